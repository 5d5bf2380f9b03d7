# SPDX-License-Identifier: MIT
"""``mmcow compare``.

Owns: the verb and its exit statuses: 0 equal, 1 different, 2 failed.
Never: reads content itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.cli import exits
from mmcow.cli.images import opened
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_progress,
    add_quiet,
    add_share,
    refuse_qemu,
)
from mmcow.cli.progress import meter
from mmcow.cli.sizes import exact_size
from mmcow.jobs.compare import compare

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui


def configure_compare(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("-f", "--format", metavar="FMT", help="format of the first image")
    parser.add_argument("-F", dest="second_format", metavar="FMT", help="format of the second")
    add_backing_format(parser, short=False)
    parser.add_argument(
        "-s", "--strict", action="store_true",
        help="sizes must be equal too, and so must be what is allocated",
    )  # fmt: skip
    add_cache(parser, "both images", source=True)
    add_share(parser)
    add_progress(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("first", metavar="FILE1", help="an image")
    parser.add_argument("second", metavar="FILE2", help="another image")
    parser.examples("mmcow compare vm.acow flat.raw", "mmcow compare -s -f raw -F raw a b")


def run_compare(arguments: argparse.Namespace, ui: Ui) -> int:
    """Compare; the first difference is told."""
    common = {
        "cache": arguments.source_cache,
        "share": arguments.share,
        "backing_format": arguments.backing_format,
    }
    first_path, second_path = arguments.first, arguments.second
    with (
        opened(ui, first_path, format=arguments.format, **common) as first,
        opened(ui, second_path, format=arguments.second_format, **common) as second,
    ):
        ui.subject = first_path
        if first.size != second.size and not arguments.strict and not arguments.quiet:
            ui.warn(
                f"the sizes differ: {first_path} has {exact_size(first.size)}, "
                f"{second_path} {exact_size(second.size)}"
            )
        with meter(ui, arguments, "compare") as progress:
            found = compare(first, second, strict=arguments.strict, progress=progress)
    if found is None:
        ui.say(f"{first_path} and {second_path} are identical")
        return exits.OK
    ui.say(f"{first_path} and {second_path} differ: {found}")
    return exits.DIFFER
