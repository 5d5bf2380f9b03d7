# SPDX-License-Identifier: MIT
"""Who the clients are, in the log's words; and lines of the log that strangers cannot make many.

Owns: a peer's name; the bound on lines that are caused by connecting alone.
Never: decides who may come in (``server``), asks the peer anything.
"""

from __future__ import annotations

import logging
import socket as sockets
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import BaseTransport
    from collections.abc import Callable

log = logging.getLogger("mmcow.nbd")

# Of one server in one span of time; who comes later in it is counted.
LINES_MOST = 10
LINES_SECONDS = 10.0
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


class Sparing:
    """Warnings that anybody who can connect may cause: ``LINES_MOST`` in ``LINES_SECONDS``, those
    left out are counted in the next one, or in ``rest``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: deque[float] = deque()
        self._untold = 0

    def warn(self, text: str) -> None:
        """Tell it, or count it."""
        now = self._clock()
        while self._told and now - self._told[0] >= LINES_SECONDS:
            self._told.popleft()
        if len(self._told) >= LINES_MOST:
            self._untold += 1
            return
        self._told.append(now)
        more = f" (and {self._untold} clients before it)" if self._untold else ""
        self._untold = 0
        log.warning("%s%s", text, more)

    def rest(self) -> None:
        """At the end: tell of those that no line has counted."""
        if self._untold:
            log.warning("%d more clients were refused or dropped", self._untold)
            self._untold = 0
