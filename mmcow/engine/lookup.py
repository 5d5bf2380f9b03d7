# SPDX-License-Identifier: MIT
"""Where the bytes of a range are, over a whole chain of layers.

Owns: the walk down the chain, zeros past the end of a shorter layer, merging, and telling the
holes of data files from their data.
Never: waits (metadata is in memory; only ``lseek`` for holes is a call), changes anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mmcow.engine.survey import known_regions, survey
from mmcow.formats.driver import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmcow.engine.survey import Regions, Row
    from mmcow.formats.driver import Driver, Extent

_T = TypeVar("_T")


class Segment(NamedTuple):
    """A range of the disk with one answer over the whole chain.

    ``depth`` counts layers from the top (0). BELOW means that no layer has it: zeros (asked of one
    layer alone: not in that layer). ``host`` is an offset in that layer's data file, -1 unless
    DATA or SPECIAL (or a hole of the data file, then ZERO).
    """

    offset: int
    length: int
    kind: Kind
    depth: int
    host: int


class _Range(NamedTuple):
    """Still to be resolved, from layer ``depth`` downwards."""

    start: int
    end: int
    depth: int


class Lookup:
    """Answers for ``layers``, top first. The list is the caller's and may shrink from its end."""

    def __init__(self, layers: list[Driver]) -> None:
        self._layers = layers

    def resolve(self, offset: int, length: int, depth: int = 0) -> list[Segment]:
        """Where the range is, seen from layer ``depth`` downwards; in order, no gaps, merged."""
        return list(_merged(self._walk(offset, length, depth)))

    def block_status(
        self,
        offset: int,
        length: int,
        depth: int = 0,
        *,
        alone: bool = False,
        regions: dict[int, Regions] | None = None,
    ) -> Iterator[Segment]:
        """The same lazily, with holes of data files as ZERO. ``alone``: of layer ``depth`` only.

        Valid as long as nothing changes: take what you need under one hold of the lock. The same
        is true of ``regions``, by layer: what earlier questions have learned of the data files.
        """
        walk = self._walk_alone if alone else self._walk
        regions = {} if regions is None else regions
        for segment in _merged(walk(offset, length, depth)):
            yield from self._split_holes(segment, regions)

    def survey(
        self,
        offset: int,
        length: int,
        depth: int,
        make: Callable[[Row], _T],
        *,
        alone: bool,
        regions: dict[int, Regions],
    ) -> list[_T] | None:
        """What ``block_status`` says of the beginning, at once: see ``survey.survey``."""
        end = offset + length
        return survey(self._layers, offset, end, depth, make, alone=alone, regions=regions)

    def extents(self, start: int, end: int) -> list[Extent]:
        """The top layer's own extents over the whole of [start, end)."""
        extents: list[Extent] = []
        top = self._layers[0]
        while start < end:
            got = top.map(start, end - start)
            extents += got
            start = got[-1].offset + got[-1].length
        return extents

    def _walk(self, offset: int, length: int, depth: int) -> Iterator[Segment]:
        todo: list[Segment | _Range] = [_Range(offset, offset + length, depth)]
        while todo:
            item = todo.pop()
            if isinstance(item, Segment):
                yield item
            else:
                todo.extend(reversed(self._ask_layer(item)))

    def _walk_alone(self, offset: int, length: int, depth: int) -> Iterator[Segment]:
        end = offset + length
        while offset < end:
            for item in self._ask_layer(_Range(offset, end, depth)):
                if isinstance(item, Segment):
                    offset = item.offset + item.length
                    yield item
                elif item.depth != depth:
                    offset = item.end
                    yield Segment(item.start, item.end - item.start, Kind.BELOW, depth, -1)

    def _ask_layer(self, wanted: _Range) -> list[Segment | _Range]:
        """One question to one layer: answers in order, and what it leaves to be asked further."""
        start, end, depth = wanted
        driver = self._layers[depth]
        stop = min(end, driver.info.size)
        if start >= stop:
            return [Segment(start, end - start, Kind.BELOW, depth, -1)]
        out: list[Segment | _Range] = []
        goes_on = driver.info.has_backing and depth + 1 < len(self._layers)
        for extent in driver.map(start, stop - start):
            length = min(extent.length, stop - extent.offset)
            if extent.kind is Kind.BELOW and goes_on:
                out.append(_Range(extent.offset, extent.offset + length, depth + 1))
            else:
                out.append(Segment(extent.offset, length, extent.kind, depth, extent.host))
            start = extent.offset + length
        if start < end:
            out.append(_Range(start, end, depth))
        return out

    def _split_holes(self, segment: Segment, regions: dict[int, Regions]) -> Iterator[Segment]:
        if segment.kind is not Kind.DATA:
            yield segment
            return
        offset, length, _, depth, host = segment
        known = known_regions(regions, depth, self._layers[depth].data)
        while length:
            hole, run = known.at(host, length)
            yield Segment(offset, run, Kind.ZERO if hole else Kind.DATA, depth, host)
            offset, length, host = offset + run, length - run, host + run


def _merged(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Join neighbours that go on from each other."""
    last: Segment | None = None
    for segment in segments:
        if last is None:
            last = segment
        elif (
            last.kind is segment.kind
            and last.depth == segment.depth
            and (last.host < 0 or last.host + last.length == segment.host)
        ):
            last = last._replace(length=last.length + segment.length)
        else:
            yield last
            last = segment
    if last is not None:
        yield last
