# SPDX-License-Identifier: MIT
"""The verbs of ``mmcow.Image`` as awaitables, for asyncio programs.

Owns: the bridge from completions to asyncio futures, and the turn of the reactor when the
loop has time (requests made in one pass of the loop go to the kernel as one batch).

Never: contains a request algorithm, starts threads for I/O (only opening and closing, which
block in system calls, run in a worker thread).

A cancelled awaitable stops waiting, not the request: what the kernel has begun it finishes, and
the buffer stays referenced until then.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mmcow import image as sync
from mmcow.errors import ClosedError, ForkedError, Interrupted
from mmcow.native import aligned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from mmcow.engine.engine import Engine
    from mmcow.storage.host import Buffer
    from mmcow.tasks import Completion, Reactor

T = TypeVar("T")

DONE_BYTES = 16  # of a struct mmc_done


async def open(path: str | os.PathLike[str], **options: Any) -> Image:
    """Open an image; the arguments are those of ``mmcow.open``."""
    work = asyncio.ensure_future(asyncio.to_thread(sync.open_image, path, **options))
    try:
        return Image(await asyncio.shield(work))
    except asyncio.CancelledError:
        work.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(work: asyncio.Future[sync.Image]) -> None:
    """Nobody waits for this image any more: it must not keep its files and locks."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()


class Image:
    """A guest disk for the asyncio loop it was opened in; any number of requests may be awaited
    at once. Methods and errors are those of ``mmcow.Image``."""

    def __init__(self, opened: sync.Image) -> None:
        """Take over an image opened synchronously; do not use that one any more."""
        self._image = opened
        self._loop = asyncio.get_running_loop()
        self._queue: Any = opened._opener.queue
        self._engine = opened.engine
        self._reactor = opened.reactor
        self._waiting: set[asyncio.Future[Any]] = set()
        self._poll_due = False
        self._give_back: Callable[[], None] | None = None  # the queue is lent
        self._closing = False
        self._loop.add_reader(self._queue.fileno(), self.poll)

    @property
    def engine(self) -> Engine:
        """The request algorithms, for servers and jobs: begin requests under ``reactor.lock``."""
        return self._image.engine

    @property
    def reactor(self) -> Reactor:
        """Runs the requests; ``poll`` hands what was begun to the kernel."""
        return self._image.reactor

    @property
    def image(self) -> sync.Image:
        """The synchronous face, for what does not wait: layers, warnings, opener."""
        return self._image

    @property
    def is_of_this_loop(self) -> bool:
        """Whether the running loop is the one it was opened in."""
        return asyncio.get_running_loop() is self._loop

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._image.writable

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        return self._image.size

    @property
    def path(self) -> str:
        """As given to ``open``."""
        return self._image.path

    @property
    def chain(self) -> tuple[sync.LayerReport, ...]:
        """The layers, top first."""
        return self._image.chain

    async def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        offset, length = index(offset), index(length)
        self._check()
        self._engine.check_range(offset, length)
        buffer = aligned(length)
        await self.perform(lambda: self._engine.read(offset, buffer))
        return bytes(buffer)

    async def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` from ``offset``. Cancelled, it may still be written to for a while."""
        offset = index(offset)
        view = sync.writable(self.path, buffer)
        await self.perform(lambda: self._engine.read(offset, view))
        return len(view)

    async def write(self, offset: int, data: Buffer) -> int:
        """Write all of ``data``, which must not change until then."""
        offset = index(offset)
        view = sync.flat(data)
        await self.perform(lambda: self._engine.write(offset, view))
        return len(view)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make a range read as zeros."""
        offset, length = index(offset), index(length)
        await self.perform(lambda: self._engine.write_zeroes(offset, length, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Tell that a range's content is no longer needed."""
        offset, length = index(offset), index(length)
        await self.perform(lambda: self._engine.discard(offset, length))

    async def flush(self) -> None:
        """Make every change durable that was acknowledged before this call."""
        await self.perform(lambda: self._reactor.spawn(self._engine.flush()))

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Change the disk's size, durably."""
        size = sync.check_size(self.path, size)
        await self.perform(lambda: self._reactor.spawn(self._engine.resize(size, shrink=shrink)))

    def block_status(
        self, offset: int = 0, length: int | None = None, *, layer: int | None = None
    ) -> Iterator[sync.BlockStatus]:
        """What the range is made of; metadata is in memory, so this does not wait."""
        self._check()
        return self._image.block_status(offset, length, layer=layer)

    async def close(self) -> None:
        """Wait for requests in flight, flush, release files and locks."""
        if self._closing:
            return
        self._check_process()
        self._closing = True
        if self._give_back is not None:
            self._give_back()
        try:
            if self._reactor.interrupted is None:
                await self._finish_work()
        finally:
            self._loop.remove_reader(self._queue.fileno())
            await asyncio.to_thread(self._image._release)

    async def _finish_work(self) -> None:
        """Drain and flush; a cancelled ``close`` does so too before the files go."""
        closing = self._begin(lambda: self._reactor.spawn(self._engine.close()))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait([closing])
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _check(self) -> None:
        if self._closing:
            raise ClosedError(self.path)
        self._check_process()

    def _check_process(self) -> None:
        if self._image._pid != os.getpid():
            raise ForkedError(self.path)

    def perform(self, begin: Callable[[], Completion[Any]]) -> asyncio.Future[Any]:
        """Begin a request of the engine (``begin`` is called under the reactor's lock) and return a
        future for its result: for servers and jobs that need more than the verbs."""
        self._check()
        return self._begin(begin)

    def _begin(self, begin: Callable[[], Completion[Any]]) -> asyncio.Future[Any]:
        """Begin a request under the lock; a future for its completion."""
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._reactor.lock:
            self._reactor.check()
            completion = begin()
            completion.on_done(partial(_finish, future))
        if not completion.done:
            self._waiting.add(future)
            future.add_done_callback(self._waiting.discard)
            if not self._poll_due:
                self._poll_due = True
                self._loop.call_soon(self.poll)
        return future

    @property
    def queue(self) -> Any:
        """What its requests are in while the kernel has them."""
        return self._queue

    def lend_queue(self, give_back: Callable[[], None]) -> Any:
        """Leave it to the helper to see what completes, and return the queue as that knows it.
        Whoever turns the helper then calls ``poll`` with what it collected. ``give_back`` is called
        when the image is about to be closed; it calls ``take_queue_back``."""
        self._loop.remove_reader(self._queue.fileno())
        self._give_back = give_back
        return self._queue.pointer

    def take_queue_back(self) -> None:
        """End that."""
        self._give_back = None
        self._loop.add_reader(self._queue.fileno(), self.poll)

    def poll(self, collected: bytes | bytearray = b"") -> None:
        """Go on with what has completed. ``collected``: results (``struct mmc_done[]``) that the
        helper has taken off the queue."""
        self._poll_due = False
        try:
            with self._reactor.lock:
                if collected:
                    self._deliver(collected)
                self._reactor.poll()
        except BaseException as error:
            # A result may have been lost on its way: nobody may wait for it.
            for future in tuple(self._waiting):
                if not future.done():
                    future.set_exception(Interrupted(error))
            raise

    def _deliver(self, collected: bytes | bytearray) -> None:
        """Results go to whom they belong; a KeyboardInterrupt among them loses some."""
        try:
            taken = self._queue.taken(memoryview(collected), len(collected) // DONE_BYTES)
            self._queue.deliver(taken)
        except BaseException as error:
            self._reactor.interrupted = error
            raise


def _finish(future: asyncio.Future[Any], completion: Completion[Any]) -> None:
    if future.done():  # cancelled: nobody waits any more
        return
    if completion.error is not None:
        future.set_exception(completion.error)
    else:
        future.set_result(completion.value)
