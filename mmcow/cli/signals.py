# SPDX-License-Identifier: MIT
"""Ctrl-C without losing anything: a signal is noted, and noticed where stopping is safe.

Owns: the handlers for SIGINT and SIGTERM while a verb runs. A handler only notes the signal;
jobs ask through their progress callback, and long loops of the command line ask themselves. So
a second Ctrl-C, or a tenth, changes nothing: the job is already on its way out.

Never: raises out of the middle of a request. Only while the command waits for a line of
input, where nothing is under way, does a signal break in.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmcow.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The stop that the user asked for, if any."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that asked for the stop; 0: none did
        self._breaks_in = False

    def check(self, what: str) -> None:
        """Raise Cancelled where a stop was asked for. ``what`` is cancelled."""
        if self.number:
            raise Cancelled(what)

    @contextmanager
    def watched(self, *, for_good: bool) -> Iterator[None]:
        """Note signals instead of dying of them, for the length of the block.

        ``for_good``: the process ends after the block, and its exit status is decided: from then
        on signals are ignored. Otherwise the handlers are those of before again. Signals that
        the parent made us ignore (nohup) stay ignored. Outside the main thread, where Python
        cannot handle signals, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if for_good else handler)

    @contextmanager
    def breaking_in(self, what: str) -> Iterator[None]:
        """Let a signal end the block with Cancelled: for waits where nothing is under way."""
        self._breaks_in = True
        try:
            self.check(what)
            yield
        except KeyboardInterrupt:
            raise Cancelled(what) from None
        finally:
            self._breaks_in = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        if self._breaks_in:
            raise KeyboardInterrupt
