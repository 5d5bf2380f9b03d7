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
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mmcow import image as sync
from mmcow.errors import ClosedError, ForkedError, UsageError
from mmcow.native import aligned

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from mmcow.storage.host import Buffer
    from mmcow.tasks import Completion

T = TypeVar("T")


async def open(path: str | os.PathLike[str], **options: Any) -> Image:
    """Open an image; the arguments are those of ``mmcow.open``."""
    opened = await asyncio.to_thread(partial(sync.open_image, path, **options))
    return Image(opened)


class Image:
    """A guest disk for the asyncio loop it was opened in; any number of requests may be awaited
    at once. Methods and errors are those of ``mmcow.Image``."""

    def __init__(self, opened: sync.Image) -> None:
        """Take over an image opened synchronously; do not use that one any more."""
        self._image = opened
        self._loop = asyncio.get_running_loop()
        self._queue = opened._opener.queue
        self._poll_due = False
        self._closing = False
        self._loop.add_reader(self._queue.fileno(), opened.reactor.poll)

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
        self._check()
        if length < 0:
            raise UsageError(f"{self.path}: length {length} is negative")
        self._image.engine.check_range(offset, length)
        buffer = aligned(length)
        await self._start(lambda: self._image.engine.read(offset, buffer))
        return bytes(buffer)

    async def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` from ``offset``. Cancelled, it may still be written to for a while."""
        self._check()
        view = sync.flat(buffer)
        if view.readonly:
            raise UsageError(f"{self.path}: the buffer is read-only")
        await self._start(lambda: self._image.engine.read(offset, view))
        return len(view)

    async def write(self, offset: int, data: Buffer) -> int:
        """Write all of ``data``, which must not change until then."""
        self._check()
        view = sync.flat(data)
        await self._start(lambda: self._image.engine.write(offset, view))
        return len(view)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make a range read as zeros."""
        self._check()
        await self._start(lambda: self._image.engine.write_zeroes(offset, length, may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Tell that a range's content is no longer needed."""
        self._check()
        await self._start(lambda: self._image.engine.discard(offset, length))

    async def flush(self) -> None:
        """Make every change durable that was acknowledged before this call."""
        self._check()
        reactor = self._image.reactor
        await self._start(lambda: reactor.spawn(self._image.engine.flush()))

    async def resize(self, size: int, *, shrink: bool = False) -> None:
        """Change the disk's size, durably."""
        self._check()
        sync.check_size(self.path, size)
        reactor = self._image.reactor
        await self._start(lambda: reactor.spawn(self._image.engine.resize(size, shrink=shrink)))

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
        self._closing = True
        reactor = self._image.reactor
        try:
            await self._start(lambda: reactor.spawn(self._image.engine.close()))
        finally:
            self._loop.remove_reader(self._queue.fileno())
            await asyncio.to_thread(self._image._release)

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
        if self._image._pid != os.getpid():
            raise ForkedError(self.path)

    def _start(self, begin: Any) -> asyncio.Future[Any]:
        """Begin a request under the lock; a future for its completion."""
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._image.reactor.lock:
            completion: Completion[Any] = begin()
            completion.on_done(partial(_finish, future))
        if not self._poll_due and not completion.done:
            self._poll_due = True
            self._loop.call_soon(self._poll)
        return future

    def _poll(self) -> None:
        self._poll_due = False
        self._image.reactor.poll()


def _finish(future: asyncio.Future[Any], completion: Completion[Any]) -> None:
    if future.done():  # cancelled: nobody waits any more
        return
    if completion.error is not None:
        future.set_exception(completion.error)
    else:
        future.set_result(completion.value)
