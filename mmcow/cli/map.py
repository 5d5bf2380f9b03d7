# SPDX-License-Identifier: MIT
"""``mmcow map``: what each layer holds: drawn, as qemu-img's table, or as its JSON.

Owns: the verb, and the translation of extents into qemu-img's words.
Never: draws (``drawing`` does).

qemu-img's words: ``depth`` is the layer that answers; where none has a range, the deepest one
that reaches it. ``present``: some layer has it; ``data``: stored bytes; ``zero``: reads as zeros.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from mmcow.cli import drawing, exits, terminal
from mmcow.cli.images import opened
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_format,
    add_output,
    add_share,
    refuse_qemu,
    size_argument,
)
from mmcow.cli.ui import printable
from mmcow.formats.driver import Kind

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from mmcow.cli.ui import Ui
    from mmcow.image import BlockStatus, Image

# Lines of JSON written at once.
LINES = 256


class Entry(NamedTuple):
    """One entry of qemu-img's map."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    path: str | None

    def json(self) -> str:
        """As qemu-img writes it."""
        offset = self.offset
        last = "}" if offset is None else f', "offset": {offset}}}'
        return f'{{ "start": {self.start}, "length": {self.length}{_words(*self[2:6])}{last}'


# Written by the million; calling ``Entry`` by name takes twice the time.
_make_entry: partial[Entry] = partial(tuple.__new__, Entry)


@cache
def _words(depth: int, present: bool, zero: bool, data: bool) -> str:
    """The middle of an entry's JSON; there are few of them."""
    words = {True: "true", False: "false"}
    return (
        f', "depth": {depth}, "present": {words[present]}, "zero": {words[zero]}, '
        f'"data": {words[data]}'
    )


def configure_map(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    parser.add_argument(
        "-s", "--start-offset", metavar="OFFSET", type=size_argument("start offset"), default=0,
        help="where to begin (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "-l", "--max-length", metavar="LEN", type=size_argument("length"),
        help="how much to show (default: to the end)",
    )  # fmt: skip
    parser.add_argument(
        "--no-picture", dest="picture", action="store_false", help="only the table, no picture"
    )
    add_cache(parser, source=True)
    add_share(parser)
    add_output(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.examples("mmcow map vm.acow", "mmcow map -s 1G -l 64M --output=json vm.acow")


def run_map(arguments: argparse.Namespace, ui: Ui) -> int:
    """Show the map."""
    path: str = arguments.file
    with opened(
        ui,
        path,
        format=arguments.format,
        cache=arguments.source_cache,
        share=arguments.share,
        backing_format=arguments.backing_format,
    ) as image:
        start = min(arguments.start_offset, image.size)
        end = image.size
        if arguments.max_length is not None:
            end = min(end, start + arguments.max_length)
        if arguments.output == "json":
            _show_json(ui, image, arguments.start_offset, end)
            return exits.OK
        if arguments.picture:
            _draw(ui, image, start, end)
        _show_table(ui, image, start, end)
    return exits.OK


def entries(image: Image, start: int, end: int) -> Iterator[Entry]:
    """qemu-img's map of a range; adjacent extents that say the same are one entry."""
    sizes = [layer.size for layer in image.chain]
    raw = [layer.format == "raw" for layer in image.chain]
    pending: Entry | None = None
    for status in image.block_status(start, end - start):
        for entry in _translated(status, sizes, raw):
            if pending is not None:
                if pending.depth == entry.depth and _joins(pending, entry):
                    pending = pending._replace(length=pending.length + entry.length)
                    continue
                yield pending
            pending = entry
    if pending is not None:
        yield pending


def _translated(status: BlockStatus, sizes: list[int], raw: list[bool]) -> Sequence[Entry]:
    start, length, kind, depth, offset, path = status
    if kind is not Kind.BELOW:
        zero = kind is Kind.ZERO
        if offset is None and raw[depth]:
            offset = start  # a hole of a raw disk has a place too
        return (_make_entry((start, length, depth, True, zero, not zero, offset, path)),)
    found = []
    while length:
        depth, reach = _deepest(sizes, start)
        step = min(length, reach - start)
        found.append(Entry(start, step, depth, False, True, False, None, None))
        start, length = start + step, length - step
    return found


def _deepest(sizes: list[int], offset: int) -> tuple[int, int]:
    """The deepest layer that reaches ``offset`` through all above it, and up to where."""
    reach = sizes[0]
    for depth, size in enumerate(sizes):
        if size <= offset:
            return depth - 1, reach
        reach = min(reach, size)
    return len(sizes) - 1, reach


def _joins(first: Entry, second: Entry) -> bool:
    if first[2:6] != second[2:6] or first.path != second.path:
        return False
    if first.offset is None or second.offset is None:
        return first.offset is second.offset
    return first.offset + first.length == second.offset


def _show_json(ui: Ui, image: Image, start: int, end: int) -> None:
    if start >= image.size:
        beyond = Entry(start, 0, 0, False, False, False, None, None)
        ui.out(f"[{beyond.json()}]")
        return
    # One entry is kept back, to know which one is the last.
    head = "["
    held: list[str] = []
    signals = ui.signals
    for entry in entries(image, start, end):
        signals.check("map")
        held.append(entry.json())
        if len(held) > LINES:
            ui.out(head + ",\n".join(held[:-1]) + ",")
            head = ""
            del held[:-1]
    ui.out(head + ",\n".join(held) + "]")


def _show_table(ui: Ui, image: Image, start: int, end: int) -> None:
    ui.out(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for entry in entries(image, start, end):
        ui.signals.check("map")
        if entry.data and entry.offset is not None:
            ui.out(
                f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(entry.offset):<16}"
                f"{printable(entry.path or '')}"
            )


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


def _draw(ui: Ui, image: Image, start: int, end: int) -> None:
    if start >= end:
        return
    stream = ui.stdout
    style = drawing.Style(
        width=max(terminal.width_of(stream), drawing.WIDTH_LEAST),
        unicode=terminal.can_show(stream, drawing.UNICODE.characters),
        colours=terminal.has_colours(stream),
    )
    for line in drawing.draw(image, start, end, style, check=lambda: ui.signals.check("map")):
        ui.out(line)
    ui.out("")
