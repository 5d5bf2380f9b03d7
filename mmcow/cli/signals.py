# SPDX-License-Identifier: MIT
"""Ctrl-C without losing anything: a signal is noted, and noticed where stopping is safe.

Owns: the handlers for SIGINT and SIGTERM while a verb runs. A handler only notes the signal;
jobs ask through their progress callback, long loops of the command line ask themselves, and an
event loop is told. So a second Ctrl-C, or a tenth, changes nothing: the job is already on its way
out.

Never: raises out of the middle of a request. Only while the command waits for a line of
input, where nothing is under way, does a signal break in.
"""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mmcow.errors import Cancelled

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The stop that the user asked for, if any."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that asked for the stop; 0: none did
        self._breaks_in = False
        self._tell: Callable[[int], object] | None = None

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

    @contextmanager
    def told_to(self, loop: AbstractEventLoop, stop: Callable[[str], object]) -> Iterator[None]:
        """Let each signal call ``stop`` with its name in ``loop``, one noted before as well; also
        those that the parent made us ignore: a server in a script's background is told so to end.

        Not by ``loop.add_signal_handler``: where that ends, signals kill, be it for a moment.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def tell(number: int) -> None:
            loop.call_soon_threadsafe(stop, signal.Signals(number).name)

        with ExitStack() as stack:
            # The interpreter writes a byte there, and the loop's wait ends: then the handler runs.
            woken, wakes = map(stack.enter_context, socket.socketpair())
            woken.setblocking(False)
            wakes.setblocking(False)
            loop.add_reader(woken, woken.recv, 4096)
            stack.callback(loop.remove_reader, woken)
            before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
            stack.callback(signal.set_wakeup_fd, before)
            self._tell = tell
            stack.callback(setattr, self, "_tell", None)
            for number in _SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, self._note))
            if self.number:
                tell(self.number)
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        if self._tell is not None:
            self._tell(number)
        if self._breaks_in:
            raise KeyboardInterrupt
