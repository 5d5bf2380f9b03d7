# SPDX-License-Identifier: MIT
"""``mmcow rebase -u``: an image's base or data file was moved; record its new name.

Owns: the verb.
Never: opens what an image names: the disk reads the same afterwards only if the new base holds
what the old one held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.cli import exits
from mmcow.cli.create import parse_options
from mmcow.cli.options import Parser, add_format, add_quiet, refuse_qemu
from mmcow.cli.ui import CommandLineError
from mmcow.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui


def configure_rebase(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "-u", "--unsafe", action="store_true",
        help="change only what is recorded; the new base must hold what the old one held",
    )  # fmt: skip
    add_format(parser)
    parser.add_argument(
        "-b", "--backing", metavar="BASE", help="new name of the base; '' removes it"
    )
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of the base")
    parser.add_argument(
        "-o", "--options", metavar="image_file=NAME", action="append", default=[],
        help="new name of the data file",
    )  # fmt: skip
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.examples(
        "mmcow rebase -u -b /srv/base.raw -F raw vm.acow",
        "mmcow rebase -u -o image_file=/dev/vg/vm vm.acow",
    )


def run_rebase(arguments: argparse.Namespace, ui: Ui) -> int:
    """Record other names."""
    from mmcow.jobs.rebase import rename  # noqa: PLC0415 - not for --help

    if not arguments.unsafe:
        raise CommandLineError(
            "rebase: only -u is there so far: it changes the recorded names and copies nothing. "
            "To merge layers, see commit and stream"
        )
    options = parse_options(arguments.options)
    data_file = options.pop("image_file", None)
    if options:
        raise CommandLineError(f"rebase: -o takes image_file=NAME, not {', '.join(options)}")
    wanted = (arguments.backing, arguments.backing_format, data_file)
    if wanted == (None, None, None):
        raise CommandLineError("rebase: nothing to change; see -b, -F and -o")
    ui.subject = path = arguments.file
    if arguments.backing and arguments.backing_format is None:
        _require_format(path, arguments.format, arguments.backing)
    rename(
        path,
        format=arguments.format,
        backing=arguments.backing,
        backing_format=arguments.backing_format,
        data_file=data_file,
    )
    if arguments.backing is not None:
        ui.say(f"{path}: base is now {arguments.backing or 'none'}")
    if arguments.backing_format is not None:
        ui.say(f"{path}: format of the base is now {arguments.backing_format}")
    if data_file is not None:
        ui.say(f"{path}: data file is now {data_file}")
    return exits.OK


def _require_format(path: str, format_: str | None, backing: str) -> None:
    """The format that is recorded is the old base's: the new one's may be another."""
    from mmcow.jobs.info import inspect  # noqa: PLC0415 - not for --help

    recorded = inspect(path, format=format_).backing_format
    if recorded is not None:
        raise UsageError(
            f"{path}: say the new base's format (-F): {recorded} is what is recorded of the old "
            f"one, and {backing} may be another"
        )
