# SPDX-License-Identifier: MIT
"""One client: bytes in, requests to the engine, replies out, in any order.

Owns: the connection's two phases, buffers, back-pressure, the end.
Never: blocks the loop; interprets the negotiation (``handshake``); trusts a length before it is
checked.

Bounds, so that no client can exhaust the server: a client that has ``REQUESTS_MOST`` requests or
``BYTES_MOST`` bytes in flight, or does not read its replies, is not read from; one that does not
finish the negotiation in ``HANDSHAKE_SECONDS`` is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mmcow.errors import MmcowError
from mmcow.native import aligned
from mmcow.nbd import protocol as wire
from mmcow.nbd.handshake import Handshake, Step

if TYPE_CHECKING:
    from mmcow.nbd.export import Export
    from mmcow.nbd.server import Server
    from mmcow.tasks import Completion

log = logging.getLogger("mmcow.nbd")

HANDSHAKE_SECONDS = 30.0
REQUESTS_MOST = 128
BYTES_MOST = 64 << 20
RECEIVE = 64 << 10
# Room before a payload for the reply's head, so that both leave in one send without a copy, while
# the payload stays aligned for direct I/O.
HEAD_ROOM = 4096

_READ_HEAD = struct.Struct(">IHHQIQ")  # chunk head and the offset of OFFSET_DATA
_CHANGES = frozenset((wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES))
_VERBS = {
    wire.CMD_READ: "read",
    wire.CMD_WRITE: "write",
    wire.CMD_FLUSH: "flush",
    wire.CMD_TRIM: "trim",
    wire.CMD_CACHE: "cache",
    wire.CMD_WRITE_ZEROES: "write_zeroes",
    wire.CMD_BLOCK_STATUS: "block_status",
}


class Connection(asyncio.BufferedProtocol):
    """A client from connect to disconnect."""

    def __init__(self, server: Server) -> None:
        self.export: Export | None = None
        self._server = server
        self._loop = server.loop
        self._transport: Any = None
        self._handshake: Handshake | None = Handshake(
            server.exports, tls_required=server.tls is not None
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._structured = False
        self._contexts: list[tuple[int, str]] = []
        self._receive = memoryview(bytearray(RECEIVE))
        self._have = 0  # bytes of an incomplete request at the start of _receive
        self._request: wire.Request | None = None  # a WRITE whose payload is coming
        self._payload = memoryview(b"")
        self._filled = 0
        self._requests = 0
        self._bytes = 0
        self._held: set[str] = set()  # why the client is not read from
        self._leaving = False
        self._gone = False

    # ---- asyncio's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected, or TLS is up on this connection."""
        self._transport = transport
        if self._deadline is not None:
            return
        self._deadline = self._loop.call_later(HANDSHAKE_SECONDS, self._too_slow)
        self._server.joined(self)
        self._send_handshake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone. Its requests in flight run to their end, unanswered."""
        self._gone = True
        self._end_handshake()
        self._request = None
        self._payload = memoryview(b"")
        self._server.left(self)

    def eof_received(self) -> bool:
        """The client sends no more: finish what it asked for, then close."""
        self._leave()
        return True

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self._hold("replies")

    def resume_writing(self) -> None:
        """It does again."""
        self._release("replies")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: straight into the payload of a write, if one is coming."""
        if self._request is not None:
            return self._payload[self._filled :]
        return self._receive[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        try:
            if self._request is not None:
                self._filled += nbytes
                self._finish_payload()
            elif self._handshake is not None:
                self._negotiate(self._handshake, self._receive[:nbytes])
            else:
                self._parse(self._have + nbytes)
        except wire.ProtocolError as error:
            log.warning("client dropped: %s", error)
            self._transport.abort()
        if self.export is not None:
            self.export.image.reactor.poll()  # hand what was begun to the kernel, as one batch

    # ---- negotiation ----

    def _negotiate(self, handshake: Handshake, data: memoryview) -> None:
        step = handshake.feed(data)
        self._send_handshake()
        if step is Step.CLOSE:
            self._end_handshake()
            self._transport.close()
        elif step is Step.TLS:
            self._hold("tls")
            self._server.background(self._start_tls(handshake))
        elif step is Step.TRANSMIT:
            self._transmit(handshake)

    def _send_handshake(self) -> None:
        if self._handshake is not None:
            out = self._handshake.take_output()
            if out:
                self._transport.write(out)

    async def _start_tls(self, handshake: Handshake) -> None:
        handshake.encrypted()
        try:
            await self._loop.start_tls(
                self._transport, self, self._server.tls, server_side=True,  # type: ignore[arg-type]
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
            )  # fmt: skip
        except (TimeoutError, OSError) as error:  # ssl.SSLError is an OSError
            log.warning("client dropped: TLS: %s", error)
            self._transport.abort()
            return
        self._release("tls")

    def _transmit(self, handshake: Handshake) -> None:
        export = handshake.export
        assert export is not None
        self._end_handshake()
        self.export = export
        self._structured = handshake.structured
        self._contexts = handshake.contexts
        export.connections += 1
        log.info("client attached to export %r", export.name)
        rest = handshake.rest()
        if rest:  # never more than was received at once: it fits
            self._receive[: len(rest)] = rest
            self._parse(len(rest))

    def _end_handshake(self) -> None:
        self._handshake = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _too_slow(self) -> None:
        if self._handshake is not None and not self._gone:
            log.warning("client dropped: negotiation not finished in %g s", HANDSHAKE_SECONDS)
            self._transport.abort()

    # ---- requests ----

    def _parse(self, have: int) -> None:
        """Take every complete request out of the first ``have`` bytes received."""
        at = 0
        size = wire.REQUEST.size
        while have - at >= size and not self._leaving:
            request = wire.parse_request(self._receive[at : at + size])
            at += size
            if request.command == wire.CMD_WRITE:
                at += self._begin_payload(request, self._receive[at:have])
                if self._request is not None:
                    break
            else:
                self._start(request)
        self._have = have - at if self._request is None else 0
        if self._have and at:
            self._receive[: self._have] = bytes(self._receive[at:have])

    def _begin_payload(self, request: wire.Request, data: memoryview) -> int:
        """Take what is there of a write's payload; returns how much."""
        if request.length > wire.PAYLOAD_MOST:
            raise wire.ProtocolError(f"write of {request.length} bytes")
        self._payload = aligned(request.length)
        self._filled = min(request.length, len(data))
        self._payload[: self._filled] = data[: self._filled]
        self._request = request
        taken = self._filled
        self._finish_payload()
        return taken

    def _finish_payload(self) -> None:
        request = self._request
        if request is not None and self._filled == request.length:
            payload, self._payload, self._request = self._payload, memoryview(b""), None
            self._start(request, payload)

    def _start(self, request: wire.Request, payload: memoryview | None = None) -> None:
        """Hand one request to the engine; its completion sends the reply."""
        if request.command == wire.CMD_DISC:
            self._leave()
            return
        export = self.export
        assert export is not None
        problem = self._refusal(export, request)
        if problem is not None:
            self._send_error(request, *problem)
            return
        if request.command == wire.CMD_BLOCK_STATUS:
            self._send_block_status(export, request)
            return
        began = time.monotonic()
        buffer = payload
        if request.command == wire.CMD_READ:
            if self._structured and self._send_hole(export, request):
                return
            buffer = aligned(HEAD_ROOM + request.length)
        self._enter(request.length)
        try:
            with export.image.reactor.lock:
                completion = self._begin(export, request, buffer)
        except MmcowError as error:
            self._leave_request(request.length)
            self._send_error(request, wire.error_of(error), str(error))
            return
        completion.on_done(partial(self._finish, request, buffer, began))

    def _refusal(self, export: Export, request: wire.Request) -> tuple[int, str] | None:
        """Why a request cannot even be begun."""
        flags, offset, length = request.flags, request.offset, request.length
        command = request.command
        known = wire.KNOWN_FLAGS.get(command)
        changes = command in _CHANGES
        error, text = wire.EINVAL, ""
        if known is None:
            text = f"unknown command {command}"
        elif flags & ~known or (flags & wire.CMD_FLAG_DF and not self._structured):
            text = f"flags {flags:#x} do not go with command {command}"
        elif command == wire.CMD_FLUSH and (offset or length):
            text = "flush takes no range"
        elif changes and export.read_only:
            error, text = wire.EPERM, "the export is read-only"
        elif offset + length > export.size:
            error = wire.ENOSPC if changes else wire.EINVAL
            text = f"{offset}+{length} is beyond {export.size}"
        elif command == wire.CMD_READ and length > wire.PAYLOAD_MOST:
            error, text = wire.EOVERFLOW, f"read of {length} bytes"
        elif command == wire.CMD_BLOCK_STATUS and not (self._contexts and length):
            text = "no metadata context was agreed, or the range is empty"
        return (error, text) if text else None

    @staticmethod
    def _begin(export: Export, request: wire.Request, buffer: memoryview | None) -> Completion[Any]:
        offset, length, flags = request.offset, request.length, request.flags
        durable = bool(flags & wire.CMD_FLAG_FUA)
        if request.command == wire.CMD_READ:
            assert buffer is not None
            return export.read(offset, buffer[HEAD_ROOM:])
        if request.command == wire.CMD_WRITE:
            assert buffer is not None
            return export.write(offset, buffer, durable=durable)
        if request.command == wire.CMD_FLUSH:
            return export.flush()
        if request.command == wire.CMD_TRIM:
            return export.trim(offset, length, durable=durable)
        if request.command == wire.CMD_WRITE_ZEROES:
            return export.write_zeroes(
                offset,
                length,
                may_unmap=not flags & wire.CMD_FLAG_NO_HOLE,
                fast=bool(flags & wire.CMD_FLAG_FAST_ZERO),
                durable=durable,
            )
        return export.cache()

    # ---- replies ----

    def _finish(
        self,
        request: wire.Request,
        buffer: memoryview | None,
        began: float,
        completion: Completion[Any],
    ) -> None:
        export = self.export
        assert export is not None
        self._leave_request(request.length)
        error = completion.error
        if error is not None:
            export.counters.errors += 1
            log.error("export %r: %s", export.name, error)
            self._send_error(request, wire.error_of(error), str(error))
            return
        verb = _VERBS[request.command]
        export.counters.count(verb, request.length, time.monotonic() - began)
        if request.command == wire.CMD_READ:
            assert buffer is not None
            self._send(self._data_reply(request, buffer))
        else:
            self._send(self._done_reply(request.cookie))

    def _data_reply(self, request: wire.Request, buffer: memoryview) -> memoryview | bytes:
        if not self._structured:
            head = wire.simple_reply(request.cookie, 0)
        elif request.length == 0:
            return self._done_reply(request.cookie)  # a chunk of data must not be empty
        else:
            head = _READ_HEAD.pack(
                wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.REPLY_TYPE_OFFSET_DATA,
                request.cookie, 8 + request.length, request.offset,
            )  # fmt: skip
        start = HEAD_ROOM - len(head)
        buffer[start:HEAD_ROOM] = head
        return buffer[start:]

    def _done_reply(self, cookie: int) -> bytes:
        if self._structured:
            return wire.chunk(cookie, wire.REPLY_TYPE_NONE, 0)
        return wire.simple_reply(cookie, 0)

    def _send_hole(self, export: Export, request: wire.Request) -> bool:
        """Answer a read of known zeros without reading; False where it is not known."""
        if not request.length or export.image.engine.gate.closed:
            return False
        with export.image.reactor.lock:
            if not export.reads_zero(request.offset, request.length):
                return False
        export.counters.count("read", request.length, 0.0)
        payload = struct.pack(">QI", request.offset, request.length)
        head = wire.chunk(request.cookie, wire.REPLY_TYPE_OFFSET_HOLE, len(payload))
        self._send(head + payload)
        return True

    def _send_block_status(self, export: Export, request: wire.Request) -> None:
        one = bool(request.flags & wire.CMD_FLAG_REQ_ONE)
        out = bytearray()
        try:
            for position, (number, context) in enumerate(self._contexts):
                with export.image.reactor.lock:
                    extents = export.extents(request.offset, request.length, context, one=one)
                payload = struct.pack(">I", number) + b"".join(
                    struct.pack(">II", length, flags) for length, flags in extents
                )
                last = position == len(self._contexts) - 1
                flags = wire.REPLY_FLAG_DONE if last else 0
                out += wire.chunk(request.cookie, wire.REPLY_TYPE_BLOCK_STATUS, len(payload), flags)
                out += payload
        except MmcowError as error:
            self._send_error(request, wire.error_of(error), str(error))
            return
        self._send(bytes(out))

    def _send_error(self, request: wire.Request, error: int, text: str) -> None:
        if self._structured:
            self._send(wire.error_chunk(request.cookie, error, text))
        else:
            self._send(wire.simple_reply(request.cookie, error))

    def _send(self, data: bytes | memoryview) -> None:
        if not self._gone:
            self._transport.write(data)

    # ---- back-pressure and the end ----

    def _enter(self, length: int) -> None:
        self._requests += 1
        self._bytes += length
        if self._requests >= REQUESTS_MOST or self._bytes >= BYTES_MOST:
            self._hold("requests")

    def _leave_request(self, length: int) -> None:
        self._requests -= 1
        self._bytes -= length
        if "requests" in self._held and self._bytes < BYTES_MOST // 2:
            self._release("requests")
        if self._leaving and not self._requests and not self._gone:
            # The reply of this last request is sent first.
            self._loop.call_soon(self._transport.close)

    def _hold(self, why: str) -> None:
        if not self._held and not self._gone:
            self._transport.pause_reading()
        self._held.add(why)

    def _release(self, why: str) -> None:
        self._held.discard(why)
        if not self._held and not self._gone and not self._leaving:
            self._transport.resume_reading()

    def _leave(self) -> None:
        """Read no more; close once everything in flight is answered."""
        self._leaving = True
        if not self._requests and not self._gone:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def finish(self) -> None:
        """The server stops: as if the client had said that it sends no more."""
        if self._handshake is not None:
            self._end_handshake()
            self._transport.abort()
            return
        self._hold("stopping")
        self._leave()
