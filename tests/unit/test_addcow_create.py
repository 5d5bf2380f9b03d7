# SPDX-License-Identifier: MIT
"""Making and renaming add-cow images: two files, in order, and what is refused."""

from __future__ import annotations

import errno
import os

import pytest

from mmcow.errors import ChainError, LockedError, StorageError, UnsupportedError, UsageError
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.unit.addcow_support import KIB, MIB, Rig, kinds, v20

VARIANTS = ("v20", "v10", "v7")


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def top(tmp_path):
    return str(tmp_path / "disk.add-cow")


@pytest.fixture
def data(tmp_path):
    return tmp_path / "disk.add-cow.raw"


def content(path):
    with open(path, "rb") as file:
        return file.read()


# ---- the two files ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_create_over_a_base_has_no_bit(rig, tmp_path, top, data, variant):
    (tmp_path / "base").write_bytes(b"B" * 100_000)
    assert rig.create(top, backing="base", backing_size=100_352, compat=variant) == 100_352
    assert os.path.getsize(data) == 100_352
    assert os.stat(data).st_blocks == 0
    driver = rig.open(top)
    assert driver.info.variant == variant
    assert kinds(driver) == [(0, 100_352, "BELOW")]
    assert driver.backing == ("base", None if variant == "v7" else "raw")
    assert not driver.describe()["all-allocated"]
    assert set(content(top)[driver.inner._bitmap :]) <= {0}
    assert sorted(os.listdir(tmp_path)) == ["base", "disk.add-cow", "disk.add-cow.raw"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_create_without_a_base_is_all_ones(rig, top, variant):
    """This test covers driver defect 9: ones below the flag, tail bits zero."""
    size = 11 * 64 * KIB - 512
    assert rig.create(top, size, compat=variant) == size
    driver = rig.open(top)
    assert driver.describe()["all-allocated"] == (variant == "v20")
    assert driver.describe()["bitmap-complete"]
    assert kinds(driver) == [(0, size, "DATA")]
    clusters = -(-size // driver.info.cluster_size)
    bitmap = content(top)[driver.inner._bitmap :]
    assert int.from_bytes(bitmap, "little") == (1 << clusters) - 1


def test_create_records_the_default_name_relative(rig, top):
    rig.create(top, MIB)
    assert rig.inspect(top).data_file == "disk.add-cow.raw"


def test_create_default_name_never_looks_like_a_protocol(rig, tmp_path):
    path = str(tmp_path / "a:b")
    rig.create(path, MIB)
    assert rig.inspect(path).data_file == "./a:b.raw"
    rig.open(path)


def test_create_resolves_image_file_against_the_image_directory(rig, tmp_path, top, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir("/")
    rig.create(top, MIB, image_file="sub/d.raw")
    assert os.path.getsize(tmp_path / "sub" / "d.raw") == MIB
    assert rig.open(top).data.path == str(tmp_path / "sub/d.raw")


@pytest.mark.parametrize(
    ("text", "size"), [("4k", 4096), ("64K", 65536), ("2M", 2 << 20), ("8192", 8192)]
)
def test_create_cluster_size(rig, top, text, size):
    rig.create(top, 4 * MIB, cluster_size=text)
    assert rig.open(top).info.cluster_size == size
    assert os.path.getsize(top) == max(4096, size) + size


@pytest.mark.parametrize("text", ["0", "2k", "4M", "5000", "64kb", "-4k", "", "1G", "9" * 30])
def test_create_refuses_a_cluster_size(rig, top, text):
    with pytest.raises(UsageError, match="power of two from 4k to 2M"):
        rig.create(top, MIB, cluster_size=text)
    assert not os.path.exists(top)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"compat": "v18"}, UsageError),
        ({"compat": "v7", "cluster_size": "4k"}, UsageError),
        ({"image_format": "qcow2"}, UnsupportedError),
        ({"image_file": "nbd:x"}, ChainError),
        ({"image_file": "a\0b"}, UsageError),
        ({"image_file": "disk.add-cow"}, UsageError),
        ({"image_file": "./disk.add-cow"}, UsageError),
        ({"image_file": "x" * 70_000}, UsageError),
        ({"image_file": "missing/d.raw"}, StorageError),
    ],
)
def test_create_refuses_and_makes_nothing(rig, tmp_path, top, options, error):
    with pytest.raises(error):
        rig.create(top, MIB, **options)
    assert os.listdir(tmp_path) == []


def test_create_needs_a_size(rig, tmp_path, top):
    with pytest.raises(UsageError, match="a size must be given"):
        rig.create(top)
    assert os.listdir(tmp_path) == []


def test_create_needs_the_format_of_the_base(rig, tmp_path, top):
    with pytest.raises(UsageError, match="format of backing file"):
        rig.create(top, MIB, backing="base", backing_format=None)
    assert os.listdir(tmp_path) == []


def test_create_rounds_the_size_up(rig, top, data):
    assert rig.create(top, 1000) == 1024
    assert os.path.getsize(data) == 1024


def test_create_size_zero(rig, top):
    assert rig.create(top, 0) == 0
    assert os.path.getsize(top) == 4096
    assert rig.open(top).info.size == 0


# ---- adoption ----


@pytest.mark.parametrize("length", [100_000, 100_352])
def test_create_adopts_an_existing_data_file_as_it_is(rig, top, data, length):
    """This test covers driver defect 8: the base's size never cuts a data file."""
    data.write_bytes(b"d" * length)
    assert rig.create(top, backing_size=4096) == 100_352
    assert content(data) == b"d" * length
    assert kinds(rig.open(top)) == [(0, 100_352, "DATA")]


def test_create_adopts_under_a_base_without_showing_content(rig, tmp_path, top, data):
    data.write_bytes(b"d" * 65536)
    rig.create(top, backing="base", backing_size=4096)
    assert kinds(rig.open(top)) == [(0, 65536, "BELOW")]


def test_create_refuses_another_size_than_the_data_file_has(rig, tmp_path, top, data):
    data.write_bytes(b"d" * 65536)
    with pytest.raises(UsageError, match="exists and has 65536 bytes"):
        rig.create(top, 131072)
    assert content(data) == b"d" * 65536
    assert not os.path.exists(top)


def test_create_adopts_a_block_device():
    host = SimHost()
    host.put("/sim/lv", b"d" * 65536, kind="block")
    rig = Rig(host)
    assert rig.create("/sim/top", image_file="lv") == 65536
    with pytest.raises(UsageError, match="exists and has 65536 bytes"):
        rig.create("/sim/top2", 512, image_file="lv")
    driver = rig.open("/sim/top")
    assert kinds(driver) == [(0, 65536, "DATA")]
    assert not driver.info.can_resize
    rig.close()


def test_create_takes_a_known_format_for_raw_only_when_told(rig, top, data):
    data.write_bytes(b"QFI\xfb".ljust(65536, b"\0"))
    with pytest.raises(UsageError, match="looks like qcow2"):
        rig.create(top)
    rig.create(top, image_format="raw")


def test_create_refuses_a_data_file_in_use(rig, tmp_path, top, data):
    rig.create(top, MIB)
    rig.open(top)
    with pytest.raises(LockedError):
        rig.create(str(tmp_path / "second"), image_file="disk.add-cow.raw")
    assert not (tmp_path / "second").exists()


# ---- replacement ----


def test_create_replaces_an_image_that_nobody_has_open(rig, tmp_path, top):
    rig.create(top, MIB, cluster_size="4k")
    rig.create(top, cluster_size="64k")
    assert rig.open(top).info.cluster_size == 65536
    assert sorted(os.listdir(tmp_path)) == ["disk.add-cow", "disk.add-cow.raw"]


@pytest.mark.parametrize("write", [True, False])
def test_create_refuses_to_replace_an_open_image(rig, tmp_path, top, write):
    rig.create(top, MIB)
    before = content(top)
    rig.open(top, write=write)
    with pytest.raises(LockedError):
        rig.create(top, 2 * MIB, image_file="other.raw")
    assert content(top) == before
    assert not (tmp_path / "other.raw").exists()


def test_create_never_replaces_a_device():
    host = SimHost()
    host.put("/sim/lv", bytes(65536), kind="block")
    rig = Rig(host)
    with pytest.raises(UsageError, match="must be a regular file"):
        rig.create("/sim/lv", 512)
    assert host.names("/sim") == ["lv"]
    rig.close()


# ---- the same file twice ----


@pytest.mark.parametrize("link", ["name", "hard", "symbolic"])
@pytest.mark.parametrize("pair", ["image is base", "data is base", "image is data"])
def test_create_refuses_one_file_in_two_roles(rig, tmp_path, top, link, pair):
    """This test covers driver defect 6, and what it compared by name only."""
    (tmp_path / "one").write_bytes(b"1" * 65536)
    other = "one" if link == "name" else "other"
    if link == "hard":
        os.link(tmp_path / "one", tmp_path / "other")
    if link == "symbolic":
        os.symlink("one", tmp_path / "other")
    path, names = {
        "image is base": (str(tmp_path / "one"), {"backing": other, "backing_size": 65536}),
        "data is base": (top, {"backing": "one", "image_file": other}),
        "image is data": (str(tmp_path / "one"), {"image_file": other}),
    }[pair]
    with pytest.raises(UsageError, match=r"same file|are both|is the image"):
        rig.create(path, **names)
    assert content(tmp_path / "one") == b"1" * 65536
    assert not os.path.exists(top)


# ---- failures ----


def _calls_of_create(**options):
    host = SimHost()
    host.put("/sim/base", bytes(65536))
    Rig(host).create("/sim/top", 65536, backing="base", **options)
    return host.calls


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_create_failing_anywhere_leaves_no_file_of_ours(code):
    for at in range(_calls_of_create()):
        host = SimHost(at)
        host.put("/sim/base", bytes(65536))
        host.faults = [Fault(at, getattr(errno, code), once=True)]
        with pytest.raises(StorageError):
            Rig(host).create("/sim/top", 65536, backing="base")
        assert host.names("/sim") == ["base"], host.story()


@pytest.mark.parametrize("at", range(40))
def test_create_failing_over_an_old_image_leaves_a_pair_that_opens(at):
    host = SimHost(at)
    host.put("/sim/base", b"")
    rig = Rig(host)
    rig.create("/sim/top", 65536, image_file="old.raw")
    host.faults = [Fault(at, errno.EIO, once=True)]
    size = 131072
    try:
        rig.create("/sim/top", size, image_file="new.raw")
    except StorageError:
        size = 65536
    host.faults = []
    if "top" in host.names("/sim"):  # taken back when its directory could not be synced
        assert rig.open("/sim/top").info.size == size
    else:
        assert host.names("/sim") == ["base", "old.raw"]


@pytest.mark.parametrize("at", range(12))
def test_create_failing_never_harms_an_adopted_file(at):
    host = SimHost(at)
    host.put("/sim/top.raw", b"d" * 65536)
    host.faults = [Fault(at, 5, once=False, kind=None)]
    with pytest.raises(StorageError):
        Rig(host).create("/sim/top")
    host.faults = []
    assert host.content("/sim/top.raw") == b"d" * 65536


# ---- rename ----


def make(rig, tmp_path, top, variant="v20", *, full=False, **options):
    (tmp_path / "base").write_bytes(b"B" * 131072)
    if variant == "v20":
        options.setdefault("cluster_size", "4k")
    rig.create(top, 131072, backing="base", compat=variant, **options)
    if full:
        driver = rig.open(top)
        rig.fill(driver, 0, b"x" * 131072)
        rig.flush(driver)
        driver.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rename_backing(rig, tmp_path, top, variant):
    make(rig, tmp_path, top, variant)
    rig.rename(top, backing=("no/such/file", "qcow2"))
    found = rig.inspect(top)
    assert (found.backing, found.backing_format) == (
        "no/such/file", "qcow2" if variant == "v20" else None,
    )  # fmt: skip
    assert found.data_file == "disk.add-cow.raw"
    rig.rename(top, backing=("base", "raw"))
    driver = rig.open(top)
    assert driver.backing == ("base", None if variant == "v7" else "raw")
    assert rig.run(driver.check("")).findings == []


def test_rename_keeps_the_recorded_format_when_none_is_given(rig, tmp_path, top):
    make(rig, tmp_path, top)
    rig.rename(top, backing=("elsewhere", None))
    assert rig.inspect(top).backing_format == "raw"


@pytest.mark.parametrize("variant", VARIANTS)
def test_rename_data_file(rig, tmp_path, top, data, variant):
    make(rig, tmp_path, top, variant)
    data.rename(tmp_path / "moved.raw")
    rig.rename(top, data_file=("moved.raw", None))
    driver = rig.open(top)
    assert driver.data.path == str(tmp_path / "moved.raw")
    assert driver.info.has_backing


@pytest.mark.parametrize("variant", VARIANTS)
def test_rename_removes_the_base_only_when_every_bit_is_set(rig, tmp_path, top, variant):
    make(rig, tmp_path, top, variant)
    before = content(top)
    with pytest.raises(UsageError, match="not every cluster"):
        rig.rename(top, backing=("", None))
    assert content(top) == before
    driver = rig.open(top)
    rig.fill(driver, 0, b"x" * 131072)
    rig.flush(driver)
    driver.close()
    rig.rename(top, backing=("", None))
    assert b"base" not in content(top)
    again = rig.open(top)
    assert again.backing is None
    assert again.describe()["all-allocated"] == (variant == "v20")
    assert kinds(again) == [(0, 131072, "DATA")]


def test_rename_removes_the_base_of_a_flagged_image_whatever_its_bits(rig, tmp_path, top):
    (tmp_path / "disk.raw").write_bytes(bytes(65536))
    (tmp_path / "disk.add-cow").write_bytes(v20(bits=12, compat=1, bitmap=bytes(4096)))
    rig.rename(top, backing=("", None))
    assert rig.inspect(top).backing is None


def test_rename_removing_a_base_measures_a_block_device():
    host = SimHost()
    host.put("/sim/disk.raw", bytes(65536), kind="block")
    host.put("/sim/top", v20(bits=12, bitmap=b"\xff\x7f".ljust(4096, b"\0")))
    rig = Rig(host)
    with pytest.raises(UsageError, match="not every cluster"):
        rig.rename("/sim/top", backing=("", None))
    host.put("/sim/top2", v20(bits=12, bitmap=b"\xff\xff".ljust(4096, b"\0")))
    rig.rename("/sim/top2", backing=("", None))
    assert rig.inspect("/sim/top2").backing is None
    rig.close()


def test_rename_gives_a_base_to_a_complete_image(rig, tmp_path, top):
    rig.create(top, 131072)
    rig.rename(top, backing=("base", "raw"))
    assert rig.inspect(top).details["all-allocated"] is False
    (tmp_path / "base").write_bytes(b"B")
    assert kinds(rig.open(top)) == [(0, 131072, "DATA")]


def test_rename_gives_no_base_to_a_flag_over_zeros(rig, tmp_path, top):
    (tmp_path / "disk.raw").write_bytes(bytes(65536))
    path = tmp_path / "disk.add-cow"
    path.write_bytes(v20(bits=12, backing=b"", compat=1, bitmap=bytes(4096)))
    with pytest.raises(UsageError, match="not every cluster"):
        rig.rename(top, backing=("base", "raw"))


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ({"backing": ("x" * 4020, "raw")}, UsageError, "4019"),
        ({"backing": ("x" * 4010, "raw")}, UsageError, "4020 together"),
        ({"backing": ("disk.add-cow", "raw")}, UsageError, "is the image itself"),
        ({"data_file": ("./disk.add-cow", None)}, UsageError, "is the image itself"),
        ({"data_file": ("base", None)}, UsageError, "are both"),
        ({"backing": ("nbd:x", "raw")}, ChainError, "protocol"),
        ({"data_file": ("", None)}, ChainError, "empty"),
        ({"backing": ("a\0b", "raw")}, ChainError, "NUL"),
        ({"data_file": ("d.raw", "qcow2")}, UsageError, "must be raw"),
        ({"backing": ("b", "sixteen-letters!")}, UsageError, "15 ASCII"),
    ],
)
def test_rename_refuses_and_changes_nothing(rig, tmp_path, top, names, error, text):
    make(rig, tmp_path, top)
    before = content(top)
    with pytest.raises(error, match=text):
        rig.rename(top, **names)
    assert content(top) == before


def test_rename_needs_the_image_to_itself(rig, tmp_path, top):
    make(rig, tmp_path, top)
    rig.open(top, write=False)
    with pytest.raises(LockedError):
        rig.rename(top, backing=("other", "raw"))
