# SPDX-License-Identifier: MIT
"""Rounds: every side of a cell in turn, forwards and backwards, and what comes of it.

Owns: the order of runs, the time limit of a cell, the result of a cell as JSON has it.
Never: drops a run, repeats a bad one, knows a program.
"""

from __future__ import annotations

import signal
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from bench import stats
from bench.lab import Lab, Skipped
from bench.model import programs
from bench.process import Failed, installed
from bench.sessions import SESSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.model import Aim, Cell, Sample, Suite

CELL_SECONDS_MOST = 240.0


class _Late(Exception):
    """A cell had its time."""


def run_cell(lab: Lab, cell: Cell, rounds: int) -> dict[str, Any]:
    """Measure a cell. What goes wrong becomes its result: the others go on."""
    begin = time.monotonic()
    missing = sorted(p for p in programs(cell) if not installed(p))
    if missing:
        return {"name": cell.name, "skipped": f"{', '.join(missing)} not installed"}
    try:
        with _time_limit(CELL_SECONDS_MOST), SESSIONS[type(cell.work)](lab, cell) as measure:
            samples = _rounds(cell, measure, rounds)
    except Skipped as reason:
        return {"name": cell.name, "skipped": str(reason)}
    except _Late:
        return {"name": cell.name, "failed": f"not done after {CELL_SECONDS_MOST:.0f} s"}
    except (Failed, OSError, psutil.Error, ValueError, KeyError) as error:
        return {"name": cell.name, "failed": f"{type(error).__name__}: {error}"[:1000]}
    return summarize(cell, samples) | {"seconds": round(time.monotonic() - begin, 1)}


def _rounds(cell: Cell, measure: Callable[[str], Sample], rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {side: [] for side in cell.sides}
    for number in range(rounds):
        for side in cell.sides[:: -1 if number % 2 else 1]:
            samples[side].append(measure(side))
    return samples


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises in the middle of whatever the main thread waits for."""

    def late(_number: int, _frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, again)  # whose it was (a test's, for one)


# ---- results --------------------------------------------------------------------------------


def summarize(cell: Cell, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """A cell's result: every run, the medians, the ratios."""
    return {
        "name": cell.name,
        "unit": cell.work.unit,
        "higher_is_better": cell.work.higher_is_better,
        "sides": {side: _side(found) for side, found in samples.items()},
        "ratios": _ratios(cell, {side: [s.value for s in f] for side, f in samples.items()}),
    }


def _side(samples: list[Sample]) -> dict[str, Any]:
    values = [sample.value for sample in samples]
    names = samples[0].extras
    return {
        "median": stats.rounded(statistics.median(values)),
        "values": [stats.rounded(value) for value in values],
        **{n: stats.rounded(statistics.median(s.extras[n] for s in samples)) for n in names},
    }


def _ratios(cell: Cell, values: dict[str, list[float]]) -> list[dict[str, Any]]:
    better = cell.work.higher_is_better
    ours = values[cell.sides[0]]
    found = []
    if cell.limit is not None:
        rounds = [cell.limit / value for value in ours]
        found.append(_ratio("limit", rounds, 1.0) | {"limit": cell.limit})
    for aim in cell.aims:
        peer = stats.best_of({p: values[p] for p in aim.peers}, higher_is_better=better)
        rounds = stats.ratios(ours, values[peer], higher_is_better=better)
        found.append(_ratio(peer, rounds, aim.at_least) | {"peers": list(aim.peers)})
    return found


def _ratio(peer: str, rounds: list[float], at_least: float | None) -> dict[str, Any]:
    interval = stats.Interval.of(rounds)
    return {
        "peer": peer,
        **interval.as_json(),
        "values": [stats.rounded(value) for value in rounds],
        "aim": at_least,
        "verdict": None if at_least is None else stats.verdict(interval, at_least),
    }


def overall(suite: Suite, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the cells that were measured."""
    return [found for aim in suite.overall if (found := _overall(aim, cells))]


def _overall(aim: Aim, cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    rounds = [
        ratio["values"]
        for cell in cells
        for ratio in cell.get("ratios", [])
        if ratio.get("peers") == list(aim.peers)
    ]
    if not rounds:
        return None
    shortest = min(map(len, rounds))  # cells of other calls may have had more
    interval = stats.overall([values[:shortest] for values in rounds])
    return {
        "peer": " or ".join(aim.peers),
        **interval.as_json(),
        "aim": aim.at_least,
        "verdict": None if aim.at_least is None else stats.verdict(interval, aim.at_least),
        "cells": len(rounds),
        "of": len(cells),
    }
