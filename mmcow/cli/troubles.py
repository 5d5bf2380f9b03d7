# SPDX-License-Identifier: MIT
"""``mmcow serve`` where the system has no more, and what goes wrong outside of any request.

Owns: the process's limit of open files, the event loop's exception handler.
Never: refuses a client (``nbd.server``); a traceback, unless MMCOW_DEBUG=1.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING, Any

from mmcow.nbd.peers import Sparing
from mmcow.nbd.server import DESCRIPTORS_KEPT, affordable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from mmcow.cli.ui import Ui

# Of a chain of some layers, each with a data file.
_PER_IMAGE = 16
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_open_files(connections: int, images: int, ui: Ui) -> None:
    """Raise the soft limit of open files as far as so many clients need it and the hard one goes;
    warn where that is too little. No further: a command that we start inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + DESCRIPTORS_KEPT + images * _PER_IMAGE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft not in (hard, resource.RLIM_INFINITY) and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError, OverflowError):
            pass  # beyond what the kernel grants anybody: the warning tells
    most = affordable(connections)
    if most < connections:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        ui.warn(
            f"clients at once: {most}, not {connections} (--max-connections): the limit of open "
            f"files is {soft}"
        )


class Troubles:
    """What the event loop cannot tell a caller: lines of the log, in bounded numbers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        # The loop asks for the next client over and over while there is no descriptor for it.
        self._scarce = Sparing(clock, "failed", most=1, counted="tries to accept a client")
        self._other = Sparing(clock, "were not told", counted="errors")

    def tell(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """See ``loop.set_exception_handler``."""
        message, error = context.get("message"), context.get("exception")
        if isinstance(error, OSError) and error.errno in _SCARCE and "accept" in str(message):
            self._scarce.tell(f"a client cannot be accepted: {error.strerror}")
            return
        if os.environ.get("MMCOW_DEBUG") == "1":
            loop.default_exception_handler(context)
        what = "" if error is None else f": {type(error).__name__}: {error}"
        self._other.tell(f"internal error: {message}{what}")

    def rest(self) -> None:
        """At the end: count what no line has counted."""
        self._scarce.rest()
        self._other.rest()
