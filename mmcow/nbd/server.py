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
import socket as sockets
from typing import TYPE_CHECKING, Any

from mmcow.errors import StorageError, UsageError
from mmcow.nbd.connection import Connection
from mmcow.nbd.export import Export

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Self

    from mmcow.aio import Image

CONNECTIONS_MOST = 1024
BACKLOG = 128
PARTING_SECONDS = 5.0


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
        self.idle_since: float | None = self.loop.time()
        self._max_connections = max_connections
        self._listeners: list[asyncio.Server] = []
        self._paths: list[str] = []
        self._parted = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()

    # ---- listening ----

    async def listen_unix(self, path: str) -> str:
        """Listen on a Unix socket; a stale one of that name is replaced. Returns an NBD URI."""
        _remove_stale(path)
        try:
            listener = await self.loop.create_unix_server(self._connect, path, backlog=BACKLOG)
        except OSError as error:
            raise StorageError(error.errno or 0, "listen", path) from error
        self._listeners.append(listener)
        self._paths.append(path)
        return f"nbd+unix:///{self._default_name()}?socket={path}"

    async def listen_tcp(self, host: str, port: int) -> str:
        """Listen on a TCP port (0: any free one). Returns an NBD URI."""
        try:
            listener = await self.loop.create_server(self._connect, host, port, backlog=BACKLOG)
        except OSError as error:
            raise StorageError(error.errno or 0, "listen", f"{host}:{port}") from error
        self._listeners.append(listener)
        bound = listener.sockets[0].getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        scheme = "nbds" if self.tls is not None else "nbd"
        return f"{scheme}://{shown}:{bound[1]}/{self._default_name()}"

    async def listen_on(self, given: Sequence[sockets.socket]) -> None:
        """Listen on sockets that somebody else bound (systemd's socket activation)."""
        for one in given:
            one.setblocking(False)
            if one.family == sockets.AF_UNIX:
                self._listeners.append(
                    await self.loop.create_unix_server(self._connect, sock=one, backlog=BACKLOG)
                )
            else:
                self._listeners.append(
                    await self.loop.create_server(self._connect, sock=one, backlog=BACKLOG)
                )

    async def listen_control(
        self, path: str, serve: Callable[..., Coroutine[Any, Any, None]], limit: int
    ) -> asyncio.Server:
        """Listen for streams of lines up to ``limit`` bytes on a Unix socket."""
        _remove_stale(path)
        try:
            return await asyncio.start_unix_server(serve, path, limit=limit)
        except OSError as error:
            raise StorageError(error.errno or 0, "listen", path) from error

    def _default_name(self) -> str:
        return next(iter(self.exports)) if len(self.exports) == 1 else ""

    def _connect(self) -> asyncio.BaseProtocol:
        if len(self.connections) >= self._max_connections:
            return _Refusal()
        return Connection(self)

    # ---- what connections tell ----

    def joined(self, connection: Connection) -> None:
        """A client connected."""
        self.connections.add(connection)
        self.idle_since = None

    def left(self, connection: Connection) -> None:
        """A client is gone."""
        self.connections.discard(connection)
        if connection.export is not None:
            connection.export.connections -= 1
        if not self.connections:
            self._parted.set()
            self.idle_since = self.loop.time()

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine beside the requests; it is awaited or cancelled at the end."""
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # ---- the end ----

    async def close(self) -> None:
        """Finish what is in flight, flush, close everything. The first error of a flush is raised
        after all was closed."""
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        for connection in list(self.connections):
            connection.finish()
        for task in list(self._background):
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        first: Exception | None = None
        for export in self.exports.values():
            try:
                await export.image.close()
            except Exception as error:  # noqa: BLE001 - all are closed, the first is raised
                first = first or error
        await self._part()
        if first is not None:
            raise first

    async def _part(self) -> None:
        """Let last replies leave; then cut whoever does not read them."""
        if self.connections:
            self._parted.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._parted.wait(), PARTING_SECONDS)
        for connection in list(self.connections):
            connection.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Refusal(asyncio.Protocol):
    """One client too many: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave anything else alone."""
    probe = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass  # nothing there, or no socket: listening tells
    else:
        raise UsageError(f"{path}: another server listens there")
    finally:
        probe.close()
