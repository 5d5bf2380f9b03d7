# SPDX-License-Identifier: MIT
"""The C helper through cffi: both queue back ends, views, buffers, and the host process around
them (signals, threads, faulthandler, forks). tests/c has the deeper tests of the same code.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import mmap
import os
import random
import re
import select
import signal
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

import mmcow
from mmcow import native
from mmcow.errors import StorageError, UsageError
from mmcow.native import ffi, lib

PAGE = 4096
UNIT = 512
BACKENDS = {"io_uring": lib.MMC_BACKEND_URING, "threads": lib.MMC_BACKEND_POOL}


class Queue:
    """The queue with Python's shapes: ops as dicts, completions as (token, result)."""

    def __init__(self, backend, depth=8):
        error = ffi.new("int *")
        self.pointer = lib.mmc_queue_open(backend, depth, 0, error)
        if self.pointer == ffi.NULL:
            raise StorageError(-error[0], "open", "queue")

    def turn(self, ops=(), most=64, timeout_ms=-1):
        array = ffi.new("struct mmc_op[]", list(ops))
        done = ffi.new("struct mmc_done[]", most)
        n = lib.mmc_queue_turn(self.pointer, array, len(ops), done, most, timeout_ms)
        return n if n < 0 else [(d.token, d.result) for d in done[0:n]]

    def run(self, **op):
        """One op to its end: its result."""
        (completion,) = self.turn([op], timeout_ms=20000)
        assert completion[0] == op.get("token", 0)
        return completion[1]

    def collect(self, count):
        found = []
        while len(found) < count:
            found += self.turn()
        return found

    def close(self):
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            lib.mmc_queue_close(pointer)


@pytest.fixture(params=BACKENDS)
def backend(request):
    try:
        Queue(BACKENDS[request.param]).close()
    except StorageError as refused:
        pytest.skip(f"{request.param}: {refused.strerror}")
    return BACKENDS[request.param]


@pytest.fixture
def queue(backend):
    queue = Queue(backend)
    yield queue
    queue.close()


@pytest.fixture
def file(tmp_path):
    """A descriptor of an empty file, for reading and writing."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def transfer(code, fd, offset, buffer):
    return {
        "code": code,
        "fd": fd,
        "offset": offset,
        "address": native.address_of(buffer),
        "length": len(buffer),
    }


# ---- queue: opening ------------------------------------------------------------


def test_open_auto_takes_what_there_is():
    queue = Queue(lib.MMC_BACKEND_AUTO)
    assert lib.mmc_queue_backend(queue.pointer) in BACKENDS.values()
    assert queue.run(code=lib.MMC_NOP) == 0
    queue.close()


def test_open_unknown_backend_is_refused():
    with pytest.raises(StorageError) as refused:
        Queue(9)
    assert refused.value.errno == errno.EINVAL


def test_open_reports_its_backend(backend, queue):
    assert lib.mmc_queue_backend(queue.pointer) == backend


def test_close_of_null_does_nothing():
    lib.mmc_queue_close(ffi.NULL)


# ---- queue: transfers ----------------------------------------------------------


def test_write_then_read_back(queue, file):
    data = os.urandom(100_000)
    assert queue.run(**transfer(lib.MMC_WRITE, file, 12345, data)) == len(data)
    assert os.pread(file, len(data), 12345) == data
    back = bytearray(len(data))
    assert queue.run(**transfer(lib.MMC_READ, file, 12345, back)) == len(data)
    assert back == data


def test_iovecs_scatter_and_gather(queue, file):
    parts = [os.urandom(n) for n in (1, 4095, 0, 70_000, 3)]
    whole = b"".join(parts)

    def vector(buffers):
        return b"".join(struct.pack("@PN", native.address_of(b), len(b)) for b in buffers)

    op = {"fd": file, "length": len(parts)}
    array = vector(parts)
    address = native.address_of(array)
    assert queue.run(code=lib.MMC_WRITEV, address=address, **op) == len(whole)
    assert os.pread(file, len(whole) + 1, 0) == whole
    back = [bytearray(len(part)) for part in parts]
    array = vector(back)
    address = native.address_of(array)
    assert queue.run(code=lib.MMC_READV, address=address, **op) == len(whole)
    assert back == parts


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_read_at_the_end_zeroes_the_rest(queue, tmp_path, flags):
    path = tmp_path / "odd"
    path.write_bytes(b"e" * 1234)
    try:
        fd = os.open(path, os.O_RDONLY | flags)
    except OSError as refused:
        pytest.skip(f"O_DIRECT: {refused.strerror}")
    buffer = native.aligned(8192)
    buffer[:] = b"x" * 8192
    assert queue.run(**transfer(lib.MMC_READ, fd, 0, buffer)) == 1234
    assert bytes(buffer) == b"e" * 1234 + bytes(8192 - 1234)
    buffer[:] = b"x" * 8192
    assert queue.run(**transfer(lib.MMC_READ, fd, 1 << 20, buffer)) == 0
    assert native.is_zero(buffer)
    os.close(fd)


def test_non_blocking_descriptor_of_a_file(queue, tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    assert queue.run(**transfer(lib.MMC_WRITE, fd, 0, b"abc")) == 3
    back = bytearray(3)
    assert queue.run(**transfer(lib.MMC_READ, fd, 0, back)) == 3
    assert back == b"abc"
    os.close(fd)


def test_other_codes(queue, file):
    assert queue.run(code=lib.MMC_FALLOCATE, fd=file, offset=0, length=8192) == 0
    assert os.fstat(file).st_size == 8192
    os.pwrite(file, b"x" * 8192, 0)
    punch = 0x02 | 0x01
    assert queue.run(code=lib.MMC_FALLOCATE, fd=file, mode=punch, offset=4096, length=4096) == 0
    assert os.pread(file, 8192, 0) == b"x" * 4096 + bytes(4096)
    assert queue.run(code=lib.MMC_DATASYNC, fd=file) == 0
    with mmap.mmap(file, 8192) as shared:
        address = native.address_of(shared)
        assert queue.run(code=lib.MMC_MSYNC, fd=-1, address=address, length=8192) == 0


def test_errors_come_back_as_results(queue, file):
    buffer = bytearray(10)
    assert queue.run(**transfer(lib.MMC_READ, -1, 0, buffer)) == -errno.EBADF
    assert queue.run(code=lib.MMC_READ, fd=file, address=1, length=0) == 0
    os.pwrite(file, b"x", 0)
    assert queue.run(code=lib.MMC_READ, fd=file, address=1, length=10) == -errno.EFAULT
    assert queue.run(code=lib.MMC_MSYNC, fd=-1, address=1, length=10) == -errno.EINVAL


def test_one_bad_op_refuses_all(queue, file):
    good = transfer(lib.MMC_WRITE, file, 0, b"abc")
    assert queue.turn([good, {"code": 1234}, good]) == -errno.EINVAL
    assert queue.turn(timeout_ms=20) == []
    assert os.fstat(file).st_size == 0


def test_tokens_are_64_bits(queue):
    tokens = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert queue.turn([{"code": lib.MMC_NOP, "token": t} for t in tokens], most=0) == []
    assert sorted(queue.collect(len(tokens))) == [(t, 0) for t in tokens]


def test_thousands_of_ops_beyond_the_depth(backend, file):
    queue = Queue(backend, depth=4)
    data = os.urandom(5000)
    address = native.address_of(data)
    ops = [
        {
            "code": lib.MMC_WRITE, "fd": file, "token": i,
            "offset": i, "address": address + i, "length": 1,
        }
        for i in range(5000)
    ]  # fmt: skip
    assert queue.turn(ops, most=0, timeout_ms=0) == []
    assert sorted(queue.collect(5000)) == [(i, 1) for i in range(5000)]
    assert os.pread(file, 5000, 0) == data
    queue.close()


def test_close_waits_for_what_is_in_flight(backend, file):
    queue = Queue(backend, depth=1)
    data = native.aligned(1 << 20)
    data[:] = b"d" * len(data)
    ops = [transfer(lib.MMC_WRITE, file, i << 20, data) for i in range(8)]
    assert queue.turn(ops, most=0, timeout_ms=0) == []
    queue.close()
    assert os.fstat(file).st_size == 8 << 20


# ---- queue: waiting ------------------------------------------------------------


def test_time_out(queue):
    begin = time.monotonic()
    assert queue.turn(timeout_ms=0) == []
    assert queue.turn(timeout_ms=60) == []
    assert time.monotonic() - begin >= 0.06


def test_descriptor_polls_while_completions_wait(queue):
    fd = lib.mmc_queue_fd(queue.pointer)
    assert select.select([fd], [], [], 0)[0] == []
    queue.turn([{"code": lib.MMC_NOP}, {"code": lib.MMC_NOP}], most=0)
    assert select.select([fd], [], [], 10)[0] == [fd]
    queue.collect(2)
    assert select.select([fd], [], [], 0)[0] == []


def test_signal_interrupts_a_wait(queue):
    """This test checks that Ctrl-C gets through: SIGINT ends the wait with -EINTR."""
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    result = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the handler runs after the call
        result.append(queue.turn(timeout_ms=20000))
        time.sleep(10)
    assert result in ([], [-errno.EINTR])
    assert queue.run(code=lib.MMC_NOP) == 0


def test_waiting_thread_keeps_nobody_from_submitting(queue):
    found = []

    def wait():
        while not found:
            found.extend(queue.turn())

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.1)
    begin = time.monotonic()
    mine = queue.turn([{"code": lib.MMC_NOP, "token": 5}], timeout_ms=0)
    assert time.monotonic() - begin < 1
    if mine:  # this thread was faster: the waiter needs one of its own
        assert queue.turn([{"code": lib.MMC_NOP, "token": 5}], most=0, timeout_ms=0) == []
    waiter.join(20)
    assert found == [(5, 0)]


def test_many_threads_share_a_queue(queue, file):
    """This test submits and waits from several threads at once; nothing is lost or doubled."""
    os.pwrite(file, b"x" * PAGE, 0)
    found = []
    buffers = [bytearray(PAGE) for _ in range(4)]

    def work(number):
        op = transfer(lib.MMC_READ, file, 0, buffers[number])
        for i in range(500):
            found.extend(queue.turn([{**op, "token": number * 500 + i}], timeout_ms=0))
        while len(found) < 2000:
            found.extend(queue.turn(timeout_ms=10))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [(token, PAGE) for token in range(2000)]


# ---- views ----------------------------------------------------------------------


class View:
    """A mapped or memory view, closed by ``close``."""

    def __init__(self, size, reserve=0, unit=UNIT, fd=None):
        error = ffi.new("int *")
        if fd is None:
            self.pointer = lib.mmc_view_memory(size, reserve, unit, error)
        else:
            self.pointer = lib.mmc_view_map(fd, size, reserve, unit, error)
        if self.pointer == ffi.NULL:
            raise StorageError(-error[0], "open", "view")

    def load(self, offset, length):
        data = bytearray(length)
        rc = lib.mmc_view_load(self.pointer, offset, ffi.from_buffer(data), length)
        return rc if rc < 0 else bytes(data)

    def store(self, offset, data):
        return lib.mmc_view_store(self.pointer, offset, data, len(data))

    def dirty(self):
        return lib.mmc_view_dirty(self.pointer, 0, lib.mmc_view_size(self.pointer))

    def bit_runs(self, base, first, count, most=100):
        runs = ffi.new("struct mmc_run[]", most)
        n = lib.mmc_view_bit_runs(self.pointer, base, first, count, runs, most)
        return n if n < 0 else [(r.start, r.count, r.value) for r in runs[0:n]]

    def snapshot(self, offset, length, most=100, room=1 << 20):
        runs = ffi.new("struct mmc_run[]", most)
        copy = ffi.new("char[]", room)
        n = lib.mmc_view_snapshot(self.pointer, offset, length, runs, most, copy, room)
        return (
            n if n < 0 else [(r.start, ffi.buffer(copy + r.value, r.count)[:]) for r in runs[0:n]]
        )

    def close(self):
        lib.mmc_view_close(self.pointer)


@pytest.fixture(params=["mapped", "memory"])
def view(request, file):
    os.ftruncate(file, 4 * PAGE)
    view = View(4 * PAGE, 1 << 20, fd=file if request.param == "mapped" else None)
    yield view
    view.close()


@pytest.mark.parametrize("unit", [0, 500])
def test_view_bad_unit_is_refused(unit):
    with pytest.raises(StorageError) as refused:
        View(PAGE, unit=unit)
    assert refused.value.errno == errno.EINVAL


def test_view_of_a_bad_descriptor_is_refused():
    with pytest.raises(StorageError) as refused:
        View(PAGE, fd=-1)
    assert refused.value.errno == errno.EBADF


def test_view_store_reaches_no_file(view, file):
    assert view.store(3001, b"a" * 1000) == 0
    assert view.load(3000, 1002) == b"\0" + b"a" * 1000 + b"\0"
    assert view.dirty() == 3
    assert os.pread(file, 4 * PAGE, 0) == bytes(4 * PAGE)


def test_view_fill_marks_nothing(view):
    assert lib.mmc_view_fill(view.pointer, 5, b"abc", 3) == 0
    assert view.load(5, 3) == b"abc"
    assert view.dirty() == 0
    lib.mmc_view_mark(view.pointer, UNIT - 1, 2)
    assert view.dirty() == 2


def test_view_access_beyond_the_size(view):
    assert view.load(4 * PAGE, 1) == -errno.ERANGE
    assert view.store(4 * PAGE - 1, b"ab") == -errno.ERANGE
    assert view.store(2**64 - 1, b"ab") == -errno.ERANGE
    assert view.bit_runs(0, 4 * PAGE * 8, 1) == -errno.ERANGE
    assert view.load(4 * PAGE, 0) == b""


def test_view_snapshot_takes_and_clears(view):
    view.store(0, b"a")
    view.store(UNIT, b"b")
    view.store(10 * UNIT, b"c")
    assert view.snapshot(0, 4 * PAGE, most=1) == [
        (0, b"a".ljust(UNIT, b"\0") + b"b".ljust(UNIT, b"\0"))
    ]
    assert view.dirty() == 1
    assert view.snapshot(0, 10 * UNIT) == []
    assert view.snapshot(10 * UNIT, 1, room=UNIT - 1) == []
    assert view.snapshot(10 * UNIT, 1, room=UNIT) == [(10 * UNIT, b"c".ljust(UNIT, b"\0"))]
    assert view.dirty() == 0


def test_view_sizes(view):
    view.store(0, b"a" * 4 * PAGE)
    assert lib.mmc_view_set_size(view.pointer, 1000) == 0
    assert lib.mmc_view_size(view.pointer) == 1000
    assert view.dirty() == 2
    assert lib.mmc_view_set_size(view.pointer, 4 * PAGE) == 0
    assert view.load(0, PAGE) == (b"a" * 1000).ljust(PAGE, b"\0")
    assert view.dirty() == 2
    assert lib.mmc_view_set_size(view.pointer, (1 << 20) + 1) == -errno.ENOSPC


def test_view_bits_against_a_list(view, rng):
    base, limit = 37, 3000
    bits = [0] * limit
    for _ in range(300):
        first = rng.randrange(limit)
        count = rng.randrange(min(limit - first, rng.choice((10, 200, limit))) + 1)
        value = rng.randrange(2)
        assert lib.mmc_view_bits_write(view.pointer, base, first, count, value) == 0
        bits[first : first + count] = [value] * count
        first = rng.randrange(limit)
        runs = view.bit_runs(base, first, limit - first, most=5000)
        assert [value for _, count, value in runs for _ in range(count)] == bits[first:]
        assert all(left[2] != right[2] for left, right in pairwise(runs))
        assert lib.mmc_view_bits_count(view.pointer, base, first, limit - first) == sum(
            bits[first:]
        )
    assert len(view.bit_runs(base, 0, limit, most=3)) <= 3


def test_view_release_gives_clean_pages_back(file):
    os.ftruncate(file, 2 * PAGE)
    view = View(2 * PAGE, fd=file)
    lib.mmc_view_fill(view.pointer, 0, b"a", 1)
    view.store(PAGE, b"b")
    assert lib.mmc_view_release(view.pointer) == 0
    assert view.load(0, 1) == b"\0"
    assert view.load(PAGE, 1) == b"b"
    view.close()


# ---- views: SIGBUS --------------------------------------------------------------


@pytest.fixture
def truncated(file):
    """A view of four pages whose file has one."""
    os.ftruncate(file, 4 * PAGE)
    view = View(4 * PAGE, fd=file)
    view.store(0, b"a")
    os.ftruncate(file, PAGE)
    yield view
    view.close()


def check_faults(view):
    assert view.load(0, 1) == b"a"
    assert view.load(2 * PAGE, 1) == -errno.EFAULT
    assert view.store(2 * PAGE, b"x") == -errno.EFAULT
    assert view.bit_runs(0, 0, 4 * PAGE * 8) == -errno.EFAULT
    assert lib.mmc_view_bits_write(view.pointer, 2 * PAGE, 0, 8, 1) == -errno.EFAULT
    assert lib.mmc_view_bits_count(view.pointer, 0, 0, 4 * PAGE * 8) == -errno.EFAULT
    lib.mmc_view_mark(view.pointer, 2 * PAGE, 1)
    assert view.snapshot(0, 4 * PAGE) == -errno.EFAULT
    assert view.dirty() == 2  # marked again


def test_truncated_file_is_efault(truncated):
    assert faulthandler.is_enabled()  # by pytest, whose handler it must survive
    check_faults(truncated)


def test_truncated_file_while_faulthandler_comes_and_goes(truncated, capfd):
    check_faults(truncated)
    faulthandler.disable()
    check_faults(truncated)
    with capfd.disabled():
        faulthandler.enable()
    check_faults(truncated)


def test_truncated_file_with_a_python_handler(truncated):
    before = signal.signal(signal.SIGBUS, lambda *_: None)
    try:
        check_faults(truncated)
    finally:
        signal.signal(signal.SIGBUS, before)


def test_truncated_file_in_threads(truncated):
    results = []

    def work():
        results.extend(truncated.load(3 * PAGE, 8) for _ in range(500))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [-errno.EFAULT] * 2000


# ---- forks ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_is_harmless(queue, file):
    os.ftruncate(file, PAGE)
    view = View(PAGE, fd=file)
    view.store(0, b"z")
    assert queue.run(code=lib.MMC_MSYNC, address=lib.mmc_view_shared(view.pointer), length=1) == 0
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert queue.turn([{"code": lib.MMC_NOP}]) == -errno.EBADF
            assert view.load(0, 1) == -errno.EBADF
            assert view.store(0, b"y") == -errno.EBADF
            queue.close()
            view.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert view.load(0, 1) == b"z"
    assert queue.run(code=lib.MMC_NOP) == 0
    view.close()


# ---- buffers and files ------------------------------------------------------------


def test_check_returns_or_raises():
    assert native.check(7, "read", "disk") == 7
    with pytest.raises(StorageError) as failed:
        native.check(-errno.EIO, "read", "disk", 4096, 512)
    assert failed.value.errno == errno.EIO
    assert str(failed.value) == "disk: read at 4096+512: Input/output error"
    assert isinstance(failed.value, OSError)


def test_address_of_every_kind_of_buffer():
    array = bytearray(b"abc")
    with mmap.mmap(-1, PAGE) as anonymous:
        anonymous[:3] = b"abc"
        for buffer in (b"abc", array, memoryview(b"abc"), memoryview(array)[0:], anonymous):
            assert ctypes.string_at(native.address_of(buffer), 3) == b"abc"
    assert native.address_of(memoryview(array)[1:]) == native.address_of(array) + 1


@pytest.mark.parametrize("alignment", [1, 512, 4096, 65536])
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_aligned_buffer(size, alignment):
    buffer = native.aligned(size, alignment)
    assert len(buffer) == size
    assert buffer.format == "B"
    assert not buffer.readonly
    assert native.is_zero(buffer)
    assert size == 0 or native.address_of(buffer) % alignment == 0
    buffer[:] = b"x" * size  # what is reused is zeroed again: the next round checks


def test_aligned_buffer_lives_as_long_as_a_slice():
    part = native.aligned(1 << 20)[4096:8192]
    part[:] = b"p" * 4096
    gc.collect()
    others = [native.aligned(1 << 20) for _ in range(8)]
    assert bytes(part) == b"p" * 4096
    assert all(native.is_zero(other) for other in others)


def test_aligned_buffer_is_freed():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident()
    for _ in range(1000):
        native.aligned(1 << 20)
    assert (resident() - before) * PAGE < 100 << 20


@pytest.mark.parametrize("alignment", [3000, 1 << 63])
def test_aligned_buffer_that_cannot_be(alignment):
    with pytest.raises(StorageError) as refused:
        native.aligned(10, alignment)
    assert refused.value.errno in (errno.EINVAL, errno.ENOMEM)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_trim_gives_the_heap_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [ctypes.memset(libc.malloc(64 << 10), 1, 64 << 10) for _ in range(1000)]
    last = blocks.pop()  # all others lie below it
    for block in blocks:
        libc.free(block)
    before = Path("/proc/self/statm").read_text().split()[1]
    lib.mmc_memory_trim()
    after = Path("/proc/self/statm").read_text().split()[1]
    assert (int(before) - int(after)) * mmap.PAGESIZE > 40 << 20
    libc.free(last)


def test_is_zero():
    assert native.is_zero(b"")
    assert native.is_zero(bytes(100))
    for at in (0, 15, 16, 99):
        data = bytearray(100)
        data[at] = 1
        assert not native.is_zero(data)
        assert native.is_zero(memoryview(data)[:at])


def test_zero_run():
    data = bytearray(10_000)
    assert native.zero_run(data) == (10_000, True)
    data[5000] = 1
    assert native.zero_run(data) == (4096, True)
    assert native.zero_run(memoryview(data)[4096:]) == (4096, False)
    assert native.zero_run(data, 512) == (4608, True)
    assert native.zero_run(b"") == (0, True)


def test_direct_alignment(file):
    known = native.direct_alignment(file)
    assert known is None or all(value & (value - 1) == 0 for value in known)
    with pytest.raises(StorageError) as failed:
        native.direct_alignment(-1)
    assert failed.value.errno == errno.EBADF


def test_fallocate(file):
    assert lib.mmc_fallocate(file, 0, 0, 5000) == 0
    assert os.fstat(file).st_size == 5000
    assert lib.mmc_fallocate(file, 0, 2**63, 1) == -errno.EINVAL
    assert lib.mmc_fallocate(-1, 0, 0, 1) == -errno.EBADF


# ---- the stub -------------------------------------------------------------------


def test_stub_matches_the_header():
    """This test keeps the hand-written types in step with the contract."""
    root = Path(native.__file__).parent
    header = (root.parent / "csrc" / "mmc_api.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    stub = (root / "_mmc.pyi").read_text()
    declared = {
        name: 0 if arguments.strip() == "void" else arguments.count(",") + 1
        for name, arguments in re.findall(r"\b(mmc_\w+)\(([^)]*)\);", header)
    }
    typed = {
        name: arguments.count(",") - 1 - arguments.rstrip().endswith(",")
        for name, arguments in re.findall(r"def (mmc_\w+)\(([^)]*)\)", stub)
    }
    assert typed == declared
    assert set(re.findall(r"#define (MMC_\w+)", header)) == set(re.findall(r"(MMC_\w+): int", stub))


def test_public_aligned_buffer_is_read_into_without_a_copy(tmp_path):
    content = random.Random(1).randbytes(1 << 20)
    (tmp_path / "disk").write_bytes(content)
    buffer = mmcow.aligned_buffer(1 << 20)
    assert not any(buffer)
    assert native.address_of(buffer) % 4096 == 0
    with mmcow.open(tmp_path / "disk", format="raw") as disk:
        assert disk.readinto(0, buffer) == 1 << 20
    assert buffer == content


@pytest.mark.parametrize("length", [-1, 1 << 63, 1 << 70])
def test_public_aligned_buffer_of_an_impossible_length(length):
    with pytest.raises(UsageError, match=f"aligned buffer of {length} bytes"):
        mmcow.aligned_buffer(length)


def test_public_aligned_buffer_without_memory():
    with pytest.raises(StorageError, match="Cannot allocate memory"):
        mmcow.aligned_buffer((1 << 63) - 1)
