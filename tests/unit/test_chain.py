# SPDX-License-Identifier: MIT
"""From a name to a chain: names, loops, what is refused, whose word on a format counts."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

import mmcow
from mmcow import ChainError, DeniedError, FormatError, LockedError, MmcowError, UsageError
from mmcow import chain as chain_module
from mmcow.chain import describe_chain
from mmcow.formats.opening import resolve

SIZE = 65536


def overlay(path: Path, backing: str, backing_format: str = "raw", **options) -> Path:
    """An image over a base that need not be there."""
    made = {"format": "add-cow", "size": SIZE, "check_backing": False} | options
    mmcow.create(path, backing=backing, backing_format=backing_format, **made)
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"base" * (SIZE // 4))
    return path


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = descriptors()
    yield
    assert descriptors() == before


# ---- names ----------------------------------------------------------------------------------


def test_relative_names_start_at_the_image_that_holds_them(tmp_path, base, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    overlay(tmp_path / "a" / "middle", "../base.raw")
    top = overlay(tmp_path / "a" / "b" / "top", "../middle", "add-cow")
    monkeypatch.chdir("/")
    with mmcow.open(top) as disk:
        assert disk.read(0, 4) == b"base"
        assert [layer.format for layer in disk.chain] == ["add-cow", "add-cow", "raw"]
        assert describe_chain(disk.layers).count("->") == 2
    monkeypatch.chdir(tmp_path / "a")
    with mmcow.open("middle") as disk:
        assert disk.read(0, 4) == b"base"


def test_relative_names_through_a_symbolic_link_start_beside_the_image(tmp_path, base):
    """This test opens an image by a link in another directory, where a data file of that name lies
    too: QEMU would look beside the link, and pair the bitmap with another disk's data."""
    overlay(tmp_path / "top", "base.raw")
    other = tmp_path / "other"
    other.mkdir()
    (other / "link").symlink_to(tmp_path / "top")
    (other / "top.raw").write_bytes(b"another disk")
    (other / "base.raw").write_bytes(b"another base")
    with mmcow.open(other / "link", write=True) as image:
        assert image.read(0, 512) == base.read_bytes()[:512]
        image.write(0, b"mine")
    with mmcow.open(tmp_path / "top") as image:
        assert image.read(0, 4) == b"mine"
    assert (other / "top.raw").read_bytes() == b"another disk"


def test_names_of_any_bytes_work(tmp_path):
    name = os.fsdecode(b"b\xff\xc3\xa4 \n'.raw")
    (tmp_path / name).write_bytes(b"odd!" * 1000)
    top = overlay(tmp_path / "top", name)
    with mmcow.open(top) as disk:
        assert disk.read(0, 4) == b"odd!"


@pytest.mark.parametrize(
    "name",
    ["nbd:localhost:10809", "json:{}", "file:base.raw", "http://x/y", "fat:/etc", "ssh+x.y-z:a"],
)
def test_protocol_names_are_refused(tmp_path, name):
    with pytest.raises(DeniedError, match="protocol"):
        resolve(str(tmp_path / "top"), "backing file", name)
    top = overlay(tmp_path / "top", "x" * len(name))
    data = top.read_bytes().replace(b"x" * len(name), name.encode())
    top.write_bytes(data)
    with pytest.raises(DeniedError, match="protocol"):
        mmcow.open(top)


@pytest.mark.parametrize("name", ["./a:b", "/a:b", "a/b:c", "1:2", "../x:y", ":x"])
def test_names_with_a_colon_that_are_no_protocol_are_names(tmp_path, name):
    assert resolve("/dir/top", "backing file", name) == os.path.join("/dir", name)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ChainError):
        resolve("/dir/top", "backing file", name)


# ---- loops ----------------------------------------------------------------------------------

WRITE = pytest.mark.parametrize("write", [False, True], ids=["reading", "writing"])


@WRITE
def test_image_that_is_its_own_base_is_a_loop(tmp_path, write):
    top = overlay(tmp_path / "top", "x-top", "add-cow")
    top.write_bytes(top.read_bytes().replace(b"x-top", b"./top"))
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(top, write=write)


@WRITE
@pytest.mark.parametrize("way", ["hard link", "symbolic link"])
def test_image_that_is_its_own_base_by_another_name_is_a_loop(tmp_path, write, way):
    top = overlay(tmp_path / "top", "other", "add-cow")
    if way == "hard link":
        os.link(top, tmp_path / "other")
    else:
        (tmp_path / "other").symlink_to("top")
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(top, write=write)


@WRITE
@pytest.mark.parametrize("format_", ["add-cow", "cow"])
def test_cycle_of_two_is_a_loop(tmp_path, write, format_):
    overlay(tmp_path / "one", "two", format_, format=format_)
    overlay(tmp_path / "two", "one", format_, format=format_)
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(tmp_path / "one", write=write, backing_format=format_)


@WRITE
def test_cycle_below_the_top_is_a_loop(tmp_path, write):
    overlay(tmp_path / "one", "two", "add-cow")
    overlay(tmp_path / "two", "one", "add-cow")
    top = overlay(tmp_path / "top", "one", "add-cow")
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(top, write=write)


@WRITE
def test_data_file_that_is_the_base_is_a_loop(tmp_path, write):
    top = overlay(tmp_path / "top", "data", options={"image_file": "elsewhere"})
    os.link(tmp_path / "elsewhere", tmp_path / "data")
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(top, write=write)


@WRITE
def test_two_layers_with_one_data_file_are_a_loop(tmp_path, base, write):
    middle = overlay(tmp_path / "middle", "base.raw", options={"image_file": "shared"})
    top = overlay(tmp_path / "top", "middle", "add-cow", options={"image_file": "shared2"})
    (tmp_path / "shared2").unlink()
    os.link(tmp_path / "shared", tmp_path / "shared2")
    assert middle.exists()
    with pytest.raises(ChainError, match="loop"):
        mmcow.open(top, write=write)


def test_base_somebody_else_writes_is_locked_and_no_loop(tmp_path, base):
    top = overlay(tmp_path / "top", "base.raw")
    with mmcow.open(base, format="raw", write=True), pytest.raises(LockedError):
        mmcow.open(top, write=True)


def test_chain_deeper_than_the_bound_is_refused(tmp_path, base, monkeypatch):
    monkeypatch.setattr(chain_module, "DEPTH_MOST", 5)
    below, format_ = "base.raw", "raw"
    for depth in range(5):
        overlay(tmp_path / f"layer{depth}", below, format_)
        below, format_ = f"layer{depth}", "add-cow"
    with mmcow.open(tmp_path / "layer3") as disk:
        assert len(disk.layers) == 5
    with pytest.raises(ChainError, match="deeper than 5"):
        mmcow.open(tmp_path / "layer4")


def test_chain_of_sixty_works(tmp_path, base):
    below, format_ = "base.raw", "raw"
    for depth in range(60):
        overlay(tmp_path / f"layer{depth}", below, format_)
        below, format_ = f"layer{depth}", "add-cow"
    with mmcow.open(tmp_path / below, write=True) as disk:
        assert disk.read(0, SIZE) == base.read_bytes()
        disk.write(100, b"top")
        assert disk.read(98, 7) == b"setopeb"


# ---- what is no disk ------------------------------------------------------------------------


def strange(tmp_path: Path) -> dict[str, str]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    unix.close()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    return {
        "a fifo": "fifo",
        "a directory": "folder",
        "a socket": "socket",
        "a character device": "/dev/zero",
        "a terminal": "/dev/tty",
        "a dangling link": "dangling",
        "a link to itself": "round",
        "nothing": "missing",
        "a name that is too long": "n" * 300,
        "below a file": "base.raw/x",
    }


def test_what_is_no_disk_is_refused_without_hanging(tmp_path, base):
    for number, (what, name) in enumerate(strange(tmp_path).items()):
        began = time.monotonic()
        with pytest.raises(MmcowError):
            mmcow.open(tmp_path / name)
        with pytest.raises(MmcowError):
            mmcow.open(tmp_path / name, format="raw", write=True)
        for format_ in ("raw", "add-cow"):
            stand_in = ("b/" * 200)[: len(name) - 1] + "b"
            top = overlay(tmp_path / f"top{number}{format_}", stand_in, format_)
            top.write_bytes(top.read_bytes().replace(stand_in.encode(), name.encode()))
            with pytest.raises(ChainError) as caught:
                mmcow.open(top)
            assert caught.value.name == name, what
            assert str(top) in str(caught.value)
        assert time.monotonic() - began < 2, what


def test_data_file_that_is_no_disk_is_refused(tmp_path, base):
    for number, name in enumerate(strange(tmp_path).values()):
        if len(name) > 200:
            continue
        stand_in = "d" * len(name)
        top = overlay(tmp_path / f"t{number}", "base.raw", options={"image_file": stand_in})
        (tmp_path / stand_in).unlink()
        top.write_bytes(top.read_bytes().replace(stand_in.encode(), name.encode()))
        with pytest.raises(ChainError):
            mmcow.open(top, write=True)


def test_data_file_that_is_the_image_itself_is_refused(tmp_path, base):
    top = overlay(tmp_path / "top", "base.raw", options={"image_file": "data1"})
    os.unlink(tmp_path / "data1")
    os.link(top, tmp_path / "data1")
    for write in (False, True):
        with pytest.raises(ChainError, match="itself"):
            mmcow.open(top, write=write)


def test_missing_base_names_both_files(tmp_path):
    top = overlay(tmp_path / "top", "gone.raw")
    with pytest.raises(ChainError) as caught:
        mmcow.open(top)
    error = caught.value
    assert (error.path, error.role, error.name) == (str(top), "backing file", "gone.raw")
    assert "No such file" in str(error)
    with mmcow.open(top, backing=False) as disk:
        assert disk.size == SIZE


# ---- policy ---------------------------------------------------------------------------------


def test_deny_all_allows_no_other_file(tmp_path, base):
    top = overlay(tmp_path / "top", "base.raw")
    with pytest.raises(DeniedError, match="policy"):
        mmcow.open(top, policy=mmcow.DenyAll())
    with mmcow.open(base, format="raw", policy=mmcow.DenyAll()) as disk:
        assert disk.read(0, 4) == b"base"


def test_within_allows_what_lies_below_its_directories(tmp_path, base):
    top = overlay(tmp_path / "top", "base.raw")
    mmcow.open(top, policy=mmcow.Within(str(tmp_path))).close()
    mmcow.open(top, policy=mmcow.Within("/nowhere", str(tmp_path))).close()
    with pytest.raises(DeniedError):
        mmcow.open(top, policy=mmcow.Within(str(tmp_path / "sub")))
    with pytest.raises(DeniedError):
        mmcow.open(top, policy=mmcow.Within())


@pytest.mark.parametrize("way", ["dots", "link", "linked directory", "absolute", "prefix"])
def test_within_is_not_escaped(tmp_path, way):
    """This test leaves the allowed directory by every way a name can go."""
    jail, outside = tmp_path / "jail", tmp_path / "jail-not"
    jail.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 1000)
    (jail / "link").symlink_to(outside / "secret")
    (jail / "directory").symlink_to(outside)
    name = {
        "dots": "../jail-not/secret",
        "link": "link",
        "linked directory": "directory/secret",
        "absolute": str(outside / "secret"),
        "prefix": "../jail-not/../jail-not/secret",
    }[way]
    top = overlay(jail / "top", name)
    mmcow.open(top).close()
    with pytest.raises(DeniedError):
        mmcow.open(top, policy=mmcow.Within(str(jail)))


def test_policy_is_asked_about_every_file_with_both_names(tmp_path, base):
    asked = []

    class Recorder:
        def check(self, path, role, name, resolved):
            asked.append((os.path.basename(path), role, name, os.path.basename(resolved)))

    overlay(tmp_path / "middle", "base.raw")
    top = overlay(tmp_path / "top", "middle", "add-cow")
    mmcow.open(top, policy=Recorder()).close()
    assert asked == [
        ("top", "data file", "top.raw", "top.raw"),
        ("top", "backing file", "middle", "middle"),
        ("middle", "data file", "middle.raw", "middle.raw"),
        ("middle", "backing file", "base.raw", "base.raw"),
    ]


# ---- formats --------------------------------------------------------------------------------

KNOWN = [b"ACOW", b"ADD_COW\xff", b"OOOM", b"MOOO", b"QFI\xfb", b"vhdxfile", b"KDMV", b"QED\0",
         b"conectix", b"LUKS\xba\xbe", b"WithoutFreeSpace", b"COWD", b"# Disk DescriptorFile",
         b"Bochs Virtual HD Image", b"\0" * 64 + b"\x7f\x10\xda\xbe"]  # fmt: skip


@pytest.mark.parametrize("magic", KNOWN, ids=repr)
@pytest.mark.parametrize("length", [0, 1, 600, 20_000], ids=lambda n: f"and-{n}-bytes")
def test_known_magic_is_that_format_or_an_error_and_never_raw(tmp_path, magic, length):
    path = tmp_path / "x"
    path.write_bytes(magic + b"\xff" * length)
    for write in (False, True):
        with pytest.raises((FormatError, UsageError)):
            mmcow.open(path, write=write)
    with mmcow.open(path, format="raw") as disk:
        assert disk.read(0, min(len(magic), disk.size)) == magic[: disk.size]


@pytest.mark.parametrize("content", [b"", b"A", b"ACO", b"acow", b"QED", b"\0ACOW", b"raw" * 999])
def test_any_other_content_is_raw(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with mmcow.open(path) as disk:
        assert disk.format == "raw"
        assert disk.read(0, disk.size).rstrip(b"\0") == content.rstrip(b"\0")


@pytest.mark.parametrize("format_", ["cow", "add-cow"])
def test_unrecorded_base_format_is_raw_or_has_to_be_said(tmp_path, base, format_):
    """This test lays images that cannot record a format (cow, v7) over raw and over add-cow."""
    options = {"compat": "v7"} if format_ == "add-cow" else {}
    over_raw = overlay(tmp_path / "r", "base.raw", format=format_, options=options)
    with mmcow.open(over_raw) as disk:
        assert disk.read(0, 4) == b"base"
    overlay(tmp_path / "middle", "base.raw")
    top = overlay(tmp_path / "t", "middle", "add-cow", format=format_, options=options)
    with pytest.raises(ChainError, match=r"-F add-cow.*-F raw"):
        mmcow.open(top)
    with mmcow.open(top, backing_format="add-cow") as disk:
        assert disk.read(0, 4) == b"base"
    with mmcow.open(top, backing_format="raw") as disk:
        assert disk.read(0, 4) == b"ACOW"


def test_recorded_base_format_holds_against_content_and_argument(tmp_path, base):
    overlay(tmp_path / "middle", "base.raw")
    top = overlay(tmp_path / "top", "middle", "raw")
    for said in (None, "add-cow"):
        with mmcow.open(top, backing_format=said) as disk:
            assert disk.read(0, 4) == b"ACOW"
    wrong = overlay(tmp_path / "wrong", "base.raw", "add-cow")
    with pytest.raises(FormatError, match="magic"):
        mmcow.open(wrong)


def test_base_of_a_format_nobody_has_is_an_error(tmp_path, base):
    top = overlay(tmp_path / "top", "base.raw")
    top.write_bytes(top.read_bytes().replace(b"raw\0" + bytes(12), b"qcow2".ljust(16, b"\0"), 1))
    with pytest.raises(ChainError, match="qcow2"):
        mmcow.open(top)


def test_base_of_another_length_than_the_top(tmp_path):
    for length in (0, 1, 511, 512, 1000, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE):
        (tmp_path / "b").write_bytes(b"\x01" * length)
        top = overlay(tmp_path / f"top{length}", "b")
        with mmcow.open(top) as disk:
            assert disk.read(0, SIZE) == (b"\x01" * length).ljust(SIZE, b"\0")[:SIZE]


def test_each_layer_has_its_own_cache_mode(tmp_path, base):
    overlay(tmp_path / "middle", "base.raw")
    overlay(tmp_path / "top", "middle", backing_format="add-cow")

    def modes(**options):
        with mmcow.open(tmp_path / "top", **options) as image:
            return [layer.cache for layer in image.chain]

    assert modes(cache="writeback") == ["writeback"] * 3
    assert modes(cache="none", base_cache="writeback") == ["none", "writeback", "writeback"]
    chosen = ["writethrough", "unsafe"]
    assert modes(cache="none", base_cache=chosen) == ["none", "writethrough", "unsafe"]
    with pytest.raises(mmcow.UsageError, match="empty"):
        modes(base_cache=[])
    with pytest.raises(mmcow.UsageError, match="bogus"):
        modes(base_cache=["none", "bogus"])
