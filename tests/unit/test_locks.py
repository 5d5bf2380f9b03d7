# SPDX-License-Identifier: MIT
"""Which bytes each role locks, read from the kernel, and who excludes whom."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

import mmcow
from mmcow import LockedError
from mmcow.formats.opening import Access, lock_sets
from mmcow.storage.file import Cache
from mmcow.storage.holders import lock_holders
from mmcow.storage.linux import LinuxHost

SIZE = 1 << 20

# DESIGN: image and data file opened for writing; raw opened for writing; every backing file;
# read-only top; -U.
WRITER = {100, 101, 103, 201, 203}
RAW_WRITER = {100, 101, 201}
BACKING = {100, 201, 203}
READER = {100, 201}
SHARED = {100}


@pytest.fixture
def chain(tmp_path) -> Path:
    """top (add-cow) over middle (cow) over base (raw)."""
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    mmcow.create(tmp_path / "middle", format="cow", backing="base.raw", backing_format="raw")
    mmcow.create(tmp_path / "top", backing="middle", backing_format="cow")
    return tmp_path


def held(path: Path) -> set[int]:
    """Bytes locked on ``path`` by this process, from /proc/self/fdinfo; all must be read locks."""
    inode = os.stat(path).st_ino
    found = set()
    for name in os.listdir("/proc/self/fdinfo"):
        try:
            lines = Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[0] == "lock:" and fields[6].endswith(f":{inode}"):
                assert fields[2:5] == ["OFDLCK", "ADVISORY", "READ"], line
                found |= set(range(int(fields[7]), int(fields[8]) + 1))
    return found


def test_bytes_of_a_chain_opened_for_writing(chain):
    with mmcow.open(chain / "top", write=True):
        assert held(chain / "top") == WRITER
        assert held(chain / "top.raw") == WRITER
        assert held(chain / "middle") == BACKING
        assert held(chain / "base.raw") == BACKING
    for name in ("top", "top.raw", "middle", "base.raw"):
        assert held(chain / name) == set()


def test_bytes_of_a_chain_opened_for_reading(chain):
    with mmcow.open(chain / "top"):
        assert held(chain / "top") == READER
        assert held(chain / "top.raw") == READER
        assert held(chain / "middle") == BACKING
        assert held(chain / "base.raw") == BACKING


def test_bytes_of_a_shared_chain(chain):
    with mmcow.open(chain / "top", share=True):
        for name in ("top", "top.raw", "middle", "base.raw"):
            assert held(chain / name) == SHARED


def test_bytes_of_a_cow_image_opened_for_writing(chain):
    with mmcow.open(chain / "middle", write=True):
        assert held(chain / "middle") == WRITER
        assert held(chain / "base.raw") == BACKING


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_bytes_of_a_raw_disk(chain, cache):
    raw = chain / "base.raw"
    with mmcow.open(raw, format="raw", write=True, cache=cache):
        assert held(raw) == RAW_WRITER
    with mmcow.open(raw, format="raw", cache=cache):
        assert held(raw) == READER
    with mmcow.open(raw, format="raw", share=True, cache=cache):
        assert held(raw) == SHARED


def test_locks_survive_the_buffered_second_handle_of_an_odd_file(tmp_path):
    """This test writes the odd end through a second descriptor: closing or opening one must not
    drop the locks (they belong to the open file description, not to the process)."""
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(5000))
    with mmcow.open(odd, format="raw", write=True, cache="none") as disk:
        disk.write(4990, b"x")
        assert held(odd) == RAW_WRITER
        with open(odd, "rb") as other:
            other.read()
        assert held(odd) == RAW_WRITER


# ---- who excludes whom ----------------------------------------------------------------------

MODES = {
    "writer": {"write": True},
    "reader": {},
    "shared": {"share": True},
}
# The same top twice: what two openers of it may be.
TOGETHER = {
    ("reader", "reader"),
    ("reader", "shared"), ("shared", "reader"),
    ("writer", "shared"), ("shared", "writer"),
    ("shared", "shared"),
}  # fmt: skip
PAIRS = [(first, second) for first in MODES for second in MODES]


def attempt(path: str, options: dict, format_: str | None = None) -> str:
    try:
        mmcow.open(path, format=format_, **options).close()
    except LockedError as error:
        return f"locked: {error}"
    return "opened"


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("name", ["top", "middle", "base.raw"])
def test_two_openers_in_one_process(chain, name, first, second):
    format_ = "raw" if name == "base.raw" else None
    with mmcow.open(chain / name, format=format_, **MODES[first]):
        answer = attempt(str(chain / name), MODES[second], format_)
    assert answer.startswith("opened") == ((first, second) in TOGETHER), answer


@pytest.fixture(scope="module")
def worker():
    """Another process, made once, that opens what it is told to."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        yield pool


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("name", ["top", "middle", "base.raw"])
def test_two_openers_in_two_processes(chain, worker, name, first, second):
    format_ = "raw" if name == "base.raw" else None
    with mmcow.open(chain / name, format=format_, **MODES[first]):
        answer = worker.apply(attempt, (str(chain / name), MODES[second], format_))
        if (first, second) not in TOGETHER:
            assert f"pid {os.getpid()}" in answer, "the holder is named"
            assert name in answer
    assert answer.startswith("opened") == ((first, second) in TOGETHER), answer
    assert worker.apply(attempt, (str(chain / name), MODES[second], format_)) == "opened"


def test_base_in_use_by_a_chain_is_not_written(chain, worker):
    for options in ({"write": True}, {}):
        with mmcow.open(chain / "top", **options):
            for name, format_ in (("middle", None), ("base.raw", "raw")):
                writing = worker.apply(attempt, (str(chain / name), {"write": True}, format_))
                assert writing.startswith("locked")
                assert worker.apply(attempt, (str(chain / name), {}, format_)) == "opened"


def test_chain_over_a_base_that_is_written_is_refused(chain, worker):
    with mmcow.open(chain / "base.raw", format="raw", write=True):
        for options in ({"write": True}, {}):
            answer = worker.apply(attempt, (str(chain / "top"), options))
            assert answer.startswith("locked")
            assert "base.raw" in answer
        assert worker.apply(attempt, (str(chain / "top"), {"share": True})) == "opened"


def test_two_chains_share_a_base(chain, worker):
    mmcow.create(chain / "other", backing="middle", backing_format="cow")
    with mmcow.open(chain / "top", write=True):
        assert worker.apply(attempt, (str(chain / "other"), {"write": True})) == "opened"


def test_data_file_of_an_open_image_is_locked_too(chain, worker):
    with mmcow.open(chain / "top", write=True):
        for options in ({"write": True}, {}):
            answer = worker.apply(attempt, (str(chain / "top.raw"), options, "raw"))
            assert answer.startswith("locked")


def test_failed_opening_keeps_no_byte(chain):
    with mmcow.open(chain / "base.raw", format="raw", write=True):
        with pytest.raises(LockedError):
            mmcow.open(chain / "top", write=True)
        assert held(chain / "top") == held(chain / "top.raw") == set()
        assert held(chain / "base.raw") == RAW_WRITER


def test_locked_error_keeps_its_parts(chain):
    with mmcow.open(chain / "top", write=True), pytest.raises(LockedError) as caught:
        mmcow.open(chain / "top", write=True)
    error = caught.value
    assert error.path == str(chain / "top")
    assert any(f"pid {os.getpid()}" in holder for holder in error.holders)
    assert isinstance(error, OSError)


def test_change_of_locks_is_undone_when_it_fails(chain):
    host = LinuxHost()
    path = str(chain / "base.raw")
    first = host.open(path, write=True, direct=False)
    second = host.open(path, write=True, direct=False)
    try:
        first.lock(frozenset({0}), frozenset())
        second.lock(frozenset({0}), frozenset({1}))
        with pytest.raises(LockedError):
            first.lock(frozenset({0, 1}), frozenset({3}))
        second.lock(frozenset(), frozenset())
        assert held(chain / "base.raw") == {100}
        first.lock(frozenset({0, 1}), frozenset({3}))
        assert held(chain / "base.raw") == {100, 101, 203}
        assert lock_holders(first.identity, (101,)) == [os.getpid()]
        assert lock_holders(first.identity, (102,)) == []
    finally:
        first.close()
        second.close()
    assert held(chain / "base.raw") == set()


def test_lock_sets_of_every_role():
    def both(access, *, raw):
        use, deny = lock_sets(access, raw=raw)
        return {100 + bit for bit in use} | {200 + bit for bit in deny}

    writer = Access(write=True, top=True, share=False, cache=Cache.NONE)
    assert both(writer, raw=False) == WRITER
    assert both(writer, raw=True) == RAW_WRITER
    reader = writer._replace(write=False)
    assert both(reader, raw=False) == both(reader, raw=True) == READER
    below = reader._replace(top=False)
    assert both(below, raw=False) == both(below, raw=True) == BACKING
    assert both(below._replace(share=True), raw=False) == SHARED
    assert both(reader._replace(share=True), raw=True) == SHARED
