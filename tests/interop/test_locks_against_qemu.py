# SPDX-License-Identifier: MIT
"""Who excludes whom: mmcow against qemu-io, qemu-img and itself, every pair of roles.

Three files are fought over: a raw disk, an add-cow's data file and the add-cow file itself (QEMU
knows the latter two as raw files only). The tables say what is expected, nothing is derived.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import mmcow
from tests.interop.tools import QemuIo, lock_bytes, requires, run, sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.interop

SIZE = 1 << 20

# The file fought over, and each role's way to open it (in the folder made by ``disks``).
FILES = {"raw": "x.raw", "data": "a.raw", "image": "a.acow"}
OVERLAY: dict[str, Callable[[], mmcow.Image]] = {
    "rw": lambda: mmcow.open("a.acow", write=True),
    "ro": lambda: mmcow.open("a.acow"),
    "base": lambda: mmcow.open("t.acow", write=True),
    "-U": lambda: mmcow.open("a.acow", share=True),
}
MMCOW: dict[str, dict[str, Callable[[], mmcow.Image]]] = {
    "raw": {
        "rw": lambda: mmcow.open("x.raw", format="raw", write=True),
        "ro": lambda: mmcow.open("x.raw", format="raw"),
        "base": lambda: mmcow.open("a.acow", write=True),
        "-U": lambda: mmcow.open("x.raw", format="raw", share=True),
    },
    "data": OVERLAY,
    "image": OVERLAY,
}

SECOND_OVERLAY = {
    "raw": lambda: mmcow.open("x2.acow", write=True),
    "image": lambda: mmcow.open("t2.acow", write=True),
}

# What each role of mmcow holds, bytes 100+use and 200+deny.
BYTES = {
    ("raw", "rw"): {100, 101, 201},
    ("raw", "ro"): {100, 201},
    ("raw", "base"): {100, 201, 203},
    ("raw", "-U"): {100},
    **{(file, "rw"): {100, 101, 103, 201, 203} for file in ("data", "image")},
    **{(file, "ro"): {100, 201} for file in ("data", "image")},
    **{(file, "base"): {100, 201, 203} for file in ("data", "image")},
    **{(file, "-U"): {100} for file in ("data", "image")},
}

# Who is refused while mmcow has the file (rows). The same for all three files: QEMU's raw
# driver, unlike its other formats, lets others write.
#   x  excluded        .  both go on
REFUSED_BY_MMCOW = """
           rw  ro  base  -U
io-rw      x   x   x     .
io-ro      .   .   .     .
io-U       .   .   .     .
io-base    .   .   .     .
info       .   .   .     .
info-U     .   .   .     .
map        .   .   .     .
compare    .   .   .     .
convert    x   .   .     .
convert-U  .   .   .     .
write-to   x   x   x     .
resize     x   x   x     .
create     x   x   x     .
"""

# Who of mmcow is refused while qemu-io has the file open.
REFUSED_BY_QEMU = """
           rw  ro  base  -U
io-rw      x   x   x     .
io-ro      .   .   .     .
io-U       .   .   .     .
io-base    .   .   .     .
"""

# mmcow against mmcow: first the holder, then who comes.
REFUSED_RAW = """
           rw  ro  base  -U
rw         x   x   x     .
ro         x   .   .     .
base       x   .   .     .
-U         .   .   .     .
"""
REFUSED_ADDCOW = REFUSED_RAW

QEMU_IO = {
    "io-rw": ((), "raw"),
    "io-ro": (("-r",), "raw"),
    "io-U": (("-r", "-U"), "raw"),
    "io-base": ((), "qcow2"),
}
QEMU_IMG = {
    "info": ("info", "-f", "raw", "FILE"),
    "info-U": ("info", "-U", "-f", "raw", "FILE"),
    "map": ("map", "-f", "raw", "FILE"),
    "compare": ("compare", "-f", "raw", "-F", "raw", "FILE", "FILE"),
    "convert": ("convert", "-f", "raw", "-O", "raw", "FILE", "out.raw"),
    "convert-U": ("convert", "-U", "-f", "raw", "-O", "raw", "FILE", "out.raw"),
    "write-to": ("convert", "-n", "-f", "raw", "-O", "raw", "zero.raw", "FILE"),
    "resize": ("resize", "-f", "raw", "FILE", "+1M"),
    "create": ("create", "-f", "raw", "FILE", str(SIZE)),
}


def table(text: str) -> dict[tuple[str, str], bool]:
    """(row, column) -> whether it is excluded."""
    head, *rows = (line.split() for line in text.strip().splitlines())
    return {
        (row[0], column): cell == "x"
        for row in rows
        for column, cell in zip(head, row[1:], strict=True)
    }


BY_MMCOW = table(REFUSED_BY_MMCOW)
BY_QEMU = table(REFUSED_BY_QEMU)


@pytest.fixture
def disks(tmp_path, monkeypatch):
    """t.acow over a.acow over x.raw, and for QEMU a qcow2 overlay over each of the files."""
    requires("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.raw").write_bytes(os.urandom(SIZE))
    mmcow.create("a.acow", backing="x.raw", backing_format="raw", options={"image_file": "a.raw"})
    mmcow.create("x2.acow", backing="x.raw", backing_format="raw")
    mmcow.create("t.acow", backing="a.acow", backing_format="add-cow")
    mmcow.create("t2.acow", backing="a.acow", backing_format="add-cow")
    with mmcow.open("a.acow", write=True) as image:
        image.write(0, os.urandom(SIZE))
    run("qemu-img", "create", "-q", "-f", "raw", "zero.raw", str(128 << 10))
    for name in FILES.values():
        run(
            "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw",
            f"{name}.qcow2", str(SIZE),
        )  # fmt: skip
    return tmp_path


def hold(role: str, file: str) -> QemuIo:
    options, fmt = QEMU_IO[role]
    return QemuIo(file if fmt == "raw" else f"{file}.qcow2", *options, fmt=fmt)


@pytest.mark.parametrize("mine", ["rw", "ro", "base", "-U"])
@pytest.mark.parametrize("which", FILES)
def test_mmcow_first_then_qemu(disks, which, mine):
    file = FILES[which]
    before = {name: sha256(name) for name in FILES.values()}
    with MMCOW[which][mine]():
        assert lock_bytes(os.getpid(), file) == BYTES[which, mine]
        wrong = []
        for theirs in [*QEMU_IO, *QEMU_IMG]:
            if mine == "-U" and theirs in ("write-to", "resize", "create"):
                continue  # allowed, and would change the file: the next test
            if theirs in QEMU_IO:
                options, fmt = QEMU_IO[theirs]
                name = file if fmt == "raw" else f"{file}.qcow2"
                ended = run("qemu-io", *options, "-f", fmt, "-c", "quit", name, ok=())
            else:
                words = [file if word == "FILE" else word for word in QEMU_IMG[theirs]]
                ended = run("qemu-img", *words, ok=())
            refused = "lock" in ended.stdout + ended.stderr
            if refused:
                assert "Is another process using the image" in ended.stdout + ended.stderr
            if refused != BY_MMCOW[theirs, mine] or (ended.returncode != 0) != refused:
                wrong.append((theirs, refused, ended.stderr))
        assert not wrong
    assert {name: sha256(name) for name in FILES.values()} == before


@pytest.mark.parametrize("theirs", ["write-to", "resize", "create"])
@pytest.mark.parametrize("which", ["raw", "data"])
def test_a_shared_reader_does_not_keep_qemu_from_changing(disks, which, theirs):
    file = FILES[which]
    assert not BY_MMCOW[theirs, "-U"]
    with MMCOW[which]["-U"]():
        run("qemu-img", *[file if word == "FILE" else word for word in QEMU_IMG[theirs]])


@pytest.mark.parametrize("theirs", QEMU_IO)
@pytest.mark.parametrize("which", FILES)
def test_qemu_first_then_mmcow(disks, which, theirs):
    file = FILES[which]
    with hold(theirs, file) as qemu:
        for mine, opening in MMCOW[which].items():
            if not BY_QEMU[theirs, mine]:
                opening().close()
                continue
            with pytest.raises(mmcow.LockedError) as caught:
                opening()
            assert caught.value.holders == (f"qemu-io, pid {qemu.pid}",)
            assert os.path.basename(caught.value.path) == file
            assert f"held by qemu-io, pid {qemu.pid}" in str(caught.value)
        assert lock_bytes(os.getpid(), file) == set(), "a refused opening left locks"
    for opening in MMCOW[which].values():  # the locks went with the process
        opening().close()


@pytest.mark.parametrize("theirs", ["io-rw", "io-ro"])
@pytest.mark.parametrize("which", FILES)
def test_a_killed_qemu_leaves_no_lock(disks, which, theirs):
    qemu = hold(theirs, FILES[which])
    os.kill(qemu.pid, 9)
    qemu.close()
    MMCOW[which]["rw"]().close()


@pytest.mark.parametrize(("which", "text"), [("raw", REFUSED_RAW), ("image", REFUSED_ADDCOW)])
def test_mmcow_against_mmcow(disks, which, text):
    expected = table(text)
    found = {}
    for first, open_first in MMCOW[which].items():
        for second, open_second in MMCOW[which].items():
            with ExitStack() as stack:
                stack.enter_context(open_first())
                # As a second base: through another overlay over the same file.
                opening = SECOND_OVERLAY[which] if second == "base" else open_second
                try:
                    stack.enter_context(opening())
                    holders = ()
                except mmcow.LockedError as error:
                    holders = error.holders
                found[first, second] = bool(holders)
                assert all(holder.endswith(f"pid {os.getpid()}") for holder in holders)
    assert found == expected


@pytest.mark.parametrize("name", ["a.acow", "a.raw", "x.raw"])
def test_create_replaces_nothing_that_qemu_has_open(disks, name):
    before = sha256(name)
    format_ = "raw" if name.endswith(".raw") else "add-cow"
    with hold("io-rw", name) as qemu, pytest.raises(mmcow.LockedError) as caught:
        mmcow.create(name, format=format_, size=SIZE)
    assert f"pid {qemu.pid}" in str(caught.value)
    assert sha256(name) == before
    assert not [entry for entry in os.listdir() if entry.endswith("mmcow-new")]


def test_adopting_a_data_file_that_qemu_writes_is_refused(disks):
    with hold("io-rw", "x.raw"), pytest.raises(mmcow.LockedError):
        mmcow.create("new.acow", options={"image_file": "x.raw"})
    assert not os.path.exists("new.acow")


def test_a_base_that_qemu_writes_cannot_get_an_overlay(disks):
    with hold("io-rw", "x.raw"), pytest.raises(mmcow.LockedError):
        mmcow.create("new.acow", backing="x.raw", backing_format="raw")
    assert not os.path.exists("new.acow")
    assert not os.path.exists("new.acow.raw")


def test_resize_under_a_qemu_reader_is_seen_by_it(disks):
    """A raw reader of QEMU denies nothing, so a writer may come and go under it."""
    with hold("io-ro", "x.raw") as qemu, mmcow.open("x.raw", format="raw", write=True) as image:
        image.write(4096, b"\xa5" * 4096)
        image.flush()
        assert "verification failed" not in qemu.do("read -P 0xa5 4096 4096")


def test_shared_reading_of_a_disk_that_qemu_writes(disks):
    with hold("io-rw", "x.raw") as qemu:
        qemu.do("write -P 0x77 64k 64k")
        with mmcow.open("x.raw", format="raw", share=True, cache="writeback") as image:
            assert image.read(64 << 10, 64 << 10) == b"\x77" * (64 << 10)


def test_the_data_file_of_a_qcow2_in_use_is_excluded(disks: Path):
    """qcow2 with an external data file: it uses write and resize there and denies resize."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=q.data", "q.qcow2", str(SIZE))
    with QemuIo("q.qcow2", fmt="qcow2") as qemu:
        assert lock_bytes(qemu.pid, "q.data") == {100, 101, 103, 203}
        for write in (True, False):
            with pytest.raises(mmcow.LockedError, match=f"pid {qemu.pid}"):
                mmcow.open("q.data", format="raw", write=write)
        mmcow.open("q.data", format="raw", share=True).close()
