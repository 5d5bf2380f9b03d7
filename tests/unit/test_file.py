# SPDX-License-Identifier: MIT
"""Guest data under every alignment: what O_DIRECT may touch, partial blocks, odd ends."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmcow import StorageError, UsageError
from mmcow.native import aligned
from mmcow.storage.file import BOUNCE, Cache, File
from mmcow.storage.host import Alignment
from mmcow.tasks import Reactor
from tests.unit.spying import SpyHost

KIB = 1 << 10


class Bench:
    """A file, a model of it, and a reactor to run requests with."""

    def __init__(self, path: Path, host: SpyHost, cache: Cache, align: int) -> None:
        self.path = path
        self.host = host
        self.spy = host.spy
        self.queue = host.queue()
        self.reactor = Reactor(self.queue)
        real = host.open

        def opening(path, *, write, direct):
            handle = real(path, write=write, direct=direct)
            if direct and align:
                handle.alignment = Alignment(max(handle.alignment.memory, 512), align)
            return handle

        host.open = opening
        self.file = File.open(host, self.reactor, self.queue, str(path), cache, write=True)
        host.open = real
        self.model = bytearray(path.read_bytes()) if path.is_file() else bytearray()

    def close(self) -> None:
        self.spy.failures.clear()
        self.queue.close()
        self.file.close()

    def write(self, offset: int, *parts: bytes, skew: int = 0) -> None:
        data = b"".join(parts)
        buffers = []
        for part in parts:
            buffer = aligned(len(part) + skew)[skew:]
            buffer[:] = part
            buffers.append(buffer)
        assert self.reactor.perform(lambda: self.file.write(offset, buffers)) is not None
        if len(self.model) < offset:
            self.model += bytes(offset - len(self.model))
        self.model[offset : offset + len(data)] = data

    def read(self, offset: int, *lengths: int, skew: int = 0) -> bytes:
        buffers = [aligned(length + skew)[skew:] for length in lengths]
        for buffer in buffers:
            buffer[:] = b"\xaa" * len(buffer)
        self.reactor.perform(lambda: self.file.read(offset, buffers))
        return b"".join(bytes(buffer) for buffer in buffers)

    def expect(self, offset: int, length: int) -> bytes:
        return bytes(self.model[offset : offset + length].ljust(length, b"\0"))

    def check_direct(self, align: int) -> None:
        """Every request of the main handle was one that O_DIRECT takes."""
        for operation, _, offset, length in self.spy.log:
            if operation == "fallocate":
                assert offset % 4096 == 0, "partial blocks dirty the page cache"
                assert length % 4096 == 0
        assert align


@pytest.fixture(params=["io_uring", "threads"])
def host(request):
    return SpyHost(request.param)


CASES = [
    pytest.param((Cache.NONE, 0), id="direct"),
    pytest.param((Cache.NONE, 4096), id="direct-4096"),
    pytest.param((Cache.WRITEBACK, 0), id="buffered"),
]


@pytest.fixture(params=CASES)
def bench(request, tmp_path, host):
    path = tmp_path / "data"
    path.write_bytes(random.Random(1).randbytes(64 * KIB))
    bench = Bench(path, host, *request.param)
    yield bench
    bench.close()


EDGES = (0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 12288 + 7)


def test_every_alignment_of_reads_and_writes(bench):
    """This test meets every offset near a border with every length near one, twice over: buffers
    at aligned addresses and not."""
    tag = 0
    for skew in (0, 1):
        for offset in EDGES:
            for length in EDGES[1:]:
                tag += 1
                bench.write(offset, bytes([tag % 255 + 1]) * length, skew=skew)
                assert bench.read(offset, length, skew=skew) == bench.expect(offset, length)
        assert bench.read(0, 64 * KIB) == bench.model
    assert bench.path.read_bytes() == bench.model


def test_scattered_buffers_of_any_lengths(bench, rng):
    for _ in range(60):
        offset = rng.randrange(40 * KIB)
        lengths = [rng.choice((0, 1, 512, 700, 4096, 5000)) for _ in range(rng.randrange(1, 5))]
        bench.write(offset, *(rng.randbytes(n) for n in lengths))
        assert bench.read(offset, *lengths) == bench.expect(offset, sum(lengths))
    assert bench.read(0, 64 * KIB) == bench.model


def test_requests_larger_than_the_bounce_buffer(bench, rng):
    data = rng.randbytes(2 * BOUNCE + 777)
    bench.write(333, data)
    assert bench.read(333, len(data)) == data
    assert bench.read(0, len(bench.model)) == bench.model


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 4095, 4097, 10_000, 65_537])
@pytest.mark.parametrize(("cache", "align"), [(Cache.NONE, 0), (Cache.NONE, 4096),
                                              (Cache.WRITEBACK, 0)])  # fmt: skip
def test_odd_end_keeps_its_length(tmp_path, host, rng, length, cache, align):
    """This test writes everywhere in a file of an odd length: it never changes."""
    path = tmp_path / "odd"
    path.write_bytes(rng.randbytes(length))
    bench = Bench(path, host, cache, align)
    try:
        for _ in range(30):
            if length:
                offset = rng.randrange(length)
                bench.write(offset, rng.randbytes(rng.randrange(1, length - offset + 1)))
            assert path.stat().st_size == length == bench.file.size
            at = rng.randrange(length + 600)
            assert bench.read(at, 5000) == bench.expect(at, 5000)
        bench.reactor.run(bench.file.zero(length // 2, length))
        bench.model[length // 2 :] = bytes(length - length // 2)
        assert path.stat().st_size == length
    finally:
        bench.close()
    assert path.read_bytes() == bench.model


def test_reading_past_the_end_gives_zeros(bench):
    end = len(bench.model)
    for offset in (end - 1, end, end + 1, end + 4096, end + (1 << 30)):
        assert bench.read(offset, 9000) == bench.expect(offset, 9000)
        assert bench.read(offset, 512, 3) == bench.expect(offset, 515)
    assert bench.path.stat().st_size == end


def test_short_file_grows_by_writing(bench):
    end = len(bench.model)
    for offset in (end, end + 4096, end + 10_000, end + 99_999):
        bench.write(offset, b"g" * 700)
        assert bench.file.size >= offset + 700
        assert bench.read(0, offset + 5000) == bench.expect(0, offset + 5000)
    found = bench.path.read_bytes()
    assert found[: len(bench.model)] == bench.model
    assert not any(found[len(bench.model) :])


# ---- partial blocks side by side ------------------------------------------------------------


def test_two_unaligned_writes_of_one_block_both_survive(bench, rng):
    """This test begins many writes of pieces of one 4096-byte block at once: each reads, changes
    and writes the whole block, and none may undo another."""
    for _ in range(20):
        pieces = list(range(32))
        rng.shuffle(pieces)
        waits = []
        with bench.reactor.lock:
            for piece in pieces:
                data = memoryview(rng.randbytes(100))
                bench.model[8192 + piece * 128 : 8192 + piece * 128 + 100] = data
                waits.append(bench.file.write(8192 + piece * 128, (data,)))
            for wait in waits:
                bench.reactor.wait(wait)
        assert bench.read(8192, 4096) == bench.expect(8192, 4096)


def test_unaligned_write_beside_an_aligned_one(bench, rng):
    for _ in range(30):
        small, large = rng.randbytes(10), rng.randbytes(4096)
        with bench.reactor.lock:
            waits = [
                bench.file.write(4000, (memoryview(small),)),
                bench.file.write(4096, (memoryview(large),)),
                bench.file.write(8190, (memoryview(small),)),
            ]
            rng.shuffle(waits)
            for wait in waits:
                bench.reactor.wait(wait)
        bench.model[4000:4010] = small
        found = bench.read(4096, 4096)
        assert found[:4094] == large[:4094]
        assert found[4094:] in (large[4094:], small[:2])
        assert bench.read(8192, 8) == small[2:]
        assert bench.read(3990, 106) == bench.expect(3990, 106)


@pytest.mark.parametrize("how", ["zero", "punch", "discard"])
def test_unaligned_write_beside_zeroing(bench, rng, how):
    """This test lets a read-modify-write meet a punch of its neighbours: whichever comes first,
    bytes outside the write are zero, and the write's are either."""
    for _ in range(30):
        bench.write(8192, b"\xff" * 12288)
        data = rng.randbytes(100)
        zeroing = {
            "zero": lambda: bench.file.zero(8192, 12288, may_punch=False),
            "punch": lambda: bench.file.zero(8192, 12288),
            "discard": lambda: bench.file.discard(8192, 12288),
        }[how]
        with bench.reactor.lock:
            first = rng.random() < 0.5
            waits = []
            for turn in (first, not first):
                if turn:
                    waits.append(bench.reactor.spawn(zeroing()))
                else:
                    waits.append(bench.file.write(12300, (memoryview(data),)))
            for wait in waits:
                bench.reactor.wait(wait)
        found = bench.read(8192, 12288)
        inside = found[12300 - 8192 : 12400 - 8192]
        outside = found[: 12300 - 8192] + found[12400 - 8192 :]
        assert inside in (data, bytes(100))
        assert not any(outside), "old bytes came back"


# ---- zeroing --------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [(), ("punch",), ("punch", "zero")], ids="-".join)
def test_zero_ladder(bench, rng, refused):
    """This test takes the ways to zero away, one by one: the result is the same."""
    queue_fallocate = bench.queue.fallocate
    calls = []

    def fallocate(handle, mode, offset, length):
        kind = "punch" if mode & 2 else "zero"
        calls.append(kind)
        if kind in refused:
            bench.spy.failures[("fallocate", "")] = errno.EOPNOTSUPP
        try:
            return queue_fallocate(handle, mode, offset, length)
        finally:
            bench.spy.failures.clear()

    bench.queue.fallocate = fallocate
    for _ in range(25):
        offset = rng.randrange(60 * KIB)
        length = rng.randrange(20_000)
        bench.reactor.run(bench.file.zero(offset, length))
        end = min(offset + length, 64 * KIB)
        bench.model[offset:end] = bytes(end - offset)
        assert bench.read(0, 64 * KIB) == bench.model
    for kind in refused:
        assert calls.count(kind) == 1, "a refusal is remembered"
    assert bench.path.stat().st_size == 64 * KIB
    bench.check_direct(1)


def test_zero_without_punching_keeps_the_space(bench):
    bench.reactor.run(bench.file.zero(0, 64 * KIB, may_punch=False))
    assert bench.path.stat().st_blocks * 512 >= 64 * KIB
    bench.reactor.run(bench.file.zero(0, 64 * KIB))
    assert bench.path.stat().st_blocks == 0
    assert not any(bench.read(0, 64 * KIB))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_other_errors_of_fallocate_are_raised(bench, number):
    bench.spy.failures[("fallocate", "")] = number
    with pytest.raises(StorageError) as caught:
        bench.reactor.run(bench.file.zero(0, 8192))
    assert caught.value.errno == number
    bench.spy.failures.clear()
    assert bench.read(0, 64 * KIB) == bench.model


def test_discard_is_a_hint(bench):
    bench.reactor.run(bench.file.discard(100, 20_000))
    bench.model[4096:16384] = bytes(12288)
    assert bench.read(0, 64 * KIB) == bench.model
    bench.spy.failures[("fallocate", "")] = errno.EOPNOTSUPP
    bench.reactor.run(bench.file.discard(32768, 8192))
    assert bench.read(0, 64 * KIB) == bench.model


def test_holes_are_found(bench):
    bench.reactor.run(bench.file.zero(16384, 16384))
    bench.reactor.perform(bench.file.sync)
    endless = 1 << 63
    assert bench.file.region(0) == (False, 16384)
    assert bench.file.region(16384) == (True, 32768)
    assert bench.file.region(20480) == (True, 32768)
    assert bench.file.region(32768) == (False, 65536)
    assert bench.file.region(65536) == (True, endless)
    assert bench.file.region(1 << 40) == (True, endless)


# ---- durability -----------------------------------------------------------------------------


def test_sync_is_skipped_when_nothing_was_written(bench):
    bench.reactor.perform(bench.file.sync)
    bench.spy.log.clear()
    bench.reactor.perform(bench.file.sync)
    assert bench.spy.log == []
    bench.write(0, b"x" * 4096)
    bench.spy.log.clear()
    bench.reactor.perform(bench.file.sync)
    assert bench.spy.count("datasync") == 1


def test_sync_beside_a_write_does_not_count_for_it(bench):
    """This test syncs while a write is in flight: the next sync must not be skipped."""
    with bench.reactor.lock:
        writing = bench.file.write(0, (aligned(4096),))
        syncing = bench.file.sync()
        bench.reactor.wait(syncing)
        bench.reactor.wait(writing)
    bench.spy.log.clear()
    bench.reactor.perform(bench.file.sync)
    assert bench.spy.count("datasync") == 1


@pytest.mark.parametrize("how", ["zero", "punch", "discard"])
def test_sync_while_zeroing_waits_does_not_count_for_it(tmp_path, host, how):
    """This test lets zeroing wait for the odd end to be written and syncs meanwhile: the next sync
    must not be skipped."""
    path = tmp_path / "odd"
    path.write_bytes(b"\xff" * (64 * KIB + 100))
    bench = Bench(path, host, Cache.NONE, 512)
    zeroing = {
        "zero": lambda: bench.file.zero(0, 8192, may_punch=False),
        "punch": lambda: bench.file.zero(0, 8192),
        "discard": lambda: bench.file.discard(0, 8192),
    }[how]
    try:
        with bench.reactor.lock:
            writing = bench.file.write(64 * KIB + 50, (memoryview(b"tail"),))
            waiting = bench.reactor.spawn(zeroing())
            bench.reactor.wait(bench.file.sync())
            bench.reactor.wait(writing)
            bench.reactor.wait(waiting)
        bench.spy.log.clear()
        bench.reactor.perform(bench.file.sync)
        assert bench.spy.count("datasync") == 1
    finally:
        bench.close()


@pytest.mark.parametrize("proc", [True, False], ids=["proc", "no-proc"])
def test_odd_end_of_a_file_that_was_renamed(tmp_path, host, monkeypatch, proc):
    """This test puts another file under the name while the first is open: the odd end of the first
    is written, the other is left alone."""
    path, moved = tmp_path / "x", tmp_path / "moved"
    path.write_bytes(b"a" * 1000)
    bench = Bench(path, host, Cache.NONE, 512)
    path.rename(moved)
    path.write_bytes(b"b" * 1000)
    if not proc:
        real = os.open

        def without_proc(name, *arguments):
            if str(name).startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, "No such file", name)
            return real(name, *arguments)

        monkeypatch.setattr(os, "open", without_proc)
    try:
        if proc:
            bench.reactor.perform(lambda: bench.file.write(600, (memoryview(b"new"),)))
            assert moved.read_bytes() == b"a" * 600 + b"new" + b"a" * 397
        else:
            with pytest.raises(StorageError) as caught:
                bench.reactor.perform(lambda: bench.file.write(600, (memoryview(b"new"),)))
            assert caught.value.errno == errno.ESTALE
        assert path.read_bytes() == b"b" * 1000
    finally:
        bench.close()


def test_truncate_is_durable_and_known(bench):
    bench.file.truncate(1000)
    assert bench.file.size == bench.path.stat().st_size == 1000
    del bench.model[1000:]
    assert bench.read(0, 5000) == bench.expect(0, 5000)
    bench.file.truncate(9000)
    assert bench.read(0, 9000) == bench.expect(0, 9000)


# ---- opening --------------------------------------------------------------------------------


def test_cache_modes_parse():
    assert Cache.parse("none") is Cache.NONE
    assert Cache.parse(Cache.UNSAFE) is Cache.UNSAFE
    with pytest.raises(UsageError, match="directsync"):
        Cache.parse("quick")


class RefusesDirect(SpyHost):
    """A file system without O_DIRECT, as some FUSE and tmpfs are."""

    def open(self, path, *, write, direct):
        if direct:
            raise StorageError(errno.EINVAL, "open with O_DIRECT", path)
        return super().open(path, write=write, direct=direct)


def open_file(host, path, cache):
    queue = host.queue()
    try:
        file = File.open(host, Reactor(queue), queue, str(path), cache, write=True)
        file.close()
        return file.cache
    finally:
        queue.close()


def test_auto_falls_back_where_direct_io_is_refused_and_none_says_so(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(4096))
    assert open_file(SpyHost(), path, Cache.AUTO) is Cache.NONE
    assert open_file(RefusesDirect(), path, Cache.AUTO) is Cache.WRITEBACK
    for cache in (Cache.NONE, Cache.DIRECTSYNC):
        with pytest.raises(StorageError, match=r"O_DIRECT is not supported.*cache=auto"):
            open_file(RefusesDirect(), path, cache)


def test_auto_does_not_hide_other_errors(tmp_path):
    with pytest.raises(StorageError) as caught:
        open_file(SpyHost(), tmp_path / "gone", Cache.AUTO)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
def test_tmpfs_works_whether_it_knows_direct_io_or_not(host, rng):
    path = Path(f"/dev/shm/mmcow-test-{os.getpid()}")
    path.write_bytes(bytes(30_001))
    try:
        bench = Bench(path, host, Cache.AUTO, 0)
        for _ in range(40):
            offset = rng.randrange(30_001)
            bench.write(offset, rng.randbytes(rng.randrange(1, 30_002 - offset)))
            assert bench.read(0, 30_001) == bench.model
        bench.reactor.run(bench.file.zero(100, 20_000))
        bench.model[100:20_100] = bytes(20_000)
        assert bench.read(0, 30_001) == bench.model
        bench.close()
        assert path.read_bytes() == bench.model
    finally:
        path.unlink()


# ---- block devices --------------------------------------------------------------------------

LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01


@contextmanager
def loop_device(backing: Path, block: int):
    """A loop device with sectors of ``block`` bytes, by ioctl: a unit test starts no program."""
    try:
        with open("/dev/loop-control", "rb", buffering=0) as control:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        device = os.open(f"/dev/loop{number}", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no loop device: {error}")
    try:
        with backing.open("r+b") as file:
            config = struct.pack("<II", file.fileno(), block) + bytes(232) + bytes(64)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
            except OSError as error:
                pytest.skip(f"no loop device: {error}")
        try:
            yield Path(f"/dev/loop{number}")
        finally:
            fcntl.ioctl(device, LOOP_CLR_FD, 0)
    finally:
        os.close(device)


@pytest.mark.root
@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("cache", [Cache.NONE, Cache.WRITEBACK])
def test_block_device(tmp_path, host, rng, block, cache):
    """This test does everything on a device with sectors of 512 and of 4096 bytes."""
    backing = tmp_path / "backing"
    content = rng.randbytes(256 * KIB)
    backing.write_bytes(content)
    with loop_device(backing, block) as device:
        bench = Bench(device, host, cache, 0)
        bench.model = bytearray(content)
        assert bench.file.handle.kind == "block"
        assert bench.file.size == 256 * KIB
        if cache is Cache.NONE:
            assert bench.file.handle.alignment.offset == block
        for _ in range(60):
            offset = rng.randrange(256 * KIB)
            length = min(rng.randrange(1, 20_000), 256 * KIB - offset)
            bench.write(offset, rng.randbytes(length))
            assert bench.read(offset, length) == bench.expect(offset, length)
        bench.reactor.run(bench.file.zero(5000, 100_000))
        bench.model[5000:105_000] = bytes(100_000)
        bench.reactor.run(bench.file.zero(150_000, 5000, may_punch=False))
        bench.model[150_000:155_000] = bytes(5000)
        assert bench.read(0, 256 * KIB) == bench.model
        bench.reactor.perform(bench.file.sync)
        bench.close()
    assert backing.read_bytes() == bench.model
    assert shutil.disk_usage(tmp_path).free
