# SPDX-License-Identifier: MIT
"""``mmcow resize``.

Owns: the verb, and sizes relative to the present one.
Never: changes a size without the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.cli import exits
from mmcow.cli.images import opened
from mmcow.cli.options import Parser, add_backing_format, add_format, add_quiet, refuse_qemu
from mmcow.cli.sizes import exact_size, parse_size
from mmcow.errors import UsageError
from mmcow.ranges import SECTOR, align_up

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui


def configure_resize(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    parser.add_argument(
        "--shrink", action="store_true", help="allow the disk to become smaller: its end is lost"
    )
    add_quiet(parser)
    refuse_qemu(parser)
    parser.refuse("new space is always sparse", "--preallocation", argument=True)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.add_argument("size", metavar="[+|-]SIZE", help="the new size, or by how much it changes")
    parser.examples(
        "mmcow resize vm.acow 40G",
        "mmcow resize vm.acow +10G",
        "mmcow resize --shrink disk.raw -512M",
    )


def new_size(text: str, present: int) -> int:
    """The size that ``text`` asks for: absolute, or relative where it has a sign."""
    if text[:1] not in ("+", "-"):
        return parse_size(text)
    change = parse_size(text[1:], "change of size")
    return present + (change if text[0] == "+" else -change)


def run_resize(arguments: argparse.Namespace, ui: Ui) -> int:
    """Change the size."""
    path: str = arguments.file
    with opened(
        ui, path, format=arguments.format, write=True, backing_format=arguments.backing_format
    ) as image:
        before = image.size
        size = new_size(arguments.size, before)
        if size <= 0 and size != before and arguments.size[:1] in ("+", "-"):
            raise UsageError(f"{path}: {arguments.size} leaves nothing of {exact_size(before)}")
        if align_up(size, SECTOR) < before and not arguments.shrink:
            raise UsageError(
                f"{path}: {exact_size(size)} is less than the present {exact_size(before)}: what "
                "lies beyond would be lost. --shrink does it all the same"
            )
        image.resize(size, shrink=arguments.shrink)
        after = image.size
    ui.say(f"{path}: resized from {exact_size(before)} to {exact_size(after)}")
    return exits.OK
