# SPDX-License-Identifier: MIT
"""An NBD client for tests, written from the protocol's text and sharing nothing with the server.

Blocking sockets, strict: whatever the protocol forbids a server is an AssertionError here. Every
layer can be used by itself: raw bytes, options, requests and replies by cookie, whole operations.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import Self

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << n for n in range(5))
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = 8, 9, 10
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID = 0x80000001, 0x80000002, 0x80000003
ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = 0x80000005, 0x80000006, 0x80000007
ERR_TOO_BIG = 0x80000009
IHAVEOPT = b"IHAVEOPT"


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number} {text}")
        self.number = number
        self.text = text


@dataclass
class Sent:
    """A request that waits for its reply."""

    command: int
    flags: int
    offset: int
    length: int


@dataclass
class Reply:
    """All that came for one request."""

    error: int = 0
    text: str = ""
    data: bytearray | None = None
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    kinds: list[int] = field(default_factory=list)  # of chunks; empty: a simple reply
    covered: list[tuple[int, int]] = field(default_factory=list)


class Client:
    """One connection. ``greet=False``: nothing is sent or received yet."""

    def __init__(
        self, path: str, *, flags: int = 3, greet: bool = True, timeout: float = 15
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.connect(path)  # waits where many others do
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(timeout)
        self.size = 0
        self.flags = 0
        self.structured = False
        self.contexts: dict[int, str] = {}
        self.sent: dict[int, Sent] = {}
        self._partial: dict[int, Reply] = {}
        self._cookie = 0
        self._no_zeroes = bool(flags & 2)
        if greet:
            self.greet(flags)

    # ---- bytes ----

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        parts = []
        while length:
            part = self.socket.recv(min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def at_end(self) -> bool:
        """Whether the server has closed, with nothing left to read."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- options ----

    def greet(self, flags: int = 3) -> None:
        magic, option_magic, offered = struct.unpack(">8s8sH", self.receive(18))
        assert (magic, option_magic, offered) == (b"NBDMAGIC", IHAVEOPT, 3)
        self.send(struct.pack(">I", flags))

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.send(struct.pack(">8sII", IHAVEOPT, option, len(data)) + data)

    def receive_option_reply(self, option: int) -> tuple[int, bytes]:
        magic, echoed, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        assert echoed == option
        data = self.receive(length)
        if kind == ACK:
            assert data == b""
        if kind & 0x80000000:
            assert len(data.decode()) <= len(data) <= 4096
            assert b"\0" not in data
        return kind, data

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies to an option; the last is ACK or an error."""
        self.send_option(option, data)
        replies = [self.receive_option_reply(option)]
        while replies[-1][0] != ACK and not replies[-1][0] & 0x80000000:
            replies.append(self.receive_option_reply(option))
        return replies

    def negotiate_structured(self) -> None:
        assert self.option(STRUCTURED_REPLY) == [(ACK, b"")]
        self.structured = True

    def meta(self, option: int, export: str, *queries: str) -> list[tuple[int, bytes]]:
        data = string(export) + struct.pack(">I", len(queries))
        return self.option(option, data + b"".join(string(query) for query in queries))

    def set_contexts(self, export: str, *queries: str) -> None:
        replies = self.meta(SET_META_CONTEXT, export, *queries)
        assert replies.pop() == (ACK, b"")
        assert all(kind == META_CONTEXT for kind, _ in replies)
        self.contexts = {struct.unpack(">I", d[:4])[0]: d[4:].decode() for _, d in replies}
        assert len(self.contexts) == len(replies)  # each has its own number

    def info(self, option: int, export: str, *wanted: int) -> dict[int, bytes]:
        """What INFO or GO tells, by the number of the information."""
        data = string(export) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
        replies = self.option(option, data)
        kind, text = replies.pop()
        if kind != ACK:
            raise NbdError(kind, text.decode())
        found = {struct.unpack(">H", d[:2])[0]: d[2:] for _, d in replies}
        self.size, self.flags = struct.unpack(">QH", found[0])
        return found

    def go(self, export: str = "") -> None:
        self.info(GO, export)

    def export_name(self, export: str = "") -> None:
        self.send_option(EXPORT_NAME, export.encode())
        self.size, self.flags = struct.unpack(">QH", self.receive(10))
        if not self._no_zeroes:
            assert self.receive(124) == bytes(124)

    # ---- requests ----

    def start(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> int:
        """Send a request; returns its cookie."""
        self._cookie = (self._cookie + 0x9E3779B97F4A7C15) % (1 << 64)
        header = request(command, self._cookie, offset, length or len(data), flags)
        self.sent[self._cookie] = Sent(command, flags, offset, length or len(data))
        self.send(header + data)
        return self._cookie

    def next_reply(self) -> tuple[int, Reply]:
        """The next complete reply, whichever request it belongs to."""
        while True:
            magic = struct.unpack(">I", self.receive(4))[0]
            if magic == 0x67446698:
                cookie, reply = self._simple()
            else:
                assert magic == 0x668E33EF, hex(magic)
                cookie, reply, done = self._chunk()
                if not done:
                    continue
            sent = self.sent.pop(cookie)
            self._check(sent, reply)
            return cookie, reply

    def _simple(self) -> tuple[int, Reply]:
        error, cookie = struct.unpack(">IQ", self.receive(12))
        sent = self.sent[cookie]
        assert not (self.structured and sent.command == READ)
        reply = Reply(error)
        if sent.command == READ and not error:
            reply.data = bytearray(self.receive(sent.length))
            reply.covered.append((sent.offset, sent.offset + sent.length))
        return cookie, reply

    def _chunk(self) -> tuple[int, Reply, bool]:
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        assert self.structured
        assert flags in (0, 1)
        sent = self.sent[cookie]
        reply = self._partial.setdefault(cookie, Reply())
        reply.kinds.append(kind)
        if kind == 0:
            assert length == 0 and flags == 1
        elif kind == 1:
            assert length >= 9 and sent.command == READ
            (offset,) = struct.unpack(">Q", self.receive(8))
            self._content(sent, reply, offset, self.receive(length - 8))
        elif kind == 2:
            assert length == 12 and sent.command == READ
            offset, hole = struct.unpack(">QI", self.receive(12))
            assert hole
            self._content(sent, reply, offset, bytes(hole))
        elif kind == 5:
            assert sent.command == BLOCK_STATUS and length % 8 == 4 and length > 4
            (context,) = struct.unpack(">I", self.receive(4))
            assert context in self.contexts and context not in reply.status
            extents = list(struct.iter_unpack(">II", self.receive(length - 4)))
            assert all(size for size, _ in extents)
            assert len(extents) == 1 or not sent.flags & REQ_ONE
            assert sum(size for size, _ in extents) <= sent.length
            reply.status[context] = extents
        else:
            assert kind == 0x8001, kind
            error, size = struct.unpack(">IH", self.receive(6))
            assert error and size == length - 6 <= 4096 and not reply.error
            reply.error, reply.text = error, self.receive(size).decode()
        if flags:
            del self._partial[cookie]
        return cookie, reply, bool(flags)

    @staticmethod
    def _content(sent: Sent, reply: Reply, offset: int, data: bytes) -> None:
        end = offset + len(data)
        assert sent.offset <= offset and end <= sent.offset + sent.length
        assert all(end <= first or offset >= last for first, last in reply.covered)
        assert not reply.covered or not sent.flags & DF
        reply.covered.append((offset, end))
        if reply.data is None:
            reply.data = bytearray(sent.length)
        reply.data[offset - sent.offset : end - sent.offset] = data

    def _check(self, sent: Sent, reply: Reply) -> None:
        assert reply.error in (0, 1, 5, 12, 22, 28, 75, 95, 108)
        if reply.error == 75:
            assert sent.command == READ and sent.flags & DF
        if reply.error == 95:
            assert sent.command == WRITE_ZEROES and sent.flags & FAST_ZERO
        if sent.command == READ and not reply.error:
            assert sum(end - start for start, end in reply.covered) == sent.length
            reply.data = reply.data if reply.data is not None else bytearray()
        if sent.command == BLOCK_STATUS and not reply.error:
            assert set(reply.status) == set(self.contexts)

    # ---- whole operations ----

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b""
    ) -> Reply:
        """One request and its reply; NbdError where it failed."""
        cookie = self.start(command, offset, length, flags=flags, data=data)
        got, reply = self.next_reply()
        assert got == cookie
        if reply.error:
            raise NbdError(reply.error, reply.text)
        return reply

    def error_of(self, *request: int, flags: int = 0, data: bytes = b"") -> int:
        """The error number of one request, 0 if it succeeds."""
        try:
            self.ask(*request, flags=flags, data=data)
        except NbdError as error:
            return error.number
        return 0

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        data = self.ask(READ, offset, length, flags=flags).data
        assert data is not None
        return bytes(data)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.ask(WRITE, offset, data=data, flags=flags)

    def flush(self) -> None:
        self.ask(FLUSH)

    def disconnect(self) -> None:
        """Leave as the protocol wants it; the server closes."""
        self.start(DISC)
        assert self.at_end()
        self.close()


def string(text: str) -> bytes:
    """A length-prefixed string of an option."""
    encoded = text.encode()
    return struct.pack(">I", len(encoded)) + encoded


def request(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """The 28 bytes that begin a request."""
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def connect(
    path: str, export: str = "", *, structured: bool = True, contexts: bool = True
) -> Client:
    """A client in the transmission phase."""
    client = Client(path)
    if structured:
        client.negotiate_structured()
        if contexts:
            client.set_contexts(export, "base:allocation", "qemu:allocation-depth")
    client.go(export)
    return client
