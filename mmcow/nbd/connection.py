# SPDX-License-Identifier: MIT
"""One client: bytes in, requests to the engine, replies out, in any order.

Owns: the connection's two phases, buffers, back-pressure, the end.
Never: blocks the loop; interprets the negotiation (``handshake``); trusts a length before it is
checked.

Bounds, so that no client can exhaust the server: a request is begun only while fewer than
``REQUESTS_MOST`` are in flight, and only where its buffer finds room beside what this client
(``BYTES_MOST``) and all of them (``memory``) hold; a buffer counts until its reply has left.
Otherwise the client is not read from, as when it does not read its replies. One that does not
finish the negotiation in ``HANDSHAKE_SECONDS``, or sends too many options in it
(``handshake.OPTIONS_MOST``), is dropped.

Replies that become ready together leave together, in one send.
"""

from __future__ import annotations

import asyncio
import socket as sockets
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mmcow.errors import MmcowError
from mmcow.native import aligned
from mmcow.nbd import memory
from mmcow.nbd import protocol as wire
from mmcow.nbd.handshake import Handshake, Step
from mmcow.nbd.peers import peer_of, queued_for
from mmcow.nbd.pump import Limits, Socket
from mmcow.nbd.pumped import Pumped
from mmcow.nbd.requests import HOLE_LEAST, SHUTDOWN, VERBS, Agreed, begin, refusal

if TYPE_CHECKING:
    from mmcow.nbd.export import Export
    from mmcow.nbd.pump import Pump
    from mmcow.nbd.server import Server
    from mmcow.tasks import Completion

HANDSHAKE_SECONDS = 30.0
REQUESTS_MOST = 128
# Begun before others get their turn: what is answered at once (holes, trims) is never in flight.
TURN_MOST = 128
BYTES_MOST = 32 << 20
# What is received at once, while options are negotiated and after.
RECEIVE_OPTIONS = 4 << 10
RECEIVE = 64 << 10
# Room before a payload for the reply's head, so that both leave in one send without a copy, while
# the payload stays aligned for direct I/O.
HEAD_ROOM = 4096
# Replies up to this size are copied together to leave in one send; larger ones go by themselves.
JOIN_MOST = 64 << 10
_REQUEST = wire.REQUEST.size
_NO_PAYLOAD = memoryview(b"")


class Connection(asyncio.BufferedProtocol):
    """A client from connect to disconnect."""

    def __init__(self, server: Server) -> None:
        self.export: Export | None = None
        self.peer = ""  # who it is, in the log
        self._server = server
        self._memory = 0  # bytes of buffers that are kept for this client
        self._pumped: Pumped | None = None  # who serves it instead, once it is negotiated
        self._loop = server.loop
        self._transport: Any = None
        self._socket_transport: Any = None  # the one below, where there is TLS
        self._encrypted = False
        self._handshake: Handshake | None = Handshake(
            server.exports, tls_required=server.tls is not None
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._agreed = Agreed(structured=False, contexts=[])
        self._rest = b""
        self._receive = memoryview(bytearray(RECEIVE_OPTIONS))
        self._at = 0  # what was received and is not begun yet is _receive[_at:_have]
        self._have = 0
        self._backlog = False  # that holds requests which have to wait
        self._request: wire.Request | None = None  # a WRITE whose payload is coming
        self._payload = _NO_PAYLOAD
        self._filled = 0
        self._skip = 0  # bytes to come of a refused WRITE's payload
        self._refused: tuple[wire.Request, int, str] | None = None
        self._requests = 0
        self._out: list[bytes | memoryview] = []  # replies that leave together
        self._out_memory = 0  # of the buffers in _out
        self._unread_memory = 0  # of replies that the client has not read
        self._received = self._written = 0  # bytes, ever
        self._in_turn = False
        self._started = False  # a request was begun in this turn
        self._asked = False  # there was a valid request, ever
        self._write_due = False
        self._held: set[str] = set()  # why the client is not read from
        self._paused = False
        self._stopping = False  # the server ends: nothing more is begun
        self._leaving = False
        self._gone = False

    @property
    def memory(self) -> int:
        """Bytes of buffers that the server keeps for this client."""
        return self._memory if self._pumped is None else self._pumped.memory

    @property
    def unsent(self) -> int:
        """Bytes of replies that the client has not read."""
        if self._pumped is not None:
            return self._pumped.unsent
        return int(self._transport.get_write_buffer_size())

    @property
    def unread(self) -> int:
        """As ``unsent``, and what TLS has encrypted and the kernel has taken already: it changes
        where the client reads, however little."""
        below = int(self._socket_transport.get_write_buffer_size()) if self._encrypted else 0
        return self.unsent + below + queued_for(self._socket_transport.get_extra_info("socket"))

    # ---- asyncio's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = self._socket_transport = transport
        self.peer = peer_of(transport)
        if not self._server.joined(self):
            self._gone = True
            self._transport.abort()
            return
        self._deadline = self._loop.call_later(HANDSHAKE_SECONDS, self._too_slow)
        socket = transport.get_extra_info("socket")
        if socket is not None and socket.family != sockets.AF_UNIX:
            # A machine that is switched off says nothing; without this its connection stays.
            socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
        self._send_handshake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone. Its requests in flight run to their end, unanswered."""
        if self._gone:
            return
        self._gone = True
        self._end_handshake()
        if self._pumped is not None:
            self._pumped.drop()
        unfinished = 0 if self._request is None else self._request.length
        self._request, self._payload = None, _NO_PAYLOAD
        self._out = []
        self._give_memory(unfinished + self._out_memory + self._unread_memory)
        self._server.memory.forget(self)
        self._server.left(self)

    def eof_received(self) -> bool:
        """The client sends no more: finish what it asked for, then close."""
        self._leave()
        return not self._encrypted  # TLS knows no half-closed connection

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self._hold("replies")

    def resume_writing(self) -> None:
        """It does again."""
        if "pumped" in self._held:
            if self._pumped is None and not self._gone:
                pump = self._server.pump()
                assert pump is not None
                assert self.export is not None
                self._hand_over(pump, self.export)
            return
        unread, self._unread_memory = self._unread_memory, 0
        self._give_memory(unread)
        self._release("replies", "requests", "memory")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: straight into the payload of a write, if one is coming."""
        if self._request is not None:
            return self._payload[self._filled :]
        return self._receive[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        if self._handshake is not None:
            self._have += nbytes
            if "tls" not in self._held:  # else before start_tls has returned: it has to wait
                self._negotiate(self._handshake)
        elif self.export is not None:
            self._received += nbytes
            if self._request is not None:
                self._filled += nbytes
            else:
                self._have += nbytes
            self._turn(self.export)

    # ---- negotiation ----

    @property
    def negotiating_since(self) -> float | None:
        """When the client connected (in the loop's time), until it is served."""
        if self._handshake is None or self._deadline is None:
            return None
        return self._deadline.when() - HANDSHAKE_SECONDS

    def _negotiate(self, handshake: Handshake) -> None:
        data, self._have = self._receive[: self._have], 0
        try:
            step = handshake.feed(data)
        except wire.ProtocolError as error:
            self.drop(str(error))
            return
        self._send_handshake()
        if step is Step.CLOSE:
            self._end_handshake()
            self._leave()
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
        transport = None
        try:
            if not self._gone and not self._transport.is_closing():
                transport = await self._loop.start_tls(
                    self._transport, self, self._server.tls,  # type: ignore[arg-type]
                    server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS,
                )  # fmt: skip
        except (TimeoutError, OSError) as error:  # ssl.SSLError is an OSError
            self._tell_dropped(f"TLS: {error}")
        finally:
            # asyncio does not tell the protocol of a connection that ends in TLS's handshake.
            if transport is None:
                self._transport.abort()
                self.connection_lost(None)
        if transport is not None:
            self._transport = transport
            self._encrypted = True
            handshake.encrypted()
            self._release("tls")
            if self._have:
                self._negotiate(handshake)

    def _transmit(self, handshake: Handshake) -> None:
        export = handshake.export
        assert export is not None
        self._end_handshake()
        self.export = export
        self._agreed = Agreed.of(handshake)
        self._rest = handshake.rest()  # the first requests; never more than was received at once
        export.connections += 1
        self._server.attached += 1
        told = self._server.told.attached
        told.tell(f"client attached to export {export.name!r}{self.peer}")
        pump = self._server.pump()
        if pump is None:
            self._receive = memoryview(bytearray(RECEIVE))
            self._receive[: len(self._rest)] = self._rest
            self._have = len(self._rest)
            self._turn(export)
            return
        self._hold("pumped")  # for good: nothing is received here any more
        if self._transport.get_write_buffer_size():
            # The end of the negotiation must be read first: ``resume_writing`` goes on.
            self._transport.set_write_buffer_limits(0)
        else:
            self._hand_over(pump, export)

    def _hand_over(self, pump: Pump, export: Export) -> None:
        """From here on the pump serves the client; the transport only keeps the socket open."""
        socket = Socket(self._transport.get_extra_info("socket").fileno(), self._rest)
        self._pumped = Pumped(pump, export, self._agreed, socket, self._over)
        if self._stopping:
            self._pumped.refuse()
        if self._leaving:
            self._pumped.leave()

    def _over(self, broken: str | None) -> None:
        """The pump is through with it."""
        if broken is not None:
            self._tell_dropped(broken)
        self._transport.abort()

    def _end_handshake(self) -> None:
        self._handshake = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _too_slow(self) -> None:
        if self._handshake is not None and not self._gone:
            self.drop(f"negotiation not finished in {HANDSHAKE_SECONDS:g} s")

    # ---- requests ----

    def _turn(self, export: Export) -> None:
        """Begin what was received, hand it to the kernel as one batch, send what is ready."""
        self._in_turn = True
        self._started = False
        reactor = export.image.reactor
        try:
            with reactor.lock:
                self._parse(export)
        except wire.ProtocolError as error:
            self.drop(str(error))
        if self._started:
            reactor.poll()
        self._in_turn = False
        self._write_out()

    def _parse(self, export: Export) -> None:
        """Begin every complete request received, until the client has to wait."""
        if self._request is not None:
            if self._filled < self._request.length:
                return
            self._end_payload(export, self._request)
        begun = 0
        while not self._held and not self._leaving:
            if self._skip:
                self._skip_payload()
            if self._have - self._at < _REQUEST:
                break
            if begun == TURN_MOST:
                self._end_turn()
                break
            begun += 1
            if not self._begin(export, wire.parse_request(self._receive, self._at)):
                break
        self._backlog = self._have - self._at >= _REQUEST
        if self._at == self._have:
            self._at = self._have = 0
        elif self._at and not self._backlog:  # the beginning of a request
            rest = bytes(self._receive[self._at : self._have])
            self._at, self._have = 0, len(rest)
            self._receive[: self._have] = rest

    def _begin(self, export: Export, request: wire.Request) -> bool:
        """Begin one request, or refuse it; False where it has to wait."""
        self._asked = True
        command, length = request.command, request.length
        problem = self._refusal(export, request)
        if problem is not None:
            self._at += _REQUEST
            if command == wire.CMD_WRITE and length:
                self._skip, self._refused = length, (request, *problem)
            else:
                self._send_error(request, *problem)
            return True
        carries_data = command in (wire.CMD_READ, wire.CMD_WRITE)
        if not self._admit(length if carries_data else 0):
            return False
        self._at += _REQUEST
        if command == wire.CMD_WRITE:
            self._begin_payload(export, request)
        elif command == wire.CMD_DISC:
            self._leave()
        elif command == wire.CMD_BLOCK_STATUS:
            self._send_block_status(export, request)
        else:
            self._start(export, request, None)
        return True

    def _admit(self, length: int) -> bool:
        """Whether one more request, with a buffer of ``length``, may be begun now."""
        memory = self._memory
        if self._requests >= REQUESTS_MOST or (memory and memory + length > BYTES_MOST):
            self._hold("requests")
            return False
        if length:
            if not self._server.memory.take(self, length):
                self._hold("memory")
                return False
            self._memory += length
        return True

    def _begin_payload(self, export: Export, request: wire.Request) -> None:
        """Take what is there of a write's payload; the rest is received in place."""
        try:
            self._payload = aligned(request.length)
        except MmcowError as error:
            self._give_memory(request.length)
            self._skip, self._refused = request.length, (request, wire.error_of(error), "no memory")
            export.failed(error)
            return
        there = min(request.length, self._have - self._at)
        self._payload[:there] = self._receive[self._at : self._at + there]
        self._at += there
        self._filled = there
        self._request = request
        if there == request.length:
            self._end_payload(export, request)

    def _end_payload(self, export: Export, request: wire.Request) -> None:
        payload, self._payload, self._request = self._payload, _NO_PAYLOAD, None
        if self._stopping:
            self._give_memory(request.length)
            self._send_error(request, *SHUTDOWN)
        else:
            self._start(export, request, payload)

    def _end_turn(self) -> None:
        """Let others have their turn before this client's next request."""
        self._hold("turn")
        self._loop.call_soon(self._release, "turn")

    def _skip_payload(self) -> None:
        """Pass over the payload of a write that was refused, then say so."""
        there = min(self._skip, self._have - self._at)
        self._at += there
        self._skip -= there
        if not self._skip and self._refused is not None:
            refused, self._refused = self._refused, None
            self._send_error(*refused)

    def _start(self, export: Export, request: wire.Request, payload: memoryview | None) -> None:
        """Hand one request to the engine; its completion sends the reply."""
        buffer = payload if payload is not None else _NO_PAYLOAD
        moved = buffer
        began = time.monotonic()
        self._requests += 1
        self._started = True
        try:
            if request.command == wire.CMD_READ:
                if self._agreed.structured and request.length >= HOLE_LEAST:
                    hole = export.reads_zero(request.offset, request.length)
                    if hole:
                        self._done(request)
                        self._send_hole(export, request)
                        return
                buffer = aligned(HEAD_ROOM + request.length)
                moved = buffer[HEAD_ROOM:]
            completion = begin(export, request, moved)
        except MmcowError as error:
            self._failed(export, request, error)
            return
        completion.on_done(partial(self._finish, request, buffer, began))

    def _refusal(self, export: Export, request: wire.Request) -> tuple[int, str] | None:
        """Why a request cannot even be begun."""
        if self._stopping and request.command != wire.CMD_DISC:
            return SHUTDOWN
        return refusal(export, self._agreed, request)

    # ---- replies ----

    def _finish(
        self,
        request: wire.Request,
        buffer: memoryview,
        began: float,
        completion: Completion[Any],
    ) -> None:
        export = self.export
        assert export is not None
        error = completion.error
        if error is not None:
            self._failed(export, request, error)
            return
        command = request.command
        export.counters.count(VERBS[command], request.length, time.monotonic() - began)
        if command == wire.CMD_READ and request.length:
            self._requests -= 1
            self._send(self._data_reply(request, buffer), request.length)
        else:
            self._done(request)
            self._send(self._agreed.done(request.cookie))

    def _failed(self, export: Export, request: wire.Request, error: BaseException) -> None:
        """A request ended with an error, or could not even begin."""
        self._done(request)
        self._send_failure(export, request, error)

    def _done(self, request: wire.Request) -> None:
        """A request has ended and its buffer is needed no more."""
        self._requests -= 1
        if request.command in (wire.CMD_READ, wire.CMD_WRITE):
            self._give_memory(request.length)
        self._ease()

    def _data_reply(self, request: wire.Request, buffer: memoryview) -> memoryview:
        head = self._agreed.data_head(request)
        start = HEAD_ROOM - len(head)
        buffer[start:HEAD_ROOM] = head
        return buffer[start:]

    def _send_hole(self, export: Export, request: wire.Request) -> None:
        """Answer a read of known zeros without reading."""
        export.counters.count("read", request.length, 0.0)
        self._send(self._agreed.hole(request))

    def _send_block_status(self, export: Export, request: wire.Request) -> None:
        began = time.monotonic()
        try:
            out = self._agreed.status(export, request)
        except MmcowError as error:
            self._send_failure(export, request, error)
            return
        export.counters.count("block_status", request.length, time.monotonic() - began)
        self._send(out)
        if self._have > self._at:
            self._end_turn()  # it may have looked at much

    def _send_failure(self, export: Export, request: wire.Request, error: BaseException) -> None:
        """Tell the client in words that name no file of this host, and the log all of it."""
        reason = wire.reason_of(error, export.image.path)
        self._send_error(request, wire.error_of(error), reason)
        export.failed(error)

    def _send_error(self, request: wire.Request, error: int, text: str) -> None:
        self._send(self._agreed.error(request, error, text))

    def _send(self, reply: bytes | memoryview, memory: int = 0) -> None:
        """Send a reply, with what else is ready: at the end of this turn, or of the loop's."""
        if self._gone:
            self._give_memory(memory)
            return
        self._out.append(reply)
        self._out_memory += memory
        if self._in_turn:
            return
        if not self._requests:
            self._write_out()  # nothing can join it
        elif not self._write_due:
            self._write_due = True
            self._loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        """Send the replies that are ready."""
        self._write_due = False
        out = self._out
        if out:
            self._out = []
            self._written += sum(map(len, out))
            if self._transport.is_closing():  # the client is gone, which is told later
                pass
            elif len(out) == 1:
                self._transport.write(out[0])
            elif max(map(len, out)) <= JOIN_MOST:
                # Not writelines(): in CPython 3.12.0 to 3.12.8 and 3.13.0 to 3.13.1 it never says
                # that too much is unsent (CVE-2024-12254).
                self._transport.write(b"".join(out))
            else:
                for reply in out:
                    self._transport.write(reply)
            memory, self._out_memory = self._out_memory, 0
            if "replies" in self._held:
                self._unread_memory += memory
            elif memory:
                self._give_memory(memory)
                self._ease()
        if self._leaving and not self._requests and not self._gone:
            self._transport.close()

    # ---- back-pressure and the end ----

    def _give_memory(self, length: int) -> None:
        if length:
            self._memory -= length
            self._server.memory.give(length)

    def _ease(self) -> None:
        """Read on from a client that had too much in flight, once half of that is done."""
        if self._held and self._requests <= REQUESTS_MOST // 2 and self._memory <= BYTES_MOST // 2:
            self._release("requests", "memory")

    def room_came(self) -> None:
        """There may be memory for the request that waits."""
        self._release("memory")
        if self._held:  # it cannot use the room now, so it must not stand in the way
            self._server.memory.forget(self)

    def moved(self) -> int | None:
        """See ``memory.Holder``."""
        if self._pumped is not None:
            return self._pumped.moved()
        if self._request is None and "replies" not in self._held:
            return None
        return self._received + self._written - int(self._transport.get_write_buffer_size())

    def _hold(self, why: str) -> None:
        self._held.add(why)
        if not self._paused and not self._gone:
            self._paused = True
            self._transport.pause_reading()

    def _release(self, *reasons: str) -> None:
        if self._held:
            self._held.difference_update(reasons)
            if not self._held:
                self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begin what was received before the client had to wait, then read on."""
        if not self._paused or self._must_wait():
            return
        if self.export is not None:
            self._turn(self.export)
        if not self._must_wait() and not self._backlog:
            self._paused = False
            self._transport.resume_reading()

    def _must_wait(self) -> bool:
        return bool(self._held) or self._gone or self._leaving

    def _leave(self) -> None:
        """Read no more; close once everything in flight is answered."""
        self._leaving = True
        if self._pumped is not None:
            self._pumped.leave()
            return
        self._hold("leaving")
        self._server.memory.forget(self)
        if not self._requests and not self._in_turn:
            self._write_out()

    def drop(self, why: str) -> None:
        """Close at once, for a reason."""
        self._tell_dropped(why)
        self._transport.abort()

    def _tell_dropped(self, why: str) -> None:
        was_served = self._asked if self._pumped is None else self._pumped.was_served
        told = self._server.told.dropped if was_served else self._server.told.turned_away
        told.tell(f"client dropped{self.peer}: {why}")

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def refuse(self) -> None:
        """The server stops: what is in flight goes on, nothing else is begun."""
        self._stopping = True
        if self._pumped is not None:
            self._pumped.refuse()
        if self._is_deaf():
            self._end_handshake()
            self._transport.abort()
        if self._handshake is None:
            return
        if "tls" in self._held:  # in the middle of TLS's own handshake nothing can be said
            self._end_handshake()
            self._transport.abort()
        else:
            self._handshake.refuse()

    def finish(self) -> None:
        """As if the client had said that it sends no more."""
        if not self._gone:
            self._end_handshake()
            if self._is_deaf():
                self._transport.abort()
            else:
                self._leave()

    def _is_deaf(self) -> bool:
        """Whether the client was never served and does not even read the negotiation: whatever
        else it is told, the server would wait for it in vain."""
        if self._pumped is not None or self._asked or self._gone:
            return False
        layers = (self._transport, self._socket_transport)
        return any(layer.get_write_buffer_size() for layer in layers)


def pump_limits() -> Limits:
    """What bounds the clients of a pump: the same as here."""
    return Limits(
        room=memory.MEMORY_MOST,
        share=memory.SHARE,
        bytes=BYTES_MOST,
        requests=REQUESTS_MOST,
        payload=wire.PAYLOAD_MOST,
    )
