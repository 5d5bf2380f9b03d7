# SPDX-License-Identifier: MIT
"""The NBD server: exports, listening sockets, the beginning and the end.

Owns: the exports and the images behind them, the sockets, the connections, the turn of each
image's reactor in the loop.
Never: speaks to clients (``connection``), parses command lines.

One thread and one asyncio loop serve everything. It may be somebody else's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket as sockets
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from mmcow.errors import StorageError, UsageError
from mmcow.native import lib
from mmcow.nbd.connection import Connection, pump_limits
from mmcow.nbd.export import Export
from mmcow.nbd.memory import Memory
from mmcow.nbd.peers import Told
from mmcow.nbd.pump import Pump, can_pump

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Self

    from mmcow.aio import Image

CONNECTIONS_MOST = 1024
BACKLOG = 128
PORT_MOST = 65535
# How long clients have at the end to read the last replies (all is flushed by then), and after how
# long one that reads nothing at all is left.
PARTING_SECONDS = 5.0
DEAF_SECONDS = 1.0
# Descriptors left for images, listeners and the program around.
DESCRIPTORS_KEPT = 128
# How long after the last client left the memory of all goes back to the kernel: many leave at
# once, and who comes one after the other needs it again.
TRIM_SECONDS = 1.0


class SocketName(NamedTuple):
    """A name that a listening socket was given: to be removed at the end, unless it has become
    somebody else's. Absolute: the program around may change its working directory."""

    path: str
    inode: int

    @classmethod
    def of(cls, path: str) -> SocketName:
        """The name that a socket was just bound to."""
        return cls(os.path.abspath(path), os.stat(path).st_ino)

    def remove(self) -> None:
        """If it still is the same socket."""
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)


class Server:
    """Serves images over NBD from the running asyncio loop.

    ::

        disk = await mmcow.aio.open("vm.acow", write=True)
        async with Server({"": disk}) as server:
            await server.listen_unix("/run/vm.sock")
            ...

    Leaving the context finishes what is in flight, flushes, closes connections and images.
    """

    def __init__(
        self,
        images: dict[str, Image],
        *,
        read_only: bool = False,
        tls: ssl.SSLContext | None = None,
        max_connections: int = CONNECTIONS_MOST,
    ) -> None:
        if not images:
            raise UsageError("nothing to serve")
        self.loop = asyncio.get_running_loop()
        self.tls = tls
        self.exports = {
            name: Export(name, image, read_only=read_only) for name, image in images.items()
        }
        self.connections: set[Connection] = set()
        self.attached = 0  # clients that were negotiated, ever
        self.memory = Memory(self.loop, self.connections)
        self._can_pump = tls is None and can_pump(images.values())
        self.idle_since: float | None = self.loop.time()
        self._max_connections = affordable(max_connections)
        afforded = self._max_connections == max_connections
        self._bound = "max-connections" if afforded else "limit of open files"
        self.told = Told(self.loop.time)
        self._listeners: list[asyncio.Server] = []
        self._names: list[SocketName] = []
        self._parted = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._closed: asyncio.Future[None] | None = None
        self._trimming: asyncio.TimerHandle | None = None

    # ---- listening ----

    async def listen_unix(self, path: str) -> str:
        """Listen on a Unix socket; a stale one of that name is replaced. Returns an NBD URI."""
        _remove_stale(path)
        try:
            listener = await self.loop.create_unix_server(self._connect, path, backlog=BACKLOG)
        except OSError as error:
            raise _unlistenable(error, path) from error
        self._listeners.append(listener)
        self._names.append(SocketName.of(path))
        return self._unix_uri(path)

    async def listen_tcp(self, host: str, port: int) -> str:
        """Listen on a TCP port (0: any free one). Returns an NBD URI."""
        if not 0 <= port <= PORT_MOST:  # the resolver would take it modulo 65536
            raise UsageError(f"{host}:{port}: a port is a number from 0 to {PORT_MOST}")
        try:
            listener = await self.loop.create_server(self._connect, host, port, backlog=BACKLOG)
        except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
            raise _unlistenable(error, f"{host}:{port}") from error
        self._listeners.append(listener)
        return self._tcp_uri(listener.sockets[0].getsockname())

    async def listen_on(self, given: Sequence[sockets.socket]) -> list[str]:
        """Listen on sockets that somebody else bound (systemd's socket activation). Returns their
        NBD URIs."""
        uris = []
        for one in given:
            unix = one.family == sockets.AF_UNIX
            if one.type != sockets.SOCK_STREAM or not (
                unix or one.family in (sockets.AF_INET, sockets.AF_INET6)
            ):
                raise UsageError(f"{one!r}: is no stream socket of TCP or Unix")
            one.setblocking(False)
            # Not create_unix_server, which may remove the socket's name at the end.
            listener = await self.loop.create_server(self._connect, sock=one, backlog=BACKLOG)
            self._listeners.append(listener)
            name = one.getsockname()
            uris.append(self._unix_uri(os.fsdecode(name)) if unix else self._tcp_uri(name))
        return uris

    async def listen_control(
        self, path: str, serve: Callable[..., Coroutine[Any, Any, None]], limit: int
    ) -> tuple[asyncio.Server, SocketName]:
        """Listen for streams of lines up to ``limit`` bytes on a Unix socket that only its owner
        can open."""
        _remove_stale(path)
        try:
            private = _bind_private(path)
            listener = await asyncio.start_unix_server(serve, sock=private, limit=limit)
        except OSError as error:
            raise _unlistenable(error, path) from error
        return listener, SocketName.of(path)

    def _unix_uri(self, path: str) -> str:
        scheme = "nbd+unix" if self.tls is None else "nbds+unix"
        return f"{scheme}:///{self._default_name()}?socket={quote(os.fsencode(path))}"

    def _tcp_uri(self, bound: Sequence[Any]) -> str:
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        scheme = "nbds" if self.tls is not None else "nbd"
        return f"{scheme}://{shown}:{bound[1]}/{self._default_name()}"

    def _default_name(self) -> str:
        return quote(next(iter(self.exports)), safe="") if len(self.exports) == 1 else ""

    def _connect(self) -> asyncio.BaseProtocol:
        return Connection(self)

    # ---- what connections tell ----

    def pump(self) -> Pump | None:
        """Who serves clients once they are negotiated; None where their connections do."""
        if self._can_pump and self.memory.pump is None:
            images = [export.image for export in self.exports.values()]
            self.memory.pump = Pump(images, pump_limits(), self.memory)
        return self.memory.pump

    def joined(self, connection: Connection) -> bool:
        """A client connected. False: there are too many, or the server stops."""
        if self._closed is not None:
            return False
        if len(self.connections) >= self._max_connections and not self._make_room():
            self.told.turned_away.tell(
                f"client refused{connection.peer}: no more than {self._max_connections} at once "
                f"({self._bound})"
            )
            return False
        self.connections.add(connection)
        self.idle_since = None
        return True

    def _make_room(self) -> bool:
        """Drop the client that negotiates for the longest time, if one does: those who connect and
        say nothing must not keep others out."""
        waiting = [
            (since, connection)
            for connection in self.connections
            if (since := connection.negotiating_since) is not None
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda one: one[0])[1]
        oldest.drop("negotiates while others want to connect")
        self.left(oldest)
        return True

    def left(self, connection: Connection) -> None:
        """A client is gone."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        if connection.export is not None:
            connection.export.connections -= 1
        if not self.connections:
            self._parted.set()
            self.idle_since = self.loop.time()
            if self._trimming is None:
                self._trimming = self.loop.call_later(TRIM_SECONDS, self._trim)

    def _trim(self) -> None:
        """A process may wait for clients for weeks, with what a thousand of them had needed."""
        self._trimming = None
        if not self.connections:
            lib.mmc_memory_trim()

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine beside the requests; it is awaited or cancelled at the end."""
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- the end ----

    async def close(self) -> None:
        """Finish what is in flight, flush, close everything. The first error of a flush is raised
        after all was closed, others are its notes; LayerFailed where a client's flush had failed
        before. Further calls wait for the first."""
        if self._closed is None:
            self._closed = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closed)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        for name in self._names:
            name.remove()

    async def _close(self) -> None:
        self._stop_listening()
        for connection in list(self.connections):
            connection.refuse()
        for task in list(self._background):
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        first: Exception | None = None
        for export in self.exports.values():
            try:
                await export.image.close()
                export.image.engine.flusher.check()  # what clients were told its owner hears too
            except Exception as error:  # noqa: BLE001 - all are closed, the first is raised
                if first is None:
                    first = error
                else:
                    first.add_note(str(error))
        for connection in list(self.connections):
            connection.finish()
        await self._let_last_replies_leave()
        for connection in list(self.connections):
            connection.abort()  # who does not read them in time
        await self._part(PARTING_SECONDS)
        self.told.rest()
        self.memory.close()
        if self._trimming is not None:
            self._trimming.cancel()
        if first is not None:
            raise first

    async def _let_last_replies_leave(self) -> None:
        """Wait for clients as long as they read. What they lose otherwise is word of what is done,
        which no client can count on when its server ends."""
        began = now = self.loop.time()
        moved: dict[Connection, tuple[int, float]] = {}  # what it has to read, and since when
        while self.connections and now - began < PARTING_SECONDS:
            for connection in list(self.connections):
                unread = connection.unread
                before, since = moved.get(connection, (None, now))
                if unread != before:
                    moved[connection] = unread, now
                elif now - since >= DEAF_SECONDS:
                    connection.abort()
            await self._part(DEAF_SECONDS / 4)
            now = self.loop.time()

    async def _part(self, seconds: float) -> None:
        """Wait until every client is gone."""
        if self.connections:
            self._parted.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._parted.wait(), seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def tls_context(folder: str | os.PathLike[str], *, verify_peer: bool = False) -> ssl.SSLContext:
    """TLS with the files that QEMU and libnbd look for in a folder: ``server-cert.pem``,
    ``server-key.pem``; with ``verify_peer`` a client must show a certificate of ``ca-cert.pem``.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    here = Path(folder)
    certificate, key, authority = (
        str(here / name) for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem")
    )
    for path in (certificate, key, *((authority,) if verify_peer else ())):
        if not os.access(path, os.R_OK):
            raise UsageError(f"{path}: cannot be read; TLS needs it")
    try:
        context.load_cert_chain(certificate, key)
        if verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise UsageError(f"{folder}: these certificates cannot be used: {error}") from error
    return context


def affordable(connections: int) -> int:
    """As many clients as there are descriptors for: beyond that even accepting fails."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - DESCRIPTORS_KEPT))


def _bind_private(path: str) -> sockets.socket:
    """A socket that only its owner can open; nobody can connect before it listens. Not by umask,
    which is every thread's."""
    private = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        private.bind(path)
        os.chmod(path, 0o600)
        private.setblocking(False)
    except BaseException:
        private.close()
        raise
    return private


def _unlistenable(error: OSError | UnicodeError, where: str) -> UsageError | StorageError:
    """Python's and the resolver's own refusals (a path that is too long, a name that does not
    resolve) are no errno of the system."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, sockets.gaierror):
        return StorageError(error.errno, "listen", where)
    words = error.strerror if isinstance(error, sockets.gaierror) else error
    return UsageError(f"{where}: cannot listen there: {words}")


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave anything else alone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"{path}: exists and is no socket")
    except OSError:
        return  # nothing there, or out of reach: listening tells
    probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    probe.setblocking(False)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except BlockingIOError:
        raise UsageError(f"{path}: another server listens there") from None  # with a full queue
    except OSError:
        pass  # listening tells
    else:
        raise UsageError(f"{path}: another server listens there")
    finally:
        probe.close()
