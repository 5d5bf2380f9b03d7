# SPDX-License-Identifier: MIT
"""What every measurement here shares: rounds that interleave, medians, a description of the host.

One run of a cell says little on a machine that also does other things: cells are run in many
rounds, each round in another random order, and the median and quartiles over the rounds are kept.
Compare cells of one result file only.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mmcow
from bench.process import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

HERE = Path(__file__).parent
RESULTS = "results"

# What a suite's result has.
_SUITE = {
    "suite": str, "title": str, "note": str, "host": dict, "conditions": str, "parameters": dict,
    "overall": list, "cells": list,
}  # fmt: skip

# Each prints its version on the first line.
_PROGRAMS = ("qemu-img", "fio", "nbdkit", "nbdcopy")


class Spread(NamedTuple):
    """Median and quartiles of a cell's rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def as_json(self) -> dict[str, float]:
        """Rounded to four digits: more would be noise."""
        shown = {name: float(f"{value:.4g}") for name, value in self._asdict().items()}
        return shown | {"rounds": self.rounds}


def interleave(
    cells: Sequence[Hashable],
    measure: Callable[[Any], dict[str, float]],
    *,
    rounds: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[Any, dict[str, Spread]]:
    """Measure every cell once a round, each round in another order."""
    rng = random.Random(seed)
    found: dict[Any, dict[str, list[float]]] = {cell: {} for cell in cells}
    begin = time.monotonic()
    for number in range(rounds):
        order = list(cells)
        rng.shuffle(order)
        for cell in order:
            for name, value in measure(cell).items():
                found[cell].setdefault(name, []).append(value)
        say(f"round {number + 1} of {rounds}, {time.monotonic() - begin:.0f} s")
    return {
        cell: {name: Spread.of(values) for name, values in measures.items()}
        for cell, measures in found.items()
    }


def describe_host(folder: Path) -> dict[str, Any]:
    """What a reader needs to judge the figures by; no names."""
    cpu = "unknown"
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = next(int(x.split()[1]) for x in _lines("/proc/meminfo") if x.startswith("MemTotal"))
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / (1 << 20), 1),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "file_system": _file_system(folder),
        "device": _device(folder),
        "python": platform.python_version(),
        "mmcow": mmcow.__version__,
        "commit": _first_line("git", "-C", str(HERE), "rev-parse", "--short", "HEAD"),
        "programs": {name: _first_line(name, "--version") for name in _PROGRAMS},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _file_system(folder: Path) -> str:
    """The kind of file system that holds ``folder``."""
    best, kind = "", "unknown"
    real = os.path.realpath(folder)
    for line in _lines("/proc/mounts"):
        _, point, found = line.split()[:3]
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind


def _device(folder: Path) -> str:
    """What the kernel tells of the device below the file system; no names."""
    number = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not block.exists():
        return "none"
    whole = block if (block / "queue").exists() else block.resolve().parent
    driver = whole.resolve().parent.parent / "driver"
    kind = driver.resolve().name if driver.exists() else "unknown driver"
    size = int(_lines(f"{block}/size")[0]) >> 21
    return f"{kind}, {size} GiB"


def _first_line(*command: str) -> str:
    """What a program says of itself; nothing if it is not there."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.partition("\n")[0].strip()


def save(name: str, result: dict[str, Any], out: Path = HERE) -> Path:
    """Write a result beside the others."""
    folder = out / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(_readable(result), encoding="utf-8")
    return path


def load_result(out: Path, name: str) -> dict[str, Any] | None:
    """What ``save`` wrote of a suite; None where there is none. Failed if it is something else."""
    path = out / RESULTS / f"{name}.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failed(f"{path}: is no JSON: {error}") from error
    for field, kind in _SUITE.items():
        if not isinstance(found, dict) or not isinstance(found.get(field), kind):
            raise Failed(f"{path}: is no result of a suite: {field!r} is missing or wrong")
    result: dict[str, Any] = found
    return result


def _readable(result: dict[str, Any]) -> str:
    """JSON with one line for each cell of a list."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(cell) for cell in value) + "\n ]"
        parts.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def size_name(size: int) -> str:
    """4096 as "4K"."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
