# SPDX-License-Identifier: MIT
"""``mmcow create``.

Owns: the verb, and the text form of ``-o``.
Never: makes a file itself.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

import mmcow
from mmcow.chain import probe_file
from mmcow.cli import exits
from mmcow.cli.options import Parser, add_quiet, refuse_qemu
from mmcow.cli.sizes import exact_size, parse_size
from mmcow.cli.ui import CommandLineError
from mmcow.errors import UsageError
from mmcow.formats import registry
from mmcow.formats.addcow_create import default_data_name
from mmcow.formats.opening import resolve
from mmcow.storage.linux import LinuxHost

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui

# Options that qemu-img takes with -o for what has an option or operand of its own.
_ALIASES = {"size": "size", "backing_file": "backing", "backing_fmt": "backing_format"}


class Wanted(NamedTuple):
    """What the options come to."""

    format: str
    size: int | None
    backing: str | None
    backing_format: str | None
    options: dict[str, str]


def configure_create(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "-f", "--format", metavar="FMT",
        help="format to make: raw, add-cow or cow (default: add-cow with -b, raw without)",
    )  # fmt: skip
    parser.add_argument(
        "-b", "--backing", metavar="BASE",
        help="the base: what the new image does not hold is read from it",
    )  # fmt: skip
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of the base")
    parser.add_argument(
        "-u", "--unsafe", action="store_true", help="do not open the base; needs -F and SIZE"
    )
    add_format_options(parser)
    add_quiet(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="the new image")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", help="of the disk (default: the size of the base)"
    )
    parser.examples(
        "mmcow create disk.raw 20G",
        "mmcow create -b base.raw -F raw vm.acow",
        "mmcow create -f add-cow -b base.raw -F raw -o image_file=/dev/vg/vm vm.acow",
        "mmcow create -f add-cow -o help",
    )


def add_format_options(parser: Parser) -> None:
    """-o: the options of a format."""
    parser.add_argument(
        "-o", "--options", metavar="K=V,...", action="append", default=[],
        help="options of the format; '-o help' lists them. May be given several times",
    )  # fmt: skip


def parse_options(texts: list[str]) -> dict[str, str]:
    """Names and values of "a=1,b=x,,y"; a doubled comma stands for one in a value."""
    options: dict[str, str] = {}
    for text in texts:
        for item in _split(text):
            key, equals, value = item.partition("=")
            if not key or not equals:
                raise CommandLineError(f"-o {item!r}: must be name=value")
            if key == "image_file" and not value:
                raise CommandLineError("-o image_file=: the name of the data file is missing")
            options[key] = value
    return options


def _split(text: str) -> list[str]:
    return [item.replace("\0", ",") for item in text.replace(",,", "\0").split(",") if item]


def options_help(format_: str) -> str:
    """What ``-o help`` shows."""
    options = registry.get(format_).options
    if not options:
        return f"format {format_} has no options"
    width = max(len(option.name) for option in options)
    lines = [f"  {option.name:<{width}}  {option.help}" for option in options]
    return "\n".join([f"options of format {format_}:", *lines])


def wants_help(texts: list[str]) -> bool:
    """Whether ``-o help`` (or ``-o ?``) was given."""
    return any(item in ("help", "?") for text in texts for item in _split(text))


def run_create(arguments: argparse.Namespace, ui: Ui) -> int:
    """Make the image."""
    if wants_help(arguments.options):
        ui.out(options_help(arguments.format or ("add-cow" if arguments.backing else "raw")))
        return exits.OK
    path: str | None = arguments.file
    if path is None:
        raise CommandLineError("create: FILE is missing; see 'mmcow create --help'")
    ui.subject = path
    wanted = _wanted(arguments, path)
    if wanted.backing_format is not None:
        from mmcow.jobs.rebase import check_format_name  # noqa: PLC0415 - not for --help

        check_format_name(path, wanted.backing_format)
    if wanted.backing is not None and wanted.backing_format is None and not arguments.unsafe:
        wanted = wanted._replace(backing_format=_base_format(ui, path, wanted.backing))
    data_path = _existing_data(path, wanted)
    size = mmcow.create(
        path,
        format=wanted.format,
        size=wanted.size,
        backing=wanted.backing,
        backing_format=wanted.backing_format,
        options=wanted.options,
        check_backing=not arguments.unsafe,
    )
    ui.say(_created(path, wanted, size))
    if data_path is not None:
        _warn_of_adopted(ui, path, data_path, wanted, size, opened=not arguments.unsafe)
    return exits.OK


def _wanted(arguments: argparse.Namespace, path: str) -> Wanted:
    given = vars(arguments)
    options = parse_options(arguments.options)
    for alias, name in _ALIASES.items():
        value = options.pop(alias, None)
        if value is None:
            continue
        if given[name] not in (None, value):
            raise CommandLineError(f"create: {name} is given twice: {given[name]} and {value}")
        given[name] = value
    backing: str | None = given["backing"] or None
    format_ = arguments.format or ("raw" if backing is None else "add-cow")
    if backing is None and given["backing_format"] is not None:
        raise CommandLineError("create: -F is the format of a base, and there is none; see -b")
    if backing is None and arguments.unsafe:
        raise CommandLineError("create: -u leaves the base unopened, and there is none; see -b")
    if backing is not None and format_ == "raw":
        raise UsageError(
            f"{path}: a raw disk cannot record a base ({backing}); -f add-cow makes one that can"
        )
    size = None if given["size"] is None else parse_size(given["size"])
    return Wanted(format_, size, backing, given["backing_format"], options)


def _base_format(ui: Ui, path: str, backing: str) -> str:
    """The format of a base when nobody says it: raw, or the user must say what it is.

    A raw disk whose guest wrote the first bytes of an image would be opened as that image, and
    the files it names with it. So only raw is taken without being said.
    """
    found = probe_file(LinuxHost(), resolve(path, "backing file", backing))
    if found != "raw":
        raise UsageError(
            f"{path}: the base {backing} begins like {found}: say its format "
            f"(-F {found}, or -F raw if it is a raw disk whose guest wrote that)"
        )
    ui.warn(f"{path}: the base {backing} is taken and recorded as raw; -F raw says so")
    return found


def _created(path: str, wanted: Wanted, size: int) -> str:
    text = f"created {path}: {wanted.format}, {exact_size(size)}"
    if wanted.backing is not None:
        text += f", over {wanted.backing} ({wanted.backing_format})"
    return text


def _existing_data(path: str, wanted: Wanted) -> str | None:
    """The data file that the new image will adopt; None where it makes one, or has none."""
    if wanted.format != "add-cow":
        return None
    if os.path.islink(path):
        path = os.path.realpath(path)  # what it leads to is made
    name = wanted.options.get("image_file") or default_data_name(path)
    data_path = resolve(path, "data file", name)
    return data_path if os.path.exists(data_path) else None


def _warn_of_adopted(
    ui: Ui, path: str, data_path: str, wanted: Wanted, size: int, *, opened: bool
) -> None:
    """Somebody may not know that the file was there: it is the disk now, or will be."""
    found = os.stat(data_path)
    length = found.st_size if stat.S_ISREG(found.st_mode) else size
    use = (
        "what it holds is the disk"
        if wanted.backing is None
        else "it is hidden by the base, and overwritten by writes to the disk"
    )
    ui.warn(f"{path}: existing data file {data_path} ({length} bytes) adopted: {use}")
    if wanted.backing is None or not opened:
        return
    base = resolve(path, "backing file", wanted.backing)
    with mmcow.open(base, format=wanted.backing_format, share=True) as image:
        below = image.size
    if size < below:
        ui.warn(
            f"{path}: the disk is as long as the data file, {exact_size(size)}: the end of the "
            f"base {wanted.backing}, {exact_size(below)}, is not visible"
        )
