# SPDX-License-Identifier: MIT
"""``mmcow``: from the command line to an exit status.

Owns: finding the verb, the general options, and the one place where errors end: a line on
standard error and a status, never a traceback (unless MMCOW_DEBUG=1).

Never: knows what a verb does (``verbs``).
"""

from __future__ import annotations

import os
import sys

from mmcow.cli import exits
from mmcow.cli.options import HelpWanted
from mmcow.cli.ui import CommandLineError, OutputError, Ui
from mmcow.cli.verbs import VERBS, make_parser, run
from mmcow.errors import Cancelled, Interrupted, MmcowError

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

_ENDING = """\
general options:
  -h, --help     show this help and exit
  -V, --version  show the version and how data is moved, and exit

Every verb has a help of its own: mmcow VERB --help.
Sizes are bytes, or take k, M, G, T, P or E (powers of 1024), with decimals.
Exit status: 0 done, 1 failed, 130 stopped by Ctrl-C; check and compare have more."""


def command() -> int:
    """``main`` for a process that ends with it."""
    status = main()
    verb = VERBS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if verb is not None and verb.brief:
        # All is closed, and written out. To take the interpreter apart, too, would take an eighth
        # of the time it took to start.
        os._exit(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``argv`` is without the program's name."""
    _occupy_standard_descriptors()
    arguments = list(sys.argv[1:] if argv is None else argv)
    ui = Ui()
    verb = arguments[0] if arguments and arguments[0] in VERBS else ""
    if verb and VERBS[verb].brief:
        return _run(arguments, verb, ui)
    with ui.signals.watched(for_good=argv is None):
        return _run(arguments, verb, ui)


def _run(arguments: list[str], verb: str, ui: Ui) -> int:
    try:
        status = _dispatch(arguments, ui)
        ui.flush()
    # Whatever ends here is told in one line; Cancelled by signal included.
    except BaseException as error:
        if isinstance(error, GeneratorExit | SystemExit):
            raise
        return _report(error, verb, ui)
    return status


def _occupy_standard_descriptors() -> None:
    """Keep an image from getting a descriptor that something may take for a standard stream."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def _dispatch(arguments: list[str], ui: Ui) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        ui.out(usage())
        return exits.OK
    if first in ("-V", "--version"):
        ui.out(_version())
        return exits.OK
    if first not in VERBS:
        raise CommandLineError(_unknown(first))
    parser = make_parser(first)
    try:
        parsed = parser.parse(arguments[1:])
    except HelpWanted:
        ui.out(parser.full().format_help().rstrip("\n"))
        return exits.OK
    ui.quiet = getattr(parsed, "quiet", False)
    ui.can_share = not getattr(parsed, "share", True)
    return run(first, parsed, ui)


def usage() -> str:
    """The general help."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "usage: mmcow VERB [options]\n\nCopy-on-write disk images.\n\nverbs:\n" + "\n".join(
        [*lines, "", _ENDING]
    )


def _unknown(first: str) -> str:
    if not first:
        return "a verb is missing; see 'mmcow --help'"
    what = "option" if first.startswith("-") else "verb"
    return f"unknown {what} {first!r}; the verbs are {', '.join(VERBS)}"


def _version() -> str:
    from mmcow import __version__  # noqa: PLC0415 - only --version needs the queue
    from mmcow.storage.linux import LinuxHost  # noqa: PLC0415

    queue = LinuxHost().queue()
    try:
        return f"mmcow {__version__}\nI/O queue: {queue.backend}"
    finally:
        queue.close()


def _report(error: BaseException, verb: str, ui: Ui) -> int:
    if os.environ.get("MMCOW_DEBUG") == "1":
        import traceback  # noqa: PLC0415 - only for those who debug mmcow

        ui.err("".join(traceback.format_exception(error)).rstrip("\n"))
    if isinstance(error, OutputError):
        ui.abandon_output()
        if isinstance(error.error, BrokenPipeError):
            return exits.PIPE_CLOSED
    if isinstance(error, KeyboardInterrupt | Cancelled | Interrupted):
        ui.note(ui.describe(error) if isinstance(error, MmcowError) else "interrupted")
        return 128 + ui.signals.number if ui.signals.number else exits.INTERRUPTED
    status = exits.status_of(error, verb)
    if status == exits.INTERNAL:
        ui.note(f"internal error: {type(error).__name__}: {error}")
        ui.note("this is a bug in mmcow; MMCOW_DEBUG=1 shows where")
        return status
    ui.note(ui.describe(error))
    for note in getattr(error, "__notes__", ()):
        ui.note(note)
    return status
