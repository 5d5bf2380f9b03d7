# SPDX-License-Identifier: MIT
"""``mmcow commit``, ``stream`` and ``detach``: ending the dependence of one layer on another.

Owns: the verbs.
Never: moves data (``jobs`` do).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.cli import exits
from mmcow.cli.images import opened
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_format,
    add_progress,
    add_quiet,
    refuse_qemu,
)
from mmcow.cli.progress import meter
from mmcow.cli.sizes import exact_size

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui


def configure_commit(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    parser.add_argument(
        "-b", "--base", metavar="BASE",
        help="the layer to merge into, as the chain names it (default: the one right below)",
    )  # fmt: skip
    parser.add_argument(
        "-d", "--keep", action="store_true", help="leave the overlay as it is, do not empty it"
    )
    add_cache(parser)
    add_progress(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.refuse("the rate cannot be limited", "-r", argument=True)
    parser.add_argument("file", metavar="FILE", help="the overlay")
    parser.examples("mmcow commit vm.acow", "mmcow commit -d -b base.raw top.acow")


def run_commit(arguments: argparse.Namespace, ui: Ui) -> int:
    """Merge down."""
    from mmcow.jobs.commit import commit  # noqa: PLC0415 - detach does not need it

    ui.subject = path = arguments.file
    with meter(ui, arguments, "commit") as progress:
        moved = commit(
            path,
            format=arguments.format,
            base=arguments.base,
            keep=arguments.keep,
            cache=arguments.cache,
            progress=progress,
            backing_format=arguments.backing_format,
        )
    ui.say(f"{path}: {exact_size(moved)} committed")
    return exits.OK


def configure_stream(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    add_cache(parser)
    add_progress(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="the overlay")
    parser.examples("mmcow stream vm.acow", "mmcow stream --progress=json vm.acow")


def run_stream(arguments: argparse.Namespace, ui: Ui) -> int:
    """Pull the rest of the base in; started again after a stop it goes on where it was."""
    from mmcow.jobs.stream import stream  # noqa: PLC0415 - detach does not need it

    path: str = arguments.file
    with (
        opened(
            ui,
            path,
            format=arguments.format,
            write=True,
            cache=arguments.cache,
            backing_format=arguments.backing_format,
        ) as image,
        meter(ui, arguments, "stream") as progress,
    ):
        moved = stream(image, progress=progress)
    ui.say(f"{path}: {exact_size(moved)} copied from below; it needs no base any more")
    return exits.OK


def configure_detach(parser: Parser) -> None:
    """Add the verb's options."""
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="an add-cow image that holds every cluster")
    parser.examples("mmcow detach vm.acow", "mmcow stream vm.acow && mmcow detach vm.acow")


def run_detach(arguments: argparse.Namespace, ui: Ui) -> int:
    """Leave the raw disk, remove the bitmap file."""
    from mmcow.jobs.detach import detach  # noqa: PLC0415 - stream does not need it

    ui.subject = path = arguments.file
    raw = detach(path)
    ui.say(f"{path}: removed; {raw} is the whole disk, raw")
    return exits.OK
