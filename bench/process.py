# SPDX-License-Identifier: MIT
"""Starting programs, and knowing what they cost.

Owns: one run of a program (wall time, CPU time of it and its children, output), the error that
tells what failed, and whether a program is installed.
Never: knows any program.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SECONDS_MOST = 120.0
# Programs start as they do where they are installed: with this variable Python would compile each
# module at each start.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class Failed(Exception):
    """A program, or what it said, was not as it should be."""


class Ended(NamedTuple):
    """A program that succeeded. Times are seconds."""

    output: str
    wall: float
    cpu: float


def installed(program: str) -> bool:
    """Whether it can be found."""
    return shutil.which(program) is not None


def run(
    *command: str | Path, stdin: str | None = None, keep_output: bool = True,
    seconds_most: float = SECONDS_MOST,
) -> Ended:  # fmt: skip
    """Run to the end; Failed if it fails or takes too long. The clock runs from start to end."""
    before = _children_cpu()
    start = time.perf_counter()
    try:
        ended = subprocess.run(
            [os.fspath(part) for part in command],
            input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE if keep_output else subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, errors="replace", timeout=seconds_most, check=False,
            env=ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{shown(command)}: not done after {seconds_most:.0f} s") from None
    except OSError as error:
        raise Failed(f"{shown(command)}: {error}") from error
    wall = time.perf_counter() - start
    if ended.returncode:
        raise Failed(f"{shown(command)}: status {ended.returncode}: {last_line(ended.stderr)}")
    return Ended(ended.stdout or "", wall, _children_cpu() - before)


def seconds_of(command: Sequence[str]) -> float:
    """How long a short program takes; Failed if it fails or takes too long.

    Not by ``run``: waiting with a time-out polls, in steps that grow to 8 ms in the first 16.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        watchdog = threading.Timer(SECONDS_MOST, process.kill)
        watchdog.start()
        try:
            status = process.wait()
            seconds = time.perf_counter() - start
        except BaseException:  # Ctrl-C, or a cell's time is up: neither waits for the program
            process.kill()
            raise
        finally:
            watchdog.cancel()
    if status:
        raise Failed(f"{shown(command)}: status {status}")
    return seconds


def shown(command: Sequence[str | Path]) -> str:
    """For a message: the program and what it was told."""
    return " ".join(os.path.basename(os.fspath(part)) for part in command[:8])


def last_line(text: str) -> str:
    """What a program said at its end, which is where errors stand."""
    return text.strip().rpartition("\n")[2][-500:]


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
