# SPDX-License-Identifier: MIT
"""The add-cow driver over real files: lookups, bits on disk, size changes, the base, check."""

from __future__ import annotations

import json
import os
import time

import pytest

import mmcow
from mmcow.errors import (
    ChainError,
    CorruptError,
    DeniedError,
    LockedError,
    ReadOnlyError,
    UnsupportedError,
    UsageError,
)
from mmcow.formats import addcow_meta as meta
from mmcow.formats.driver import Kind
from mmcow.formats.opening import DenyAll
from mmcow.storage.file import Cache
from tests.sim.host import SimHost
from tests.unit.addcow_support import KIB, MIB, Rig, disk, kinds, v7, v10, v20

C = 4 * KIB
SIZE = 10 * C + 512  # 11 clusters, the last one partial
VARIANTS = ("v20", "v10", "v7")


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def top(tmp_path):
    return str(tmp_path / "disk.add-cow")


def put(tmp_path, header, size, bitmap=None, name="disk.add-cow", data=b"\xee"):
    """An image as a stranger may have made it; its data file is full of garbage."""
    (tmp_path / "disk.raw").write_bytes(data * size if len(data) == 1 else data)
    (tmp_path / "base.raw").write_bytes(b"B" * size)
    path = tmp_path / name
    path.write_bytes(header + (bitmap if bitmap is not None else bytes(C)))
    return str(path)


def content(path):
    with open(path, "rb") as file:
        return file.read()


def bitmap_of(driver):
    return content(driver.path)[driver.inner._bitmap :]


# ---- opening ----


@pytest.mark.parametrize(
    ("header", "bitmap", "variant", "cluster"),
    [
        (v20(bits=12), bytes(C), "v20", C),
        (v20(bits=9), bytes(512), "v18", 512),
        (v10(), bytes(1), "v10", 65536),
        (v7(), bytes(-(-SIZE // 4096)), "v7", 512),
    ],
    ids=["v20", "v18", "v10", "v7"],
)
def test_open_reads_every_variant(rig, tmp_path, header, bitmap, variant, cluster):
    driver = rig.open(put(tmp_path, header, SIZE, bitmap))
    assert driver.info.format == "add-cow"
    assert (driver.info.variant, driver.info.cluster_size) == (variant, cluster)
    assert (driver.info.size, driver.info.has_backing) == (SIZE, True)
    assert driver.backing == (
        "base.raw",
        "raw" if variant[:2] in ("v2", "v1") and variant != "v10" else None,
    )
    assert driver.allocated() == 0
    assert disk(driver, content, b"B" * SIZE) == b"B" * SIZE


def test_open_v10_knows_a_raw_base_by_its_flag(rig, tmp_path):
    assert rig.open(put(tmp_path, v10(features=3), SIZE)).backing == ("base.raw", "raw")


def test_open_rounds_an_odd_data_file_up_to_a_sector(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), 3 * C - 100))
    assert driver.info.size == 3 * C
    assert os.path.getsize(tmp_path / "disk.raw") == 3 * C - 100


def test_open_resolves_names_against_the_image_directory(rig, tmp_path, monkeypatch):
    path = put(tmp_path, v20(bits=12), SIZE)
    monkeypatch.chdir("/")
    assert rig.open(path).data.path == str(tmp_path / "disk.raw")


def test_open_bitmap_one_byte_too_short(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE, bytes(1))
    with pytest.raises(CorruptError, match="4098 are needed") as caught:
        rig.open(path)
    assert (caught.value.path, caught.value.field, caught.value.value) == (path, "length", 4097)
    rig.open(put(tmp_path, v20(bits=12), SIZE, bytes(2)))


@pytest.mark.parametrize("write", [True, False])
def test_open_tolerates_missing_padding_and_a_writer_adds_it(rig, tmp_path, write):
    path = put(tmp_path, v20(bits=12), SIZE, b"\xff\x07")
    driver = rig.open(path, write=write)
    assert driver.allocated() == 11
    assert os.path.getsize(path) == (2 * C if write else C + 2)
    findings = rig.run(driver.check("")).findings
    assert [f.kind for f in findings] == ([] if write else ["corruption"])


def test_open_missing_data_file_names_both(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE)
    (tmp_path / "disk.raw").unlink()
    with pytest.raises(ChainError, match=r"disk\.add-cow: data file 'disk\.raw'"):
        rig.open(path)
    rig.create(path, SIZE)  # and its lock is gone


def test_open_asks_the_policy(tmp_path):
    rig = Rig(policy=DenyAll())
    with pytest.raises(DeniedError):
        rig.open(put(tmp_path, v20(bits=12), SIZE))
    rig.close()


@pytest.mark.parametrize("link", ["name", "hard", "symbolic"])
@pytest.mark.parametrize("write", [True, False])
def test_open_refuses_itself_as_data_file(rig, tmp_path, link, write):
    image = b"disk.add-cow" if link == "name" else b"other"
    path = put(tmp_path, v20(bits=12, image=image), SIZE)
    if link == "hard":
        os.link(path, tmp_path / "other")
    if link == "symbolic":
        os.symlink("disk.add-cow", tmp_path / "other")
    with pytest.raises(ChainError, match="is the image file itself"):
        rig.open(path, write=write)


@pytest.mark.parametrize("image", [b"fifo", b".", b"nbd:localhost", b"json:{}"])
def test_open_refuses_other_kinds_of_data_file(rig, tmp_path, image):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ChainError):
        rig.open(put(tmp_path, v20(bits=12, image=image), SIZE))


def test_open_locks_image_and_data_file_out_of_other_writers(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE)
    second = tmp_path / "second"
    second.write_bytes(content(path))
    rig.open(path)
    for other in (path, str(second)):
        with pytest.raises(LockedError):
            Rig().open(other)
        with pytest.raises(LockedError):
            Rig().open(other, write=False)
    Rig().open(path, write=False, share=True).close()


def test_two_readers_share(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE)
    rig.open(path, write=False)
    rig.open(path, write=False)


# ---- lookups and changes ----


def test_map_follows_bits_least_significant_first(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE, b"\x0d\x04".ljust(C, b"\0")))
    assert kinds(driver) == [
        (0, C, "DATA"),
        (C, C, "BELOW"),
        (2 * C, 2 * C, "DATA"),
        (4 * C, 6 * C, "BELOW"),
        (10 * C, 512, "DATA"),
    ]
    assert kinds(driver, C - 512, 1024) == [(C - 512, 512, "DATA"), (C, 512, "BELOW")]
    assert [e.host for e in driver.map(2 * C + 512, 512)] == [2 * C + 512]
    assert driver.allocated() == 4


def test_map_ignores_bits_behind_the_last_cluster(rig, tmp_path):
    """This test covers spec: "bits past the last cluster must be ignored on read"."""
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE, b"\0\xf8".ljust(C, b"\xff")))
    assert kinds(driver) == [(0, SIZE, "BELOW")]
    assert driver.allocated() == 0
    assert rig.run(driver.check("")).findings == []


def test_map_stops_early_in_a_scattered_bitmap(rig, tmp_path):
    driver = rig.open(put(tmp_path, v7(), 512 * 800, b"\x55" * 100))
    assert len(driver.map(0, 512 * 800)) <= 64
    assert kinds(driver) == [(512 * n, 512, "BELOW" if n % 2 else "DATA") for n in range(800)]


def test_reserve_is_invisible_and_publish_sets_bits_durably_at_flush(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE))
    reservation = driver.reserve(2 * C, 2 * C)
    assert reservation.pieces == ((2 * C, 2 * C, 2 * C),)
    assert kinds(driver) == [(0, SIZE, "BELOW")]
    driver.publish(reservation)
    assert kinds(driver, 0, 5 * C)[1] == (2 * C, 2 * C, "DATA")
    assert bitmap_of(driver)[0] == 0, "before the flush nothing reaches the file"
    rig.flush(driver)
    assert bitmap_of(driver)[0] == 0x0C
    assert driver.stage() is None


def test_abandon_leaves_nothing(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE))
    driver.abandon(driver.reserve(0, C))
    assert driver.allocated() == 0
    assert driver.stage() is None


def test_unmap_shows_the_base_again(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE, b"\xff\x07".ljust(C, b"\0")))
    driver.unmap(C, 9 * C, Kind.BELOW)
    rig.flush(driver)
    assert bitmap_of(driver)[:2] == b"\x01\x04"


def test_last_partial_cluster_is_one_bit(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE))
    rig.fill(driver, 10 * C, b"x" * 512)
    rig.flush(driver)
    assert bitmap_of(driver)[:2] == b"\x00\x04"
    assert disk(driver, content, b"B" * SIZE) == b"B" * 10 * C + b"x" * 512


def test_unset_bits_never_show_the_data_file(rig, tmp_path):
    """This test covers driver defects 2 and 3: what is read where nothing lies below."""
    driver = rig.open(put(tmp_path, v20(bits=12, backing=b""), SIZE))
    assert not driver.info.has_backing
    assert driver.backing is None
    assert disk(driver, content) == bytes(SIZE)


def test_unsafe_cache_writes_without_a_barrier(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE), cache=Cache.UNSAFE)
    rig.fill(driver, 0, b"x" * C)
    rig.flush(driver)
    assert bitmap_of(driver)[0] == 1


# ---- all-allocated ----


def test_all_allocated_sets_bitmap_and_base_aside(rig, tmp_path):
    """This test covers a foreign file: the flag over a zero bitmap is valid."""
    driver = rig.open(put(tmp_path, v20(bits=12, compat=1), SIZE))
    info = driver.info
    assert (info.has_backing, info.can_allocate, info.can_unallocate) == (False, False, False)
    assert driver.backing is None
    assert driver.map(0, SIZE) == driver.map(0, SIZE)[:1]
    assert kinds(driver) == [(0, SIZE, "DATA")]
    assert driver.allocated() == 11
    assert driver.describe()["bitmap-complete"] is False
    assert rig.run(driver.check("")).findings == []


def test_check_all_writes_the_ones_below_the_flag(rig, tmp_path):
    """This test covers driver defect 9: a reader that ignores the flag must see the same disk."""
    driver = rig.open(put(tmp_path, v20(bits=12, compat=1), SIZE))
    rig.run(driver.check("leaks"))
    assert bitmap_of(driver)[:2] == b"\0\0"
    assert rig.run(driver.check("all")).findings == []
    assert bitmap_of(driver) == b"\xff\x07".ljust(C, b"\0")


# ---- resize ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_grow_over_a_longer_base_sets_bits(rig, tmp_path, top, variant):
    step = {"v20": C, "v10": 64 * KIB, "v7": 512}[variant]
    options = {"cluster_size": "4k"} if variant == "v20" else {}
    (tmp_path / "base").write_bytes(b"B" * 8 * step)
    rig.create(top, 4 * step, backing="base", compat=variant, **options)
    driver = rig.open(top)
    rig.run(driver.resize(12 * step, 8 * step))
    assert kinds(driver) == [
        (0, 4 * step, "BELOW"),
        (4 * step, 4 * step, "DATA"),
        (8 * step, 4 * step, "BELOW"),
    ]
    base = b"B" * 8 * step
    assert disk(driver, content, base) == b"B" * 4 * step + bytes(8 * step)
    assert os.path.getsize(tmp_path / "disk.add-cow.raw") == 12 * step
    assert bitmap_of(driver)[0] == 0xF0
    assert rig.run(driver.check("")).findings == []


def test_grow_needs_the_last_partial_cluster_copied_up(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE))
    with pytest.raises(AssertionError, match="copy up before growing"):
        rig.run(driver.resize(2 * SIZE // C * C, 2 * SIZE))
    rig.fill(driver, 10 * C, b"B" * 512)
    rig.flush(driver)
    rig.run(driver.resize(20 * C, 20 * C))
    assert disk(driver, content, b"B" * 20 * C) == (b"B" * SIZE).ljust(20 * C, b"\0")


def test_grow_over_a_base_that_nobody_opened_sets_every_bit(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), 2 * C))
    rig.run(driver.resize(4 * C, 0))
    assert kinds(driver) == [(0, 2 * C, "BELOW"), (2 * C, 2 * C, "DATA")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_grow_without_a_base_keeps_all_ones(rig, tmp_path, top, variant):
    rig.create(top, 64 * KIB, compat=variant)
    driver = rig.open(top)
    rig.run(driver.resize(64 * KIB * 20 + 512, 0))
    clusters = -(-driver.info.size // driver.info.cluster_size)
    ones = ((1 << clusters) - 1).to_bytes(-(-clusters // 8), "little")
    assert bitmap_of(driver).rstrip(b"\0") == ones
    assert os.path.getsize(top) == driver.inner._header.file_length(driver.info.size)
    driver.close()
    again = rig.open(top)
    assert kinds(again) == [(0, 64 * KIB * 20 + 512, "DATA")]


def test_grow_clears_stale_bits_beyond_the_base(rig, tmp_path):
    bits = b"\0\xff".ljust(C, b"\0")
    driver = rig.open(put(tmp_path, v20(bits=12), 8 * C, bits))
    rig.run(driver.resize(16 * C, 4 * C))
    assert kinds(driver) == [(0, 16 * C, "BELOW")]
    assert bitmap_of(driver) == bytes(C)


def test_grow_makes_the_bitmap_file_longer_by_whole_clusters(rig, tmp_path):
    size = C * 8 * C  # one cluster of bitmap, full
    path = put(tmp_path, v20(bits=12), 0, bytes(C))
    os.truncate(tmp_path / "disk.raw", size)
    driver = rig.open(path)
    rig.run(driver.resize(size + 512, 1))
    assert os.path.getsize(path) == 3 * C
    rig.run(driver.resize(size, 1))
    assert os.path.getsize(path) == 2 * C
    assert rig.run(driver.check("")).findings == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_shrink_clears_bits_and_a_later_grow_reads_zeros(rig, tmp_path, top, variant):
    step = {"v20": 64 * KIB, "v10": 64 * KIB, "v7": 512}[variant]
    (tmp_path / "base").write_bytes(b"B" * 20 * step)
    options = {"cluster_size": "64k"} if variant == "v20" else {}
    rig.create(top, 20 * step, backing="base", compat=variant, **options)
    driver = rig.open(top)
    rig.fill(driver, 2 * step, b"x" * 18 * step)
    rig.flush(driver)
    rig.run(driver.resize(3 * step, 20 * step))
    assert driver.allocated() == 1
    assert bitmap_of(driver).rstrip(b"\0") == b"\x04"
    assert os.path.getsize(tmp_path / "disk.add-cow.raw") == 3 * step
    rig.run(driver.resize(20 * step, 20 * step))
    expected = (b"B" * 2 * step + b"x" * step).ljust(20 * step, b"\0")
    assert disk(driver, content, b"B" * 20 * step) == expected


def test_resize_to_the_same_size_changes_nothing(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE - 100)
    driver = rig.open(path)
    rig.run(driver.resize(SIZE, SIZE))
    assert os.path.getsize(tmp_path / "disk.raw") == SIZE - 100


def test_resize_of_a_block_device_is_refused():
    host = SimHost()
    host.put("/sim/disk.raw", bytes(8 * C), kind="block")
    host.put("/sim/disk.add-cow", v20(bits=12, bitmap=bytes(C)))
    rig = Rig(host)
    driver = rig.open("/sim/disk.add-cow")
    assert not driver.info.can_resize
    for size in (4 * C, 16 * C):
        with pytest.raises(UsageError, match="block device of 32768 bytes"):
            rig.run(driver.resize(size, 0))
    rig.run(driver.resize(8 * C, 0))
    assert driver.info.size == 8 * C


# ---- the base ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_backing_leaves_no_name(rig, tmp_path, top, variant):
    (tmp_path / "base").write_bytes(b"B" * 128 * KIB)
    rig.create(top, 128 * KIB, backing="base", compat=variant)
    driver = rig.open(top)
    with pytest.raises(UsageError, match="only in the backing file"):
        rig.run(driver.drop_backing())
    rig.fill(driver, 0, b"x" * 128 * KIB)
    rig.flush(driver)
    rig.run(driver.drop_backing())
    assert driver.info.can_allocate == (variant != "v20")
    assert b"base" not in content(top)
    driver.close()
    (tmp_path / "base").unlink()
    again = rig.open(top)
    assert (again.backing, again.info.has_backing) == (None, False)
    assert kinds(again) == [(0, 128 * KIB, "DATA")]
    assert again.describe()["all-allocated"] == (variant == "v20")
    assert rig.run(again.check("")).findings == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_backing_with_a_name_longer_than_a_sector(rig, tmp_path, top, variant):
    (tmp_path / "base").write_bytes(bytes(64 * KIB))
    long_name = "./" * 400 + "base"
    rig.create(top, 64 * KIB, backing=long_name, compat=variant)
    driver = rig.open(top)
    rig.fill(driver, 0, b"x" * 64 * KIB)
    rig.flush(driver)
    rig.run(driver.drop_backing())
    assert driver.backing is None
    assert b"base" not in content(top)
    assert b"./" not in content(top)
    driver.close()
    assert rig.open(top).data.path == str(tmp_path / "disk.add-cow.raw")


# ---- check, describe, inspect ----


def test_check_counts(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE, b"\x0d\x04".ljust(C, b"\0")))
    result = rig.run(driver.check(""))
    assert (result.total, result.allocated, result.fragmented, result.compressed) == (11, 4, 0, 0)
    assert result.image_end == 2 * C
    assert result.findings == []


@pytest.mark.parametrize("place", [300, 600])
def test_check_finds_and_clears_stray_header_bytes(rig, tmp_path, place):
    header = bytearray(v20(bits=12))
    header[place] = 1
    path = put(tmp_path, bytes(header), SIZE)
    driver = rig.open(path)
    found = rig.run(driver.check("")).findings
    assert [(f.kind, f.fixed) for f in found] == [("leak", False)]
    assert f"between {place} and {place + 1}" in found[0].text
    assert [f.fixed for f in rig.run(driver.check("leaks")).findings] == [True]
    assert rig.run(driver.check("")).findings == []
    assert content(path)[:C] == v20(bits=12)


def test_check_finds_and_cuts_bytes_behind_the_bitmap(rig, tmp_path):
    path = put(tmp_path, v20(bits=12), SIZE, bytes(C + 100))
    driver = rig.open(path)
    found = rig.run(driver.check("")).findings
    assert [(f.kind, f.fixed) for f in found] == [("leak", False)]
    assert "100 bytes behind the bitmap" in found[0].text
    assert [f.fixed for f in rig.run(driver.check("leaks")).findings] == [True]
    assert os.path.getsize(path) == 2 * C
    assert rig.run(driver.check("")).findings == []


def test_check_repair_needs_a_writer(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE), write=False)
    with pytest.raises(ReadOnlyError):
        rig.run(driver.check("all"))


def test_describe_is_json(rig, tmp_path):
    driver = rig.open(put(tmp_path, v20(bits=12), SIZE))
    assert json.loads(json.dumps(driver.describe())) == {
        "compat": "v20",
        "all-allocated": False,
        "data-file": "disk.raw",
        "data-file-format": "raw",
        "bitmap-complete": False,
    }


def test_inspect_opens_nothing_that_it_names(rig, tmp_path):
    path = put(tmp_path, v20(bits=12, image=b"/dev/tape", backing=b"nbd:x"), SIZE)
    found = rig.inspect(path)
    assert (found.format, found.variant, found.size, found.cluster_size) == (
        "add-cow",
        "v20",
        None,
        C,
    )
    assert (found.backing, found.backing_format, found.data_file) == ("nbd:x", "raw", "/dev/tape")


def test_recognises_the_magic_alone(rig):
    assert rig.format.recognises(b"ACOW")
    assert rig.format.recognises(b"ADD_COW\xff")
    assert not rig.format.recognises(b"ACO")
    assert not rig.format.recognises(b"ADD_COW")


def test_names_that_are_not_utf8_survive(rig, tmp_path):
    name = os.fsdecode(b"\xff\xfe.raw")
    (tmp_path / name).write_bytes(b"x" * SIZE)
    driver = rig.open(put(tmp_path, v20(bits=12, image=b"\xff\xfe.raw"), SIZE))
    assert os.path.basename(driver.data.path) == name
    json.dumps(driver.describe())


def test_unknown_feature_is_refused_by_name(rig, tmp_path):
    with pytest.raises(UnsupportedError, match="features is 2: an unknown incompatible feature"):
        rig.open(put(tmp_path, v20(bits=12, features=2), SIZE))


def test_large_disk_costs_only_its_bits(rig, tmp_path, top):
    """This test covers v18's index beyond one bitmap table: 33 GiB at 64 KiB."""
    size = 33 << 30
    (tmp_path / "base").write_bytes(b"B")
    assert rig.create(top, size, backing="base", cluster_size="64k") == size
    driver = rig.open(top)
    rig.fill(driver, size - 64 * KIB, b"x" * 64 * KIB)
    rig.flush(driver)
    assert bitmap_of(driver)[67583] == 0x80
    assert driver.allocated() == 1
    assert os.path.getsize(top) == 65536 + 131072
    assert os.stat(tmp_path / "disk.add-cow.raw").st_blocks * 512 < MIB


def test_sparse_bitmap_of_gigabytes_is_counted_at_once(tmp_path):
    """This test makes a disk of 16 TiB in clusters of 512 bytes: 4 GiB of bitmap, nearly all a
    hole."""
    size = (16 << 40) - 4096
    header = v20(bits=9, bitmap=b"")
    path = tmp_path / "top"
    path.write_bytes(header)
    os.truncate(path, meta.parse("top", header, 1 << 40).file_length(size))
    with path.open("r+b") as file:
        file.seek(4096 + (3 << 30))
        file.write(b"\x07")
    for name, length in (("disk.raw", size), ("base.raw", 4096)):
        (tmp_path / name).touch()
        try:
            os.truncate(tmp_path / name, length)
        except OSError as error:
            pytest.skip(f"no file of {length} bytes here: {error}")
    started = time.monotonic()
    with mmcow.open(path) as image:
        assert image.engine.top.allocated() == 3
    assert time.monotonic() - started < 1
