# SPDX-License-Identifier: MIT
"""``mmcow serve``: disks as NBD exports, until a signal, a command's end or idleness.

Owns: the verb: what listens where, readiness, the status line, the end.
Never: speaks NBD (``nbd``).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from mmcow import aio
from mmcow.cli import exits, terminal
from mmcow.cli.images import warn
from mmcow.cli.options import Parser, add_backing_format, add_cache, add_format, add_quiet
from mmcow.cli.sizes import io_size
from mmcow.errors import StorageError, UsageError
from mmcow.nbd.control import Control
from mmcow.nbd.server import CONNECTIONS_MOST, Server, tls_context

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui

_FIRST_GIVEN = 3  # systemd's first descriptor
_STATUS_SECONDS = 1.0


def configure_serve(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    add_cache(parser)
    parser.add_argument("--socket", metavar="PATH", help="listen on a Unix socket")
    parser.add_argument("--bind", metavar="HOST:PORT", help="listen on TCP (port 0: any free one)")
    parser.add_argument(
        "--control", metavar="PATH", help="Unix socket for 'mmcow ctl': status, stream, snapshot"
    )
    parser.add_argument("-r", "--read-only", action="store_true", help="refuse writes")
    parser.add_argument(
        "--export-name", metavar="NAME", action="append", default=[],
        help="name of an export, in the order of the images (default: one image has no name, "
        "several have their file names)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-certs", metavar="DIR",
        help="require TLS; DIR has server-cert.pem, server-key.pem and ca-cert.pem",
    )  # fmt: skip
    parser.add_argument(
        "--tls-verify-peer", action="store_true", help="and a client certificate signed by the CA"
    )
    parser.add_argument(
        "--max-connections", metavar="N", type=int, default=CONNECTIONS_MOST,
        help=f"refuse further clients (default: {CONNECTIONS_MOST})",
    )  # fmt: skip
    parser.add_argument(
        "--exit-when-idle", metavar="SECONDS", type=float,
        help="end after that long without a client",
    )  # fmt: skip
    add_quiet(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="what to serve")
    parser.take_command("COMMAND", "start it when ready, {uri} replaced; end when it ends")
    parser.examples(
        "mmcow serve --socket /run/vm.sock --control /run/vm.ctl vm.acow",
        "mmcow serve vm.acow -- qemu-system-x86_64 -drive file={uri},format=raw,if=virtio",
        "mmcow serve vm.acow -- nbdinfo {uri}",
    )


def run_serve(arguments: argparse.Namespace, ui: Ui) -> int:
    """Serve until told to stop."""
    _check(arguments)
    _log_to_journal_or_terminal(quiet=arguments.quiet)
    return asyncio.run(_serve(arguments, ui))


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.socket or arguments.bind or arguments.command or _given_sockets_count()):
        raise UsageError("serve: say where to listen: --socket, --bind, or -- COMMAND {uri}")
    idle = arguments.exit_when_idle
    if idle is not None and not 0 <= idle < math.inf:
        raise UsageError(f"serve: --exit-when-idle {idle}: must be a number of seconds")
    if arguments.max_connections < 1:
        raise UsageError(f"serve: --max-connections {arguments.max_connections}: must be 1 or more")
    names = arguments.export_name
    if names and len(names) != len(arguments.images):
        raise UsageError(f"serve: {len(names)} export names for {len(arguments.images)} images")
    if arguments.tls_verify_peer and not arguments.tls_certs:
        raise UsageError("serve: --tls-verify-peer needs --tls-certs")
    if arguments.tls_certs and arguments.command and not arguments.bind:
        raise UsageError("serve: a command is given a Unix socket, which needs no TLS")


async def _serve(arguments: argparse.Namespace, ui: Ui) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        async with AsyncExitStack() as stack:
            server = await _start(arguments, ui, stack)
            if arguments.control:
                control = Control(server, stop.set)
                await control.listen(arguments.control)
                stack.push_async_callback(control.close)
            uris = await _listen(arguments, server, stack)
            _tell_ready(uris, ui, quiet=bool(arguments.command) or arguments.quiet)
            if arguments.exit_when_idle is not None:
                server.background(_watch_idle(server, arguments.exit_when_idle, stop))
            if not arguments.quiet and terminal.is_terminal(sys.stderr) and not arguments.command:
                server.background(_show_status(server, ui))
            if arguments.command:
                return await _run_command(arguments.command, uris[0], stop)
            await stop.wait()
        return exits.OK
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _start(arguments: argparse.Namespace, ui: Ui, stack: AsyncExitStack) -> Server:
    """Open the images and put a server over them."""
    images: dict[str, aio.Image] = {}
    opening = await stack.enter_async_context(AsyncExitStack())
    for name, path in zip(_export_names(arguments), arguments.images, strict=True):
        if name in images:
            raise UsageError(f"serve: two exports are called {name!r}: use --export-name")
        ui.subject = path
        image = await aio.open(
            path,
            format=arguments.format,
            write=not arguments.read_only,
            cache=arguments.cache,
            backing_format=arguments.backing_format,
        )
        opening.push_async_callback(image.close)
        warn(ui, path, image.image)
        images[name] = image
    server = Server(
        images,
        read_only=arguments.read_only,
        tls=tls_context(arguments.tls_certs, verify_peer=arguments.tls_verify_peer)
        if arguments.tls_certs
        else None,
        max_connections=arguments.max_connections,
    )
    opening.pop_all()  # the server closes them
    return await stack.enter_async_context(server)


def _export_names(arguments: argparse.Namespace) -> list[str]:
    if arguments.export_name:
        return list(arguments.export_name)
    if len(arguments.images) == 1:
        return [""]
    return [os.path.basename(path) for path in arguments.images]


async def _listen(
    arguments: argparse.Namespace, server: Server, stack: AsyncExitStack
) -> list[str]:
    """Open every way in; returns the URIs."""
    uris = []
    given = _given_sockets()
    if given:
        await server.listen_on(given)
        uris.append("nbd: sockets from systemd")
    if arguments.socket:
        uris.append(await server.listen_unix(arguments.socket))
    if arguments.bind:
        host, colon, port = arguments.bind.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()):
            raise UsageError(f"serve: --bind {arguments.bind}: must be HOST:PORT")
        uris.append(await server.listen_tcp(host.strip("[]") or "localhost", int(port)))
    if arguments.command and not uris:
        directory = tempfile.mkdtemp(prefix="mmcow-")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        uris.append(await server.listen_unix(os.path.join(directory, "nbd.sock")))
    return uris


def _given_sockets_count() -> int:
    """Listening sockets handed over by systemd (LISTEN_FDS, LISTEN_PID)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    text = os.environ.get("LISTEN_FDS", "0")
    return int(text) if text.isdigit() else 0


def _given_sockets() -> list[socket.socket]:
    given: list[socket.socket] = []
    for descriptor in range(_FIRST_GIVEN, _FIRST_GIVEN + _given_sockets_count()):
        try:
            one = socket.socket(fileno=descriptor)
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise StorageError(
                error.errno or 0, "LISTEN_FDS", f"descriptor {descriptor}"
            ) from error
        given.append(one)
        if not listens:
            raise UsageError(f"serve: LISTEN_FDS: descriptor {descriptor} does not listen")
    return given


def _tell_ready(uris: list[str], ui: Ui, *, quiet: bool) -> None:
    """Say that clients may come: to systemd, and a line per way in on standard output."""
    if not quiet:
        for uri in uris:
            ui.out(uri)
        ui.flush()
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.connect(address)
            notify.sendall(b"READY=1\nSTATUS=serving")
        except OSError as error:
            raise StorageError(error.errno or 0, "ready notification", address) from error


async def _watch_idle(server: Server, seconds: float, stop: asyncio.Event) -> None:
    while True:
        since = server.idle_since
        now = server.loop.time()
        if since is not None and now - since >= seconds:
            stop.set()
            return
        await asyncio.sleep(seconds if since is None else since + seconds - now)


async def _run_command(command: list[str], uri: str, stop: asyncio.Event) -> int:
    """Run the command; its status is ours. A signal to us is passed on."""
    words = [word.replace("{uri}", uri) for word in command]
    try:
        process = await asyncio.create_subprocess_exec(*words)
    except OSError as error:
        raise StorageError(error.errno or 0, "start", words[0]) from error
    ended = asyncio.ensure_future(process.wait())
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not ended.done():
        process.terminate()
    status = await ended
    return status if status >= 0 else 128 - status


async def _show_status(server: Server, ui: Ui) -> None:
    """One line on the terminal, renewed every second."""
    before = _totals(server)
    try:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            now = _totals(server)
            ui.draw(_status_line(server, before, now))
            before = now
    finally:
        ui.draw("")


def _totals(server: Server) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for export in server.exports.values():
        for verb, count in export.counters.operations.items():
            old = totals.get(verb, (0, 0))
            totals[verb] = (old[0] + count, old[1] + export.counters.bytes[verb])
    return totals


def _status_line(server: Server, before: dict[str, Any], now: dict[str, Any]) -> str:
    parts = [f"{len(server.connections)} clients"]
    for verb in ("read", "write", "flush"):
        count = now.get(verb, (0, 0))[0] - before.get(verb, (0, 0))[0]
        moved = now.get(verb, (0, 0))[1] - before.get(verb, (0, 0))[1]
        parts.append(f"{verb} {count}/s" + (f" {io_size(moved)}/s" if moved else ""))
    for export in server.exports.values():
        stream = export.stream
        if stream is not None and stream.active:
            parts.append(f"stream {100 * stream.done // max(stream.total, 1)} %")
    return "  ".join(parts)


def _log_to_journal_or_terminal(*, quiet: bool) -> None:
    """Log lines on standard error; with the journal's priority where it reads them."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("mmcow: %(message)s"))
    logger = logging.getLogger("mmcow")
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


class _JournalFormatter(logging.Formatter):
    """Puts syslog's priority in front, as sd-daemon(3) reads it."""

    _PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        priority = next((p for level, p in self._PRIORITIES if record.levelno >= level), 7)
        return f"<{priority}>{super().format(record)}"
