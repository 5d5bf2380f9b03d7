# SPDX-License-Identifier: MIT
"""The seam over Linux itself: kinds of files, short and failing calls, both queues."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import weakref

import pytest

from mmcow import StorageError, SyncFailed, UsageError
from mmcow.native import aligned
from mmcow.storage import handle as handles
from mmcow.storage import linux
from mmcow.storage.host import FALLOCATE_PUNCH, Identity
from mmcow.storage.linux import LinuxHost
from mmcow.tasks import Reactor


@pytest.fixture(params=["io_uring", "threads"])
def host(request):
    return LinuxHost(request.param)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.fixture
def queue(host):
    queue = host.queue()
    yield queue
    queue.close()


@pytest.fixture
def handle(host, path):
    handle = host.open(str(path), write=True, direct=False)
    yield handle
    handle.close()


def test_backend_is_the_one_asked_for(host, queue):
    assert queue.backend == host.backend
    assert not queue.busy
    assert queue.fileno() >= 0


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("MMCOW_QUEUE", "threads")
    queue = LinuxHost().queue()
    assert queue.backend == "threads"
    queue.close()
    queue.close()
    with pytest.raises(UsageError):
        LinuxHost("fast")


def test_facts_of_a_handle(handle, path):
    assert handle.kind == "file"
    assert handle.size() == 16384
    assert handle.allocated() == 16384
    assert handle.mtime() == int(path.stat().st_mtime)
    assert handle.identity == Identity(path.stat().st_dev, path.stat().st_ino)
    assert handle.alignment == (1, 1)
    assert not os.get_inheritable(handle.descriptor)


def test_direct_handle_knows_its_alignment(host, path):
    handle = host.open(str(path), write=False, direct=True)
    memory, offset = handle.alignment
    assert offset in (512, 4096)
    assert memory >= 1
    assert handle.read_at(0, 4096) == path.read_bytes()[:4096]
    handle.close()


def test_synchronous_calls(handle, path):
    assert handle.read_at(250, 10) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
    assert handle.read_at(16380, 100) == bytes([252, 253, 254, 255])
    assert handle.read_at(99999, 1) == b""
    handle.write_at(5, b"hello")
    handle.datasync()
    assert path.read_bytes()[5:10] == b"hello"
    handle.truncate(40960)
    assert handle.size() == 40960
    assert handle.next_data(0) == 0
    assert handle.next_hole(0) == 16384
    assert handle.next_data(20000) == 40960
    handle.reserve(16384, 4096)
    assert handle.size() == 40960
    handle.sync()
    handle.drop_cache()


def test_direct_read_of_an_odd_length(host, tmp_path):
    """This test reads up to the odd end of a file past the cache, and less than a block."""
    path = tmp_path / "odd"
    path.write_bytes(bytes(range(250)) * 8)
    handle = host.open(str(path), write=False, direct=True)
    assert handle.read_at(0, 2000) == path.read_bytes()
    assert handle.read_at(0, 100) == path.read_bytes()[:100]
    handle.close()


def test_closed_handle_raises_and_closes_once(handle):
    handle.close()
    handle.close()
    with pytest.raises((StorageError, OSError)):
        handle.size()


@pytest.mark.parametrize("flags", [True, False])
def test_missing_file(host, tmp_path, flags):
    with pytest.raises(StorageError) as caught:
        host.open(str(tmp_path / "no"), write=flags, direct=flags)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(StorageError):
        host.stat("with\0nul")


def test_create_refuses_a_taken_name(host, path):
    with pytest.raises(StorageError) as caught:
        host.create(str(path))
    assert caught.value.errno == errno.EEXIST


def test_a_device_that_does_not_say_whether_it_is_read_only_is_no_error(handle, path):
    handles._refuse_read_only(str(path), handle.descriptor)  # ENOTTY: it is a regular file
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        fcntl.ioctl(handle.descriptor, handles._BLKROGET, bytearray(4))


def test_requests_through_the_queue(queue, handle, path):
    reactor = Reactor(queue)
    into = [memoryview(bytearray(100)), memoryview(bytearray(300))]
    assert reactor.wait(queue.read(handle, 16200, into)) == 184
    assert bytes(into[0]) + bytes(into[1])[:84] == path.read_bytes()[16200:]
    assert not any(into[1][84:]), "what the file does not have reads as zeros"
    assert reactor.wait(queue.write(handle, 10, [memoryview(b"ab"), memoryview(b"cd")])) == 4
    assert reactor.wait(queue.write(handle, 20, [memoryview(b"whole")])) == 5
    reactor.wait(queue.datasync(handle))
    reactor.wait(queue.fallocate(handle, FALLOCATE_PUNCH, 4096, 4096))
    content = path.read_bytes()
    assert content[10:14] == b"abcd"
    assert content[20:25] == b"whole"
    assert not any(content[4096:8192])


def test_changes_in_flight_are_those_of_the_range(queue, handle):
    write = queue.write(handle, 4096, [aligned(4096)])
    punch = queue.fallocate(handle, FALLOCATE_PUNCH, 8192, 4096)
    queue.read(handle, 0, [aligned(512)])
    queue.datasync(handle)
    assert queue.busy
    assert queue.changes_in_flight(handle, 0, 4096) == []
    assert queue.changes_in_flight(handle, 4095, 4097) == [write]
    assert queue.changes_in_flight(handle, 0, 1 << 63) == [write, punch]
    assert queue.changes_in_flight(object(), 0, 1 << 63) == []
    reactor = Reactor(queue)
    while queue.busy:
        reactor.poll()
    assert write.done
    assert punch.done


def test_errors_of_requests_name_file_and_place(host, queue, path):
    handle = host.open(str(path), write=False, direct=False)
    reactor = Reactor(queue)
    with pytest.raises(StorageError) as caught:
        reactor.wait(queue.write(handle, 4096, [memoryview(b"x")]))
    assert caught.value.errno == errno.EBADF
    assert (caught.value.path, caught.value.offset) == (str(path), 4096)
    assert not isinstance(caught.value, SyncFailed)
    handle.close()
    with pytest.raises(SyncFailed):
        reactor.wait(queue.datasync(handle))


def test_more_requests_than_the_queue_is_deep(queue, handle, path):
    reactor = Reactor(queue)
    content = path.read_bytes()
    buffers = [memoryview(bytearray(7)) for _ in range(2000)]
    waits = [queue.read(handle, n * 8, [buffer]) for n, buffer in enumerate(buffers)]
    for wait in waits:
        reactor.wait(wait)
    for n, buffer in enumerate(buffers):
        assert buffer == content[n * 8 : n * 8 + 7]


def test_lone_request_needs_no_other_thread_until_two_wait(queue, handle, monkeypatch):
    alone = []
    run = linux.lib.mmc_queue_alone

    class Spy:
        def __getattr__(self, name):
            return getattr(lib, name)

        def mmc_queue_alone(self, *arguments):
            alone.append(run(*arguments))
            return alone[-1]

    lib = linux.lib
    monkeypatch.setattr(linux, "lib", Spy())
    reactor = Reactor(queue)
    assert reactor.perform(lambda: queue.datasync(handle)) == 0
    assert alone == [1]
    queue.submit()  # as a thread does while another waits in the kernel
    assert reactor.perform(lambda: queue.datasync(handle)) == 0
    assert alone == [1]


def test_submitted_without_a_turn_and_collected_later(queue, handle):
    done = queue.write(handle, 0, [memoryview(b"early")])
    queue.submit()
    queue.submit()
    Reactor(queue).wait(done)
    assert handle.read_at(0, 5) == b"early"


def test_closing_with_requests_in_flight_waits_for_them(host, handle):
    queue = host.queue()
    for n in range(100):
        queue.write(handle, n * 4, [memoryview(b"late")])
    queue.submit()
    queue.close()
    assert handle.read_at(0, 400) == b"late" * 100


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("parts", [1, 2])
def test_buffers_are_kept_until_the_result_is_in(queue, handle, operation, parts):
    """This test forgets buffers that the kernel still has: freed memory must not be written to."""

    class Buffer(bytearray):
        pass

    buffers = [Buffer(4096) for _ in range(parts)]
    watches = [weakref.ref(buffer) for buffer in buffers]
    getattr(queue, operation)(handle, 0, [memoryview(buffer) for buffer in buffers])
    del buffers
    gc.collect()
    assert all(watch() is not None for watch in watches)
    reactor = Reactor(queue)
    while queue.busy:
        reactor.poll()
    gc.collect()
    assert all(watch() is None for watch in watches)
