# SPDX-License-Identifier: MIT
"""Block status by the thousand: the rows of a fragmented layer, made without a step per extent.

Owns: the shortcut for the common shape: a layer with a bit per cluster over one that is all there
(or over none). One call reads thousands of runs from the bitmap, and the rows are zipped together.

Never: the only answer. Where the shape is another, or a run is neither data nor hole as a whole,
it stops and ``lookup``, with which it is compared in tests, goes on.

::

    borders   b0      b1        b2   b3           b4       runs alternate: even ones are
    top       | DATA  |  BELOW  | DATA |  BELOW   |        alike, and so are odd ones
"""

from __future__ import annotations

from itertools import cycle, islice, repeat
from operator import sub
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mmcow.formats.driver import Kind
from mmcow.native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mmcow.formats.driver import Driver, Table
    from mmcow.storage.file import File

# (offset, length, kind, depth, host offset, path): what ``mmcow.BlockStatus`` holds.
Row = tuple[int, int, Kind, int, int | None, str | None]

_T = TypeVar("_T")

# Rows at a time. A million extents took 0.30 s with 340 to 512, 0.44 s with 1024, 0.55 s with 4096:
# more of them live long enough for the collector of cycles to look at.
MOST = 512
# Bits looked at for one answer. A bitmap of zeros, maybe a hole of gigabytes, is for ``lookup``.
_BITS = 1 << 20
# Fewer runs than this are no gain.
_LEAST = 16


class Regions:
    """Holes and data of a file, remembered from question to question.

    Valid as long as nothing changes: one of it for one hold of the lock, or for an image that is
    only read. Many extents may lie in one hole, and to find the end of space that was reserved
    and never written the kernel walks over all of it: a second for half a million pieces.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._start = self._end = 0
        self._hole = False

    def at(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether ``offset`` lies in a hole, and how many of ``length`` bytes are alike."""
        if not self._start <= offset < self._end:
            self._hole, self._end = self._file.region(offset)
            self._start = offset
        return self._hole, min(self._end - offset, length)


def known_regions(regions: dict[int, Regions], depth: int, file: File) -> Regions:
    """Those of layer ``depth``, whose data file is ``file``."""
    found = regions.get(depth)
    if found is None:
        found = regions[depth] = Regions(file)
    return found


class _Side(NamedTuple):
    """What every second run is: in ``file`` at offset plus ``start``; None: in no layer."""

    depth: int
    file: File | None
    start: int


def survey(
    layers: Sequence[Driver],
    start: int,
    end: int,
    depth: int,
    make: Callable[[Row], _T],
    *,
    alone: bool,
    regions: dict[int, Regions],
) -> list[_T] | None:
    """Rows from ``start`` on, each made into what the caller wants.

    Seen from layer ``depth`` downwards, or ``alone``. None of them continues another; they may end
    before ``end``. None: the layers have another shape. None at all: what stands at ``start`` is
    for ``lookup``.
    """
    top = layers[depth]
    table = top.table()
    if table is None or table.view is None:
        return None
    lower = _lower(layers, depth, alone)
    if lower is None:
        return None
    side, reach = lower
    found = _borders(table, start, min(end, top.info.size, reach))
    if found is None:
        return []
    borders, first_is_data = found
    sides = (_Side(depth, top.data, table.start), side)
    columns = _columns(borders, sides if first_is_data else (sides[1], sides[0]), regions)
    return [] if columns is None else list(map(make, zip(*columns, strict=False)))


def _lower(layers: Sequence[Driver], depth: int, alone: bool) -> tuple[_Side, int] | None:
    """What shows where the layer has nothing, and up to where; None where that is not one thing."""
    nothing = _Side(depth, None, 0)
    if alone or not layers[depth].info.has_backing or depth + 1 == len(layers):
        return nothing, 1 << 63
    below = layers[depth + 1]
    table = below.table()
    if table is None or table.view is not None:
        return None
    return _Side(depth + 1, below.data, table.start), below.info.size


def _borders(table: Table, start: int, end: int) -> tuple[list[int], bool] | None:
    """Where runs begin, the end of the last one, and whether the first is data."""
    shift = table.shift
    first = start >> shift
    count = min(((end - 1) >> shift) + 1 - first, _BITS)
    if count < _LEAST:
        return None
    runs = ffi.new("struct mmc_run[]", MOST)
    n = int(lib.mmc_view_bit_runs(table.view, table.bits, first, count, runs, MOST))
    if n < _LEAST:  # an error, too, for ``lookup`` tells what it means
        return None
    values = memoryview(ffi.buffer(runs)).cast("B").cast("Q")[: 3 * n].tolist()
    borders = [bit << shift for bit in values[::3]]
    borders[0] = start
    borders.append(min((values[-3] + values[-2]) << shift, end))
    return borders, bool(values[2])


def _columns(
    borders: list[int], sides: tuple[_Side, _Side], regions: dict[int, Regions]
) -> tuple[Iterable[Any], ...] | None:
    """The columns of the rows, up to the first run that is mixed."""
    kinds: list[Iterable[Kind]] = []
    whole = len(borders) - 1
    for parity, side in enumerate(sides):
        starts, ends = borders[parity:whole:2], borders[parity + 1 : whole + 1 : 2]
        found = _kinds(side, starts, ends, regions)
        if isinstance(found, list):
            whole = min(whole, 2 * len(found) + parity) if len(found) < len(starts) else whole
            kinds.append(found)
        else:
            kinds.append(repeat(found))
    if whole < _LEAST:
        return None
    starts = borders[:whole]
    return (
        starts,
        map(sub, borders[1 : whole + 1], starts),
        _woven(kinds[0], kinds[1], whole),
        cycle((sides[0].depth, sides[1].depth)),
        _woven(_hosts(sides[0], starts[::2]), _hosts(sides[1], starts[1::2]), whole),
        cycle([None if side.file is None else side.file.path for side in sides]),
    )


def _kinds(
    side: _Side, starts: list[int], ends: list[int], regions: dict[int, Regions]
) -> Kind | list[Kind]:
    """What the runs are: all the same, or one by one up to the first that is mixed."""
    if side.file is None or not starts:
        return Kind.BELOW
    start, at = side.start, known_regions(regions, side.depth, side.file).at
    span = ends[-1] - starts[0]
    hole, length = at(starts[0] + start, span)
    if length == span:
        return Kind.ZERO if hole else Kind.DATA
    kinds = []
    for begin, end in zip(starts, ends, strict=True):
        hole, length = at(begin + start, end - begin)
        if length < end - begin:
            break
        kinds.append(Kind.ZERO if hole else Kind.DATA)
    return kinds


def _hosts(side: _Side, starts: list[int]) -> Iterable[int | None]:
    if side.file is None:
        return repeat(None)
    return map(side.start.__add__, starts) if side.start else starts


def _woven(even: Iterable[_T], odd: Iterable[_T], count: int) -> list[_T]:
    """Alternately one of each, ``count`` in all."""
    woven: list[Any] = [None] * count
    woven[::2] = islice(even, (count + 1) // 2)
    woven[1::2] = islice(odd, count // 2)
    return woven
