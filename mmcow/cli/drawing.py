# SPDX-License-Identifier: MIT
"""A picture of a disk's layers for a terminal.

Owns: the columns (each an equal part of the disk), what each layer has in them, and the
characters for it.
Never: writes, asks the terminal (``terminal`` does).

::

    disk 1 GiB, 64 columns of 16 MiB
    A vm.acow   |▓▓█                    ·       ░                         |   4 %
    B base.raw  |████████████▒··········████████                          |  31 %
      together  |AAABBBBBBBBBB··········BBBBBBBB····                      |
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from mmcow.cli.sizes import human_size
from mmcow.cli.ui import printable
from mmcow.formats.driver import Kind
from mmcow.ranges import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmcow.image import BlockStatus, Image

WIDTH_LEAST = 40
_NAME_MOST = 24
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Characters(NamedTuple):
    """What stands for what. ``shades``: a quarter, half, three quarters, all of a column."""

    shades: str
    zero: str
    frame: str
    ellipsis: str

    @property
    def characters(self) -> str:
        """All of them."""
        return "".join(self)


UNICODE = Characters("░▒▓█", "·", "│", "…")
ASCII = Characters(".:+#", "0", "|", "~")


class Style(NamedTuple):
    """What the terminal can do."""

    width: int
    unicode: bool
    colours: bool


class _Row:
    """One row: for each column, how many bytes are data and how many are zeros."""

    def __init__(self, columns: int) -> None:
        self.data = [0] * columns
        self.zero = [0] * columns


class _Grid(NamedTuple):
    """The columns of a picture: column i is the bytes from ``edge(i)`` to ``edge(i + 1)``."""

    start: int
    end: int
    columns: int

    def edge(self, column: int) -> int:
        """Where a column begins."""
        return self.start + (self.end - self.start) * column // self.columns

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The columns that a range touches, and by how many bytes."""
        end = offset + length
        size = self.end - self.start
        column = (offset - self.start) * self.columns // size
        while offset < end:
            stop = min(end, self.edge(column + 1))
            if stop > offset:
                yield column, stop - offset
                offset = stop
            column += 1


def draw(
    image: Image, start: int, end: int, style: Style, check: Callable[[], None]
) -> Iterator[str]:
    """The lines of a picture of ``start`` to ``end``. ``check`` is called often; it may raise."""
    characters = UNICODE if style.unicode else ASCII
    names = [_short(layer.path, characters) for layer in image.chain]
    label = max(map(len, [*names, "together"])) + 2
    columns = _column_count(style.width - label - len(" || 100 %"), end - start)
    grid = _Grid(start, end, columns)
    pen = _Pen(style, characters, label)
    yield (
        f"{human_size(end - start)} from {start}: {columns} columns of "
        f"{human_size((end - start) // columns)}"
    )
    for depth, name in enumerate(names):
        row = _layer_row(image, depth, grid, check)
        share = 100 * sum(row.data) / (end - start)
        yield pen.line(_letter(depth), name, _shade(row, grid, characters), depth, share)
    if len(names) > 1:
        yield pen.line(" ", "together", _together(image, grid, characters, check), None, None)
    yield from _legend(characters, style.width, layered=len(names) > 1)


def _column_count(room: int, size: int) -> int:
    """As many as there is room for, but none smaller than a sector."""
    return max(1, min(room, size // SECTOR))


def _short(path: str, characters: Characters) -> str:
    # What the terminal would act on, or cannot show, must not reach it.
    name = printable(os.path.basename(path))
    if characters is ASCII:
        name = name.encode("ascii", "backslashreplace").decode("ascii")
    if len(name) <= _NAME_MOST:
        return name
    half = (_NAME_MOST - 1) // 2
    return name[:half] + characters.ellipsis + name[-(_NAME_MOST - 1 - half) :]


def _letter(depth: int) -> str:
    return _LETTERS[depth] if depth < len(_LETTERS) else "+"


def _layer_row(image: Image, depth: int, grid: _Grid, check: Callable[[], None]) -> _Row:
    row = _Row(grid.columns)
    end = min(grid.end, image.chain[depth].size)
    if grid.start >= end:
        return row
    for status in _statuses(image, grid.start, end, depth, check):
        if status.kind is Kind.BELOW:
            continue
        counts = row.zero if status.kind is Kind.ZERO else row.data
        for column, length in grid.parts(status.offset, status.length):
            counts[column] += length
    return row


def _statuses(
    image: Image, start: int, end: int, layer: int | None, check: Callable[[], None]
) -> Iterator[BlockStatus]:
    for status in image.block_status(start, end - start, layer=layer):
        check()
        yield status


def _shade(row: _Row, grid: _Grid, characters: Characters) -> str:
    """How much of each column is data; a column without any may still be zeros."""
    text = []
    for column, (data, zero) in enumerate(zip(row.data, row.zero, strict=True)):
        size = grid.edge(column + 1) - grid.edge(column)
        if data:
            text.append(characters.shades[min(4 * data // size, 3)])
        else:
            text.append(characters.zero if zero else " ")
    return "".join(text)


def _together(image: Image, grid: _Grid, characters: Characters, check: Callable[[], None]) -> str:
    """For each column the layer that most of its data is read from."""
    counts: list[dict[int, int]] = [{} for _ in range(grid.columns)]
    for status in _statuses(image, grid.start, grid.end, None, check):
        if status.is_zero:
            continue
        for column, length in grid.parts(status.offset, status.length):
            found = counts[column]
            found[status.depth] = found.get(status.depth, 0) + length
    return "".join(
        _letter(max(found, key=lambda depth: found[depth])) if found else characters.zero
        for found in counts
    )


def _legend(characters: Characters, width: int, *, layered: bool) -> Iterator[str]:
    shades = characters.shades
    items = [
        f"{shades[0]} {shades[1]} {shades[2]} {shades[3]} held in part .. all",
        f"{characters.zero} zeros",
        "blank: not in this layer",
    ]
    if layered:
        items.append("letters: the layer that is read")
    line = ""
    for item in items:
        if line and len(line) + 3 + len(item) > width:
            yield line
            line = ""
        line += ("   " if line else "  ") + item
    yield line


def _percent(share: float) -> str:
    """Whole numbers; but what is there at all is not "0"."""
    return "<1" if 0 < share < 1 else f"{share:.0f}"


class _Pen:
    """Puts lines together, in colour where there is any."""

    _COLOURS = (32, 34, 35, 36, 33, 31)  # green, blue, magenta, cyan, yellow, red

    def __init__(self, style: Style, characters: Characters, label: int) -> None:
        self._style = style
        self._frame = characters.frame
        self._label = label

    def line(self, letter: str, name: str, bar: str, depth: int | None, share: float | None) -> str:
        """Label, bar, and how much of the range the layer holds."""
        head = f"{letter} {name}".ljust(self._label)
        tail = "" if share is None else f" {_percent(share):>3} %"
        return f"{head} {self._frame}{self._coloured(bar, depth)}{self._frame}{tail}"

    def _coloured(self, bar: str, depth: int | None) -> str:
        if not self._style.colours:
            return bar
        if depth is not None:
            return f"\x1b[{self._colour(depth)}m{bar}\x1b[0m"
        return "".join(
            f"\x1b[{self._colour(_LETTERS.index(c))}m{c}\x1b[0m" if c in _LETTERS else c
            for c in bar
        )

    def _colour(self, depth: int) -> int:
        return self._COLOURS[depth % len(self._COLOURS)]
