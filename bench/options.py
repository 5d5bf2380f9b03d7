# SPDX-License-Identifier: MIT
"""What the commands of this folder have in common: kinds of arguments, and where errors end.

Owns: the words for a wrong argument, options that mean the same in all of them, and the status of
what could not be done.
Never: knows what only one command has.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.process import Failed
from mmcow.errors import MmcowError

if TYPE_CHECKING:
    from collections.abc import Callable

NOT_DONE = 2
INTERRUPTED = 130


def whole_number(least: int) -> Callable[[str], int]:
    """A kind of argument: a whole number of at least ``least``."""

    def kind(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return kind


def seconds(text: str) -> float:
    """A kind of argument: a time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:  # "nan" is neither
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds, more than 0")
    return value


def folder(text: str) -> Path:
    """A kind of argument: a folder that is there."""
    path = Path(os.path.abspath(text))  # programs are started elsewhere
    if not text:
        raise argparse.ArgumentTypeError("'' is no name")
    if not path.is_dir():
        why = "is no folder" if path.exists() else "does not exist"
        raise argparse.ArgumentTypeError(f"{text!r} {why}")
    return path


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """What a result says of the machine besides what can be found out."""
    parser.add_argument(
        "--conditions", default="nothing known of other load on the machine", metavar="TEXT",
        help="what else a reader should know",
    )  # fmt: skip


def ended(program: str, work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """The status of a command that does ``work``; what ends it is told in one line."""
    try:
        return work()
    except (Failed, MmcowError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return NOT_DONE
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
