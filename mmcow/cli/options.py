# SPDX-License-Identifier: MIT
"""The options that verbs share, and a parser that behaves like qemu-img's.

Owns: ``Parser`` (options and operands in any order, errors raised instead of exiting) and one
function for each group of options, so that an option means the same under every verb.

Never: opens anything, imports the library beyond its errors.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from mmcow.cli import terminal
from mmcow.cli.sizes import SizeError, parse_size
from mmcow.cli.ui import CommandLineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"(0x[0-9a-f]{1,16})|[0-9]{1,20}", re.IGNORECASE | re.ASCII)

CACHES = "auto, none, writeback, writethrough, directsync or unsafe"


class HelpWanted(Exception):
    """The user asked for help."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse makes one for every option, and finds the width by a slow import if not told."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=max(terminal.width_of(sys.stdout) - 2, 40))


class _Help(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        raise HelpWanted


class _Refused(argparse.Action):
    """An option that qemu-img has and mmcow has not: say so, instead of "unrecognized"."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string} is not supported: {self.metavar}")


class Parser(argparse.ArgumentParser):
    """One verb's parser."""

    def __init__(self, verb: str, summary: str, **settings: Any) -> None:
        super().__init__(
            prog=f"mmcow {verb}",
            description=summary,
            formatter_class=_Formatter,
            add_help=False,
            allow_abbrev=False,
            **settings,
        )
        self.verb = verb
        self._given: list[str] = []
        self._takes_command = False
        # "-512M" is a size, not an option: no option of any verb begins with a digit.
        self._negative_number_matcher = re.compile(r"-[0-9]")
        self.refused: dict[str, str] = {}
        self.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help and exit")

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting: ``main`` decides about exit statuses."""
        unknown = self._unknown_option()
        if unknown is not None:  # argparse tells of missing operands first, which misleads
            message = f"unknown option {unknown}"
        raise CommandLineError(f"{self.verb}: {message}; see 'mmcow {self.verb} --help'")

    def examples(self, *lines: str) -> None:
        """Show ``lines`` below the options."""
        self.epilog = "examples:\n" + "\n".join(f"  {line}" for line in lines)

    def refuse(self, reason: str, *options: str, argument: bool = False) -> None:
        """Answer qemu-img's ``options`` with ``reason``, and leave them out of the help."""
        for option in options:
            self.refused[option] = reason
            self.add_argument(
                option,
                action=_Refused,
                nargs=None if argument else 0,
                metavar=reason,
                help=argparse.SUPPRESS,
            )

    def take_command(self, metavar: str, help: str) -> None:
        """Let ``-- COMMAND...`` end the arguments; it becomes ``namespace.command``."""
        self._takes_command = True
        self.description = f"{self.description}\n\n-- {metavar} ...: {help}"

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; operands may stand between options, as getopt_long allows."""
        self._given = list(arguments)
        command: list[str] = []
        if self._takes_command and "--" in self._given:
            index = self._given.index("--")
            self._given, command = self._given[:index], self._given[index + 1 :]
        # A usage that is set keeps argparse from formatting one for every parse, just in case.
        self.usage = self.prog
        try:
            parsed = _uncovered(self.parse_intermixed_args(_covered(self._given)))
            if self._takes_command:
                parsed.command = command
            return parsed
        finally:
            self.usage = None

    def _unknown_option(self) -> str | None:
        for text in self._given:
            if text == "--":
                return None
            if not text.startswith("-") or text == "-" or text[1].isdigit():
                continue
            flag = text.partition("=")[0] if text.startswith("--") else text[:2]
            if flag not in self._option_string_actions:
                return text
        return None


# parse_intermixed_args forgets "--" between its two passes. What follows it and looks like an
# option is covered by a character that no argument can contain.
_COVER = "\0"


def _covered(arguments: list[str]) -> list[str]:
    if "--" not in arguments:
        return arguments
    index = arguments.index("--")
    operands = arguments[index + 1 :]
    return arguments[:index] + [
        _COVER + text if text.startswith("-") else text for text in operands
    ]


def _uncovered(namespace: argparse.Namespace) -> argparse.Namespace:
    values = vars(namespace)
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = value.removeprefix(_COVER)
        elif isinstance(value, list):
            values[name] = [text.removeprefix(_COVER) for text in value]
    return namespace


def size_argument(what: str) -> Callable[[str], int]:
    """A converter for ``add_argument(type=...)``; its errors name ``what``."""

    def convert(text: str) -> int:
        try:
            return parse_size(text, what)
        except SizeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def number_argument(what: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """The same for plain numbers, decimal or hexadecimal, within bounds."""

    def convert(text: str) -> int:
        found = _NUMBER.fullmatch(text)
        value = int(text, 16 if found[1] else 10) if found else least - 1
        if value < least or (most is not None and value > most):
            bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{what} {text!r}: must be a number {bounds}")
        return value

    return convert


def add_format(parser: Parser, what: str = "the image") -> None:
    """-f: which format, instead of looking at the first bytes."""
    parser.add_argument(
        "-f", "--format", metavar="FMT", help=f"format of {what}: raw, add-cow or cow"
    )


def add_backing_format(parser: Parser, *, short: bool = True) -> None:
    """-F: format of a base where the image above cannot record it."""
    flags = ("-F", "--backing-format") if short else ("--backing-format",)
    parser.add_argument(
        *flags,
        dest="backing_format",
        metavar="FMT",
        help="format of a base whose format the image above it cannot record",
    )


def add_cache(parser: Parser, what: str = "the image", *, source: bool = False) -> None:
    """-t (or -T for what is only read): the cache mode."""
    flags = ("-T", "--source-cache") if source else ("-t", "--cache")
    parser.add_argument(
        *flags,
        dest="source_cache" if source else "cache",
        metavar="CACHE",
        default="auto",
        help=f"cache mode of {what}: {CACHES} (default auto: none where possible)",
    )


def add_share(parser: Parser) -> None:
    """-U: read an image that is in use."""
    parser.add_argument(
        "-U",
        "--force-share",
        dest="share",
        action="store_true",
        help="read even while another process writes; what is read may be inconsistent",
    )


def add_quiet(parser: Parser) -> None:
    """-q: say nothing but errors."""
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")


def add_progress(parser: Parser, *, short: bool = True) -> None:
    """-p (unless ``short`` is False) and --progress."""
    parser.set_defaults(show_progress=False)
    if short:
        parser.add_argument(
            "-p",
            dest="show_progress",
            action="store_true",
            help="show progress even where standard error is no terminal "
            "(then as qemu-img does, on standard output)",
        )
    parser.add_argument(
        "--progress",
        choices=("bar", "json", "none"),
        help="show progress on standard error: as a bar (the default on a terminal), as lines "
        "of JSON, or not at all",
    )


def add_output(parser: Parser) -> None:
    """--output: for people or for programs."""
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="for people (default) or as JSON, in qemu-img's shape",
    )


def refuse_qemu(parser: Parser) -> None:
    """The options that qemu-img has under every verb and mmcow under none."""
    parser.refuse("name the file, and its format with -f", "--image-opts")
    parser.refuse("mmcow has no secrets and no encryption", "--object", argument=True)
