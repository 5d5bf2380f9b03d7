# SPDX-License-Identifier: MIT
"""NBD servers: started, waited for, stopped, whatever happens between.

Owns: the server's process and its socket.
Never: talks NBD.
"""

from __future__ import annotations

import os
import socket as sockets
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import psutil

from bench.process import Failed, last_line, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READY_SECONDS = 20.0
STOP_SECONDS = 30.0


class Server(NamedTuple):
    """One that listens."""

    socket: Path
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        used = self.process.cpu_times()
        return float(used.user + used.system)

    def memory(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)


@contextmanager
def serving(command: list[str], socket: Path) -> Iterator[Server]:
    """Run a server while the block runs; Failed where it does not come up or fails at its end."""
    with suppress(FileNotFoundError):
        socket.unlink()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            _wait(process, command, socket, errors.fileno())
            yield Server(socket, psutil.Process(process.pid))
        finally:
            _stop(process)
            with suppress(FileNotFoundError):
                socket.unlink()


def _wait(process: subprocess.Popen[bytes], command: list[str], socket: Path, errors: int) -> None:
    end = time.monotonic() + READY_SECONDS
    while not _listens(socket):
        if process.poll() is not None or time.monotonic() > end:
            said = os.pread(errors, 1 << 16, 0).decode(errors="replace")
            raise Failed(f"{shown(command)} does not listen: {last_line(said)}")
        time.sleep(0.01)


def _listens(socket: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(socket))
        except OSError:
            return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
