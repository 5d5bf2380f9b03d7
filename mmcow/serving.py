# SPDX-License-Identifier: MIT
"""``mmcow.serve``: disks as NBD exports from inside an asyncio program.

::

    async with mmcow.serve("vm.acow", socket="/run/vm.sock") as server:
        start_a_vm(server.uri)
        await server.stream(rate=100 << 20)       # the base is pulled in, and closed
        await server.snapshot("monday.acow")
        print(server.status())

Owns: what is opened, what listens where, the order of beginning and end; the live operations as
methods.
Never: speaks NBD (``nbd``), changes a layer by itself (``nbd.live``), needs a loop of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from socket import socket as Socket  # noqa: N812 - serve has an argument of that name
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from mmcow import aio
from mmcow.errors import ClosedError, UsageError
from mmcow.image import Image
from mmcow.nbd import live
from mmcow.nbd.arguments import file_name, same_path, whole_number
from mmcow.nbd.control import Control
from mmcow.nbd.mistaken import require_raw_content
from mmcow.nbd.server import CONNECTIONS_MOST, Server, tls_context
from mmcow.nbd.status import activity_of, status_of

if TYPE_CHECKING:
    from types import TracebackType

    from mmcow.formats.opening import Policy
    from mmcow.nbd.export import Export
    from mmcow.nbd.live import Stream
    from mmcow.storage.file import Cache

log = logging.getLogger("mmcow.nbd")

Path: TypeAlias = str | os.PathLike[str]
Disk: TypeAlias = Path | Image | aio.Image

_DISK = (str, os.PathLike, Image, aio.Image)
_DIGITS_MOST = 100  # of a port; Python refuses to read 5000 of them in words of its own


def serve(
    disks: Disk | Sequence[Disk] | Mapping[str, Disk],
    *,
    socket: Path | None = None,
    bind: str | tuple[str, int] | None = None,
    sockets: Sequence[Socket] = (),
    control: Path | None = None,
    read_only: bool = False,
    tls: Path | ssl.SSLContext | None = None,
    tls_verify_peer: bool = False,
    max_connections: int = CONNECTIONS_MOST,
    exit_when_idle: float | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    cache: str | Cache = "auto",
    base_cache: str | Cache | Sequence[str | Cache] | None = None,
    policy: Policy | None = None,
) -> Serving:
    """Serve disks over NBD in the running asyncio loop, while the ``async with`` block runs.

    ``disks``: one, which becomes the default export; several, which have their file names; or a
    mapping from export names. A disk is a path, or an image that is open already (``mmcow.open``,
    ``mmcow.aio.open``): use it no more, it is closed at the end too. ``format`` to ``policy`` are
    for the paths, as in ``mmcow.open``; they are opened for writing unless ``read_only``.

    Where clients come in, one at least: ``socket`` (path of a Unix socket), ``bind`` ("HOST:PORT"
    or (host, port); port 0 is any free one), ``sockets`` (bound by somebody else, as systemd
    does). ``control``: path of a Unix socket for ``mmcow ctl``. ``tls``: a context, or a directory
    with server-cert.pem and server-key.pem; with ``tls_verify_peer`` clients need a certificate of
    its ca-cert.pem. ``exit_when_idle``: ``wait_quit`` returns after so many seconds without a
    client and without a stream that runs.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(
            "mmcow.serve: no asyncio loop is running: write 'async with mmcow.serve(...)' in a "
            "coroutine, and run that with asyncio.run"
        ) from None
    if socket is None and bind is None and not sockets:
        raise UsageError("mmcow.serve: say where to listen: socket=, bind= or sockets=")
    socket_path = None if socket is None else file_name("socket", socket)
    control_path = None if control is None else file_name("control", control)
    if socket_path and control_path and same_path(socket_path, control_path):
        raise UsageError(
            f"socket and control are both {control_path}: each needs a name of its own"
        )
    opening = {
        "format": format,
        "backing_format": backing_format,
        "cache": cache,
        "base_cache": base_cache,
        "policy": policy,
    }
    return Serving(
        _Plan(
            disks=_named(disks),
            opening=opening,
            read_only=read_only,
            socket=socket_path,
            bind=None if bind is None else _host_port(bind),
            sockets=_sockets(sockets),
            control=control_path,
            tls=_tls(tls, verify_peer=tls_verify_peer),
            max_connections=whole_number("max_connections", max_connections, "clients", least=1),
            exit_when_idle=_idle_seconds(exit_when_idle),
        )
    )


class _Plan(NamedTuple):
    """What ``serve`` was asked for."""

    disks: dict[str, Disk]
    opening: dict[str, Any]
    read_only: bool
    socket: str | None
    bind: tuple[str, int] | None
    sockets: tuple[Socket, ...]
    control: str | None
    tls: ssl.SSLContext | None
    max_connections: int
    exit_when_idle: float | None


class Serving:
    """What ``mmcow.serve`` returns: an asynchronous context manager, or ``start`` and ``close``.

    Methods are called in the loop that serves. ``export`` is a name; None is the only one.
    """

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._server: Server | None = None
        self._uris: tuple[str, ...] = ()
        self._ending: AsyncExitStack | None = None
        self._closed = False
        self._quit = asyncio.Event()
        self._why = ""  # it ends, for the log
        self._began = 0.0

    # ---- life ----

    async def start(self) -> None:
        """Open, listen. After an error nothing is left open. ``async with`` does it."""
        if self._closed or self._ending is not None:
            raise UsageError("mmcow.serve: was started already; call serve again")
        plan = self._plan
        async with AsyncExitStack() as stack:
            self._ending = stack
            server = await self._over_images(stack)
            if plan.control is not None:
                listener = Control(server, lambda: self.quit("quit command"))
                await listener.listen(plan.control)
                stack.push_async_callback(listener.close)
            uris = await server.listen_on(plan.sockets)
            if plan.socket is not None:
                uris.append(await server.listen_unix(plan.socket))
            if plan.bind is not None:
                uris.append(await server.listen_tcp(*plan.bind))
            if plan.exit_when_idle is not None:
                server.background(self._watch_idle(server, plan.exit_when_idle))
            self._uris = tuple(uris)
            self._server = server
            self._began = server.loop.time()
            self._ending = stack.pop_all()

    async def _over_images(self, stack: AsyncExitStack) -> Server:
        """Open what is not open, and put a server over all; the stack closes everything."""
        plan = self._plan
        images = {}
        for disk in plan.disks.values():
            if isinstance(disk, aio.Image) and not disk.is_of_this_loop:
                raise UsageError(f"{disk.path}: was opened in another event loop")
        async with AsyncExitStack() as opened:
            for disk in plan.disks.values():
                if isinstance(disk, Image | aio.Image):
                    opened.push_async_callback(_close, disk)
            for name, disk in plan.disks.items():
                image = await self._open(disk)
                opened.push_async_callback(image.close)
                await asyncio.to_thread(require_raw_content, image.image)
                images[name] = image
            server = Server(
                images,
                read_only=plan.read_only,
                tls=plan.tls,
                max_connections=plan.max_connections,
            )
            opened.pop_all()  # the server closes them
        stack.push_async_callback(server.close)
        return server

    async def _open(self, disk: Disk) -> aio.Image:
        if isinstance(disk, aio.Image):
            return disk
        if isinstance(disk, Image):
            return aio.Image(disk)
        return await aio.open(disk, write=not self._plan.read_only, **self._plan.opening)

    async def close(self) -> None:
        """Finish what is in flight, flush, close connections and images. The first error of a flush
        is raised after all was closed. Later calls do nothing."""
        self._closed = True
        ending, self._ending = self._ending, None
        if ending is not None and self._server is not None:
            try:
                await ending.aclose()
            except BaseException:
                self._tell_end(self._server, logging.WARNING, "with an error")
                raise
            self._tell_end(self._server, logging.INFO, "all is flushed")

    def _tell_end(self, server: Server, level: int, how: str) -> None:
        seconds = server.loop.time() - self._began
        clients = f"{server.attached} client{'' if server.attached == 1 else 's'}"
        why = self._why or "closed by its program"
        log.log(level, "server ended (%s), %s: %s in %.0f s", why, how, clients, seconds)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.close()
            return
        self._why = self._why or f"after {type(error).__name__}"
        try:
            await self.close()
        except Exception as second:  # noqa: BLE001 - the first error is the one to see
            error.add_note(f"the end of the server failed too: {second}")

    def quit(self, why: str = "") -> None:
        """Let ``wait_quit`` return; closes nothing. ``mmcow ctl ... quit`` does this too. ``why``:
        for the line of the log about the end; the first one counts."""
        self._why = self._why or why
        self._quit.set()

    async def wait_quit(self) -> None:
        """Wait until somebody wants the server to end: ``quit``, or neither a client nor a running
        stream for ``exit_when_idle`` seconds. For programs that do nothing but serve; ending the
        block is up to the caller."""
        await self._quit.wait()

    async def _watch_idle(self, server: Server, seconds: float) -> None:
        while not self._quit.is_set():
            since, now = _idle_since(server), server.loop.time()
            if since is not None and now - since >= seconds:
                self.quit(f"idle for {seconds:g} s")
                return
            wait = seconds if since is None else since + seconds - now
            await asyncio.sleep(max(wait, 0.01))

    # ---- facts ----

    @property
    def uri(self) -> str:
        """Where clients come in: an NBD URI that qemu, libnbd and fio take (the first way in)."""
        return self.uris[0]

    @property
    def uris(self) -> tuple[str, ...]:
        """All ways in."""
        self._started()
        return self._uris

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of the exports; "" is the default one."""
        return tuple(self._started().exports)

    def status(self, export: str | None = None) -> dict[str, Any]:
        """Connections, throughput, latencies, allocated clusters, streams, of one or of all
        exports; JSON-ready, the keys are those of ``mmcow ctl status`` (docs/cli.md)."""
        server = self._running()
        exports = server.exports.values() if export is None else [live.find(server, export)]
        return status_of(server, exports)

    def activity(self) -> dict[str, Any]:
        """What a display renews every second: of ``status`` the part that costs nothing (clusters
        are counted over the whole bitmap)."""
        return activity_of(self._running())

    # ---- live operations ----

    async def flush(self, export: str | None = None) -> None:
        """Make durable what was acknowledged to clients, of one or of all exports."""
        server = self._running()
        exports = server.exports.values() if export is None else [live.find(server, export)]
        for one in list(exports):
            await one.image.flush()

    def stream(self, export: str | None = None, *, rate: int = 0) -> Stream:
        """Begin to pull the base into the disk, beside the guests, at ``rate`` bytes a second at
        most (0: no limit). At the end the base is closed and needed no more.

        Returns at once. The result has ``pause``, ``resume``, ``cancel`` and ``status``; ``await``
        it, or its ``wait()``, for the end: Cancelled where it was stopped.
        """
        return live.start_stream(self._running(), self._export(export), rate)

    async def snapshot(
        self, as_: str, *, export: str | None = None, data_file: str | None = None
    ) -> str:
        """Freeze the running layer as ``as_``, a free name in its directory; the disk goes on in a
        new layer under the name it had. Requests wait meanwhile, none is lost. Returns the frozen
        layer's path. ``data_file``: the new layer's, by default the first free IMAGE.N.raw."""
        name = file_name("as_", as_)
        data_name = None if data_file is None else file_name("data_file", data_file)
        return await live.snapshot(self._export(export), name, data_name)

    async def resize(self, size: int, *, export: str | None = None) -> int:
        """Make the disk larger: ``size`` bytes, rounded up to 512. Returns its size, which clients
        see when they connect again."""
        return await live.grow(self._export(export), size)

    def _export(self, name: str | None) -> Export:
        return live.find(self._running(), name)

    def _started(self) -> Server:
        if self._closed:
            raise ClosedError("the server")
        if self._server is None:
            raise UsageError("mmcow.serve: is not started: use 'async with'")
        return self._server

    def _running(self) -> Server:
        """The server, for what must be done in its loop."""
        server = self._started()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is not server.loop:
            raise UsageError("mmcow.serve: call this in the event loop that serves")
        return server


def _idle_since(server: Server) -> float | None:
    """Since when (the loop's time) there is no client, and no stream runs."""
    latest = server.idle_since
    for export in server.exports.values():
        if latest is not None and export.stream is not None:
            rests = export.stream.idle_since
            latest = None if rests is None else max(latest, rests)
    return latest


async def _close(disk: Image | aio.Image) -> None:
    """Close a disk that was given open, however far it got; twice does no harm."""
    if isinstance(disk, aio.Image):
        await disk.close()
    else:
        await asyncio.to_thread(disk.close)


def _sockets(given: Any) -> tuple[Socket, ...]:
    if not isinstance(given, Sequence):
        raise UsageError(f"sockets {given!r}: must be a list of sockets")
    for one in given:
        if not isinstance(one, Socket):
            raise UsageError(f"sockets: {one!r}: must be a socket")
    return tuple(given)


def _tls(given: Any, *, verify_peer: bool) -> ssl.SSLContext | None:
    if given is None or isinstance(given, ssl.SSLContext):
        if verify_peer:
            raise UsageError("tls_verify_peer goes with tls=DIRECTORY; a context says it by itself")
        return given
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"tls {given!r}: must be a directory's path or an ssl.SSLContext")
    return tls_context(file_name("tls", given), verify_peer=verify_peer)


def _idle_seconds(given: Any) -> float | None:
    if given is None:
        return None
    seconds = math.nan
    if not isinstance(given, bool | str):
        with suppress(TypeError, ValueError, OverflowError):
            seconds = float(given)
    if not 0 <= seconds < math.inf:
        raise UsageError(f"exit_when_idle {given!r}: must be a number of seconds, 0 or more")
    return seconds


def _named(disks: Disk | Sequence[Disk] | Mapping[str, Disk]) -> dict[str, Disk]:
    """Disks by their export names."""
    if isinstance(disks, Mapping):
        named = dict(disks)
    elif isinstance(disks, _DISK):
        named = {"": disks}
    elif not isinstance(disks, Sequence):
        raise UsageError(f"disks {disks!r}: must be a path, an image, a list or a mapping of them")
    elif len(disks) == 1:
        named = {"": disks[0]}
    else:
        named = {}
        for disk in disks:
            _check_disk(disk)
            path = disk.path if isinstance(disk, Image | aio.Image) else os.fsdecode(disk)
            name = os.path.basename(path)
            if name in named:
                raise UsageError(f"two exports would be called {name!r}: give a mapping of names")
            named[name] = disk
    if not named:
        raise UsageError("nothing to serve")
    for name, disk in named.items():
        if not isinstance(name, str):
            raise UsageError(f"disks: export name {name!r}: must be a string")
        _check_disk(disk)
    return named


def _check_disk(disk: Any) -> None:
    if not isinstance(disk, _DISK):
        raise UsageError(f"disks: {disk!r}: must be a path or an open image")
    if isinstance(disk, str | os.PathLike):
        file_name("disks:", disk)


def _host_port(bind: Any) -> tuple[str, int]:
    """Where to bind; a host in brackets is an IPv6 address, an empty one is this machine."""
    if isinstance(bind, str):
        host, colon, port = bind.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit() and len(port) <= _DIGITS_MOST):
            raise UsageError(f"bind {bind!r}: must be HOST:PORT")
        return host.strip("[]") or "localhost", int(port)
    if not (
        isinstance(bind, tuple)
        and len(bind) == 2
        and isinstance(bind[0], str)
        and isinstance(bind[1], int)
        and not isinstance(bind[1], bool)
    ):
        raise UsageError(f"bind {bind!r}: must be 'HOST:PORT' or (host, port)")
    return bind[0], bind[1]
