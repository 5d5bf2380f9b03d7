# SPDX-License-Identifier: MIT
"""The control socket of a server: QMP-shaped JSON lines over a Unix socket.

``{"execute": "snapshot", "arguments": {"name": "monday"}, "id": 7}`` is answered with
``{"return": {...}, "id": 7}`` or ``{"error": {"class": ..., "desc": ...}, "id": 7}``. The first
line is a greeting. A client that speaks QMP's ``qmp_capabilities`` gets its empty answer.

Owns: the commands, their arguments, their answers. Whoever can open the socket (its owner) may
give every command.
Never: does the work (``live``, ``jobs.snapshot``, the engine do).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

import mmcow
from mmcow.errors import MmcowError, UsageError
from mmcow.jobs.snapshot import take
from mmcow.nbd.live import Stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mmcow.nbd.export import Export
    from mmcow.nbd.server import Server

LINE_MOST = 64 << 10

Arguments = dict[str, Any]


class Control:
    """Commands for ``server``. ``quit`` is called when a client asks the server to end."""

    def __init__(self, server: Server, quit: Callable[[], None]) -> None:
        self._server = server
        self._quit = quit
        self._listener: asyncio.Server | None = None
        self._path: tuple[str, int] | None = None  # with the inode, to remove nobody else's socket
        self._clients: set[asyncio.StreamWriter] = set()
        self._commands: dict[str, Callable[[Arguments], Awaitable[Any]]] = {
            "qmp_capabilities": self._capabilities,
            "status": self._status,
            "flush": self._flush,
            "stream": self._stream,
            "snapshot": self._snapshot,
            "resize": self._resize,
            "quit": self._end,
        }

    async def listen(self, path: str) -> None:
        """Listen on a Unix socket that only its owner can open."""
        before = os.umask(0o177)
        try:
            self._listener = await self._server.listen_control(path, self._serve, LINE_MOST)
        finally:
            os.umask(before)
        self._path = path, os.stat(path).st_ino

    async def close(self) -> None:
        """Listen no more and let the clients go."""
        if self._listener is not None:
            self._listener.close()
        for writer in list(self._clients):
            writer.close()
        if self._path is not None:
            path, inode = self._path
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            _send(writer, {"mmcow": {"version": mmcow.__version__, "exports": self._names()}})
            while True:
                try:
                    line = await reader.readline()
                except ValueError:  # a line longer than LINE_MOST
                    _send(writer, _error("GenericError", "the line is too long"))
                    return
                if not line:
                    return
                if line.strip():
                    _send(writer, await self.execute(line))
                    await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._clients.discard(writer)
            writer.close()

    def _names(self) -> list[str]:
        return list(self._server.exports)

    async def execute(self, line: bytes) -> dict[str, Any]:
        """Carry out one line; returns the answer. Never raises for what a client sent."""
        identity: dict[str, Any] = {}
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            return _error("GenericError", f"not JSON: {error}")
        try:
            if not isinstance(message, dict):
                raise UsageError("a command is a JSON object")
            if "id" in message:
                identity = {"id": message["id"]}
            arguments = message.get("arguments", {})
            command = self._commands.get(str(message.get("execute")))
            if command is None:
                known = ", ".join(sorted(self._commands))
                raise UsageError(f"unknown command {message.get('execute')!r}; known: {known}")
            if not isinstance(arguments, dict):
                raise UsageError("arguments are a JSON object")
            return {"return": await command(arguments), **identity}
        except (MmcowError, OSError) as error:
            return _error(type(error).__name__, str(error), identity)

    # ---- commands ----

    async def _capabilities(self, arguments: Arguments) -> Any:
        return {}

    async def _status(self, arguments: Arguments) -> Any:
        name = arguments.get("export")
        exports = self._server.exports.values() if name is None else [self._export(arguments)]
        return {
            "version": mmcow.__version__,
            "connections": len(self._server.connections),
            "exports": [_describe(export) for export in exports],
        }

    async def _flush(self, arguments: Arguments) -> Any:
        await self._export(arguments).image.flush()
        return {}

    async def _stream(self, arguments: Arguments) -> Any:
        """``action``: start (default), pause, resume, cancel; ``rate`` in bytes a second."""
        export = self._export(arguments)
        action = arguments.get("action", "start")
        rate = _number(arguments, "rate")
        stream = export.stream
        if action == "start":
            if stream is not None and stream.active:
                raise UsageError(f"export {export.name!r}: a stream is {stream.state}")
            stream = export.stream = Stream(export, rate=rate or 0)
            self._server.background(stream.run())
            return stream.status()
        if stream is None or not stream.active:
            raise UsageError(f"export {export.name!r}: no stream is running")
        if action == "pause":
            stream.pause()
        elif action == "resume":
            stream.resume(rate)
        elif action == "cancel":
            stream.cancel()
        else:
            raise UsageError(f"stream action {action!r}: start, pause, resume or cancel")
        return stream.status()

    async def _snapshot(self, arguments: Arguments) -> Any:
        export = self._export(arguments)
        name, data_file = _file_name(arguments, "name"), _file_name(arguments, "data_file")
        if name is None:
            raise UsageError("snapshot needs a name")
        image = export.image
        frozen = await image.perform(
            lambda: image.reactor.spawn(take(image.image, name, data_file=data_file))
        )
        return {"frozen": frozen, "top": image.path}

    async def _resize(self, arguments: Arguments) -> Any:
        export = self._export(arguments)
        size = _number(arguments, "size")
        if size is None:
            raise UsageError("resize needs a size in bytes")
        if size < export.size:
            raise UsageError(f"export {export.name!r}: a served disk can only grow")
        await export.image.resize(size)
        return {"size": export.size, "note": "clients see it when they connect again"}

    async def _end(self, arguments: Arguments) -> Any:
        asyncio.get_running_loop().call_soon(self._quit)
        return {}

    def _export(self, arguments: Arguments) -> Export:
        exports = self._server.exports
        name = arguments.get("export")
        if name is None and len(exports) == 1:
            return next(iter(exports.values()))
        export = exports.get(name) if isinstance(name, str) else None
        if export is None:
            names = ", ".join(repr(known) for known in exports)
            raise UsageError(f"no export {name!r}; there are: {names}")
        return export


def _describe(export: Export) -> dict[str, Any]:
    image, counters = export.image, export.counters
    top = image.engine.top
    seconds = max(time.monotonic() - counters.started, 1e-9)
    return {
        "name": export.name,
        "path": image.path,
        "size": image.size,
        "read-only": export.read_only,
        "connections": export.connections,
        "queue": image.image.queue_backend,
        "chain": [f"{layer.path} ({layer.format})" for layer in image.chain],
        "cluster-size": top.info.cluster_size,
        "allocated-clusters": top.allocated(),
        "total-clusters": -(-top.info.size // top.info.cluster_size),
        "uptime": round(seconds, 3),
        "operations": dict(counters.operations),
        "bytes": dict(counters.bytes),
        "errors": counters.errors,
        # Bucket n counts requests that took less than 2^n microseconds (and not less than half).
        "latency-log2-us": list(counters.latency),
        "stream": None if export.stream is None else export.stream.status(),
    }


def _number(arguments: Arguments, key: str) -> int | None:
    value = arguments.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{key} {value!r}: must be a number of bytes")
    return value


def _file_name(arguments: Arguments, key: str) -> str | None:
    """A name for a file. JSON can hold what is none: half of a surrogate pair."""
    value = arguments.get(key)
    if value is None:
        return None
    try:
        os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        raise UsageError(f"{key} {value!r}: must be the name of a file") from None
    return str(value)


def _error(kind: str, text: str, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": text}, **(identity or {})}


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
