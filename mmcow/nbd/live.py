# SPDX-License-Identifier: MIT
"""Pulling the base into a disk that is being served.

Owns: the stream's state, its pace, and that guests come first.
Never: holds a request back for longer than one piece takes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mmcow.errors import MmcowError, ReadOnlyError, UsageError
from mmcow.jobs.stream import let_go, missing

if TYPE_CHECKING:
    from mmcow.formats.driver import Driver
    from mmcow.nbd.export import Export

# A stop repeats at most what was copied since the last flush.
FLUSH_SECONDS = 10.0


class Stream:
    """One run over one export. ``state``: "running", "paused", "completed", "cancelled" or
    "failed" (``error`` tells)."""

    def __init__(self, export: Export, *, rate: int = 0) -> None:
        image = export.image
        if not image.writable:
            raise ReadOnlyError(image.path, "stream")
        if not image.engine.top.info.has_backing:
            raise UsageError(f"{image.path}: has no base any more")
        self.state = "running"
        self.error: str | None = None
        self.rate = rate  # bytes a second, 0: as fast as guests leave room
        self.done = 0  # bytes of the disk that are surely in the top layer
        self.moved = 0  # bytes copied as data
        self.total = image.size
        self._export = export
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._cancelled = False

    @property
    def active(self) -> bool:
        """Whether it will do more by itself or when resumed."""
        return self.state in ("running", "paused")

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
            self._may_run.clear()

    def resume(self, rate: int | None = None) -> None:
        """Go on, at another rate if given."""
        if rate is not None:
            self.rate = rate
        if self.state == "paused":
            self.state = "running"
            self._may_run.set()

    def cancel(self) -> None:
        """End after the piece in hand. What was copied stays; a later stream copies the rest."""
        self._cancelled = True
        self._may_run.set()

    async def run(self) -> None:
        """Copy everything, then let go of the base. Never raises but CancelledError."""
        try:
            image = self._export.image
            top = image.engine.top
            while not (await self._pull(top) and await self._let_go(top)):
                if self._cancelled:
                    self.state = "cancelled"
                    return
                top = image.engine.top
            self.done = self.total
            self.state = "completed"
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        except MmcowError as error:
            self.state, self.error = "failed", str(error)

    async def _pull(self, top: Driver) -> bool:
        """Copy all that ``top`` lacks. False where it was stopped, or a snapshot has put another
        layer on top, which lacks everything again."""
        image = self._export.image
        loop = asyncio.get_running_loop()
        flushed = loop.time()
        for offset, length in missing(image.image):
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
            self.done = min(offset + length, self.total)
            took = loop.time() - began
            busy = self._export.counters.requests != served
            await asyncio.sleep(self._rest(moved, took, busy=busy))
            if loop.time() - flushed >= FLUSH_SECONDS:
                await image.flush()
                flushed = loop.time()
        return image.engine.top is top

    async def _let_go(self, top: Driver) -> bool:
        """Drop what lies below ``top``. False where a snapshot was faster and ``top`` is below."""
        image = self._export.image
        try:
            await image.perform(lambda: image.reactor.spawn(let_go(image.image)))
        except UsageError:  # the new top lacks nearly everything
            if image.engine.top is top:
                raise
            return False
        return True

    def _rest(self, moved: int, took: float, *, busy: bool) -> float:
        """How long to leave the disk to others: what the rate demands, and as long as the piece
        took while guests are active."""
        least = took if busy else 0.0
        if self.rate <= 0:
            return least
        return max(moved / self.rate - took, least)
