# SPDX-License-Identifier: MIT
"""``mmcow convert``.

Owns: the verb, and the refusal to write to a file of the source's own chain.
Never: copies (``jobs.convert`` does).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import mmcow
from mmcow.chain import probe_file
from mmcow.cli import exits
from mmcow.cli.create import add_format_options, options_help, parse_options, wants_help
from mmcow.cli.images import opened, warn
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_format,
    add_progress,
    add_quiet,
    add_share,
    refuse_qemu,
)
from mmcow.cli.progress import meter
from mmcow.cli.ui import CommandLineError
from mmcow.errors import UsageError
from mmcow.formats.addcow_create import default_data_name
from mmcow.formats.opening import resolve
from mmcow.jobs.convert import convert, convert_to
from mmcow.storage.linux import LinuxHost

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui
    from mmcow.image import Image


def configure_convert(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser, "the source")
    add_backing_format(parser)
    parser.add_argument(
        "-O", "--target-format", metavar="FMT",
        help="format of the target: raw (default), add-cow or cow",
    )  # fmt: skip
    parser.add_argument(
        "-n", "--no-create", action="store_true",
        help="copy into an image that exists; what it has more becomes zeros",
    )  # fmt: skip
    add_format_options(parser)
    add_cache(parser, "the target")
    add_cache(parser, "the source", source=True)
    add_share(parser)
    add_progress(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    _refuse_more(parser)
    parser.add_argument("source", metavar="SRC", nargs="?", help="the image to copy")
    parser.add_argument("target", metavar="DST", nargs="?", help="the image to make")
    parser.examples(
        "mmcow convert vm.acow flat.raw",
        "mmcow convert -O add-cow -o cluster_size=64k flat.raw copy.acow",
        "mmcow convert -n -O raw vm.acow /dev/vg/vm",
    )


def _refuse_more(parser: Parser) -> None:
    parser.refuse("no format that mmcow writes is compressed", "-c")
    parser.refuse("the target has no base; see create -b", "-B", argument=True)
    parser.refuse("zeros are always found, in blocks of 4 KiB", "-S", argument=True)
    parser.refuse("no format that mmcow reads has internal snapshots", "-l", argument=True)
    parser.refuse("no format that mmcow reads has bitmaps", "--bitmaps")
    parser.refuse("the rate cannot be limited", "-r", argument=True)
    parser.refuse("a copy stops at the first error", "--salvage")
    parser.refuse("name the target, and its format with -O", "--target-image-opts")
    parser.refuse("a new target is known to be zero; another one is zeroed", "--target-is-zero")
    parser.refuse("the kernel is not asked to copy ranges", "-C")
    # Hints about how to go about it, which change no result: taken and left aside.
    parser.add_argument(
        "-m", dest="parallel", metavar="N", help="accepted as qemu-img's, without effect"
    )
    parser.add_argument(
        "-W", dest="unordered", action="store_true", help="accepted as qemu-img's, without effect"
    )


def run_convert(arguments: argparse.Namespace, ui: Ui) -> int:
    """Copy."""
    if wants_help(arguments.options):
        ui.out(options_help(arguments.target_format or "raw"))
        return exits.OK
    if arguments.source is None or arguments.target is None:
        raise CommandLineError("convert: SRC and DST are needed; see 'mmcow convert --help'")
    if arguments.no_create and arguments.options:
        raise CommandLineError("convert: -o is for a new target, and -n makes none")
    with opened(
        ui,
        arguments.source,
        format=arguments.format,
        cache=arguments.source_cache,
        share=arguments.share,
        backing_format=arguments.backing_format,
    ) as source:
        ui.subject = arguments.target
        ui.can_share = False  # the target is written
        _refuse_own_files(source, arguments.target)
        if arguments.no_create:
            _copy(arguments, ui, source, _existing_format(arguments))
        else:
            _make_and_copy(arguments, ui, source)
    return exits.OK


def _existing_format(arguments: argparse.Namespace) -> str:
    """The format of a target that is there: raw unless told otherwise, as qemu-img has it.

    What looks like an image may be a raw disk whose guest made it look so, and an image of which
    only the name was given would be overwritten: the user has to say.
    """
    if arguments.target_format is not None:
        return str(arguments.target_format)
    found = probe_file(LinuxHost(), arguments.target)
    if found != "raw":
        raise UsageError(
            f"{arguments.target}: begins like {found}: say what it is (-O {found}, or -O raw to "
            "overwrite it as a raw disk)"
        )
    return found


def _make_and_copy(arguments: argparse.Namespace, ui: Ui, source: Image) -> None:
    path: str = arguments.target
    format_: str = arguments.target_format or "raw"
    options = parse_options(arguments.options)
    if format_ == "add-cow":
        _refuse_own_files(source, _data_path(path, options))
    with meter(ui, arguments, "convert") as progress:

        def copying(done: int, total: int) -> None:
            ui.subject = source.path  # what fails from here on is about the copy, not the target
            if progress is not None:
                progress(done, total)

        convert_to(
            source, path, format=format_, options=options, cache=arguments.cache, progress=copying
        )


def _copy(arguments: argparse.Namespace, ui: Ui, source: Image, format_: str) -> None:
    """Copy over an image that is there."""
    path: str = arguments.target
    with mmcow.open(path, format=format_, write=True, cache=arguments.cache) as target:
        ui.opened(path, target)
        warn(ui, path, target)
        _refuse_own_files(source, target.chain[0].data_file)
        ui.subject = source.path
        with meter(ui, arguments, "convert") as progress:
            convert(source, target, progress=progress)


def _data_path(path: str, options: dict[str, str]) -> str:
    """Where an add-cow target keeps its data."""
    name = options.get("image_file") or default_data_name(path)
    return resolve(path, "data file", name)


def _refuse_own_files(source: Image, path: str) -> None:
    """Writing to a file of the source's own chain would destroy what is being copied."""
    identity = _identity(path)
    if identity is None:
        return
    for layer in source.chain:
        for name in (layer.path, layer.data_file):
            if _identity(name) == identity:
                known = "" if name == path else f" (as {name})"
                raise UsageError(f"{path}: is a file of the source {source.path}{known}")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (-1, found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
