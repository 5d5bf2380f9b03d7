# SPDX-License-Identifier: MIT
"""The options that verbs share, and the reading of plain command lines.

Owns: ``Parser`` (what a verb takes; lines that are not plain go to ``parsing``) and one function
for each group of options, so that an option means the same under every verb.

Never: opens anything, imports the library beyond its errors.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence
    from typing import Any

    from mmcow.cli.parsing import FullParser
else:

    class Namespace:
        """As argparse's: attributes."""

        def __init__(self, **values: Any) -> None:
            vars(self).update(values)


_NUMBER = r"(?ia)(0x[0-9a-f]{1,16})|[0-9]{1,20}"

CACHES = "auto, none, writeback, writethrough, directsync or unsafe"


class HelpWanted(Exception):
    """The user asked for help."""


class Parser:
    """One verb's options: noted down, and read without argparse where the line is plain.

    Plain: known options, each with its own value, and as many operands as there are. Whatever is
    not (``-h``, mistakes, options that take several words) is for argparse, and where both
    understand a line they understand the same (a test compares them).
    """

    def __init__(self, verb: str, summary: str) -> None:
        self.verb = verb
        self._summary = summary
        self._steps: list[tuple[str, tuple[str, ...], dict[str, Any]]] = []

    def add_argument(self, *names: str, **settings: Any) -> None:
        """As argparse's."""
        self._steps.append(("add_argument", names, settings))

    def set_defaults(self, **values: Any) -> None:
        """As argparse's."""
        self._steps.append(("set_defaults", (), values))

    def examples(self, *lines: str) -> None:
        """Show ``lines`` below the options."""
        self._steps.append(("examples", lines, {}))

    def refuse(self, reason: str, *options: str, argument: bool = False) -> None:
        """Answer qemu-img's ``options`` with ``reason``, and leave them out of the help."""
        self._steps.append(("refuse", (reason, *options), {"argument": argument}))

    def take_command(self, metavar: str, help: str) -> None:
        """Let ``-- COMMAND...`` end the arguments; it becomes ``namespace.command``."""
        self._steps.append(("take_command", (metavar, help), {}))

    def full(self) -> FullParser:
        """The same for argparse."""
        from mmcow.cli.parsing import FullParser  # noqa: PLC0415 - slow

        parser = FullParser(self.verb, self._summary)
        for method, names, settings in self._steps:
            getattr(parser, method)(*names, **settings)
        return parser

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """Parse; operands may stand between options, as getopt_long allows."""
        plain = self.parse_plain(arguments)
        return self.full().parse(arguments) if plain is None else plain

    def parse_plain(self, arguments: Sequence[str]) -> Namespace | None:
        """The same of a plain line; None of another."""
        options: dict[str, tuple[str, dict[str, Any]]] = {}
        operands: list[tuple[str, dict[str, Any]]] = []
        values: dict[str, Any] = {}
        for method, names, settings in self._steps:
            if method in ("take_command", "set_defaults"):
                return None
            if method == "add_argument" and not names[0].startswith("-"):
                operands.append((names[0], settings))
            elif method == "add_argument":
                name = settings.get("dest") or _name_of(names)
                unset = _UNSET.get(settings.get("action", ""))
                values.setdefault(name, settings.get("default", unset))
                options |= dict.fromkeys(names, (name, settings))
        try:
            words = _read_options(arguments, options, values)
            if len(words) != len(operands):
                return None
            for (name, settings), word in zip(operands, words, strict=True):
                values[name] = _value(settings, word)
        except (KeyError, StopIteration, _NotPlainError):
            return None
        return Namespace(**values)


def _read_options(
    arguments: Sequence[str],
    options: dict[str, tuple[str, dict[str, Any]]],
    values: dict[str, Any],
) -> list[str]:
    """Put the options' values into ``values``; returns the other words."""
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            others.append(word)
            continue
        flag, equals, value = word.partition("=")
        name, settings = options[flag]
        if equals and not word.startswith("--"):
            raise _NotPlainError
        if settings.get("action") != "store_true":
            values[name] = _value(settings, value if equals else next(words))
        elif equals:
            raise _NotPlainError
        else:
            values[name] = True
    return others


_UNSET = {"store_true": False, "store_false": True}


class _NotPlainError(Exception):
    """A word that argparse shall look at."""


def _name_of(names: tuple[str, ...]) -> str:
    long = next((name for name in names if name.startswith("--")), names[0])
    return long.lstrip("-").replace("-", "_")


def _value(settings: dict[str, Any], word: str) -> str:
    """The value of an option or operand that takes exactly one word, as it is."""
    choices = settings.get("choices")
    if (
        not word
        or word.startswith("-")
        or settings.keys() & {"action", "nargs", "type", "const"}
        or (choices is not None and word not in choices)
    ):
        raise _NotPlainError
    return word


def size_argument(what: str) -> Callable[[str], int]:
    """A converter for ``add_argument(type=...)``; its errors name ``what``."""

    def convert(text: str) -> int:
        from argparse import ArgumentTypeError  # noqa: PLC0415 - slow

        from mmcow.cli.sizes import SizeError, parse_size  # noqa: PLC0415

        try:
            return parse_size(text, what)
        except SizeError as error:
            raise ArgumentTypeError(str(error)) from None

    return convert


def number_argument(what: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """The same for plain numbers, decimal or hexadecimal, within bounds."""

    def convert(text: str) -> int:
        import re  # noqa: PLC0415 - slow
        from argparse import ArgumentTypeError  # noqa: PLC0415

        found = re.fullmatch(_NUMBER, text)
        value = int(text, 16 if found[1] else 10) if found else least - 1
        if value < least or (most is not None and value > most):
            bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise ArgumentTypeError(f"{what} {text!r}: must be a number {bounds}")
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
    """-q: no results, no progress. Warnings stay, as qemu-img's do: they are about the data."""
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="say nothing but warnings and errors"
    )


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
