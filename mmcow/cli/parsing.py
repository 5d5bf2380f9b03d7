# SPDX-License-Identifier: MIT
"""A parser that behaves like qemu-img's: options and operands in any order.

Owns: argparse, bent to that, with errors raised instead of exiting. ``options.Parser`` fills it,
and only where a command line is not plain: argparse is slow to import.

Never: knows a verb.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from mmcow.cli import terminal
from mmcow.cli.options import HelpWanted
from mmcow.cli.ui import CommandLineError

if TYPE_CHECKING:
    from collections.abc import Sequence


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


class FullParser(argparse.ArgumentParser):
    """One verb's parser; see ``options.Parser`` for what the methods are for."""

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
        message = message.replace(_COVER, "")
        raise CommandLineError(f"{self.verb}: {message}; see 'mmcow {self.verb} --help'")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """What converters and choices look at, and errors show, is what was given."""
        return super()._get_value(action, arg_string.removeprefix(_COVER))

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
