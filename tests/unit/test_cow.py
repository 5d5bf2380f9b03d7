# SPDX-License-Identifier: MIT
"""The cow driver over real files (and, where blocks of 4096 matter, over stricter ones)."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

import mmcow
from mmcow.engine.engine import Engine
from mmcow.errors import CorruptError, LockedError, StorageError, UnsupportedError, UsageError
from mmcow.formats import cow_meta
from mmcow.formats.cow import CowFormat
from mmcow.formats.driver import Extent, Kind
from mmcow.formats.guard import Guard
from mmcow.formats.opening import Access, CreateRequest, DenyAll, Opener
from mmcow.jobs.commit import commit
from mmcow.jobs.stream import stream
from mmcow.storage.file import Cache
from mmcow.storage.host import Alignment
from mmcow.storage.linux import LinuxHost
from mmcow.tasks import Reactor
from tests.sim.host import SimHost
from tests.unit.test_cow_meta import header_bytes, image_bytes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CREATED = list(cow_meta.CREATED)
QEMU = (cow_meta.X86_64, cow_meta.I386)
OLD_UML = (cow_meta.UML1_BIG, cow_meta.UML1_LITTLE, cow_meta.UML2, cow_meta.UML3_UNPACKED)
HAND_MADE = [(layout, 512) for layout in QEMU] + [
    (layout, size) for layout in (*OLD_UML, cow_meta.UML3) for size in (512, 1024, 4096)
]


class BigBlocks(LinuxHost):
    """A machine whose direct I/O wants blocks of 4096, whatever its disk says."""

    def open(self, path, *, write, direct):
        handle = super().open(path, write=write, direct=direct)
        if direct:
            handle.alignment = Alignment(handle.alignment.memory, 4096)
        return handle


class Bench:
    """A reactor, an opener, and images that are closed at the end."""

    def __init__(self, directory, host, policy=None):
        self.directory = directory
        self.host = host
        self.queue = host.queue()
        self.reactor = Reactor(self.queue)
        self.opener = Opener(host, self.reactor, self.queue, policy)
        self.format = CowFormat()
        self.drivers = []

    def path(self, name="disk.cow"):
        return os.path.join(self.directory, name)

    def put(self, content, name="disk.cow"):
        with open(self.path(name), "wb") as file:
            file.write(content)
        return self.path(name)

    def content(self, name="disk.cow"):
        with open(self.path(name), "rb") as file:
            return file.read()

    def create(self, name="disk.cow", **facts):
        return self.format.create(self.opener, self.path(name), request(**facts))

    def open(self, name="disk.cow", *, write=True, cache=Cache.AUTO, share=False):
        access = Access(write=write, top=True, share=share, cache=cache)
        driver = self.format.open(self.opener, self.path(name), access)
        self.drivers.append(driver)
        return driver

    def engine(self, *drivers, write=True):
        layers = [Guard(driver) for driver in drivers]
        return Engine(self.reactor, layers, writable=write, name="disk")

    def run(self, coroutine):
        return self.reactor.run(coroutine)

    def write(self, engine, offset, data):
        with self.reactor.lock:
            completion = engine.write(offset, memoryview(data))
        return self.reactor.wait(completion)

    def read(self, engine, offset, length):
        into = memoryview(bytearray(length))
        with self.reactor.lock:
            completion = engine.read(offset, into)
        self.reactor.wait(completion)
        return bytes(into)

    def check(self, driver, repair=""):
        return self.run(driver.check(repair))

    def close(self):
        for driver in self.drivers:
            driver.close()
        self.drivers.clear()
        self.queue.close()


def request(size=MIB, **facts):
    values = {
        "size": size,
        "backing": None,
        "backing_format": None,
        "backing_size": None,
        "backing_mtime": 0,
        "backing_is_raw": False,
        "options": {},
    }
    return CreateRequest(**(values | facts))


def uml3(**facts):
    return {"backing": "base.raw", "options": {"compat": "uml3"}} | facts


def compat(layout):
    return {"backing": "base.raw", "options": {"compat": layout}}


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path, LinuxHost())
    yield made
    made.close()


@pytest.fixture
def big_blocks(tmp_path):
    made = Bench(tmp_path, BigBlocks())
    yield made
    made.close()


@pytest.fixture(params=["real-blocks", "4096-blocks"])
def any_bench(request, tmp_path):
    made = Bench(tmp_path, LinuxHost() if request.param == "real-blocks" else BigBlocks())
    yield made
    made.close()


# ---- create ----


@pytest.mark.parametrize(
    ("layout", "length", "data_start"),
    [("x86-64", 1536, 1536), ("i386", 1536, 1536), ("uml3", 1060864, 12288)],
)
def test_create_1_mib(bench, layout, length, data_start):
    assert bench.create(**compat(layout)) == MIB
    content = bench.content()
    assert len(content) == length
    header = cow_meta.parse("d", content[:8192], len(content))
    assert (header.layout.variant, header.size) == (layout, MIB)
    assert header.geometry.data_start == data_start
    assert not any(content[header.geometry.bitmap_offset :])


def test_create_default_layout_is_x86_64(bench):
    bench.create()
    assert bench.open().info.variant == "x86-64"


def test_create_rounds_the_size_up_to_512(bench):
    assert bench.create(size=1000) == 1024


def test_create_takes_the_size_of_the_base(bench):
    assert bench.create(size=None, backing="base.raw", backing_size=2 * MIB) == 2 * MIB


def test_create_without_any_size_refused(bench):
    with pytest.raises(UsageError, match="size is needed"):
        bench.create(size=None)


def test_create_unknown_compat_refused(bench):
    with pytest.raises(UsageError, match="x86-64, i386, uml3"):
        bench.create(options={"compat": "sparc"})


def test_create_too_large_refused(bench):
    with pytest.raises(UsageError, match="8 TiB"):
        bench.create(size=9 << 40)
    assert os.listdir(bench.directory) == []


def test_create_7_tib_is_sparse(bench):
    bench.create(size=7 << 40)
    assert os.stat(bench.path()).st_blocks * 512 < MIB


def test_create_qemu_stores_the_name_as_typed_and_the_time(bench):
    bench.create(backing="../base.raw", backing_mtime=0x540866E8)
    content = bench.content()
    assert content[8:20] == b"../base.raw\0"
    assert content[0x408:0x40C].hex() == "540866e8"
    assert bench.open().backing == ("../base.raw", None)


def test_create_uml_stores_an_absolute_name(bench):
    bench.create(**uml3(backing="sub/../base.raw", backing_mtime=7))
    absolute = os.path.join(bench.directory, "base.raw")
    assert bench.open().backing == (absolute, None)


@pytest.mark.parametrize(("layout", "room"), [("x86-64", 1023), ("i386", 1023), ("uml3", 4095)])
def test_create_longest_name(bench, layout, room):
    name = "/" + "n" * (room - 1)
    bench.create(backing=name, options={"compat": layout})
    assert bench.open().backing == (name, None)
    with pytest.raises(UsageError, match=f"room for {room}"):
        bench.create("other", backing=name + "n", options={"compat": layout})
    assert not os.path.exists(bench.path("other"))


def test_create_uml_without_base_refused(bench):
    with pytest.raises(UsageError, match="needs a backing file"):
        bench.create(options={"compat": "uml3"})


def test_create_uml_of_another_size_than_its_base_refused(bench):
    with pytest.raises(UsageError, match="as large as its backing file"):
        bench.create(**uml3(size=2 * MIB, backing_size=MIB))


def test_create_replaces_an_existing_file(bench):
    bench.put(b"x" * 5000)
    bench.create()
    assert len(bench.content()) == 1536
    assert os.listdir(bench.directory) == ["disk.cow"]


def test_create_over_an_image_in_use_refused(bench):
    bench.create()
    before = bench.content()
    bench.open(write=False)
    with pytest.raises(LockedError):
        bench.create(size=2 * MIB)
    assert bench.content() == before


# ---- open: length, window, cache mode ----


@pytest.mark.parametrize("layout", CREATED)
def test_open_info(bench, layout):
    bench.create(**compat(layout))
    info = bench.open().info
    assert (info.format, info.variant, info.size, info.cluster_size) == ("cow", layout, MIB, 512)
    assert (info.has_backing, info.can_allocate, info.can_zero, info.can_unallocate) == (
        True, True, False, True,
    )  # fmt: skip
    assert (info.can_resize, info.one_file) == (False, True)


def test_open_fresh_qemu_file_grows_to_its_disk(any_bench):
    """This test opens a file as QEMU left it: header and bitmap, 1312 bytes."""
    bench = any_bench
    bench.put(cow_meta.build(cow_meta.X86_64, MIB, b"", 0) + bytes(256))
    driver = bench.open()
    length = os.path.getsize(bench.path())
    assert length >= 1536 + MIB
    assert length % driver.data.handle.alignment.offset == 0
    assert driver.window.size == 1536


def test_open_read_only_leaves_a_fresh_qemu_file_alone(bench):
    bench.put(cow_meta.build(cow_meta.X86_64, MIB, b"", 0) + bytes(256))
    driver = bench.open(write=False)
    assert driver.map(0, MIB) == [Extent(0, MIB, Kind.BELOW, -1)]
    assert bench.read(bench.engine(driver, write=False), 0, 4096) == bytes(4096)
    assert len(bench.content()) == 1312


def test_open_large_blocks_and_unaligned_data_everything_is_buffered(big_blocks):
    bench = big_blocks
    bench.create(size=MIB)
    driver = bench.open(cache=Cache.NONE)
    assert driver.data.cache is Cache.WRITEBACK
    assert not driver.data.handle.direct
    described = driver.describe()
    assert described["cache"] == "writeback"
    assert "block of 4096 bytes (data begin at 1536)" in described["cache-note"]


def test_open_large_blocks_directsync_becomes_writethrough(big_blocks):
    big_blocks.create(size=MIB)
    assert big_blocks.open(cache=Cache.DIRECTSYNC).data.cache is Cache.WRITETHROUGH


def test_open_large_blocks_and_aligned_data_is_direct(big_blocks):
    big_blocks.create(**uml3())
    driver = big_blocks.open(cache=Cache.NONE)
    assert driver.data.handle.direct
    assert driver.describe()["cache-note"] is None


def test_open_buffered_keeps_the_lock_of_a_writer(big_blocks):
    """This test makes sure that the second opening is locked like the first."""
    big_blocks.create()
    big_blocks.open()
    with pytest.raises(LockedError):
        big_blocks.open(write=False)


@pytest.mark.parametrize(
    "layout",
    OLD_UML,
    ids=["v1-big", "v1-little", "v2", "v3-unpacked"],
)
def test_open_old_uml_layouts_are_read_only(bench, layout):
    bench.put(image_bytes(layout, name=b"base.raw"))
    with pytest.raises(UnsupportedError, match="only read"):
        bench.open(write=True)
    driver = bench.open(write=False)
    assert driver.info.variant == layout.variant
    assert driver.backing == ("base.raw", None)


@pytest.mark.parametrize(
    ("layout", "sectorsize"),
    HAND_MADE,
    ids=lambda value: getattr(getattr(value, "structure", None), "__name__", str(value)),
)
def test_read_only_image_made_by_hand(any_bench, layout, sectorsize):
    """This test sets two bits and writes two sectors by arithmetic of its own."""
    bench = any_bench
    content = bytearray(image_bytes(layout, size=MIB, sectorsize=sectorsize))
    where = cow_meta.geometry(layout, MIB, sectorsize, 4096)
    last = MIB // sectorsize - 1
    content += bytes(MIB)
    for sector, letter in ((9, b"A"), (last, b"Z")):
        content[where.bitmap_offset + sector // 8] |= 1 << sector % 8
        at = where.data_start + sector * sectorsize
        content[at : at + sectorsize] = letter * sectorsize
    bench.put(content)
    driver = bench.open(write=False)
    s, start = sectorsize, where.data_start
    assert driver.map(0, MIB) == [
        Extent(0, 9 * s, Kind.BELOW, -1),
        Extent(9 * s, s, Kind.DATA, start + 9 * s),
        Extent(10 * s, MIB - 11 * s, Kind.BELOW, -1),
        Extent(MIB - s, s, Kind.DATA, start + MIB - s),
    ]
    seen = bench.read(bench.engine(driver, write=False), 0, MIB)
    assert seen == bytes(9 * s) + b"A" * s + bytes(MIB - 11 * s) + b"Z" * s
    assert driver.allocated() == 2


def test_map_sectors_without_a_bit_show_the_base(bench):
    """UML v2's bitmap is rounded down; here it ends where the data begin."""
    sectors = (4608 - 4120) * 8 + 1
    content = bytearray(image_bytes(cow_meta.UML2, size=sectors * 512))
    content[4120:4608] = b"\xff" * (4608 - 4120)
    bench.put(bytes(content) + b"\xff" * (sectors * 512))
    driver = bench.open(write=False)
    last = (sectors - 1) * 512
    extents = driver.map(last - 512, 1024)
    assert [extent.kind for extent in extents] == [Kind.DATA, Kind.BELOW]
    assert driver.map(last, 512) == [Extent(last, 512, Kind.BELOW, -1)]


# ---- reading and writing ----


@pytest.mark.parametrize("layout", CREATED)
@pytest.mark.parametrize("cache", [Cache.AUTO, Cache.WRITEBACK, Cache.DIRECTSYNC, Cache.UNSAFE])
def test_write_flush_reopen(any_bench, layout, cache):
    bench = any_bench
    bench.create(**compat(layout))
    engine = bench.engine(bench.open(cache=cache))
    pieces = [(0, b"a" * 512), (1024, b"b" * 1024), (5120, b"c" * 9216), (MIB - 512, b"d" * 512)]
    model = bytearray(MIB)
    for offset, data in pieces:
        bench.write(engine, offset, data)
        model[offset : offset + len(data)] = data
    assert bench.read(engine, 0, MIB) == model
    bench.run(engine.flush())
    bench.drivers.pop().close()
    driver = bench.open(write=False)
    assert bench.read(bench.engine(driver, write=False), 0, MIB) == model
    assert driver.allocated() == 1 + 2 + 18 + 1
    result = bench.check(driver)
    assert (result.total, result.allocated, list(result.findings)) == (2048, 22, [])


def test_write_is_invisible_on_disk_before_flush(bench):
    bench.create()
    engine = bench.engine(bench.open())
    bench.write(engine, 0, b"x" * 512)
    assert not any(bench.content()[1056:1536])
    bench.run(engine.flush())
    assert bench.content()[1056] == 1


def test_layers_read_through(bench):
    bench.create("base.cow")
    bench.create("top.cow", backing="base.cow")
    base = bench.open("base.cow")
    bench.write(bench.engine(base), 0, b"base" * 512)
    top = bench.open("top.cow")
    engine = bench.engine(top, base)
    bench.write(engine, 700, b"top")
    expected = bytearray(b"base" * 512)
    expected[700:703] = b"top"
    assert bench.read(engine, 0, 2048) == expected
    assert top.allocated() == 1


def test_write_zeroes_past_the_written_end_is_no_finding(bench):
    bench.create(backing="base.raw")
    driver = bench.open()
    engine = bench.engine(driver)
    with bench.reactor.lock:
        done = engine.write_zeroes(MIB // 2, MIB // 4, False)
    bench.reactor.wait(done)
    bench.run(engine.flush())
    assert driver.allocated() == MIB // 4 // 512
    assert not bench.check(driver).findings


def test_unmap_below_shows_the_base_again(bench):
    bench.create()
    driver = bench.open()
    engine = bench.engine(driver)
    bench.write(engine, 0, b"x" * 4096)
    with bench.reactor.lock:
        driver.unmap(512, 1024, Kind.BELOW)
    bench.run(engine.flush())
    assert bench.content()[1056] == 0b11111001
    assert driver.allocated() == 6


def test_reserve_is_identity(bench):
    bench.create(**uml3())
    driver = bench.open()
    reservation = driver.reserve(4096, 512)
    assert list(reservation.pieces) == [(4096, 512, 12288 + 4096)]
    driver.abandon(reservation)
    assert driver.allocated() == 0
    assert driver.stage() is None
    driver.publish(reservation)
    assert driver.map(4096, 512) == [Extent(4096, 512, Kind.DATA, 16384)]
    staged = driver.stage()
    assert [group.runs[0][0] // 512 for group in staged.groups] == [8192 // 512]


def test_window_writes_reach_the_disk_beside_data(big_blocks):
    """This test writes bits and data by O_DIRECT into one file and reads both back from it."""
    bench = big_blocks
    bench.create(**uml3(size=64 * MIB))
    driver = bench.open(cache=Cache.NONE)
    engine = bench.engine(driver)
    for number in range(64):
        bench.write(engine, number * MIB, bytes([number + 1]) * 512)
        bench.run(engine.flush())
    content = bench.content()
    where = cow_meta.geometry(cow_meta.UML3, 64 * MIB, 512, 4096)
    for number in range(64):
        assert content[where.bitmap_offset + number * 256] == 1
        at = where.data_start + number * MIB
        assert content[at : at + 512] == bytes([number + 1]) * 512


def test_resize_refused_with_a_way_out(bench):
    bench.create()
    driver = bench.open()
    with pytest.raises(UsageError, match="convert it"):
        bench.run(driver.resize(2 * MIB, 0))


# ---- check ----


def test_check_counts(bench):
    bench.create()
    driver = bench.open()
    assert bench.check(driver).image_end == 1536
    bench.write(bench.engine(driver), 8192, b"x" * 1024)
    result = bench.check(driver)
    assert (result.total, result.allocated, result.fragmented) == (2048, 2, 0)
    assert result.image_end == 1536 + 8192 + 1024


@pytest.mark.parametrize("write", [True, False], ids=["writable", "read-only"])
def test_check_data_past_the_end_reported_and_zero(bench, write):
    content = bytearray(cow_meta.build(cow_meta.X86_64, MIB, b"", 0) + bytes(480))
    content[1056] = 0b111
    bench.put(bytes(content) + b"x" * 512 + b"y" * 100)
    driver = bench.open(write=write)
    seen = bench.read(bench.engine(driver, write=write), 0, 1536)
    assert seen == b"x" * 512 + (b"y" * 100).ljust(1024, b"\0")
    (finding,) = bench.check(driver).findings
    assert finding.kind == "corruption"
    assert "2 sectors" in finding.text
    assert not finding.fixed


def test_check_repair_all_makes_a_cut_file_whole(bench):
    content = bytearray(cow_meta.build(cow_meta.X86_64, MIB, b"", 0) + bytes(480))
    content[1056] = 0b111
    bench.put(bytes(content) + b"x" * 512)
    driver = bench.open()
    (finding,) = bench.check(driver, "all").findings
    assert finding.fixed
    assert not bench.check(driver).findings
    assert os.path.getsize(bench.path()) >= 1536 + MIB
    assert bench.content()[1536:2048] == b"x" * 512


def test_check_bits_beyond_the_end_are_no_finding(bench):
    content = bytearray(cow_meta.build(cow_meta.X86_64, 9 * 512, b"", 0) + bytes(480))
    content[1057] = 0b11111110
    bench.put(bytes(content) + bytes(9 * 512))
    driver = bench.open()
    result = bench.check(driver)
    assert (result.total, result.allocated, list(result.findings)) == (9, 0, [])


# ---- the base ----


def test_base_changed_tells_the_time_and_the_name(bench):
    bench.create(backing="base.raw", backing_mtime=1000)
    driver = bench.open()
    assert driver.base_changed(1000, MIB) is None
    text = driver.base_changed(1001, MIB)
    assert text is not None
    assert "base.raw" in text
    assert "1001" in text


def test_base_changed_unknown_time_is_silent(bench):
    bench.create(backing="base.raw", backing_mtime=0)
    assert bench.open().base_changed(12345, MIB) is None


@pytest.mark.parametrize(("layout", "told"), [("x86-64", False), ("uml3", True)])
def test_base_changed_size_matters_to_uml_only(bench, layout, told):
    bench.create(**compat(layout))
    assert (bench.open().base_changed(0, MIB + 512) is not None) is told


def test_check_looks_at_the_base_where_nobody_asked(bench):
    base = bench.put(bytes(MIB), "base.raw")
    bench.create(backing="base.raw", backing_mtime=int(os.stat(base).st_mtime))
    driver = bench.open()
    assert not bench.check(driver).findings
    os.utime(base, (5, 5))
    (finding,) = bench.check(driver).findings
    assert "its time is 5" in finding.text
    assert driver.describe()["backing-changed"] == finding.text


def test_check_respects_the_policy(tmp_path):
    bench = Bench(tmp_path, LinuxHost(), DenyAll())
    try:
        bench.put(bytes(MIB), "base.raw")
        bench.create(backing="base.raw", backing_mtime=5)
        assert not bench.check(bench.open()).findings
    finally:
        bench.close()


@pytest.mark.parametrize("layout", CREATED)
def test_drop_backing_needs_every_bit(any_bench, layout):
    bench = any_bench
    bench.create(size=64 * KIB, backing="base.raw", options={"compat": layout})
    driver = bench.open()
    engine = bench.engine(driver)
    bench.write(engine, 512, b"x" * (64 * KIB - 512))
    bench.run(engine.flush())
    with pytest.raises(UsageError, match="1 sectors are not copied"):
        bench.run(driver.drop_backing())
    bench.write(engine, 0, b"y" * 512)
    bench.run(engine.flush())
    bench.run(driver.drop_backing())
    assert driver.backing is None
    assert not driver.info.has_backing
    bench.drivers.pop().close()
    again = bench.open(write=False)
    assert again.backing is None
    assert again.info.variant == layout
    assert bench.read(bench.engine(again, write=False), 0, 1024) == b"y" * 512 + b"x" * 512


@pytest.mark.parametrize("layout", CREATED)
def test_rename_records_name_and_time(bench, layout):
    base = bench.put(bytes(MIB), "new.raw")
    bench.create(**compat(layout))
    before = bench.content()
    bench.format.rename(bench.opener, bench.path(), backing=("new.raw", None))
    driver = bench.open()
    name, _ = driver.backing
    assert name == (base if layout == "uml3" else "new.raw")
    assert driver.describe()["backing-mtime"] == int(os.stat(base).st_mtime)
    assert not bench.check(driver).findings
    header = cow_meta.parse("d", before[:8192], len(before))
    end = header.layout.header_size
    assert bench.content()[end : len(before)] == before[end:]


@pytest.mark.parametrize("layout", CREATED)
def test_rename_to_nothing_removes_the_name(bench, layout):
    bench.create(**compat(layout))
    bench.format.rename(bench.opener, bench.path(), backing=("", None))
    driver = bench.open()
    assert driver.backing is None
    assert driver.info.variant == layout


def test_rename_of_an_image_in_use_refused(bench):
    bench.create(backing="base.raw")
    bench.open(write=False)
    with pytest.raises(LockedError):
        bench.format.rename(bench.opener, bench.path(), backing=("new.raw", None))


def test_rename_refuses_a_data_file_and_too_long_names(bench):
    bench.create(backing="base.raw")
    with pytest.raises(UsageError, match="no separate data file"):
        bench.format.rename(bench.opener, bench.path(), data_file=("x", None))
    with pytest.raises(UsageError, match="room for 1023"):
        bench.format.rename(bench.opener, bench.path(), backing=("n" * 1024, None))
    assert bench.open().backing == ("base.raw", None)


# ---- inspect ----


@pytest.mark.parametrize("layout", CREATED)
def test_inspect_reads_the_header_only(bench, layout):
    bench.create(**compat(layout))
    handle = bench.host.open(bench.path(), write=False, direct=False)
    try:
        found = bench.format.inspect(bench.path(), handle)
    finally:
        handle.close()
    assert (found.format, found.variant, found.size) == ("cow", layout, MIB)
    assert found.cluster_size == 512
    assert os.path.basename(found.backing) == "base.raw"
    assert (found.backing_format, found.data_file) == (None, None)
    assert found.details["layout"] == layout


def test_open_error_leaves_nothing_open(bench):
    bench.put(header_bytes(cow_meta.X86_64, size=MIB))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CorruptError):
        bench.open()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_open_with_a_given_layout(bench):
    """This test forces the reading of an image that two layouts fit by their fields."""
    content = bytearray(image_bytes(cow_meta.I386, size=64 * KIB))
    content[1048 + 2] = 2
    bench.put(bytes(content) + bytes(10 * MIB))
    bench.format = CowFormat(cow_meta.I386)
    assert bench.open(write=False).info.variant == "i386"


def test_create_fails_as_a_whole(bench):
    with pytest.raises(StorageError):
        bench.format.create(bench.opener, bench.path("no/such/disk.cow"), request())


def test_extents_alternate(bench):
    """This test maps every other sector: the answer may stop early, and never overlaps."""
    bench.create()
    driver = bench.open()
    for sector in range(0, 400, 2):
        driver.publish(driver.reserve(sector * 512, 512))
    extents = driver.map(0, MIB)
    assert len(extents) > 1
    for one, other in pairwise(extents):
        assert one.offset + one.length == other.offset
        assert one.kind != other.kind


# ---- through the public interface ----


@pytest.mark.parametrize("layout", CREATED)
def test_stream_leaves_an_image_without_base(bench, layout):
    base = bench.put(os.urandom(64 * KIB), "base.raw")
    mmcow.create(bench.path(), format="cow", backing=base, options={"compat": layout})
    with mmcow.open(bench.path(), write=True) as image:
        image.write(1000, b"top")
        stream(image)
    with open(base, "rb") as file:
        expected = bytearray(file.read())
    expected[1000:1003] = b"top"
    os.unlink(base)
    with mmcow.open(bench.path()) as image:
        assert len(image.layers) == 1
        assert image.read(0, 64 * KIB) == expected


@pytest.mark.parametrize("layout", CREATED)
def test_commit_empties_the_image_and_records_the_bases_new_time(bench, layout):
    base = bench.put(bytes(64 * KIB), "base.raw")
    os.utime(base, (1000, 1000))
    mmcow.create(bench.path(), format="cow", backing=base, options={"compat": layout})
    with mmcow.open(bench.path(), write=True) as image:
        image.write(4096, b"top")
    commit(bench.path())
    driver = bench.open(write=False)
    assert driver.allocated() == 0
    assert driver.describe()["backing-mtime"] == int(os.stat(base).st_mtime) != 1000
    assert not bench.check(driver).findings
    with open(base, "rb") as file:
        assert file.read()[4096:4099] == b"top"


def test_open_warns_of_a_changed_base(bench):
    base = bench.put(bytes(64 * KIB), "base.raw")
    mmcow.create(bench.path(), format="cow", backing=base)
    os.utime(base, (5, 5))
    with mmcow.open(bench.path()) as image:
        assert any("its time is 5" in text for text in image.warnings)


@pytest.mark.parametrize("layout", OLD_UML, ids=lambda layout: layout.structure.__name__)
def test_open_old_uml_image_over_its_base(bench, layout):
    bench.put(b"b" * MIB, "base.raw")
    content = bytearray(image_bytes(layout, name=b"base.raw", mtime=0))
    where = cow_meta.geometry(layout, MIB, 512, 4096)
    content[where.bitmap_offset] = 0b10
    bench.put(bytes(content) + b"t" * 1024)
    with mmcow.open(bench.path()) as image:
        assert image.read(0, 1536) == b"b" * 512 + b"t" * 512 + b"b" * 512


# ---- block devices (simulated) ----


def test_block_device_holds_an_image_and_keeps_its_length():
    host = SimHost(1)
    content = image_bytes(cow_meta.UML3, name=b"/base.raw") + bytes(2 * MIB)
    host.put("/sim/device", content, kind="block")
    bench = Bench("/sim", host)
    try:
        driver = bench.open("device")
        engine = bench.engine(driver)
        bench.write(engine, 512, b"x" * 512)
        bench.run(engine.flush())
        found = host.content("/sim/device")
        assert len(found) == len(content)
        assert found[8192] == 0b10
        assert found[12288 + 512 : 12288 + 1024] == b"x" * 512
        assert not bench.check(driver).findings
    finally:
        bench.close()


def test_block_device_that_ends_before_the_data_refused():
    host = SimHost(1)
    content = image_bytes(cow_meta.X86_64, size=64 * MIB)
    host.put("/sim/device", content[:-512].ljust(len(content) - 300, b"\0"), kind="block")
    bench = Bench("/sim", host)
    try:
        with pytest.raises(CorruptError, match="the device ends"):
            bench.open("device")
        assert bench.open("device", write=False).allocated() == 0
    finally:
        bench.close()
