# SPDX-License-Identifier: MIT
"""What changes under a disk that is being served: stream, snapshot, growth.

Owns: the stream's state, its pace, and that guests come first; the live operations, for whoever
asks (the control socket, ``mmcow.serving``), and their lines in the log.
Never: holds a request back for longer than one piece takes.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mmcow.errors import Cancelled, JobError, MmcowError, ReadOnlyError, UsageError
from mmcow.jobs.snapshot import take
from mmcow.jobs.stream import FLUSH_EVERY, PIECE, let_go, missing
from mmcow.nbd.arguments import whole_number

if TYPE_CHECKING:
    from collections.abc import Generator

    from mmcow.formats.driver import Driver
    from mmcow.nbd.export import Export
    from mmcow.nbd.server import Server

log = logging.getLogger("mmcow.nbd")

# A server that is killed loses at most what was copied since the last flush: FLUSH_EVERY bytes, or
# as much as was copied in this time.
FLUSH_SECONDS = 10.0


class Stream:
    """One run over one export, in the background. ``state``: "running", "paused", "completed",
    "cancelled" or "failed" (``error`` tells). ``await`` it to wait for its end."""

    def __init__(self, export: Export, *, rate: int = 0) -> None:
        image = export.image
        if not image.writable:
            raise ReadOnlyError(image.path, "stream")
        if not image.engine.top.info.has_backing:
            raise UsageError(f"{image.path}: has no base any more")
        self.state = "running"
        self.error: str | None = None
        self.rate = rate  # bytes a second, 0: as fast as guests leave room
        self.moved = 0  # bytes copied as data
        self.total = image.size
        self.idle_since: float | None = None  # since when (the loop's time) it does not run
        self._export = export
        self._top = image.engine.top  # the layer that it fills
        self._filled = 0
        self._unkept = 0  # bytes that it went over since the last flush,
        self._unkept_since = 0.0  # the first of them at that time of the loop
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._asked = asyncio.Event()  # something of it was changed while it rests
        self._cancelled = False

    @property
    def active(self) -> bool:
        """Whether it will do more by itself or when resumed."""
        return self.state in ("running", "paused")

    @property
    def completed_all(self) -> bool:
        """Whether it has completed, and the disk has got no base since (by a snapshot)."""
        return self.state == "completed" and not self._export.image.engine.top.info.has_backing

    @property
    def done(self) -> int:
        """Bytes of the disk that are surely in the top layer: none after a snapshot, which puts
        an empty one there. Of a stream that has ended: those that were when it did."""
        overtaken = self.active and self._export.image.engine.top is not self._top
        return 0 if overtaken else self._filled

    def status(self) -> dict[str, Any]:
        """For people and tools, JSON-ready."""
        return {
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "moved": self.moved,
            "rate": self.rate,
            "error": self.error,
        }

    def pause(self) -> None:
        """Stop after the piece in hand; ``resume`` goes on."""
        if self.state == "running":
            self.state = "paused"
            self.idle_since = asyncio.get_running_loop().time()
            self._may_run.clear()

    def set_rate(self, rate: int) -> None:
        """From now on at most ``rate`` bytes a second (0: no limit). A paused one stays paused."""
        self.rate = _rate(rate)
        self._asked.set()

    def resume(self, rate: int | None = None) -> None:
        """Go on, at another rate (bytes a second, 0: no limit) if given."""
        if rate is not None:
            self.set_rate(rate)
        if self.state == "paused":
            self.state = "running"
            self.idle_since = None
            self._may_run.set()

    def cancel(self) -> None:
        """End after the piece in hand. What was copied stays; a later stream copies the rest."""
        self._cancelled = True
        self._may_run.set()
        self._asked.set()

    async def wait(self) -> None:
        """Return when the disk needs its base no more. Cancelled where it was stopped; the error
        where it failed. A caller that is itself cancelled does not stop the stream."""
        assert self._task is not None
        await asyncio.wait([self._task])
        if self._failure is not None:
            raise self._failure
        if self.state != "completed":
            raise Cancelled(f"{self._export.image.path}: stream")

    def __await__(self) -> Generator[Any, None, None]:
        return self.wait().__await__()

    def start(self, server: Server) -> None:
        """Begin, as work of the server."""
        self._task = server.background(self._run())

    async def _run(self) -> None:
        name = self._export.name
        log.info("export %r: stream begins", name)
        try:
            await self._pull_all()
        except asyncio.CancelledError:
            self._end("cancelled")
            log.info(
                "export %r: stream was cut at %d %% by the server's end; started again, it goes on",
                name, 100 * self.done // max(self.total, 1),
            )  # fmt: skip
            raise
        except Exception as error:  # noqa: BLE001 - told to whoever asks, never lost
            self._end("failed")
            self.error, self._failure = str(error), error
            if not isinstance(error, MmcowError):
                self._failure = JobError(f"{self._export.image.path}: stream: {error!r}")
                self._failure.__cause__ = error
            log.error("export %r: stream failed: %s", name, error)  # noqa: TRY400
        else:
            log.info("export %r: stream %s, %d bytes copied", name, self.state, self.moved)

    def _end(self, state: str) -> None:
        self._filled, self.state = self.done, state
        self.idle_since = asyncio.get_running_loop().time()

    async def _pull_all(self) -> None:
        """Copy everything, then let go of the base."""
        image = self._export.image
        top = image.engine.top
        while not (await self._pull(top) and await self._let_go(top)):
            if self._cancelled:
                await self._keep()
                self._end("cancelled")
                return
            top = image.engine.top
        self._filled = self.total
        self._end("completed")

    async def _pull(self, top: Driver) -> bool:
        """Copy all that ``top`` lacks. False where it was stopped, or a snapshot has put another
        layer on top, which lacks everything again."""
        image = self._export.image
        loop = asyncio.get_running_loop()
        self.total = image.size
        if top is not self._top:
            self._top, self._filled = top, 0
        piece: tuple[int, float, float] | None = None
        for offset, length in missing(image.image):
            if piece is not None:  # the last one needs no rest behind it
                await self._rest(*piece)
            if not self._may_run.is_set():
                await self._keep()  # who knows for how long
            await self._may_run.wait()
            if self._cancelled or image.engine.top is not top:
                return False
            served = self._export.counters.requests
            began = loop.time()
            moved = await image.perform(
                lambda offset=offset, length=length: image.reactor.spawn(  # type: ignore[misc]
                    image.engine.copy_up(offset, length)
                )
            )
            self.moved += moved
            self._filled = min(offset + length, self.total)
            if not self._unkept:
                self._unkept_since = began
            self._unkept += min(length, PIECE)
            if self._unkept >= FLUSH_EVERY or self._keep_in <= 0:
                await self._keep()
            took = loop.time() - began
            busy = self._export.counters.requests != served
            piece = moved, began, took if busy else 0.0
        return image.engine.top is top

    @property
    def _keep_in(self) -> float:
        """Seconds until what was copied should be durable."""
        if not self._unkept:
            return FLUSH_SECONDS
        return self._unkept_since + FLUSH_SECONDS - asyncio.get_running_loop().time()

    async def _keep(self) -> None:
        """Make what was copied durable."""
        if self._unkept:
            self._unkept = 0
            await self._export.image.flush()

    async def _let_go(self, top: Driver) -> bool:
        """Drop what lies below ``top``. False where something was faster: a snapshot, and ``top``
        is below; a growth, and ``top`` lacks what is new."""
        image = self._export.image
        try:
            await image.perform(lambda: image.reactor.spawn(let_go(image.image)))
        except UsageError:
            if image.engine.top is top and image.size == self.total:
                raise
            return False
        return True

    async def _rest(self, moved: int, began: float, guests: float) -> None:
        """Leave the disk to others: what the rate demands, and where guests are active as long as
        the piece took (``guests``). A new rate counts at once, a cancellation ends it. What was
        copied does not rest for long without being made durable."""
        loop = asyncio.get_running_loop()
        least = loop.time() + guests
        await asyncio.sleep(0)
        while not self._cancelled:
            due = max(least, began + moved / self.rate if self.rate > 0 else 0.0)
            left = due - loop.time()
            if left <= 0:
                return
            if self._keep_in <= 0:
                await self._keep()
                continue
            self._asked.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._keep_in)):
                    await self._asked.wait()


def _rate(given: Any) -> int:
    return whole_number("rate", given, "bytes a second")


def find(server: Server, name: str | None) -> Export:
    """The export called ``name``; None: the only one there is."""
    if name is not None and not isinstance(name, str):
        raise UsageError(f"export {name!r}: must be a name")
    exports = server.exports
    if name is None and len(exports) == 1:
        return next(iter(exports.values()))
    export = exports.get(name) if name is not None else None
    if export is None:
        names = ", ".join(repr(known) for known in exports)
        asked = "say which export" if name is None else f"no export {name!r}"
        raise UsageError(f"{asked}; there are: {names}")
    return export


def start_stream(server: Server, export: Export, rate: int = 0) -> Stream:
    """Begin to pull the base in, at ``rate`` bytes a second at most (0: no limit). Where a stream
    of this server has brought everything already, that one is returned: who starts it and who waits
    for it may be two, and it may be faster than the second."""
    rate, last = _rate(rate), export.stream
    if last is not None and last.active:
        raise UsageError(f"export {export.name!r}: a stream is {last.state}")
    if last is not None and last.completed_all:
        return last
    stream = Stream(export, rate=rate)
    stream.start(server)
    export.stream = stream
    return stream


async def snapshot(export: Export, name: str, data_file: str | None = None) -> str:
    """Freeze the running layer as ``name``; returns its path. See ``mmcow.jobs.snapshot``."""
    image = export.image
    layer = image.image.layers[0]
    frozen = await image.perform(
        lambda: image.reactor.spawn(take(image.image, name, data_file=data_file))
    )
    assert isinstance(frozen, str)
    log.info("export %r: frozen as %s; writes go to %s", export.name, frozen, image.path)
    if layer.format == "raw" and not layer.probed:
        log.warning(
            "export %r: %s was opened as raw and is an add-cow image from now on: "
            "-f raw must be left out", export.name, image.path,
        )  # fmt: skip
    return frozen


async def grow(export: Export, size: int) -> int:
    """Make the disk larger, durably; returns its size. Clients see it when they connect again."""
    size = whole_number("size", size, "bytes")
    if size < export.size:
        raise UsageError(f"export {export.name!r}: a served disk can only grow")
    await export.image.resize(size)
    log.info("export %r: has %d bytes now", export.name, export.size)
    return export.size
