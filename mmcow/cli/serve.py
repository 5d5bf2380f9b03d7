# SPDX-License-Identifier: MIT
"""``mmcow serve``: disks as NBD exports, until a signal, a command's end or idleness.

Owns: the verb: what listens where, readiness, the status line, the end.
Never: speaks NBD (``nbd``), serves by itself (``serving``).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
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
from mmcow.cli.troubles import Troubles, raise_open_files
from mmcow.cli.ui import OutputError
from mmcow.errors import StorageError, UsageError
from mmcow.nbd.arguments import same_path
from mmcow.nbd.pump import run
from mmcow.nbd.server import CONNECTIONS_MOST
from mmcow.serving import serve

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from mmcow.cli.ui import Ui
    from mmcow.serving import Serving

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
        help="require TLS, on Unix sockets too; DIR has server-cert.pem, server-key.pem and "
        "ca-cert.pem",
    )  # fmt: skip
    parser.add_argument(
        "--tls-verify-peer", action="store_true", help="and a client certificate signed by the CA"
    )
    parser.add_argument(
        "--max-connections", metavar="N", type=int, default=CONNECTIONS_MOST,
        help=f"refuse further clients (default: {CONNECTIONS_MOST})",
    )  # fmt: skip
    parser.add_argument(
        "--exit-when-idle", metavar="SECONDS", type=_seconds,
        help="end after that long without a client and without a stream that runs",
    )  # fmt: skip
    add_quiet(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="what to serve")
    parser.take_command("COMMAND", "start it when ready, {uri} replaced; end when it ends")
    parser.examples(
        "mmcow serve --socket /run/vm.sock --control /run/vm.ctl vm.acow",
        "mmcow serve vm.acow -- qemu-system-x86_64 -drive file={uri},format=raw,if=virtio",
        "mmcow serve vm.acow -- nbdinfo {uri}",
    )


def _seconds(text: str) -> float:
    """A duration of the command line."""
    from argparse import ArgumentTypeError  # noqa: PLC0415 - slow

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r}: must be a number of seconds, 0 or more")
    return value


def run_serve(arguments: argparse.Namespace, ui: Ui) -> int:
    """Serve until told to stop."""
    _check(arguments)
    _log_to_journal_or_terminal(quiet=arguments.quiet)
    raise_open_files(arguments.max_connections, len(arguments.images), ui)
    return run(_serve(arguments, ui))


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.socket or arguments.bind or arguments.command or _given_sockets_count()):
        raise UsageError("serve: say where to listen: --socket, --bind, or -- COMMAND {uri}")
    if arguments.socket and arguments.control and same_path(arguments.socket, arguments.control):
        raise UsageError(
            f"serve: --socket and --control are both {arguments.control}: each needs a name of "
            "its own"
        )
    if arguments.max_connections < 1:
        raise UsageError(f"serve: --max-connections {arguments.max_connections}: must be 1 or more")
    _check_names(arguments)
    if arguments.tls_verify_peer and not arguments.tls_certs:
        raise UsageError("serve: --tls-verify-peer needs --tls-certs")


def _check_names(arguments: argparse.Namespace) -> None:
    names = arguments.export_name or [os.path.basename(path) for path in arguments.images]
    if len(names) != len(arguments.images):
        raise UsageError(f"serve: {len(names)} export names for {len(arguments.images)} images")
    for name, path in zip(names, arguments.images, strict=True):
        if names.count(name) > 1:
            raise UsageError(f"serve: two exports are called {name!r}: use --export-name")
        if (len(names) > 1 or arguments.export_name) and not _is_utf8(name):
            raise UsageError(f"{path}: export name {name!r} is not UTF-8: use --export-name")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte of the command line that is none
        return False
    return True


async def _serve(arguments: argparse.Namespace, ui: Ui) -> int:
    loop = asyncio.get_running_loop()
    troubles = Troubles(loop.time)
    loop.set_exception_handler(troubles.tell)
    early: list[str] = []
    stops: list[Callable[[str], object]] = [early.append]

    def stop(name: str) -> None:
        stops[-1](name)

    with ui.signals.told_to(loop, stop):
        async with AsyncExitStack() as stack:
            server = await _start(arguments, ui, stack)
            stack.callback(troubles.rest)  # before the server's last line
            stops.append(server.quit)
            for name in early:
                server.quit(name)
            _tell_ready(server.uris, ui, quiet=bool(arguments.command) or arguments.quiet)
            stack.callback(_notify, "STOPPING=1")
            if not arguments.quiet and terminal.is_terminal(sys.stderr) and not arguments.command:
                stack.callback(loop.create_task(_show_status(server, ui)).cancel)
            if arguments.command:
                return await _run_command(arguments.command, server)
            await server.wait_quit()
    return exits.OK


async def _start(arguments: argparse.Namespace, ui: Ui, stack: AsyncExitStack) -> Serving:
    """Open the images and serve them, until the stack is left."""
    images: list[aio.Image] = []
    for path in arguments.images:
        ui.subject = path
        image = await aio.open(
            path,
            format=arguments.format,
            write=not arguments.read_only,
            cache=arguments.cache,
            backing_format=arguments.backing_format,
        )
        stack.push_async_callback(image.close)  # which the server does before, once it runs
        warn(ui, path, image.image)
        images.append(image)
    ui.subject = None  # what fails from here on is not the last one's fault
    socket_path = arguments.socket
    given = _given_sockets()
    if arguments.command and not (socket_path or arguments.bind or given):
        directory = tempfile.mkdtemp(prefix="mmcow-")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        socket_path = os.path.join(directory, "nbd.sock")
    names = arguments.export_name
    server = serve(
        dict(zip(names, images, strict=True)) if names else images,
        socket=socket_path,
        bind=arguments.bind,
        sockets=given,
        control=arguments.control,
        read_only=arguments.read_only,
        tls=arguments.tls_certs,
        tls_verify_peer=arguments.tls_verify_peer,
        max_connections=arguments.max_connections,
        exit_when_idle=arguments.exit_when_idle,
    )
    return await stack.enter_async_context(server)


def _given_sockets_count() -> int:
    """Listening sockets handed over by systemd (LISTEN_FDS, LISTEN_PID)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    text = os.environ.get("LISTEN_FDS", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _given_sockets() -> list[socket.socket]:
    count = _given_sockets_count()
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # they are not a command's
        os.environ.pop(name, None)
    given: list[socket.socket] = []
    for descriptor in range(_FIRST_GIVEN, _FIRST_GIVEN + count):
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
        one.set_inheritable(False)
    return given


def _tell_ready(uris: Sequence[str], ui: Ui, *, quiet: bool) -> None:
    """Say that clients may come: to systemd, and a line per way in on standard output."""
    try:
        if not quiet:
            for uri in uris:
                ui.out(uri)
            ui.flush()
    except OutputError as error:  # who reads it may be gone; who was given the socket may come
        ui.abandon_output()
        ui.warn(f"{error}: the URI is told to nobody")
    failed = _notify("READY=1\nSTATUS=serving")
    if failed is not None:
        ui.warn(
            f"{os.environ['NOTIFY_SOCKET']}: ready notification: {failed.strerror or failed} "
            "(NOTIFY_SOCKET)"
        )


def _notify(message: str) -> OSError | None:
    """Tell the service manager, if there is one, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return None
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.connect(address)
            notify.sendall(message.encode())
        except OSError as error:
            return error
    return None


async def _run_command(command: list[str], server: Serving) -> int:
    """Run the command; its status is ours. A signal to us is passed on."""
    words = [word.replace("{uri}", server.uri) for word in command]
    try:
        process = await asyncio.create_subprocess_exec(*words)
    except OSError as error:
        raise StorageError(error.errno or 0, "start", words[0]) from error
    ended = asyncio.ensure_future(process.wait())
    stopped = asyncio.ensure_future(server.wait_quit())
    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not ended.done():
        process.terminate()
    status = await ended
    server.quit(f"{words[0]} ended")
    return status if status >= 0 else 128 - status


async def _show_status(server: Serving, ui: Ui) -> None:
    """One line on the terminal, renewed every second."""
    try:
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            ui.draw(_status_line(server.activity()))
    finally:
        ui.draw("")


def _status_line(activity: dict[str, Any]) -> str:
    count = activity["connections"]
    parts = [f"{count} client{'' if count == 1 else 's'}"]
    rates = [export["throughput"] for export in activity["exports"]]
    for verb in ("read", "write", "flush"):
        operations = sum(rate["operations"].get(verb, 0) for rate in rates)
        moved = sum(rate["bytes"].get(verb, 0) for rate in rates)
        parts.append(f"{verb} {operations:.0f}/s" + (f" {io_size(int(moved))}/s" if moved else ""))
    for export in activity["exports"]:
        stream = export["stream"]
        if stream is not None and stream["state"] in ("running", "paused"):
            parts.append(f"stream {100 * stream['done'] // max(stream['total'], 1)} %")
    return "  ".join(parts)


def _log_to_journal_or_terminal(*, quiet: bool) -> None:
    """Log lines on standard error; with the journal's priority where it reads them."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        # The status line is in the way: a line of the log takes its place, and it comes again.
        clear = "\r\x1b[K" if not quiet and terminal.is_terminal(sys.stderr) else ""
        handler.setFormatter(logging.Formatter(f"{clear}mmcow: %(message)s"))
    logger = logging.getLogger("mmcow")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _JournalFormatter(logging.Formatter):
    """Puts syslog's priority in front, as sd-daemon(3) reads it."""

    _PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        priority = next((p for level, p in self._PRIORITIES if record.levelno >= level), 7)
        return f"<{priority}>{super().format(record)}"
