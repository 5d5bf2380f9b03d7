# SPDX-License-Identifier: MIT
"""How far a long job has come, for people and for programs; and the place where it is stopped.

Owns: the callback that jobs are given. It asks the signals first (so a job stops between two
pieces of work, where the image is valid), then shows something, at most ten times a second.

Never: runs a job, prints results.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from mmcow.cli import terminal
from mmcow.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from mmcow.cli.ui import Ui

INTERVAL = 0.1


class Meter:
    """The progress callback. This one shows nothing; it only lets a signal stop the job."""

    def __init__(self, ui: Ui, what: str, clock: Callable[[], float] = monotonic) -> None:
        self.ui = ui
        self.what = what
        self.done = 0
        self.total = 0
        # Of ``done``, what this run has not done; None: what the first report tells.
        self.begun: int | None = 0
        self._clock = clock
        self._started = clock()
        self._shown = -1.0
        self._last = self._started - 2 * INTERVAL

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes; raises Cancelled where the user wants to stop."""
        self.ui.signals.check(self.what)
        self.done, self.total = done, total
        if self.begun is None:
            self.begun = done
        now = self._clock()
        if now - self._last >= INTERVAL:
            self._last = now
            self._shown = done
            self.show()

    def finish(self) -> None:
        """The job ended well: show its last report, if that came too soon to be shown."""
        if self._shown != self.done:
            self.show()
        self.close()

    @property
    def percent(self) -> float:
        """Of the work that is done; a job without work is done."""
        return 100.0 * self.done / self.total if self.total else 100.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def show(self) -> None:
        """Show the present state."""

    def close(self) -> None:
        """Leave the screen as it should be after the last ``show``."""


class JsonMeter(Meter):
    """One JSON object a line on standard error."""

    def show(self) -> None:
        """Numbers only: no need for a JSON library."""
        self.ui.err(
            f'{{"done": {self.done}, "total": {self.total}, "percent": {self.percent:.2f}}}'
        )


class QemuMeter(Meter):
    """What ``qemu-img -p`` writes to standard output, for programs that read it there."""

    def show(self) -> None:
        """Overwrite the last number."""
        self.ui.out(f"    ({self.percent:.2f}/100%)", end="\r")
        self.ui.flush()

    def close(self) -> None:
        """End the line."""
        self.ui.out("")


class BarMeter(Meter):
    """One line on a terminal that is drawn over and over."""

    def show(self) -> None:
        """Bar, percent, amounts, rate, and how long it will still take."""
        self._write("\r" + self.line(terminal.width_of(sys.stderr) - 1) + "\x1b[K")

    def close(self) -> None:
        """Keep the last line."""
        self._write("\n")

    def line(self, width: int) -> str:
        """The line, at most ``width`` characters."""
        full = terminal.can_show(sys.stderr, "█░")
        after = f" {self.percent:5.1f} %  {human_size(self.done)}/{human_size(self.total)}"
        after += self._rate()
        room = min(width - len(self.what) - len(after) - 3, 40)
        if room < 5:
            return f"{self.what} {self.percent:5.1f} %"[:width]
        filled = int(room * self.percent / 100)
        bar = ("█" if full else "#") * filled + ("░" if full else "-") * (room - filled)
        return f"{self.what} [{bar}]{after}"

    def _rate(self) -> str:
        seconds = self.elapsed
        done = self.done - (self.begun or 0)
        if seconds < 0.5 or done <= 0:
            return ""
        rate = done / seconds
        left = (self.total - self.done) / rate
        return f"  {human_size(int(rate))}/s  " + (
            f"{clock_time(left)} left" if self.done < self.total else f"in {clock_time(seconds)}"
        )

    @staticmethod
    def _write(text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # the bar is for people; nobody looks


def clock_time(seconds: float) -> str:
    """Like "0:07", "12:00", "1:02:03"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def meter(ui: Ui, arguments: argparse.Namespace, what: str) -> Iterator[Meter]:
    """The meter that the options ask for; it shows completion where the block ends well."""
    made = _choose(ui, arguments)(ui, what)
    try:
        yield made
    except BaseException:
        if isinstance(made, BarMeter):
            made.close()
        raise
    made.finish()


def _choose(ui: Ui, arguments: argparse.Namespace) -> type[Meter]:
    wanted: str | None = arguments.progress
    if wanted is not None:
        return {"json": JsonMeter, "bar": BarMeter, "none": Meter}[wanted]
    if ui.quiet:
        return Meter
    if terminal.is_terminal(sys.stderr):
        return BarMeter
    if not arguments.show_progress:
        return Meter
    # A result in JSON is standard output's alone. qemu-img has no verb with both to be like.
    return JsonMeter if getattr(arguments, "output", "human") == "json" else QemuMeter
