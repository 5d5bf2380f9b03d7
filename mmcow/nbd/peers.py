# SPDX-License-Identifier: MIT
"""Who the clients are, in the log's words; what waits for them in the kernel; and lines of the log
that strangers cannot make many.

Owns: a peer's name; how much of what was sent it has not taken; the bounds on lines that clients
cause by coming and going.
Never: decides who may come in (``server``), asks the peer anything.
"""

from __future__ import annotations

import fcntl
import logging
import socket as sockets
import struct
import termios
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import BaseTransport
    from collections.abc import Callable

log = logging.getLogger("mmcow.nbd")

# Of one server in one span of time; who comes later in it is counted.
LINES_MOST = 10
LINES_SECONDS = 10.0
# The same of clients that attach, and of those that were served and are dropped: more than ordinary
# use makes (nbdcopy 16 connections, a virtual machine one or two), five a second in the long run.
SERVED_LINES_MOST = 500
SERVED_LINES_SECONDS = 100.0
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


def peer_of(transport: BaseTransport) -> str:
    """Who is at the other end: " (pid 71, uid 0)" of a Unix socket, " (192.0.2.1:50112)" of TCP; ""
    where nobody knows. To be put behind what is said of it."""
    socket = transport.get_extra_info("socket")
    if socket is not None and socket.family == sockets.AF_UNIX:
        name = _credentials_of(socket)
    else:
        name = _address(transport.get_extra_info("peername"))
    return f" ({name})" if name else ""


def _credentials_of(socket: Any) -> str:
    """As they were when it connected, also where it has gone since."""
    try:
        told = socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return ""
    pid, uid, _ = _CREDENTIALS.unpack(told)
    return f"pid {pid}, uid {uid}" if pid else f"uid {uid}"  # 0: of a container, not seen from here


def _address(name: Any) -> str:
    """Of TCP, as accepting told it: later the peer may be gone."""
    if not isinstance(name, tuple):
        return ""
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def queued_for(socket: Any) -> int:
    """Bytes that the kernel has for the peer; of a Unix socket with what it needs for them."""
    if socket is None or socket.fileno() < 0:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(count)


class Sparing:
    """Lines that anybody who can connect may cause: ``most`` in ``seconds``, those left out are
    counted in the next one, or in ``rest``, which says what ``became`` of their clients (or of
    what else is ``counted``)."""

    def __init__(
        self,
        clock: Callable[[], float],
        became: str = "were refused or dropped",
        *,
        most: int = LINES_MOST,
        seconds: float = LINES_SECONDS,
        level: int = logging.WARNING,
        counted: str = "clients",
    ) -> None:
        self._clock = clock
        self._became = became
        self._most = most
        self._seconds = seconds
        self._level = level
        self._counted = counted
        self._told: deque[float] = deque()
        self._untold = 0

    def tell(self, text: str) -> None:
        """Tell it, or count it."""
        now = self._clock()
        while self._told and now - self._told[0] >= self._seconds:
            self._told.popleft()
        if len(self._told) >= self._most:
            self._untold += 1
            return
        self._told.append(now)
        more = f" (and {self._untold} {self._counted} before it)" if self._untold else ""
        self._untold = 0
        log.log(self._level, "%s%s", text, more)

    def rest(self) -> None:
        """At the end: tell of those that no line has counted."""
        if self._untold:
            log.log(self._level, "%d more %s %s", self._untold, self._counted, self._became)
            self._untold = 0


class Told:
    """What one server's log tells of its clients, each kind within a bound of its own: a flood of
    one kind hides no other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        most, seconds = SERVED_LINES_MOST, SERVED_LINES_SECONDS
        self.turned_away = Sparing(clock)  # who never had a valid request, which costs nothing
        self.attached = Sparing(clock, "attached", most=most, seconds=seconds, level=logging.INFO)
        self.dropped = Sparing(
            clock, "were dropped after they had been served", most=most, seconds=seconds
        )

    def rest(self) -> None:
        """At the end: count those that no line has counted."""
        for lines in (self.attached, self.dropped, self.turned_away):
            lines.rest()
