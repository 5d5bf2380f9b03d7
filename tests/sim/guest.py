# SPDX-License-Identifier: MIT
"""Who talks to a simulated server: guests over NBD, and an operator over the control socket.

A ``Guest`` speaks the protocol through the strict client of the unit tests, over a connection in
memory. It asks for whatever the seed says, several requests at a time, and tells the oracle what it
asked and what it was answered. It may stall, leave politely, half-close, or vanish in the middle of
a request; another one comes in its place.

An ``Operator`` gives the live commands: stream, snapshot, resize, flush.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.sim.images import pattern
from tests.sim.loop import Move, SimTransport
from tests.sim.model import Operation, Violation
from tests.sim.workload import SECTOR, _request
from tests.unit import nbd_client as nbd

if TYPE_CHECKING:
    from tests.sim.serving import ServerCase

FAR = 1 << 24  # beyond the end of every disk here
CHANGES = (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM)
CONTEXTS = ("base:allocation", "qemu:allocation-depth")
STATE_ZERO = 2
COMMANDS = ("stream", "stream", "snapshot", "snapshot", "resize", "flush", "status")
NAMES = {
    nbd.READ: "read", nbd.WRITE: "write", nbd.FLUSH: "flush", nbd.TRIM: "trim", nbd.CACHE: "cache",
    nbd.WRITE_ZEROES: "zero", nbd.BLOCK_STATUS: "status",
}  # fmt: skip


@dataclass(slots=True)
class Asked:
    """A request that waits for its answer."""

    command: int
    flags: int
    offset: int
    length: int
    began: int  # the oracle's time
    operation: Operation | None = None  # of a change
    refusal: int = 0  # the error that must come, because the request is wrong
    ends: int = 0  # how many bytes the client has sent up to its end

    def __str__(self) -> str:
        flags = f" flags {self.flags:#x}" if self.flags else ""
        return f"{NAMES.get(self.command, self.command)} {self.offset}+{self.length}{flags}"


class Guest(nbd.Client):
    """One client from connect to its end."""

    def __init__(self, case: ServerCase, number: int) -> None:  # no socket: nothing of the base
        rng = case.rng
        self.case = case
        self.name = f"guest {number}"
        self.outgoing = bytearray()
        self.finished = self.vanished = self.over = False
        self.prompt = rng.random() < 0.5
        self.reading = True
        self.size = self.flags = 0
        self.sizes = [case.model.size, *case.model.sizes]  # that it may be told,
        self.growths = len(case.grown)  # or one that was asked for since
        self.structured = rng.random() < 0.8
        self.contexts: dict[int, str] = {}
        self.sent: dict[int, nbd.Sent] = {}
        self.asked: dict[int, Asked] = {}
        self.up = False
        self._partial: dict[int, nbd.Reply] = {}
        self._cookie = rng.getrandbits(64)
        self._incoming = bytearray()
        self._sent_bytes = 0
        self._depth = rng.choice((1, 3, 3, 8, 16))
        self._stalls = rng.random() < 0.3
        self._hello = self._negotiate(with_contexts=self.structured and rng.random() < 0.8)
        self._need = next(self._hello)
        self.transport: SimTransport = case.loop.connect("nbd", self)

    # ---- the client's end of the connection ----

    def send(self, data: bytes) -> None:
        self.outgoing += data
        self._sent_bytes += len(data)

    def receive(self, length: int) -> bytes:
        assert length <= len(self._incoming)
        data = bytes(self._incoming[:length])
        del self._incoming[:length]
        return data

    def received(self, data: bytes) -> None:
        """Bytes came from the server."""
        if self.case.over:
            return
        self._incoming += data
        try:
            self._understand()
        except Exception as error:  # noqa: BLE001 - told by the run, not by the server
            self.case.wrong(error, self)

    def ended(self) -> None:
        """The server has closed."""
        if self.case.over:
            return
        missing = [str(asked) for asked in self.asked.values() if asked.ends <= self._arrived]
        polite = not self.case.closing
        self.gone()
        if missing and polite:
            error = Violation(f"closed by the server, not answered: {'; '.join(missing)}")
            self.case.wrong(error, self)
        elif polite and not self.finished:
            self.case.wrong(Violation("closed by the server, for no reason"), self)

    @property
    def _arrived(self) -> int:
        return self._sent_bytes - len(self.outgoing)

    def gone(self) -> None:
        """The connection is no more: what was not answered may have been done or not."""
        self.over = True
        self.up = False
        self.case.left(self)

    # ---- negotiation ----

    def _negotiate(self, *, with_contexts: bool) -> Generator[int, bytes, None]:
        """Yields how many bytes it needs next."""
        magic, option_magic, offered = struct.unpack(">8s8sH", (yield 18))
        assert (magic, option_magic, offered) == (b"NBDMAGIC", nbd.IHAVEOPT, 3)
        self.send(struct.pack(">I", 3))
        if self.structured:
            yield from self._option(nbd.STRUCTURED_REPLY, b"")
        if with_contexts:
            data = nbd.string("") + struct.pack(">I", len(CONTEXTS))
            data += b"".join(nbd.string(query) for query in CONTEXTS)
            for given in (yield from self._option(nbd.SET_META_CONTEXT, data)):
                self.contexts[struct.unpack(">I", given[:4])[0]] = given[4:].decode()
            assert sorted(self.contexts.values()) == sorted(CONTEXTS)
        for info in (yield from self._option(nbd.GO, nbd.string("") + struct.pack(">H", 0))):
            if info[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", info[2:])
        assert self.flags & (1 << 8), "multi-conn is not offered"

    def _option(self, option: int, data: bytes) -> Generator[int, bytes, list[bytes]]:
        self.send_option(option, data)
        found = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", (yield 20))
            assert magic == 0x3E889045565A9 and echoed == option
            data = (yield length) if length else b""
            if kind == nbd.ACK:
                return found
            if kind == nbd.ERR_SHUTDOWN and self.case.closing:
                self.send_option(nbd.ABORT)
                self.finished = True
                while True:
                    yield 1 << 30  # nothing that comes now is of interest
            assert not kind & 0x80000000, f"option {option} refused: {data!r}"
            found.append(data)

    def _understand(self) -> None:
        while not self.up:
            if len(self._incoming) < self._need or self.over:
                return
            try:
                self._need = self._hello.send(self.receive(self._need))
            except StopIteration:
                self.up = True
                self.case.attached(self)
        while self._whole_message():
            magic = struct.unpack(">I", self.receive(4))[0]
            if magic == 0x67446698:
                cookie, reply = self._simple()
            else:
                cookie, reply, done = self._chunk()
                if not done:
                    continue
            self._check(self.sent.pop(cookie), reply)
            self._answered(self.asked.pop(cookie), reply)

    def _whole_message(self) -> bool:
        have = len(self._incoming)
        if have < 16:
            return False
        (magic,) = struct.unpack_from(">I", self._incoming)
        if magic == 0x67446698:
            error, cookie = struct.unpack_from(">IQ", self._incoming, 4)
            need = 16
        else:
            assert magic == 0x668E33EF, f"no reply begins with {magic:#x}"
            if have < 20:
                return False
            cookie, length = struct.unpack_from(">QI", self._incoming, 8)
            need, error = 20 + length, 0
        if cookie not in self.sent:
            raise Violation(f"an answer to cookie {cookie:#x}, which nobody asked")
        if magic == 0x67446698 and self.sent[cookie].command == nbd.READ and not error:
            need += self.sent[cookie].length
        return have >= need

    # ---- what it may do now ----

    def moves(self) -> list[Move]:
        """Its next steps."""
        if self.over:
            return []
        case = self.case
        moves: list[Move] = []
        if self._stalls:
            moves.append((0.3 if self.reading else 0.6, self._turn_away))
        if self.finished:
            return moves
        if self.up and case.budget and len(self.asked) < self._depth:
            moves.append((2.5, self._ask))
        if case.budget:
            moves += [(0.015, self._vanish), (0.01, self._half_close), (0.01, self._leave)]
        elif self.up and not self.asked and case.rng.random() < 0.3:
            moves.append((0.3, self._leave))
        return moves

    def _turn_away(self) -> None:
        self.reading = not self.reading

    def _cut_off(self) -> None:
        """Some of what was sent never leaves."""
        if self.case.rng.random() < 0.7:
            del self.outgoing[self.case.rng.randrange(len(self.outgoing) + 1) :]

    def _vanish(self) -> None:
        if self.over:
            return
        self._cut_off()
        self.finished = self.case.rng.random() < 0.5  # closed; else reset
        self.vanished = True
        self.gone()

    def _half_close(self) -> None:
        """Send no more, and read what is answered."""
        before = len(self.outgoing)
        self._cut_off()
        self._sent_bytes -= before - len(self.outgoing)
        self.finished = True

    def _leave(self) -> None:
        if not self.finished and self.up:
            self.start(nbd.DISC)
            self.finished = True

    # ---- asking ----

    def _ask(self) -> None:
        """One request, whichever the seed says."""
        rng = self.case.rng
        if self.over or self.finished or not self.case.budget:
            return
        self.case.budget -= 1
        roll = rng.random()
        if roll < 0.36:
            self._change(nbd.WRITE)
        elif roll < 0.58:
            self._read()
        elif roll < 0.70:
            self._request(nbd.FLUSH, 0, 0, began=self.case.model.begin_flush())
        elif roll < 0.79:
            self._change(nbd.WRITE_ZEROES)
        elif roll < 0.86:
            self._change(nbd.TRIM)
        elif roll < 0.92:
            self._status()
        elif roll < 0.94:
            offset, length = self._range()
            self._request(nbd.CACHE, offset, length)
        else:
            self._ask_wrong()

    def _range(self) -> tuple[int, int]:
        """Within the disk, as far as this client knows it; sometimes at odd bytes."""
        case, rng = self.case, self.case.rng
        size = min(self.size, case.model.size)
        _, offset, length = _request(rng, case.shape, size, SECTOR)
        if rng.random() < 0.2:
            offset = rng.randrange(size)
            length = rng.randint(1, min(size - offset, rng.choice((100, SECTOR, 5000))))
        return offset, length

    def _change(self, command: int) -> None:
        case, rng = self.case, self.case.rng
        offset, length = self._range()
        if not case.may_change(offset, length):
            # The oracle wants partly written sectors alone; other ranges are free.
            offset, length = offset // SECTOR * SECTOR, SECTOR
            if offset + length > self.size or not case.may_change(offset, length):
                return
        flags, data = 0, b""
        if rng.random() < 0.25:
            flags |= nbd.FUA
        if command == nbd.WRITE_ZEROES:
            flags |= rng.choice((0, 0, nbd.NO_HOLE)) | rng.choice((0, 0, 0, nbd.FAST_ZERO))
        model = case.model
        if command == nbd.WRITE:
            case.writes += 1
            skip = offset % SECTOR
            data = pattern(f"w{case.writes}", skip + length, offset // SECTOR)[skip:]
            operation = model.begin_write(offset, data)
        else:
            operation = model.begin_zero(offset, length)
        asked = self._request(command, offset, length, flags=flags, data=data)
        asked.operation = operation
        case.begun(asked)

    def _read(self) -> None:
        offset, length = self._range()
        rng = self.case.rng
        flags = nbd.DF if self.structured and rng.random() < 0.2 else 0
        began = self.case.model.begin_read()
        self._request(nbd.READ, offset, length, flags=flags, began=began)

    def _status(self) -> None:
        offset, length = self._range()
        flags = nbd.REQ_ONE if self.case.rng.random() < 0.3 else 0
        if self.contexts:
            began = self.case.model.begin_read()
            self._request(nbd.BLOCK_STATUS, offset, length, flags=flags, began=began)
        else:
            self._request(nbd.BLOCK_STATUS, offset, length, flags=flags, refusal=22)

    def _ask_wrong(self) -> None:
        """What must be refused, and must not change anything."""
        rng = self.case.rng
        far = FAR + rng.randrange(5000)
        roll = rng.randrange(7)
        if roll == 0:
            self._request(nbd.READ, far, 512, refusal=22)
        elif roll == 1:
            self._request(nbd.WRITE, far, 700, data=b"x" * 700, refusal=28)
        elif roll == 2:
            self._request(nbd.TRIM, far, 512, refusal=22)
        elif roll == 3:
            self._request(nbd.WRITE_ZEROES, 0, far, refusal=28)
        elif roll == 4:
            self._request(nbd.FLUSH, 512, 512, refusal=22)
        elif roll == 5:
            self._request(nbd.WRITE, 0, 512, data=b"x" * 512, flags=1 << 9, refusal=22)
        else:
            self._request(77, 0, 0, refusal=22)

    def _request(
        self, command: int, offset: int, length: int, *, flags: int = 0, data: bytes = b"",
        began: int = 0, refusal: int = 0,
    ) -> Asked:  # fmt: skip
        cookie = self.start(command, offset, length, flags=flags, data=data)
        asked = Asked(
            command, flags, offset, length, began or self.case.model.now, None, refusal,
            self._sent_bytes,
        )  # fmt: skip
        self.asked[cookie] = asked
        self.case.say(f"{self.name}: {asked}")
        return asked

    # ---- answers ----

    def _answered(self, asked: Asked, reply: nbd.Reply) -> None:
        case, model = self.case, self.case.model
        case.replies += 1
        case.say(f"{self.name}: {asked} -> {reply.error or 'ok'}")
        if case.closing and reply.error == 108:  # the server is being shut down
            case.unanswered(asked)
        elif asked.refusal:
            if reply.error != asked.refusal:
                raise Violation(f"{asked}: error {reply.error}, must be {asked.refusal}")
        elif reply.error:
            case.unanswered(asked)
            if reply.error != 95:  # FAST_ZERO that would not be fast; the client has checked that
                case.answered_error(asked, reply.error)
        elif asked.operation is not None:
            case.answered_change(asked)
        elif asked.command == nbd.FLUSH:
            case.answered_sync(asked)
            model.flushed(asked.began)
        elif asked.command == nbd.READ:
            assert reply.data is not None
            model.end_read(asked.began)
            model.check_read(asked.offset, bytes(reply.data), asked.began)
        elif asked.command == nbd.BLOCK_STATUS:
            model.end_read(asked.began)
            self._check_status(asked, reply)

    def _check_status(self, asked: Asked, reply: nbd.Reply) -> None:
        """What is told to be a hole, or to be nowhere in the chain, may read as zeros."""
        for number, extents in reply.status.items():
            at = asked.offset
            for length, flags in extents:
                zero = flags & STATE_ZERO if self.contexts[number] == CONTEXTS[0] else flags == 0
                if zero:
                    self.case.model.check_read(at, bytes(length), asked.began)
                at += length


class Operator:
    """Somebody at the control socket: one command after another."""

    prompt = True
    reading = True
    vanished = False
    finished = False

    def __init__(self, case: ServerCase) -> None:
        self.case = case
        self.outgoing = bytearray()
        self._incoming = bytearray()
        self._waits: tuple[str, dict[str, Any]] | None = ("greeting", {})
        self.streaming: str | None = None  # "stream", once one was begun
        self._began = 0
        self._commands = 0
        case.loop.connect("control", self)

    @property
    def doing(self) -> str | None:
        """The command whose answer is to come."""
        return None if self._waits is None else self._waits[0]

    def moves(self) -> list[Move]:
        """It may give a command."""
        if self.doing or not self.case.commands or not self.case.budget:
            return []
        return [(0.12, self._command)]

    def _command(self) -> None:
        case, rng = self.case, self.case.rng
        if self.doing or not case.commands:
            return
        case.commands -= 1
        name = rng.choice(COMMANDS if case.strike_in != "pivot" else ("snapshot",))
        arguments: dict[str, Any] = {}
        if name == "stream":
            arguments["action"] = rng.choice(
                ("start", "start", "start", "pause", "resume", "cancel")
            )
            if rng.random() < 0.3:
                arguments["rate"] = rng.choice((0, 4096, 1 << 20))
        elif name == "snapshot":
            case.snapshots += 1
            arguments["name"] = case.new_name()
        elif name == "resize":
            if case.resizing:
                return
            case.resizing = True
            size = case.model.size + rng.choice((1, 3, 8, 9)) * SECTOR
            arguments["size"] = size
            case.grown.append(size)
            case.model.begin_resize(size)
        elif name == "flush":
            self._began = case.model.begin_flush()
        self._waits = name, arguments
        self._commands += 1
        message = {"execute": name, "arguments": arguments, "id": self._commands}
        case.say(f"operator: {json.dumps(message)}")
        self.outgoing += json.dumps(message).encode() + b"\n"

    def received(self, data: bytes) -> None:
        """Bytes came from the server."""
        if self.case.over:
            return
        self._incoming += data
        while b"\n" in self._incoming:
            line, _, rest = self._incoming.partition(b"\n")
            self._incoming = bytearray(rest)
            try:
                self._answered(json.loads(line))
            except Exception as error:  # noqa: BLE001 - as above
                self.case.wrong(error, self)

    def ended(self) -> None:
        """The server has closed."""
        if not self.case.over and not self.case.closing:
            self.case.wrong(Violation("the control socket was closed for no reason"), self)

    def _answered(self, message: dict[str, Any]) -> None:
        assert self._waits is not None, f"an answer to nothing: {message}"
        (name, arguments), self._waits = self._waits, None
        if name == "greeting":
            assert "mmcow" in message
            return
        case = self.case
        case.say(f"operator: {name} -> {json.dumps(message)[:300]}")
        assert message["id"] == self._commands
        error = message.get("error")
        if error is not None:
            case.command_failed(name, arguments, error)
        elif name == "resize":
            case.model.resized(arguments["size"])
        elif name == "flush":
            case.model.flushed(self._began)
        elif name == "stream":
            self.streaming = name
        elif name == "snapshot":
            case.frozen_names.append(arguments["name"])
        if name == "resize":
            case.resizing = False
