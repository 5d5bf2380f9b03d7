# SPDX-License-Identifier: MIT
"""Metadata in memory and its way back: what reaches the file, when, and what an error leaves."""

from __future__ import annotations

import errno
import os
import random

import pytest

from mmcow import CorruptError, StorageError, SyncFailed
from mmcow.storage.window import UNIT, Window
from mmcow.tasks import Reactor
from tests.unit.spying import SpyHost

SIZE = 5 * 4096 + 700


class Memory(SpyHost):
    """A host whose files cannot be mapped."""

    def view(self, handle, size, reserve, unit, *, mapped):
        return super().view(handle, size, reserve, unit, mapped=False)


@pytest.fixture(params=["mapped", "memory"])
def host(request):
    return SpyHost() if request.param == "mapped" else Memory()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "meta"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


class Bench:
    def __init__(self, host, path, size=SIZE):
        self.queue = host.queue()
        self.reactor = Reactor(self.queue)
        self.handle = host.open(str(path), write=True, direct=False)
        self.window = Window(host, self.queue, self.handle, size)

    def write_out(self):
        group = self.window.take()
        if group is not None:
            self.reactor.run(self.window.write_out(group))

    def close(self):
        self.window.close()
        self.queue.close()
        self.handle.close()


@pytest.fixture
def bench(host, path):
    bench = Bench(host, path)
    yield bench
    host.spy.failures.clear()
    bench.close()


def test_nothing_reaches_the_file_before_it_is_written_out(bench, path):
    before = path.read_bytes()
    bench.window.store(100, b"changed")
    bench.window.bits_write(4096, 3, 5000, 1)
    os.sync()
    assert path.read_bytes() == before
    assert bench.window.load(100, 7) == b"changed"
    bench.write_out()
    after = path.read_bytes()
    assert after[100:107] == b"changed"
    assert len(after) == SIZE
    assert bench.window.dirty() == 0


def test_random_changes_against_a_bytearray(bench, path, rng):
    model = bytearray(path.read_bytes())
    for _ in range(300):
        if rng.random() < 0.5:
            offset = rng.randrange(SIZE)
            data = rng.randbytes(rng.randrange(1, min(2000, SIZE - offset) + 1))
            bench.window.store(offset, data)
            model[offset : offset + len(data)] = data
        else:
            first = rng.randrange(SIZE * 8)
            count = rng.randrange(1, min(9000, SIZE * 8 - first) + 1)
            value = rng.randrange(2)
            bench.window.bits_write(0, first, count, value)
            number = int.from_bytes(model, "little")
            mask = ((1 << count) - 1) << first
            number = number | mask if value else number & ~mask
            model[:] = number.to_bytes(SIZE, "little")
        if rng.random() < 0.1:
            bench.write_out()
            assert path.read_bytes() == model
    assert bench.window.load(0, SIZE) == model
    first = rng.randrange(SIZE * 4)
    assert (
        bench.window.bits_count(0, first, SIZE * 4)
        == (int.from_bytes(model, "little") >> first & (1 << SIZE * 4) - 1).bit_count()
    )
    position = 0
    for start, count, value in bench.window.bit_runs(0, 0, 3000, 5000):
        assert start == position
        bits = {model[n // 8] >> n % 8 & 1 for n in range(start, start + count)}
        assert bits == {value}
        position += count


def test_only_dirty_units_are_written(bench, host):
    bench.window.store(UNIT + 5, b"a")
    bench.window.store(SIZE - 1, b"z")
    host.spy.log.clear()
    bench.write_out()
    writes = [(offset, length) for op, _, offset, length in host.spy.log if op == "write"]
    last = (SIZE - 1) // UNIT * UNIT
    assert writes == [(UNIT, UNIT), (last, SIZE - last)]
    assert host.spy.count("msync") + host.spy.count("datasync") == 1


def test_change_after_the_copy_waits_for_the_next_one(bench, path):
    bench.window.store(0, b"one")
    group = bench.window.take()
    bench.window.store(0, b"two")
    bench.reactor.run(bench.window.write_out(group))
    assert path.read_bytes()[:3] == b"one"
    assert bench.window.load(0, 3) == b"two"
    bench.write_out()
    assert path.read_bytes()[:3] == b"two"


def test_put_back_is_written_by_the_next_one(bench, host, path):
    bench.window.store(10, b"kept")
    host.spy.failures[("write", "meta")] = errno.ENOSPC
    group = bench.window.take()
    with pytest.raises(StorageError):
        bench.reactor.run(bench.window.write_out(group))
    bench.window.put_back(group)
    host.spy.failures.clear()
    bench.write_out()
    assert path.read_bytes()[10:14] == b"kept"


def test_write_through_writes_its_own_units_only(bench, path):
    bench.window.store(3000, b"later")
    bench.reactor.run(bench.window.write_through(10, b"now"))
    after = path.read_bytes()
    assert after[10:13] == b"now"
    assert after[3000:3005] != b"later"
    bench.write_out()
    assert path.read_bytes()[3000:3005] == b"later"


def test_truncation_by_someone_else_is_an_error_naming_the_file(bench, path):
    """This test cuts the file under the window: an error, no SIGBUS."""
    bench.window.store(0, b"x")
    os.truncate(path, 4096)
    group = bench.window.take()
    with pytest.raises((SyncFailed, CorruptError), match="meta"):
        bench.reactor.run(bench.window.write_out(group))


def test_load_behind_a_cut_is_an_error_naming_the_file(path):
    bench = Bench(SpyHost(), path)
    try:
        os.truncate(path, 0)
        with pytest.raises((CorruptError, StorageError), match="meta"):
            bench.window.load(8192, 10)
        with pytest.raises((CorruptError, StorageError), match="meta"):
            bench.window.bits_count(8192, 0, 100)
    finally:
        bench.close()


@pytest.mark.parametrize("size", [SIZE + 1, SIZE + 100_000, 40 * SIZE])
def test_grow_and_shrink(bench, path, size):
    """This test grows within the reserved addresses and beyond them."""
    before = path.read_bytes()
    bench.window.grow(size)
    assert path.stat().st_size == size
    assert bench.window.load(0, SIZE) == before
    assert bench.window.load(SIZE, size - SIZE) == bytes(size - SIZE)
    bench.window.store(size - 1, b"e")
    bench.write_out()
    bench.window.shrink(SIZE)
    assert path.read_bytes() == before
    bench.window.grow(size)
    assert bench.window.load(size - 1, 1) == b"\0", "what was cut off came back"


def test_grow_that_has_no_room_is_undone(bench, path, monkeypatch):
    def full(offset, length):
        raise StorageError(errno.ENOSPC, "fallocate", str(path))

    monkeypatch.setattr(bench.handle, "reserve", full)
    with pytest.raises(StorageError):
        bench.window.grow(SIZE + 4096)
    assert path.stat().st_size == SIZE
    assert bench.window.size == SIZE
