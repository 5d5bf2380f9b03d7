# SPDX-License-Identifier: MIT
"""An asyncio loop without a clock and without sockets: a seed decides what happens next.

Owns: ``SimLoop`` (asyncio's own loop over a selector that draws), its virtual time, its listeners,
and ``SimTransport``, the server's end of a connection in memory.

Whenever asyncio asks what is ready, *moves* are collected: an I/O queue may complete something, a
transport may carry some bytes one way or the other, whoever else is an actor may act. The seed
picks one of them, or lets time pass. So storage, the network and the clients advance at unequal
paces, and the same seed gives the same story.

Transports behave as asyncio's do on sockets: they take what the socket has room for at once and
keep the rest, *without a copy*, until there is room; they pause and resume their protocol; they
tell of the end by a callback of its own. A reply whose memory is reused too early is found out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from tests.sim.host import SimHost

STEPS_MOST = 20_000  # of a loop that gets nowhere
MEAN_WAIT = 0.0002  # seconds that pass beside a move, at most
PIECES = (1, 16, 28, 60, 512, 4096, 1 << 20)  # bounds of what arrives at once
ROOM = (600, 4096, 65536, 1 << 20)  # of a socket
HIGH_WATER = (1024, 65536)

Move = tuple[float, Callable[[], Any]]  # its weight, and what it does


class Stuck(AssertionError):
    """Nothing can happen any more, or it never ends."""


class Peer(Protocol):
    """The client's end of a connection."""

    outgoing: bytearray  # sent, and not yet received by the server
    finished: bool  # sends no more
    vanished: bool  # is not there any more: what the server sends meets an error
    prompt: bool  # reads at once what the socket holds
    reading: bool

    def received(self, data: bytes) -> None:
        """Bytes came."""

    def ended(self) -> None:
        """The server has closed, and all it sent has been read."""


class SimLoop(asyncio.BaseEventLoop):
    """One process's loop on a simulated machine."""

    def __init__(self, rng: Random, host: SimHost) -> None:
        super().__init__()
        self.rng = rng
        self.host = host
        self.listeners: dict[str, SimListener] = {}
        self.transports: list[SimTransport] = []
        self.actors: list[Callable[[], list[Move]]] = []
        self.results: list[Any] = []  # of work for a thread
        self.failure: BaseException | None = None
        self._readers: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        self._time = 0.0
        self._steps = 0
        self._selector = self
        self.set_exception_handler(self._caught)

    def fail(self, error: BaseException) -> None:
        """Something is wrong that whoever called must not swallow: the run ends here."""
        self.failure = self.failure or error
        self.stop()

    def _caught(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "never retrieved" in context["message"] and error is not None:
            return  # whoever left does not ask for the result
        self.fail(error or AssertionError(context["message"]))

    # ---- what asyncio's loop asks of a real one ----

    def time(self) -> float:
        """Virtual seconds."""
        return self._time

    def select(self, timeout: float | None) -> list[Callable[[], Any]]:
        """What happens next; ``timeout`` is 0 where callbacks are ready, None where no timer is."""
        self._steps += 1
        if self._steps > STEPS_MOST:
            raise Stuck(f"no end after {STEPS_MOST} steps")
        rng = self.rng
        self._time += rng.random() * MEAN_WAIT
        if timeout == 0 and rng.random() < 0.5:
            return []
        moves = self._moves()
        if moves and (not timeout or rng.random() < 0.93):
            weights, acts = zip(*moves, strict=True)
            return rng.choices(acts, weights)
        if timeout:
            self._time += timeout if not moves else min(timeout, rng.choice((0.001, 0.05, 1.0)))
        elif timeout is None:
            raise Stuck("nothing can happen any more")
        return []

    def _process_events(self, event_list: list[Callable[[], Any]]) -> None:
        for act in event_list:
            self.call_soon(act)

    def _write_to_self(self) -> None:
        raise AssertionError("a simulated loop has one thread")

    def _moves(self) -> list[Move]:
        moves: list[Move] = []
        for number, (callback, arguments) in self._readers.items():
            if self.host.queues[number].readable:
                moves.append((4.0, lambda callback=callback, args=arguments: callback(*args)))
        for transport in self.transports:
            moves += transport.moves()
        for actor in self.actors:
            moves += actor()
        return moves

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        """Call back while a queue of the machine has something to tell."""
        assert fd in self.host.queues
        self._readers[fd] = callback, args

    def remove_reader(self, fd: Any) -> bool:
        """Call back no more."""
        return self._readers.pop(fd, None) is not None

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """A worker thread of whose work nothing can be seen before it is done: none at all."""
        future = self.create_future()
        try:
            self.results.append(func(*args))
            future.set_result(self.results[-1])
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        return future

    async def create_unix_server(self, protocol_factory: Any, path: Any = None, **_: Any) -> Any:
        """Listen under a path that exists in this loop only."""
        return self.listen(str(path), protocol_factory)

    def listen(self, name: str, factory: Callable[[], asyncio.BaseProtocol]) -> Any:
        """Listen under a name."""
        listener = self.listeners[name] = SimListener(self, name, factory)
        return listener

    def connect(self, name: str, peer: Peer) -> SimTransport:
        """Connect a client; the server hears of it soon."""
        transport = SimTransport(self, self.listeners[name].factory(), peer)
        self.transports.append(transport)
        return transport


class SimListener:
    """What ``create_server`` returns."""

    def __init__(
        self, loop: SimLoop, name: str, factory: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self.factory = factory
        self._loop = loop
        self._name = name

    def close(self) -> None:
        """Nobody can connect any more."""
        self._loop.listeners.pop(self._name, None)


class SimTransport(asyncio.Transport):
    """The server's end of one connection."""

    def __init__(self, loop: SimLoop, protocol: asyncio.BaseProtocol, peer: Peer) -> None:
        super().__init__()
        self.protocol: Any = protocol
        self.peer = peer
        self._loop = loop
        self._wire = bytearray()  # in the client's socket
        self._room = loop.rng.choice(ROOM)
        self._high = loop.rng.choice(HIGH_WATER)
        self._buffer: list[memoryview] = []  # not taken by the socket yet
        self._listening = False
        self._reading = True
        self._at_end = False  # the client's end was told
        self._writing_paused = False
        self._closing = False
        self._lost = False
        self._over = False
        loop.call_soon(protocol.connection_made, self)
        loop.call_soon(self._listen)

    def _listen(self) -> None:
        self._listening = not self._closing

    # ---- what may happen ----

    def moves(self) -> list[Move]:
        """The steps this connection can take now."""
        moves: list[Move] = []
        peer = self.peer
        if self._listening and self._reading and not self._lost and not self._closing:
            if peer.outgoing:
                moves.append((3.0, self._deliver))
            elif peer.vanished and not peer.finished:
                moves.append((2.0, lambda: self._fatal(ConnectionResetError("reset"))))
            elif peer.finished and not self._at_end:
                moves.append((2.0, self._tell_end))
        if self._buffer and (len(self._wire) < self._room or peer.vanished):
            moves.append((3.0, self._send_more))
        if peer.reading and not peer.vanished:
            if self._wire:
                moves.append((3.0, self._carry))
            elif self._over:
                moves.append((2.0, self._leave))
        return moves

    def _deliver(self) -> None:
        outgoing = self.peer.outgoing
        if self._lost or self._closing or not self._reading or not outgoing:
            return
        rng = self._loop.rng
        length = rng.randint(1, rng.choice(PIECES))
        if isinstance(self.protocol, asyncio.BufferedProtocol):
            into = self.protocol.get_buffer(-1)
            if not len(into):
                raise AssertionError("get_buffer gave an empty buffer")
            length = min(length, len(into), len(outgoing))
            into[:length] = outgoing[:length]
            del outgoing[:length]
            self.protocol.buffer_updated(length)
        else:
            piece = bytes(outgoing[:length])
            del outgoing[:length]
            self.protocol.data_received(piece)

    def _tell_end(self) -> None:
        if self._lost or self._closing:
            return
        self._at_end = True
        if not self.protocol.eof_received():
            self.close()

    def _carry(self) -> None:
        rng = self._loop.rng
        self._take(rng.randint(1, rng.choice(PIECES)))

    def _take(self, length: int) -> None:
        piece = bytes(self._wire[:length])
        del self._wire[:length]
        self.peer.received(piece)

    def _leave(self) -> None:
        if self in self._loop.transports:
            self._loop.transports.remove(self)
            self.peer.ended()

    def _send_more(self) -> None:
        if self.peer.vanished:
            self._fatal(BrokenPipeError("broken pipe"))
            return
        while self._buffer and len(self._wire) < self._room:
            first = self._buffer[0]
            taken = self._push(first)
            if taken < len(first):
                self._buffer[0] = first[taken:]
                break
            self._buffer.pop(0)
        if self._writing_paused and self.get_write_buffer_size() <= self._high // 4:
            self._writing_paused = False
            self.protocol.resume_writing()
        if self._closing and not self._buffer and not self._lost:
            self._lost = True
            self._loop.call_soon(self._tell_lost, None)

    def _push(self, data: memoryview) -> int:
        length = min(len(data), max(self._room - len(self._wire), 0))
        self._wire += data[:length]
        if self.peer.prompt and self.peer.reading:
            self._take(len(self._wire))
        return length

    # ---- asyncio's side ----

    def write(self, data: Any) -> None:
        """Send; what the socket has no room for is kept as it is."""
        view = memoryview(data).cast("B")
        if self._lost or not len(view):
            return
        if self.peer.vanished:
            self._fatal(BrokenPipeError("broken pipe"))
            return
        if not self._buffer:
            view = view[self._push(view) :]
        if len(view):
            self._buffer.append(view)
            if not self._writing_paused and self.get_write_buffer_size() > self._high:
                self._writing_paused = True
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Bytes the socket had no room for."""
        return sum(map(len, self._buffer))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing is known of a client."""
        return default

    def pause_reading(self) -> None:
        """Deliver nothing."""
        self._reading = False

    def resume_reading(self) -> None:
        """Deliver again."""
        self._reading = True

    def is_closing(self) -> bool:
        """Whether the end has begun."""
        return self._closing

    def close(self) -> None:
        """Read no more; end when all was sent."""
        if self._closing:
            return
        self._closing = True
        if not self._buffer:
            self._lost = True
            self._loop.call_soon(self._tell_lost, None)

    def abort(self) -> None:
        """End now."""
        self._fatal(None)

    def _fatal(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._buffer.clear()
        self._closing = self._lost = True
        self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self._over = True
        if self.peer.vanished:
            self._loop.transports.remove(self)
        self.protocol.connection_lost(error)
