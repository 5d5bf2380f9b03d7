# SPDX-License-Identifier: MIT
"""The control socket of a server: QMP-shaped JSON lines over a Unix socket.

``{"execute": "snapshot", "arguments": {"name": "monday"}, "id": 7}`` is answered with
``{"return": {...}, "id": 7}`` or ``{"error": {"class": ..., "desc": ...}, "id": 7}``. The first
line is a greeting. A client that speaks QMP's ``qmp_capabilities`` gets its empty answer.

Owns: the commands, their arguments, their answers. Whoever can open the socket (its owner) may
give every command.
Never: does the work (``live`` and the engine do).
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import mmcow
from mmcow.errors import MmcowError, UsageError
from mmcow.nbd import live
from mmcow.nbd.arguments import file_name, whole_number
from mmcow.nbd.status import status_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mmcow.nbd.export import Export
    from mmcow.nbd.server import Server, SocketName

LINE_MOST = 64 << 10
# Beyond that the one that is silent for the longest time has to go: monitors that forget to close
# must use up neither the descriptors that guests need nor keep their owner out.
CLIENTS_MOST = 64
PARTING_SECONDS = 5.0

Arguments = dict[str, Any]


class Control:
    """Commands for ``server``. ``quit`` is called when a client asks the server to end."""

    def __init__(self, server: Server, quit: Callable[[], None]) -> None:
        self._server = server
        self._quit = quit
        self._listener: asyncio.Server | None = None
        self._name: SocketName | None = None
        # Who said something last is last.
        self._clients: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}
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
        self._listener, self._name = await self._server.listen_control(path, self._serve, LINE_MOST)

    async def close(self) -> None:
        """Listen no more and let the clients go."""
        if self._listener is not None:
            self._listener.close()
        if self._name is not None:
            self._name.remove()
        for writer in self._clients.values():
            writer.close()
        talks = [task for task in self._clients if task is not None]
        if talks:  # each ends with the command in hand
            _, deaf = await asyncio.wait(talks, timeout=PARTING_SECONDS)
            for task in deaf:
                self._clients[task].transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.current_task()
        if len(self._clients) >= CLIENTS_MOST:
            self._clients.pop(next(iter(self._clients))).transport.abort()
        self._clients[talk] = writer
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
                if talk in self._clients:
                    self._clients[talk] = self._clients.pop(talk)
                if line.strip():
                    _send(writer, await self.execute(line))
                    await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._clients.pop(talk, None)
            writer.close()

    def _names(self) -> list[str]:
        return list(self._server.exports)

    async def execute(self, line: bytes) -> dict[str, Any]:
        """Carry out one line; returns the answer. Never raises for what a client sent."""
        identity: dict[str, Any] = {}
        try:
            message = json.loads(line.decode())
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
            _check_names(str(message["execute"]), arguments)
            return {"return": await command(arguments), **identity}
        except (MmcowError, OSError) as error:
            return _error(type(error).__name__, str(error), identity)

    # ---- commands ----

    async def _capabilities(self, arguments: Arguments) -> Any:
        return {}

    async def _status(self, arguments: Arguments) -> Any:
        every = arguments.get("export") is None
        exports = list(self._server.exports.values()) if every else [self._export(arguments)]
        return status_of(self._server, exports)

    async def _flush(self, arguments: Arguments) -> Any:
        await self._export(arguments).image.flush()
        return {}

    async def _stream(self, arguments: Arguments) -> Any:
        """``action``: start (default), pause, resume, cancel; ``rate`` in bytes a second. A start
        with a rate changes that of a stream that runs already."""
        export = self._export(arguments)
        action = arguments.get("action", "start")
        rate = _number(arguments, "rate", "bytes a second")
        stream = export.stream
        if stream is None or not stream.active:
            if action != "start":
                raise UsageError(f"export {export.name!r}: no stream is running")
            return live.start_stream(self._server, export, rate or 0).status()
        if action == "start":
            if rate is None:
                raise UsageError(
                    f"export {export.name!r}: a stream is {stream.state} already; given a rate, "
                    "this changes its own"
                )
            stream.set_rate(rate)
        elif action == "pause":
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
        frozen = await live.snapshot(export, name, data_file)
        return {"frozen": frozen, "top": export.image.path}

    async def _resize(self, arguments: Arguments) -> Any:
        size = _number(arguments, "size")
        if size is None:
            raise UsageError("resize needs a size in bytes")
        grown = await live.grow(self._export(arguments), size)
        return {"size": grown, "note": "clients see it when they connect again"}

    async def _end(self, arguments: Arguments) -> Any:
        asyncio.get_running_loop().call_soon(self._quit)
        return {}

    def _export(self, arguments: Arguments) -> Export:
        return live.find(self._server, arguments.get("export"))


# A misspelt "rate" must not be a stream without a limit.
_ARGUMENTS = {
    "qmp_capabilities": {"enable"},
    "status": {"export"},
    "flush": {"export"},
    "stream": {"export", "action", "rate"},
    "snapshot": {"export", "name", "data_file"},
    "resize": {"export", "size"},
    "quit": set[str](),
}


def _check_names(command: str, arguments: Arguments) -> None:
    for name in arguments:
        if name not in _ARGUMENTS[command]:
            known = ", ".join(sorted(_ARGUMENTS[command])) or "none"
            raise UsageError(f"{command}: unknown argument {name!r}; known: {known}")


def _number(arguments: Arguments, key: str, of: str = "bytes") -> int | None:
    value = arguments.get(key)
    return None if value is None else whole_number(key, value, of)


def _file_name(arguments: Arguments, key: str) -> str | None:
    value = arguments.get(key)
    return None if value is None else file_name(key, value)


def _error(kind: str, text: str, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": text}, **(identity or {})}


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
