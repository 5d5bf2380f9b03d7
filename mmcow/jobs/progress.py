# SPDX-License-Identifier: MIT
"""How a long operation tells how far it is, and how it is stopped.

Owns: the shape of a progress callback, and how often it is called.
Never: prints, measures time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called with (done, total) in bytes from the job's thread: once at 0, once at the end, in between
# at most every 64 MiB and at least every thousandth of a small total. Whatever it raises
# (``Cancelled``, KeyboardInterrupt) stops the job between two batches, with all images valid.
Progress: TypeAlias = Callable[[int, int], None]

_STEP_LEAST = 1 << 20
_STEP_MOST = 64 << 20


class Meter:
    """Passes positions on to a callback, leaving out those that add little."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        """Report 0 at once."""
        self.total = total
        self._progress = progress
        self._step = min(max(total // 1000, _STEP_LEAST), _STEP_MOST)
        self._next = self._step
        if progress is not None:
            progress(0, total)

    def reached(self, done: int) -> None:
        """The job is at ``done``; the end is left to ``finish``."""
        if self._progress is not None and self._next <= done < self.total:
            self._next = done + self._step
            self._progress(done, self.total)

    def finish(self) -> None:
        """Everything is done."""
        if self._progress is not None:
            self._progress(self.total, self.total)
