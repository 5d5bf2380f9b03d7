# SPDX-License-Identifier: MIT
"""The verbs as awaitables: batches, cancellation, closing, and what outlives an awaitable."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import weakref

import pytest

import mmcow
from mmcow import (
    ClosedError,
    Interrupted,
    LockedError,
    ReadOnlyError,
    StorageError,
    UsageError,
    aio,
)
from tests.unit.spying import SpyHost

SIZE = 1 << 20


@pytest.fixture(params=["io_uring", "threads"])
def host(request) -> SpyHost:
    return SpyHost(request.param)


@pytest.fixture
def base(tmp_path) -> bytes:
    content = os.urandom(SIZE)
    (tmp_path / "base.raw").write_bytes(content)
    return content


@pytest.fixture
def overlay(tmp_path, base):
    path = tmp_path / "top.acow"
    mmcow.create(path, backing="base.raw", backing_format="raw", options={"cluster_size": "4k"})
    return path


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(work) -> None:
    """asyncio.run with a bound: a lost completion is a failure and no hang."""

    async def bounded():
        await asyncio.wait_for(work, 10)

    asyncio.run(bounded())


def test_every_verb_awaited(overlay, base, host):
    async def work():
        async with await aio.open(overlay, write=True, host=host) as disk:
            assert disk.size == SIZE
            assert disk.path == str(overlay)
            assert [layer.format for layer in disk.chain] == ["add-cow", "raw"]
            assert await disk.read(5, 5000) == base[5:5005]
            assert await disk.write(100, b"hello") == 5
            into = bytearray(9)
            assert await disk.readinto(98, into) == 9
            assert into == base[98:100] + b"hello" + base[105:107]
            await disk.write_zeroes(8192, 8192)
            await disk.discard(0, 4096)
            await disk.flush()
            await disk.resize(SIZE + 700)
            assert disk.size == SIZE + 1024
            assert await disk.read(8192, 8192) == bytes(8192)
            assert await disk.read(SIZE, 1024) == bytes(1024)
            assert sum(status.length for status in disk.block_status()) == SIZE + 1024

    run(work())


def test_requests_of_one_pass_are_in_flight_together(overlay, base, host):
    async def work():
        async with await aio.open(overlay, write=True, host=host) as disk:
            reads = [disk.read(i * 1000, 4000) for i in range(100)]
            writes = [disk.write(500_000 + i * 3000, bytes([i]) * 3000) for i in range(100)]
            *found, _ = await asyncio.gather(*reads, asyncio.gather(*writes))
            assert found == [base[i * 1000 : i * 1000 + 4000] for i in range(100)]
            for i in range(100):
                assert await disk.read(500_000 + i * 3000, 3000) == bytes([i]) * 3000

    run(work())


def test_errors_are_those_of_the_synchronous_verbs(overlay, host):
    async def work():
        async with await aio.open(overlay, host=host) as disk:
            for call, error in (
                (lambda: disk.read(SIZE, 1), UsageError),
                (lambda: disk.read(0, -1), UsageError),
                (lambda: disk.read(1.5, 1), TypeError),
                (lambda: disk.readinto(0, b"fixed"), UsageError),
                (lambda: disk.readinto(0, "text"), TypeError),
                (lambda: disk.write(0, b"x"), ReadOnlyError),
                (lambda: disk.write_zeroes(0, 1), ReadOnlyError),
                (lambda: disk.resize(5.0), TypeError),
                (lambda: disk.resize(-1), UsageError),
            ):
                with pytest.raises(error):
                    await call()
            assert await disk.read(7, 0) == b""

    run(work())


def test_storage_error_reaches_the_awaiting_task_only(overlay, host):
    async def work():
        async with await aio.open(overlay, write=True, host=host) as disk:
            host.spy.failures[("read", "base.raw")] = errno.EIO
            bad = asyncio.ensure_future(disk.read(0, 4096))
            with pytest.raises(StorageError):
                await bad
            host.spy.failures.clear()
            await disk.read(0, 4096)

    run(work())


def test_cancelled_read_keeps_its_buffer_until_the_kernel_is_done(overlay, host):
    """This test cancels an awaitable whose request the queue still has: the buffer must stay
    referenced, or the kernel would write into freed memory."""

    class Buffer(bytearray):
        pass

    async def work():
        async with await aio.open(overlay, write=True, host=host) as disk:
            host.spy.hold = {"read"}
            buffer = Buffer(4096)
            watch = weakref.ref(buffer)
            task = asyncio.ensure_future(disk.readinto(0, buffer))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del buffer, task
            gc.collect()
            assert watch() is not None, "freed while the kernel may write to it"
            with pytest.raises(BufferError):
                watch().extend(b"x")  # and it cannot move either
            host.spy.release()
            disk.poll()  # what the queue's descriptor would have led to
            await disk.read(0, 1)
            await asyncio.sleep(0)
            gc.collect()
            assert watch() is None, "kept for ever"

    run(work())


def test_real_queue_keeps_the_buffer_of_a_cancelled_read(overlay):
    class Buffer(bytearray):
        pass

    async def work():
        async with await aio.open(overlay) as disk:
            buffer = Buffer(4096)
            watch = weakref.ref(buffer)
            task = asyncio.ensure_future(disk.readinto(0, buffer))
            await asyncio.sleep(0)
            task.cancel()
            del buffer
            gc.collect()
            assert watch() is not None
            with pytest.raises(asyncio.CancelledError):
                await task
            del task

    run(work())


@pytest.mark.parametrize("verb", ["write", "write_zeroes", "flush", "read"])
def test_cancelled_request_is_finished_and_close_waits_for_it(overlay, base, host, verb):
    async def work():
        disk = await aio.open(overlay, write=True, host=host)
        host.spy.hold = {"write", "fallocate", "datasync", "read"}
        await_what = {
            "write": lambda: disk.write(0, b"n" * 4096),
            "write_zeroes": lambda: disk.write_zeroes(0, 4096),
            "flush": disk.flush,
            "read": lambda: disk.read(0, 4096),
        }[verb]
        task = asyncio.ensure_future(await_what())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        host.spy.release()
        disk.poll()
        await closing
        with pytest.raises(ClosedError):
            await disk.read(0, 1)

    run(work())
    with mmcow.open(overlay) as disk:
        expected = {"write": b"n" * 4096, "write_zeroes": bytes(4096)}.get(verb, base[:4096])
        assert disk.read(0, 4096) == expected


def test_many_cancellations_at_random_moments(overlay, host, rng):
    """This test cancels half of three hundred overlapping requests: the rest goes on."""

    async def work():
        async with await aio.open(overlay, write=True, host=host) as disk:
            tasks = []
            for i in range(300):
                at = rng.randrange(SIZE - 9000)
                length = rng.randrange(9000)
                tasks.append(
                    asyncio.ensure_future(
                        disk.write(at, bytes([i % 255 + 1]) * length)
                        if rng.random() < 0.5
                        else disk.read(at, length)
                    )
                )
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
                if rng.random() < 0.5:
                    rng.choice(tasks).cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            bad = [e for e in ends if isinstance(e, BaseException)]
            assert all(isinstance(e, asyncio.CancelledError) for e in bad), bad
            first = await disk.read(0, SIZE)
            assert await disk.read(0, SIZE) == first

    run(work())


def test_cancelled_open_leaves_no_file_and_no_lock(overlay, host):
    """This test stops waiting for an image that is being opened: it must be closed all the same."""

    async def work():
        before = descriptors()
        for delay in (0, 0.0005, 0.002):
            task = asyncio.ensure_future(aio.open(overlay, write=True, host=host))
            await asyncio.sleep(delay)
            task.cancel()
            try:
                disk = await task
            except asyncio.CancelledError:
                pass
            else:
                await disk.close()
            for _ in range(200):
                await asyncio.sleep(0.005)
                if descriptors() <= before:
                    break
            assert descriptors() <= before
            mmcow.open(overlay, write=True).close()

    run(work())


def test_close_twice_and_verbs_after_it(overlay, host):
    async def work():
        before = descriptors()
        disk = await aio.open(overlay, write=True, host=host)
        with pytest.raises(LockedError):
            await aio.open(overlay, write=True, host=host)
        await disk.close()
        await disk.close()
        assert descriptors() == before
        for call in (
            lambda: disk.read(0, 1),
            lambda: disk.write(0, b"x"),
            disk.flush,
            lambda: disk.discard(0, 1),
            lambda: disk.resize(SIZE),
        ):
            with pytest.raises(ClosedError):
                await call()
        with pytest.raises(ClosedError):
            disk.block_status()

    run(work())


def test_close_flushes(overlay, host):
    async def work():
        disk = await aio.open(overlay, write=True, host=host)
        await disk.write(0, b"durable")
        await disk.close()

    run(work())
    assert host.spy.count("msync") == 1
    with mmcow.open(overlay) as disk:
        assert disk.read(0, 7) == b"durable"


def test_error_of_the_flush_in_close_is_raised_and_everything_released(overlay, host):
    async def work():
        before = descriptors()
        disk = await aio.open(overlay, write=True, host=host)
        await disk.write(0, b"x")
        host.spy.failures[("datasync", ".raw")] = errno.EIO
        with pytest.raises(StorageError):
            await disk.close()
        assert descriptors() == before

    run(work())


def test_interrupt_in_the_loop_frees_whoever_waits(overlay, host):
    """This test loses completions to a KeyboardInterrupt inside ``poll``: nobody may wait on."""

    async def work():
        disk = await aio.open(overlay, write=True, host=host)
        host.spy.hold = {"read"}
        waiting = asyncio.ensure_future(disk.read(0, 4096))
        await asyncio.sleep(0.01)

        def strike():
            raise KeyboardInterrupt

        poll = disk._reactor.poll
        disk._reactor.poll = strike
        disk._reactor.interrupted = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            disk.poll()
        disk._reactor.poll = poll
        with pytest.raises(Interrupted):
            await waiting
        with pytest.raises(Interrupted):
            await disk.read(0, 1)
        host.spy.release()
        await disk.close()

    run(work())


def test_image_whose_loop_is_gone_can_be_opened_again(overlay, host):
    for content in (b"first", b"again"):

        async def work(content=content):
            async with await aio.open(overlay, write=True, host=host) as disk:
                await disk.write(0, content)

        run(work())
    with mmcow.open(overlay) as disk:
        assert disk.read(0, 5) == b"again"
