# SPDX-License-Identifier: MIT
"""Runs of clusters that are brought into the top layer from below, many at a time.

Owns: how a fragmented range is read and written in few rounds, and that zeros are punched.
Never: claims clusters (the engine has, for the whole range), decides what is copied.

Between the runs of a fragmented layer lie clusters that it has already. What lies below those is
read along where that makes one read of many, and thrown away: they are never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.formats.driver import Kind
from mmcow.native import aligned, is_zero
from mmcow.storage.window import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from mmcow.engine.engine import Engine
    from mmcow.engine.lookup import Segment
    from mmcow.formats.driver import Extent, Reservation
    from mmcow.tasks import Completion

    # (depth, offset, into): read as seen from a layer.
    Read = Callable[[int, int, memoryview], Coroutine[Any, Any, None]]
    # (reservation, offset, buffers): write into reserved room.
    Write = Callable[[Reservation, int, tuple[memoryview, ...]], Coroutine[Any, Any, None]]

# The longest buffer.
PIECE = 4 << 20
# Runs that are under way at a time.
MOST = 256


class Copies:
    """Copies for one engine. Its methods run under the reactor's lock."""

    def __init__(self, engine: Engine, read: Read, write: Write) -> None:
        self._engine = engine
        self._read = read
        self._write = write

    async def run(self, extents: Sequence[Extent]) -> int:
        """Make unallocated runs the top layer's; returns the bytes moved.

        They are in order and claimed. After an error some of them may have been copied.
        """
        moved = 0
        for start in range(0, len(extents), MOST):
            some = extents[start : start + MOST]
            begin = some[0].offset
            end = min(some[-1].offset + some[-1].length, self._engine.size)
            if self._is_worth_one_read(some, begin, end):
                moved += await self._from_one_read(some, begin, end)
            else:
                moved += await self._together([self._one(extent) for extent in some])
        return moved

    def _is_worth_one_read(self, extents: Sequence[Extent], start: int, end: int) -> bool:
        """Whether one read brings all of them, and not more of what nobody wants."""
        engine = self._engine
        if len(extents) == 1 or end - start > PIECE or len(engine.layers) == 1:
            return False
        if 2 * sum(extent.length for extent in extents) < end - start:
            return False
        below = next(engine.lookup.block_status(start, end - start, 1))
        return below.kind is Kind.DATA and below.length == end - start

    async def _from_one_read(self, extents: Sequence[Extent], start: int, end: int) -> int:
        content = aligned(end - start)
        await self._read(1, start, content)
        return await self._together(
            [
                self._put(extent, content[extent.offset - start :][: extent.length])
                for extent in extents
            ]
        )

    async def _together(self, copies: Sequence[Coroutine[Any, Any, int]]) -> int:
        tasks: list[Completion[int]] = [self._engine.reactor.spawn(copy) for copy in copies]
        await settle(tasks)
        return sum(task.result() for task in tasks)

    async def _put(self, extent: Extent, content: memoryview) -> int:
        """Make a run the top layer's; ``content`` is what it reads as."""
        top = self._engine.top
        reservation = top.reserve(extent.offset, extent.length)
        try:
            if is_zero(content):
                for _, length, host in reservation.pieces:
                    await top.data.zero(host, length)
            else:
                await self._write(reservation, extent.offset, (content,))
        except BaseException:
            top.abandon(reservation)
            raise
        top.publish(reservation)
        return len(content)

    async def _one(self, extent: Extent) -> int:
        """Copy one run, however long and whatever lies below it."""
        engine = self._engine
        top, moved = engine.top, 0
        reservation = top.reserve(extent.offset, extent.length)
        try:
            for offset, length, host in reservation.pieces:
                visible = min(length, engine.size - offset)
                for segment in list(engine.lookup.block_status(offset, visible)):
                    moved += await self._segment(segment, host + segment.offset - offset)
        except BaseException:
            top.abandon(reservation)
            raise
        top.publish(reservation)
        return moved

    async def _segment(self, segment: Segment, host: int) -> int:
        data = self._engine.top.data
        if segment.kind in (Kind.ZERO, Kind.BELOW):
            await data.zero(host, segment.length)
            return 0
        offset, left = segment.offset, segment.length
        while left:
            part = aligned(min(left, PIECE))
            await self._read(0, offset, part)
            if is_zero(part):
                await data.zero(host, len(part))
            else:
                await data.write(host, (part,))
            offset, host, left = offset + len(part), host + len(part), left - len(part)
        return segment.length
