# SPDX-License-Identifier: MIT
"""Requests that C finishes by itself, and how the engine keeps them out where it works.

Owns: the table of the chain as C sees it, holds on ranges, waiting for hits in flight.
Never: moves data; is needed for a correct answer. Without a path (the simulator's queue, a format
or a chain that C has no table for, MMCOW_HITS=off) every request goes the engine's own way, which
stays the reference for the other.

A hit is a read or write of one run of one file, aligned, inside the disk, that needs nothing
decided: see csrc/path.h. Whatever allocates, changes the mapping or reads-modifies-writes a range
holds it first, so that hits there become misses, and waits for those in flight. Both ways can so
be used side by side, from any thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mmcow.ranges import SIZE_MOST
from mmcow.storage import path as paths
from mmcow.storage.path import PathLayer

if TYPE_CHECKING:
    from mmcow.engine.engine import Engine
    from mmcow.formats.driver import Driver
    from mmcow.storage.path import NativePath
    from mmcow.tasks import Reactor

# Writes after which staged metadata is looked at: at most as many units of 512 bytes.
RELIEF_EVERY = 1024


class Hits:
    """The hits of one engine; there are none without one. Methods run under the lock, but for
    ``transfer``."""

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine
        self.path: NativePath | None = None if engine is None else engine.reactor.queue.path()
        self._start = 0  # of the disk's byte 0 in the top layer's file
        self._waiting = 0
        self._until_relief = RELIEF_EVERY

    def refresh(self) -> None:
        """Make the table say what the chain is now. With everything held, or before any use."""
        engine, path = self._engine, self.path
        if engine is None or path is None:
            return
        top = engine.top
        table = _table(engine.layers)
        flags = 0
        if engine.writable and table and not top.data.cache.write_through:
            flags |= paths.WRITES
            if top.info.can_allocate:
                flags |= paths.ALLOCATES
            if engine.first_sector_guard is not None:
                flags |= paths.GUARDED
        self._start = table[0].start if table else 0
        for layer in engine.layers:
            layer.data.follow(self if layer is top else None)
        path.set(engine.size, table, flags)

    def transfer(self, code: int, offset: int, buffer: memoryview) -> bool:
        """Read or write one range in this thread, if that is a hit. False: do it the long way, also
        after an error, which the long way meets again and explains. From any thread."""
        path, engine = self.path, self._engine
        if path is None or engine is None or engine.reactor.interrupted is not None:
            return False
        return 0 <= offset <= SIZE_MOST and path.transfer(code, offset, buffer) > 0

    def wants_relief(self) -> bool:
        """Whether it is time to look at how much metadata the hits have left to be written."""
        self._until_relief -= 1
        if self._until_relief > 0:  # threads may count past zero
            return False
        self._until_relief = RELIEF_EVERY
        return True

    # ---- ranges of one's own ----

    def hold(self, start: int, end: int) -> int:
        """Keep writes out of [start, end) of the disk; pair with ``release``."""
        return 0 if self.path is None else self.path.hold(start, end, paths.HOLD_WRITES)

    async def drained(self, start: int, end: int) -> None:
        """Wait for the writes in flight in a held range."""
        if self.path is not None:
            await self._until_idle(start, end, paths.HOLD_WRITES)

    def release(self, hold: int) -> None:
        """End a hold."""
        if self.path is not None:
            self.path.release(hold)

    def hold_host(self, start: int, end: int) -> int:
        """``hold`` for a range of the top layer's data file."""
        return self.hold(max(start - self._start, 0), max(end - self._start, 0))

    async def drained_host(self, start: int, end: int) -> None:
        """``drained`` for a range of the top layer's data file."""
        await self.drained(max(start - self._start, 0), max(end - self._start, 0))

    def hold_all(self) -> int:
        """Keep everything out."""
        if self.path is None:
            return 0
        return self.path.hold(*paths.EVERYTHING, paths.HOLD_ALL)

    async def all_drained(self) -> None:
        """Wait for everything in flight, once everything is held."""
        if self.path is not None:
            await self._until_idle(*paths.EVERYTHING, paths.HOLD_ALL)

    async def _until_idle(self, start: int, end: int, kind: int) -> None:
        path = self.path
        assert path is not None
        if not path.busy(start, end, kind):
            return
        self._waiting += 1
        path.awaited(True)
        try:
            await self._reactor().watch(lambda: not path.busy(start, end, kind))
        finally:
            self._waiting -= 1
            path.awaited(self._waiting > 0)

    def _reactor(self) -> Reactor:
        assert self._engine is not None
        return self._engine.reactor

    # ---- what else the engine must know or tell ----

    def fail(self) -> None:
        """A sync has failed: no write is a hit any more."""
        if self.path is not None:
            self.path.fail()

    def take_written(self) -> bool:
        """Whether hits wrote since the last call, or are writing."""
        return self.path is not None and self.path.take_written()

    def keep_out(self) -> None:
        """Keep everything out for good: the last flush is over, or nobody wants one."""
        self.hold_all()

    def shut(self) -> None:
        """Keep everything out for good, before the files are closed.

        What is still in flight belongs to threads that are in the middle of one transfer, or was
        left in the queue by somebody who was interrupted: nobody else collects it any more.
        """
        path = self.path
        if path is None:
            return
        self.keep_out()
        queue = self._reactor().queue
        while path.busy(*paths.EVERYTHING, paths.HOLD_ALL):
            queue.turn(False)
            time.sleep(0.001)
        path.set(0, (), 0)


def _table(layers: list[Driver]) -> list[PathLayer]:
    """The chain for C, top first; empty where a layer that may be asked has no table."""
    table: list[PathLayer] = []
    for driver in layers:
        place = driver.table()
        if place is None or len(table) == paths.LAYERS_MOST:
            return []
        file = driver.data
        descriptor = getattr(file.handle, "descriptor", None)
        if descriptor is None:
            return []
        read_end, write_end = file.plain_ends()
        alignment = file.handle.alignment
        table.append(
            PathLayer(
                place.view, place.bits, driver.info.size, place.start, read_end, write_end,
                place.shift, alignment.offset, alignment.memory, descriptor,
            )
        )  # fmt: skip
        if not driver.info.has_backing:
            break
    return table
