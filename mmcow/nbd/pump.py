# SPDX-License-Identifier: MIT
"""The server's data path in C (csrc/pump.c), as the loop sees it.

Owns: the C pump, its turn in the loop, what Python has to do after a turn.
Never: knows a command of the protocol (``pumped``), a request that is a hit.

A loop of our own (``run``) waits inside the pump, with what asyncio waits for nested in it: as long
as there are only hits, no Python runs at all. In somebody else's loop the pump is one more
descriptor to read from.

Without a pump every client is served by ``connection`` alone: under TLS, over a queue that C does
not know (the simulator's), with MMCOW_PUMP=off in the environment. That way is complete, and the
tests hold the two against each other.
"""

from __future__ import annotations

import asyncio
import math
import os
import selectors
import struct
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mmcow.native import check, ffi, lib
from mmcow.storage.linux import NativeQueue

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from mmcow.aio import Image
    from mmcow.engine.engine import Engine
    from mmcow.nbd.memory import Memory
    from mmcow.nbd.pumped import Pumped

T = TypeVar("T")

# Told by one turn at most.
EVENTS_MOST = 128
# Clusters that hits allocate until somebody looks at how much metadata waits to be written.
RELIEF_EVERY = 4096

ASKED, FAILED, PARTED = lib.MMC_PUMP_ASKED, lib.MMC_PUMP_FAILED, lib.MMC_PUMP_PARTED
RESULT, ENDED = lib.MMC_PUMP_RESULT, lib.MMC_PUMP_ENDED
_EVENT = struct.Struct("<iHHQQqQQQII")
_RESULT = struct.Struct("<Qq")
_FOR_EVER = -1


class Event(NamedTuple):
    """``struct mmc_pump_event``."""

    kind: int
    flags: int
    command: int
    number: int
    handle: int
    result: int
    cookie: int
    offset: int
    address: int
    length: int
    reserved: int


class Socket(NamedTuple):
    """A connected client: what came from it already, and where the rest comes from."""

    descriptor: int
    rest: bytes


class Limits(NamedTuple):
    """``struct mmc_pump_limits``."""

    room: int
    share: int
    bytes: int
    requests: int
    payload: int


class Pump:
    """Serves the clients of one server in one loop."""

    def __init__(self, images: Iterable[Image], limits: Limits, memory: Memory) -> None:
        self._loop = asyncio.get_running_loop()
        self._memory = memory
        error = ffi.new("int *")
        self._pump: Any = lib.mmc_pump_open(ffi.new("struct mmc_pump_limits *", limits), error)
        check(error[0], "start of the pump", "mmcow")
        self._state: Any = lib.mmc_pump_state(self._pump)
        self._events: Any = ffi.new("struct mmc_pump_event[]", EVENTS_MOST)
        self._bytes = memoryview(ffi.buffer(self._events))
        self._todo: list[Event] = []
        self._poll_due = False
        self._relieved = 0
        self._clients: dict[int, Pumped] = {}
        self._last_number = 0
        self._paths: set[Any] = set()  # C has their addresses
        self._images: dict[int, Image] = {}
        for number, image in enumerate(images):
            queue = image.lend_queue(partial(self._give_back, number, image))
            self._images[number] = image
            added = lib.mmc_pump_add_queue(self._pump, queue, number)
            check(added, "start of the pump", "mmcow")
        self._selector = PumpSelector.of(self._loop)
        if self._selector is not None and self._selector.pump is None:
            watched = lib.mmc_pump_watch(self._pump, self._selector.fileno())
            check(watched, "start of the pump", "mmcow")
            self._selector.pump = self
        else:
            self._selector = None
            self._loop.add_reader(lib.mmc_pump_fd(self._pump), self._poll)

    @property
    def room(self) -> int:
        """Bytes of the buffers in use."""
        return int(self._state.room) if self._pump is not None else 0

    @property
    def waiting(self) -> int:
        """How many clients wait for room."""
        return int(self._state.waiting) if self._pump is not None else 0

    # ---- clients ----

    def attach(
        self, pumped: Pumped, socket: Socket, engine: Engine, counts: Any, flags: int
    ) -> tuple[int, Any]:
        """Take a client over; its number and C's handle on it."""
        path = engine.hits.path
        pointer = ffi.NULL
        if path is not None:
            self._paths.add(path)
            pointer = path.pointer
        self._last_number += 1
        error = ffi.new("int *")
        client = lib.mmc_pump_attach(
            self._pump, socket.descriptor, pointer, counts, self._last_number, flags,
            socket.rest, len(socket.rest), error,
        )  # fmt: skip
        check(error[0], "memory for a client", "mmcow")
        self._clients[self._last_number] = pumped
        self.wake()
        return self._last_number, client

    def drop(self, number: int, client: Any) -> None:
        """A client is gone."""
        del self._clients[number]
        lib.mmc_client_drop(client)
        self.wake()  # others may get the room that it had

    def reply(self, handle: int, data: bytes, how: int = lib.MMC_REPLY_BYTES) -> None:
        """Answer a request that a turn told of. From any thread."""
        lib.mmc_pump_reply(self._pump, handle, data, len(data), how)

    # ---- turns ----

    def wake(self) -> None:
        """Something was done to a client from outside of a turn."""
        if self._selector is None and not self._poll_due:
            self._poll_due = True
            self._loop.call_soon(self._poll)

    def wait(self, seconds: float | None) -> None:
        """A turn that may wait; what it tells is done in the loop's next pass."""
        ms = _FOR_EVER if seconds is None else max(math.ceil(seconds * 1e3), 0)
        self._turn(ms)
        if self._todo:
            self._loop.call_soon(self._attend)
        self._look_around()

    def _poll(self) -> None:
        """A turn that does not wait."""
        self._poll_due = False
        if self._pump is None:
            return
        self._turn(0)
        self._look_around()
        self._attend()

    def _turn(self, ms: int) -> None:
        count = lib.mmc_pump_turn(self._pump, ms, self._events, EVENTS_MOST)
        if count > 0:  # else a signal, whose handler the interpreter runs on the way back
            events = self._bytes[: count * _EVENT.size].tobytes()
            self._todo += map(Event._make, _EVENT.iter_unpack(events))

    def _look_around(self) -> None:
        state = self._state
        if state.waiting:
            self._memory.watch()
        if state.allocated - self._relieved >= RELIEF_EVERY:
            self._relieved = state.allocated
            for image in self._images.values():
                with image.reactor.lock:
                    image.reactor.spawn(image.engine.relieve())

    def _attend(self) -> None:
        """Do what the last turns told."""
        todo, self._todo = self._todo, []
        results: dict[int, bytearray] = {}
        asked = False  # of any image: there are few
        for event in todo:
            if event.kind == RESULT:
                found = results.setdefault(event.number, bytearray())
                found += _RESULT.pack(event.handle, event.result)
                continue
            asked = True
            if event.kind != ENDED:
                self._tell_safely(event)
        for number, image in tuple(self._images.items()):
            if asked or number in results:
                image.poll(results.get(number, b""))

    def _tell_safely(self, event: Event) -> None:
        """A bug over one request ends its client, and costs nobody else theirs."""
        try:
            self._tell(event)
        except Exception as error:  # noqa: BLE001 - told as asyncio tells a protocol's
            message = {"message": "a request could not be done", "exception": error}
            self._loop.call_exception_handler(message)
            client = self._clients.get(event.number)
            if client is not None:
                client.parted(0, 0)

    def _tell(self, event: Event) -> None:
        client = self._clients.get(event.number)
        if event.kind == PARTED:
            if client is not None:
                client.parted(event.result, event.offset)
        elif client is None:
            self.reply(event.handle, b"")  # nobody is there to hear it
        elif event.kind == FAILED:
            client.failed(event)
        else:
            client.asked(event)

    # ---- the end ----

    def _give_back(self, number: int, image: Image) -> None:
        """Leave an image's queue to the loop: it is about to be closed."""
        found = self._results_of(number)
        del self._images[number]
        for client in self._clients.values():
            if client.image is image:
                client.refuse()
        lib.mmc_pump_drop_queue(self._pump, image.queue.pointer)
        image.take_queue_back()
        if found:
            image.poll(found)
        self.wake()

    def _results_of(self, number: int) -> bytearray:
        """What turns have told of an image's queue and nobody has attended to yet; told once."""
        found = bytearray()
        rest = []
        for event in self._todo:
            if event.kind == RESULT and event.number == number:
                found += _RESULT.pack(event.handle, event.result)
            else:
                rest.append(event)
        self._todo = rest
        return found

    def close(self) -> None:
        """With every client gone."""
        if self._pump is None:
            return
        for number, image in tuple(self._images.items()):
            self._give_back(number, image)
        pump, self._pump = self._pump, None
        if self._selector is not None:
            self._selector.pump = None
        else:
            self._loop.remove_reader(lib.mmc_pump_fd(pump))
        lib.mmc_pump_close(pump)
        self._paths.clear()


class PumpSelector(selectors.EpollSelector):
    """asyncio's selector, which waits inside a pump where there is one."""

    pump: Pump | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See ``selectors.BaseSelector.select``."""
        if self.pump is None:
            return super().select(timeout)
        self.pump.wait(timeout)
        return super().select(0)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> PumpSelector | None:
        """A loop's selector, if it is one of these."""
        found = getattr(loop, "_selector", None)
        return found if isinstance(found, cls) else None


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in a loop that waits inside the pump."""
    with asyncio.Runner(loop_factory=_make_loop) as runner:
        return runner.run(main)


def _make_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(PumpSelector())


def can_pump(images: Iterable[Image]) -> bool:
    """Whether a pump can serve these, and nobody has forbidden it."""
    if os.environ.get("MMCOW_PUMP", "on") == "off":
        return False
    return all(isinstance(image.queue, NativeQueue) for image in images)
