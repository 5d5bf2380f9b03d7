# SPDX-License-Identifier: MIT
"""``mmcow ctl``: commands for a server that runs, over its control socket.

Owns: the verb, the wording of answers.
Never: changes anything itself (``nbd.control`` does).
"""

from __future__ import annotations

import json
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from mmcow.cli import exits, terminal
from mmcow.cli.options import Parser, add_output, add_progress, size_argument
from mmcow.cli.progress import meter
from mmcow.cli.sizes import exact_size, io_size, parse_size
from mmcow.errors import MmcowError, StorageError, UsageError

if TYPE_CHECKING:
    import argparse

    from mmcow.cli.ui import Ui

_COMMANDS = ("status", "flush", "stream", "snapshot", "resize", "top", "quit")
_ACTIONS = ("start", "pause", "resume", "cancel")
_TIMEOUT = 60.0
_TOP_SECONDS = 1.0
_LOOK_SECONDS = 0.5  # for the throughput of a lone status
_RECENT = 5.0
_BAR = 40
# Options that go with one command.
_OPTIONS = {
    "name": ("--as", "snapshot"),
    "data_file": ("--data-file", "snapshot"),
    "rate": ("--rate", "stream"),
    "wait": ("--wait", "stream"),
    "show_progress": ("-p", "stream --wait"),
    "progress": ("--progress", "stream --wait"),
}
_NBD_MAGIC = b"NBDMAGIC"


class Refused(MmcowError):
    """The server's answer is an error."""


def configure_ctl(parser: Parser) -> None:
    """Add the verb's options."""
    parser.add_argument("--export", metavar="NAME", help="which export, where there are several")
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="snapshot: name of the frozen layer"
    )
    parser.add_argument("--data-file", metavar="NAME", help="snapshot: data file of the new layer")
    parser.add_argument(
        "--rate",
        metavar="SIZE",
        type=size_argument("rate"),
        help="stream: bytes a second, at most; also of one that runs already",
    )
    parser.add_argument("--wait", action="store_true", help="stream: wait for the end of it")
    add_progress(parser, short=False)
    parser.add_argument(
        "-p", dest="show_progress", action="store_true",
        help="show progress even where standard error is no terminal (then as qemu-img does, on "
        "standard output; with --output=json as --progress=json)",
    )  # fmt: skip
    add_output(parser)
    parser.add_argument("socket", metavar="SOCKET", help="the server's control socket")
    parser.add_argument("command", metavar="COMMAND", choices=_COMMANDS, help=", ".join(_COMMANDS))
    parser.add_argument(
        "argument", metavar="ARGUMENT", nargs="?",
        help="stream: start (default), pause, resume, cancel; resize: the new size or +SIZE",
    )  # fmt: skip
    parser.examples(
        "mmcow ctl /run/vm.ctl status",
        "mmcow ctl /run/vm.ctl snapshot --as monday.acow",
        "mmcow ctl /run/vm.ctl stream --rate 100M --wait",
        "mmcow ctl /run/vm.ctl top",
    )


def run_ctl(arguments: argparse.Namespace, ui: Ui) -> int:
    """Give one command and show the answer."""
    _check_options(arguments)
    ui.subject = arguments.socket
    with _Server(arguments.socket) as server:
        if arguments.command == "top":
            return _top(server, arguments, ui)
        if _only_waits(arguments, server):
            answer = None
        else:
            answer = server.execute(arguments.command, _arguments(arguments, server))
        if arguments.command == "status":
            answer = _of_now(server, arguments, answer)
        if arguments.command == "stream" and arguments.wait:
            answer = _wait(server, arguments, ui)
        _show(arguments, answer, ui)
    return exits.OK


def _check_options(arguments: argparse.Namespace) -> None:
    given = f"{arguments.command}{' --wait' if arguments.wait else ''}"
    for key, (option, command) in _OPTIONS.items():
        if getattr(arguments, key) not in (None, False) and not given.startswith(command):
            raise UsageError(f"ctl: {option} goes with {command}, not with {arguments.command}")
    if arguments.argument is not None and arguments.command not in ("stream", "resize"):
        raise UsageError(f"ctl: {arguments.command} takes no argument ({arguments.argument})")


class _Server:
    """A conversation with a server."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_TIMEOUT)

    def __enter__(self) -> Self:
        try:
            self._socket.connect(self._path)
        except OSError as error:
            self._socket.close()
            if error.errno is None:  # Python's own: the path is too long
                raise UsageError(f"{self._path}: {error}") from error
            raise StorageError(error.errno, "connect", self._path) from error
        self._lines = self._socket.makefile("rb")
        self._greet()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        """The command's result; Refused where the server says no."""
        message = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            raise Refused("the server has ended") from None
        except OSError as error:
            raise StorageError(error.errno or 0, "write", self._path) from error
        answer = self._read()
        if "error" in answer:
            raise Refused(str(answer["error"].get("desc", "refused without a reason")))
        return answer.get("return")

    def _greet(self) -> None:
        """Read the greeting. An NBD server's has no end of line: it would be waited for in vain."""
        with suppress(OSError):  # _read says what it is
            if self._socket.recv(len(_NBD_MAGIC), socket.MSG_PEEK) == _NBD_MAGIC:
                raise Refused("this is where disks are served; name the socket of --control")
        self._read()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
            answer = json.loads(line) if line else None
        except TimeoutError:
            raise Refused(f"no answer within {_TIMEOUT:g} seconds") from None
        except OSError as error:
            raise StorageError(error.errno or 0, "read", self._path) from error
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Refused("this is no control socket of a mmcow server, or the server has ended")
        return answer


def _arguments(arguments: argparse.Namespace, server: _Server) -> dict[str, Any]:
    """The command's arguments as the server wants them."""
    given: dict[str, Any] = {}
    if arguments.export is not None:
        given["export"] = arguments.export
    if arguments.command == "stream":
        given["action"] = arguments.argument or "start"
        if given["action"] not in _ACTIONS:
            raise UsageError(f"stream {arguments.argument}: must be {', '.join(_ACTIONS)}")
        if arguments.rate is not None:
            given["rate"] = arguments.rate
    elif arguments.command == "snapshot":
        if arguments.name is None:
            raise UsageError("snapshot: say --as NAME")
        given["name"] = arguments.name
        if arguments.data_file is not None:
            given["data_file"] = arguments.data_file
    elif arguments.command == "resize":
        given["size"] = _size(arguments, server)
    return given


def _size(arguments: argparse.Namespace, server: _Server) -> int:
    text = arguments.argument
    if text is None:
        raise UsageError("resize: say the new SIZE, or +SIZE")
    if not text.startswith("+"):
        return parse_size(text)
    return int(_export(server, arguments)["size"]) + parse_size(text[1:])


def _export(server: _Server, arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {} if arguments.export is None else {"export": arguments.export}
    exports = server.execute("status", chosen)["exports"]
    if len(exports) != 1:
        raise UsageError("there are several exports: say --export NAME")
    found: dict[str, Any] = exports[0]
    return found


def _only_waits(arguments: argparse.Namespace, server: _Server) -> bool:
    """Whether ``stream --wait`` meets a stream that somebody has started already. With a rate the
    server is asked all the same: it gives the stream that rate."""
    if arguments.command != "stream" or not arguments.wait:
        return False
    if arguments.argument not in (None, "start") or arguments.rate is not None:
        return False
    stream = _export(server, arguments)["stream"]
    return stream is not None and stream["state"] in ("running", "paused")


def _wait(server: _Server, arguments: argparse.Namespace, ui: Ui) -> Any:
    """Follow a stream to its end."""
    with meter(ui, arguments, "stream") as told:
        told.begun = None
        while True:
            ui.signals.check("ctl")  # the stream goes on: only the waiting ends
            stream = _export(server, arguments)["stream"]
            if stream["state"] not in ("running", "paused", "completed"):
                raise Refused(f"stream: {stream['error'] or 'was cancelled'}")
            told(stream["done"], stream["total"])
            if stream["state"] == "completed":
                return stream
            time.sleep(0.2)


def _of_now(server: _Server, arguments: argparse.Namespace, answer: Any) -> Any:
    """A status whose throughput is that of now, not the mean since somebody asked last."""
    if any(export["throughput"]["seconds"] > _RECENT for export in answer["exports"]):
        time.sleep(_LOOK_SECONDS)
        answer = server.execute("status", _arguments(arguments, server))
    return answer


def _show(arguments: argparse.Namespace, answer: Any, ui: Ui) -> None:
    if arguments.output == "json":
        ui.out_json(answer)
    elif arguments.command == "status":
        ui.out("\n".join(line for export in answer["exports"] for line in _lines(export)))
    elif arguments.command == "stream":
        ends = arguments.argument == "cancel" and answer["state"] != "cancelled"
        ui.out(f"stream {'is being cancelled' if ends else answer['state']}: {_percent(answer)}")
    elif arguments.command == "snapshot":
        ui.out(f"frozen: {answer['frozen']}; writes go to {answer['top']}")
    elif arguments.command == "resize":
        ui.out(f"{exact_size(answer['size'])}; {answer['note']}")


def _percent(stream: dict[str, Any]) -> str:
    share = 100 * stream["done"] / max(stream["total"], 1)
    return f"{share:.1f} % of {exact_size(stream['total'])}"


def _lines(export: dict[str, Any]) -> list[str]:
    """An export's status for people."""
    lines = [
        f"export {export['name']!r}: {export['path']}, {exact_size(export['size'])}",
        f"  connections: {export['connections']}   queue: {export['queue']}"
        + ("   read-only" if export["read-only"] else ""),
        f"  clusters: {export['allocated-clusters']} of {export['total-clusters']} in the top",
    ]
    lines += [
        f"  {'chain:' if not n else '      '} {layer}" for n, layer in enumerate(export["chain"])
    ]
    for verb, count in sorted(export["operations"].items()):
        moved = export["bytes"].get(verb, 0)
        lines.append(f"  {verb}: {count}" + (f" ({io_size(moved)})" if moved else ""))
    lines.append("  now: " + _throughput(export["throughput"]))
    if export["errors"]:
        lines.append(f"  errors: {export['errors']}")
    if export["stream"] is not None:
        lines.append(f"  stream: {export['stream']['state']}, {_percent(export['stream'])}")
    return lines + _histogram(export["latency-log2-us"])


def _throughput(rates: dict[str, Any]) -> str:
    """Operations and bytes per second of each verb that was asked for."""
    parts = []
    for verb, count in sorted(rates["operations"].items()):
        moved = rates["bytes"].get(verb, 0) if verb != "block_status" else 0  # moves nothing
        rate = f"{count:.0f}" if count >= 1 else "<1"
        parts.append(f"{verb} {rate}/s" + (f" ({io_size(int(moved))}/s)" if moved else ""))
    return "  ".join(parts) or "idle"


def _histogram(buckets: list[int]) -> list[str]:
    """Latencies as bars, one per power of two."""
    used = [number for number, count in enumerate(buckets) if count]
    if not used:
        return []
    most = max(buckets)
    lines = ["  latency:"]
    for number in range(used[0], used[-1] + 1):
        count = buckets[number]
        bar = "#" * -(-count * _BAR // most)
        lines.append(f"    < {_duration(1 << number):>7} {bar:<{_BAR}} {count}")
    return lines


def _duration(microseconds: int) -> str:
    if microseconds < 1000:
        return f"{microseconds} us"
    if microseconds < 1000000:
        return f"{microseconds / 1000:.3g} ms"
    return f"{microseconds / 1000000:.3g} s"


def _top(server: _Server, arguments: argparse.Namespace, ui: Ui) -> int:
    """Show the status again and again, until stopped."""
    chosen = {} if arguments.export is None else {"export": arguments.export}
    as_json = arguments.output == "json"
    drawn = terminal.is_terminal(sys.stdout) and not as_json
    while not ui.signals.number:
        answer = server.execute("status", chosen)
        if as_json:
            ui.out(json.dumps(answer))
        else:
            text = "\n".join(line for export in answer["exports"] for line in _lines(export))
            # On a terminal over the last one; else an empty line says that this one is complete.
            ui.out("\x1b[H\x1b[J" + text if drawn else text + "\n")
        ui.flush()
        time.sleep(_TOP_SECONDS)
    return exits.OK
