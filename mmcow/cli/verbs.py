# SPDX-License-Identifier: MIT
"""The verbs: which there are, and where each one lives.

Owns: the table. A verb's module is imported when the verb is used, so that ``mmcow info`` does
not pay for ``convert``. In its module the verb ``x`` is two functions: ``configure_x(parser)``
and ``run_x(arguments, ui)``, which returns the exit status.

Never: imports a verb's module before it is asked for.
"""

from __future__ import annotations

import sys

from mmcow.cli.options import Parser
from mmcow.records import Record

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from mmcow.cli.ui import Ui


class Verb(Record):
    """A row of the table."""

    module: str
    summary: str
    brief: bool = False  # over at once: no signal needs to be noted


VERBS: dict[str, Verb] = {
    "create": Verb("create", "make a new image"),
    "info": Verb("info", "tell what an image is, without opening what it names", brief=True),
    "probe": Verb("info", "tell which format a file's first bytes claim", brief=True),
    "map": Verb("map", "show what each layer holds"),
    "check": Verb("check", "examine an image, and repair it"),
    "compare": Verb("compare", "tell whether two disks read the same"),
    "resize": Verb("resize", "change the size of a disk"),
    "convert": Verb("convert", "copy a disk, whatever its layers, into a new image"),
    "commit": Verb("merge", "move what an overlay holds into its base"),
    "stream": Verb("merge", "pull what is still in the base into the overlay"),
    "detach": Verb("merge", "make a complete overlay a plain raw disk"),
    "rebase": Verb("rebase", "change the names and formats that an image records"),
    "serve": Verb("serve", "offer disks over NBD to virtual machines and tools"),
    "ctl": Verb("ctl", "command a server that runs: status, stream, snapshot, resize"),
    "bench": Verb("bench", "measure how fast disks read and write"),
    "io": Verb("io", "read, write and look at a disk by commands"),
}


def make_parser(name: str) -> Parser:
    """The parser of one verb, with all its options."""
    verb = VERBS[name]
    parser = Parser(name, verb.summary)
    configure: Callable[[Parser], None] = getattr(_module(verb), f"configure_{name}")
    configure(parser)
    return parser


def run(name: str, arguments: argparse.Namespace, ui: Ui) -> int:
    """Do it; returns the exit status."""
    function: Callable[[argparse.Namespace, Ui], int] = getattr(_module(VERBS[name]), f"run_{name}")
    return function(arguments, ui)


def _module(verb: Verb) -> object:
    name = f"mmcow.cli.{verb.module}"
    __import__(name)
    return sys.modules[name]
