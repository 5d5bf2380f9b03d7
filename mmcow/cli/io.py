# SPDX-License-Identifier: MIT
"""``mmcow io``: qemu-io's commands on a disk.

Owns: the commands, their options, and their reports, in the words that scripts written for
qemu-io look for.
Never: grows a disk by writing past its end, as qemu-io does with raw ones: that is an error.

A command that fails says so on standard error (a pattern that is not there on standard output,
as in qemu-io); the following commands are still run, and the exit status is 1.
"""

from __future__ import annotations

import sys
from getopt import GetoptError, gnu_getopt
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, TextIO

from mmcow.cli import exits, terminal
from mmcow.cli.images import opened
from mmcow.cli.options import (
    Parser,
    add_backing_format,
    add_cache,
    add_format,
    add_share,
    refuse_qemu,
)
from mmcow.cli.sizes import io_size, parse_size
from mmcow.cli.ui import CommandLineError, OutputError
from mmcow.errors import Cancelled, MmcowError, UsageError
from mmcow.formats.driver import Kind
from mmcow.native import aligned

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from mmcow.cli.ui import Ui
    from mmcow.image import Image

# qemu-io's bound on one request: INT_MAX rounded down to sectors.
LENGTH_MOST = 2147483136
DEFAULT_PATTERN = 0xCD
_DUMP_WIDTH = 16


def configure_io(parser: Parser) -> None:
    """Add the verb's options."""
    add_format(parser)
    add_backing_format(parser)
    parser.add_argument(
        "-c", "--cmd", metavar="CMD", action="append", default=[],
        help="run a command; may be given several times. Without it, commands are read from "
        "standard input, one a line",
    )  # fmt: skip
    parser.add_argument("-r", "--read-only", action="store_true", help="open for reading only")
    add_cache(parser)
    parser.add_argument(
        "-n",
        "--nocache",
        dest="cache",
        action="store_const",
        const="none",
        help="short for -t none",
    )
    add_share(parser)
    refuse_qemu(parser)
    parser.add_argument("file", metavar="FILE", help="the image")
    parser.examples(
        "mmcow io -c 'write -P 0xab 0 64k' -c 'read -P 0xab 0 64k' vm.acow",
        "mmcow io -r -c 'read -v 0 512' vm.acow",
        "mmcow io -c help vm.acow",
    )


def run_io(arguments: argparse.Namespace, ui: Ui) -> int:
    """Run commands."""
    with opened(
        ui,
        arguments.file,
        format=arguments.format,
        write=not (arguments.read_only or arguments.share),
        cache=arguments.cache,
        share=arguments.share,
        backing_format=arguments.backing_format,
    ) as image:
        runner = Runner(ui, image)
        for line in arguments.cmd or _lines(ui):
            ui.signals.check("io")
            runner.run(line)
            if runner.ended:
                break
    return exits.FAILED if runner.failed else exits.OK


def _lines(ui: Ui) -> Iterator[str]:
    """Lines of standard input, with a prompt for people."""
    stream: TextIO | None = sys.stdin
    if stream is None:  # the program was started without one: there is nothing to read
        return
    prompt = "mmcow> " if terminal.is_terminal(stream) else ""
    while True:
        with ui.signals.breaking_in("io"):
            if prompt:
                ui.out(prompt, end="")
            ui.flush()
            line = stream.readline()
        if not line:
            return
        yield line


class Command(NamedTuple):
    """A command: its name and short names, its options for getopt, how it is written."""

    names: tuple[str, ...]
    options: str
    operands: tuple[int, int]
    usage: str
    summary: str
    run: Callable[[Runner, dict[str, str], list[str]], None]


class Runner:
    """Commands on one open image."""

    def __init__(self, ui: Ui, image: Image) -> None:
        self.ui = ui
        self.image = image
        self.failed = False
        self.ended = False

    def run(self, line: str) -> None:
        """Run one command line. Its failure is told and remembered."""
        words = line.split()
        if not words:
            return
        try:
            self._run(words)
        except (Cancelled, OutputError):
            raise
        except MmcowError as error:
            self.failed = True
            self.ui.note(self.ui.describe(error))

    def _run(self, words: list[str]) -> None:
        command = find(words[0])
        try:
            pairs, operands = gnu_getopt(words[1:], command.options)
        except GetoptError as error:
            raise CommandLineError(f"{words[0]}: {error.msg}; {command.usage}") from None
        least, most = command.operands
        if not least <= len(operands) <= most:
            raise CommandLineError(f"{words[0]}: {len(operands)} operands; it is: {command.usage}")
        command.run(self, {key[1:]: value for key, value in pairs}, operands)

    def report(self, verb: str, offset: int, length: int, started: float) -> None:
        """qemu-io's two lines about a request that was done."""
        seconds = max(monotonic() - started, 1e-9)
        self.ui.out(f"{verb} {length}/{length} bytes at offset {offset}")
        self.ui.out(
            f"{io_size(length)}, 1 ops; {_seconds(seconds)} "
            f"({io_size(length / seconds)}/sec and {1 / seconds:.4f} ops/sec)"
        )


def find(name: str) -> Command:
    """The command called ``name``."""
    for command in COMMANDS:
        if name in command.names:
            return command
    raise CommandLineError(f"{name}: unknown command; 'help' lists them")


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    if not minutes:
        return f"{rest:05.2f} sec"
    return f"{int(minutes // 60)}:{int(minutes % 60):02}:{rest:05.2f}"


def _range(operands: list[str]) -> tuple[int, int]:
    offset, length = parse_size(operands[0], "offset"), parse_size(operands[1], "length")
    if length > LENGTH_MOST:
        raise CommandLineError(f"length {operands[1]!r}: must not be above {LENGTH_MOST}")
    return offset, length


def _pattern(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFF:
        raise CommandLineError(f"pattern {text!r}: must be a byte, 0 to 255")
    return value


# ---- the commands ----


def _read(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    offset, length = _range(operands)
    expected = _expectation(options, length)
    started = monotonic()
    data = _buffer(runner, offset, length)
    runner.image.readinto(offset, data)
    if expected is not None:
        start, count, pattern = expected
        if bytes(data[start : start + count]) != bytes((pattern,)) * count:
            runner.failed = True
            runner.ui.out(f"Pattern verification failed at offset {offset + start}, {count} bytes")
    if "q" in options:
        return
    if "v" in options:
        for line in dump(data, offset):
            runner.ui.out(line)
    runner.report("read", offset, length, started)


def _expectation(options: dict[str, str], length: int) -> tuple[int, int, int] | None:
    """Which part of what is read must hold which byte: (start, count, byte)."""
    if "P" not in options:
        if "s" in options or "l" in options:
            raise CommandLineError("-s and -l say where to look for the pattern of -P")
        return None
    start = parse_size(options["s"], "-s") if "s" in options else 0
    count = parse_size(options["l"], "-l") if "l" in options else max(length - start, 0)
    if start + count > length or start > length:
        raise CommandLineError(f"the pattern's range {start}+{count} exceeds the {length} bytes")
    return start, count, _pattern(options["P"])


def dump(data: memoryview, offset: int) -> Iterator[str]:
    """Hexadecimal and printable characters, 16 bytes a line, as qemu-io does."""
    for start in range(0, len(data), _DUMP_WIDTH):
        part = bytes(data[start : start + _DUMP_WIDTH])
        shown = "".join(chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else "."
                        for byte in part)  # fmt: skip
        yield f"{offset + start:08x}:  {part.hex(' ')}  {shown}"


def _write(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    if "u" in options and "z" not in options:
        raise CommandLineError("-u says how -z may zero; there is no -z")
    if "z" in options and "P" in options:
        raise CommandLineError("-z writes zeros, -P another byte; use one")
    pattern = _pattern(options["P"]) if "P" in options else DEFAULT_PATTERN
    offset, length = _range(operands)
    started = monotonic()
    if "z" in options:
        runner.image.write_zeroes(offset, length, may_unmap="u" in options)
    else:
        data = _buffer(runner, offset, length)
        data[:] = bytes((pattern,)) * length
        runner.image.write(offset, data)
    if "f" in options:
        runner.image.flush()
    if "q" not in options:
        runner.report("wrote", offset, length, started)


def _buffer(runner: Runner, offset: int, length: int) -> memoryview:
    """Memory for a request, once it is known to lie inside the disk."""
    image = runner.image
    if offset + length > image.size:
        raise UsageError(
            f"{image.path}: {offset}+{length} reaches past the end of the disk ({image.size} bytes)"
        )
    return aligned(length)


def _discard(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    offset, length = _range(operands)
    started = monotonic()
    runner.image.discard(offset, length)
    if "q" not in options:
        runner.report("discard", offset, length, started)


def _flush(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options, operands
    runner.image.flush()


def _runs(runner: Runner, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether the top layer has it), as long as can be."""
    start, size, held = offset, 0, False
    for status in runner.image.block_status(offset, length, layer=0):
        runner.ui.signals.check("io")
        here = status.kind is not Kind.BELOW
        if size and here is not held:
            yield start, size, held
            start, size = status.offset, 0
        held = here
        size += status.length
    if size:
        yield start, size, held


def _map(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options, operands
    for offset, length, held in _runs(runner, 0, runner.image.size):
        word = "    allocated" if held else "not allocated"
        runner.ui.out(
            f"{io_size(length)} ({length:#x}) bytes {word} at offset "
            f"{io_size(offset)} ({offset:#x})"
        )


def _alloc(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options
    offset = parse_size(operands[0], "offset")
    count = parse_size(operands[1], "count") if len(operands) > 1 else 512
    count = max(min(count, runner.image.size - offset), 0)
    held = sum(length for _, length, held in _runs(runner, offset, count) if held)
    runner.ui.out(f"{held}/{count} bytes allocated at offset {io_size(offset)}")


def _length(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options, operands
    runner.ui.out(io_size(runner.image.size))


def _help(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options
    for command in [find(operands[0])] if operands else COMMANDS:
        runner.ui.out(f"{command.usage} -- {command.summary}")
        if operands:
            runner.ui.out(_HELP.get(command.names[0], "").rstrip("\n"))


def _quit(runner: Runner, options: dict[str, str], operands: list[str]) -> None:
    del options, operands
    runner.ended = True


COMMANDS: tuple[Command, ...] = (
    Command(("read", "r"), "qvP:s:l:", (2, 2),
            "read [-qv] [-P BYTE [-s OFF] [-l LEN]] OFFSET LENGTH", "read a range", _read),
    Command(("write", "w"), "fquzP:", (2, 2),
            "write [-fquz] [-P BYTE] OFFSET LENGTH", "write a range", _write),
    Command(("discard", "d"), "q", (2, 2),
            "discard [-q] OFFSET LENGTH", "tell that a range is not needed", _discard),
    Command(("flush", "f"), "", (0, 0), "flush", "make all writes durable", _flush),
    Command(("map",), "", (0, 0), "map", "show what the top layer holds", _map),
    Command(("alloc",), "", (1, 2),
            "alloc OFFSET [COUNT]", "count the bytes that the top layer holds", _alloc),
    Command(("length", "l"), "", (0, 0), "length", "show the size of the disk", _length),
    Command(("help", "?"), "", (0, 1), "help [COMMAND]", "show this, or more of one", _help),
    Command(("quit", "q"), "", (0, 0), "quit", "end", _quit),
)  # fmt: skip

_HELP = {
    "read": """\
  -q       no report
  -v       show the bytes
  -P BYTE  every byte read must be BYTE; the command fails if one is not
  -s OFF   look for the pattern from OFF on (within what is read)
  -l LEN   look for the pattern in LEN bytes only
""",
    "write": """\
  -P BYTE  write BYTE (default 0xcd)
  -z       write zeros, without data where the format can
  -u       with -z: space may be given back
  -f       flush before reporting
  -q       no report
""",
    "discard": """\
  -q       no report
""",
}
