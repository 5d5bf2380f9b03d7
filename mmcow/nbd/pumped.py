# SPDX-License-Identifier: MIT
"""A client that the C pump serves, as Python sees it: what the pump did not do by itself.

Owns: the requests that were no hits, from the pump's word to the reply.
Never: receives, sends, counts memory: the pump does (csrc/client.c).
"""

from __future__ import annotations

import errno
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mmcow.errors import Interrupted, MmcowError, StorageError
from mmcow.native import ffi, lib
from mmcow.nbd import protocol as wire
from mmcow.nbd.requests import HOLE_LEAST, SHUTDOWN, VERBS, Agreed, begin, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcow.aio import Image
    from mmcow.nbd.export import Export
    from mmcow.nbd.pump import Event, Pump, Socket
    from mmcow.tasks import Completion

# What the pump receives from a client at once (IN_BYTES in csrc/pump.h). More than that moves
# only where the first request was valid.
RECEIVE_MOST = 64 << 10
_NO_PAYLOAD = memoryview(b"")


def _nobody_is_told(broken: str | None) -> None:
    """``over`` of a client that is gone."""


class Answer:
    """The one that a request gets."""

    def __init__(self, pump: Pump, handle: int) -> None:
        self._pump = pump
        self._handle = handle

    def give(self, data: bytes, how: int = lib.MMC_REPLY_BYTES) -> None:
        """Answer, unless that was done."""
        handle, self._handle = self._handle, 0
        if handle:
            self._pump.reply(handle, data, how)


class Pumped:
    """One client. ``over`` is called once, when nothing will come from it any more; with a text
    where it broke the protocol."""

    def __init__(
        self,
        pump: Pump,
        export: Export,
        agreed: Agreed,
        socket: Socket,
        over: Callable[[str | None], None],
    ) -> None:
        self._pump = pump
        self._export = export
        self._agreed = agreed
        self._over = over
        self._stopping = False
        self._facts: Any = ffi.new("struct mmc_client_facts *")
        flags = lib.MMC_CLIENT_STRUCTURED if agreed.structured else 0
        flags |= 0 if export.read_only else lib.MMC_CLIENT_WRITES
        self._number, self._client = pump.attach(
            self, socket, export.image.engine, export.counters.hits, flags
        )

    @property
    def image(self) -> Image:
        """The disk that it is served."""
        return self._export.image

    # ---- what the connection asks ----

    @property
    def memory(self) -> int:
        """Bytes of buffers that the pump keeps for this client."""
        return int(self._look().memory)

    @property
    def unsent(self) -> int:
        """Bytes of replies that it has not read."""
        return int(self._look().unsent)

    @property
    def was_served(self) -> bool:
        """Whether it surely had a valid request; not told of who moved little."""
        return int(self._look().moved) > RECEIVE_MOST

    def moved(self) -> int | None:
        """See ``memory.Holder``."""
        facts = self._look()
        return int(facts.moved) if facts.is_awaited else None

    def refuse(self) -> None:
        """Begin nothing more: the server stops."""
        self._stopping = True
        if self._client is not None:
            lib.mmc_client_refuse(self._client)

    def leave(self) -> None:
        """Receive nothing more; ``over`` when all is answered."""
        if self._client is not None:
            lib.mmc_client_leave(self._client)
            self._pump.wake()

    def drop(self) -> None:
        """The connection is gone."""
        client, self._client = self._client, None
        if client is not None:
            self._pump.drop(self._number, client)
        self._over = _nobody_is_told  # no cycle with the connection is left to the collector

    def _look(self) -> Any:
        if self._client is None:
            return ffi.new("struct mmc_client_facts *")
        lib.mmc_client_facts(self._client, self._facts)
        return self._facts

    # ---- what the pump tells ----

    def parted(self, result: int, value: int) -> None:
        """The client is through."""
        broken = result == -errno.EPROTO
        self._over(f"request begins with {value:#x}" if broken else None)

    def failed(self, event: Event) -> None:
        """A hit ended with an error."""
        request = _request_of(event)
        path = self._export.image.path
        what = VERBS[request.command]
        error = StorageError(-event.result, what, path, request.offset, request.length)
        self._fail(Answer(self._pump, event.handle), request, error)

    def asked(self, event: Event) -> None:
        """A request that was no hit."""
        answer = Answer(self._pump, event.handle)
        try:
            self._begin(answer, event)
        except Exception:  # a bug: what it has begun may still use the buffer
            answer.give(b"", lib.MMC_REPLY_LEAK)
            raise

    def _begin(self, answer: Answer, event: Event) -> None:
        request = _request_of(event)
        export = self._export
        problem = SHUTDOWN if self._stopping else refusal(export, self._agreed, request)
        if problem is not None:
            answer.give(self._agreed.error(request, *problem))
            return
        began = time.monotonic()
        try:
            with export.image.reactor.lock:
                if request.command == wire.CMD_BLOCK_STATUS:
                    self._status(answer, request, began)
                elif self._is_hole(request):
                    export.counters.count("read", request.length, 0.0)
                    answer.give(self._agreed.hole(request))
                else:
                    payload = _payload_of(event)
                    completion = begin(export, request, payload)
                    completion.on_done(partial(self._finish, answer, request, began))
        except MmcowError as error:
            self._fail(answer, request, error)

    def _status(self, answer: Answer, request: wire.Request, began: float) -> None:
        out = self._agreed.status(self._export, request)
        seconds = time.monotonic() - began
        self._export.counters.count("block_status", request.length, seconds)
        answer.give(out)

    def _is_hole(self, request: wire.Request) -> bool:
        """Whether a READ meets nothing but zeros; what C calls a hole needs no Python at all."""
        return (
            request.command == wire.CMD_READ
            and self._agreed.structured
            and request.length >= HOLE_LEAST
            and self._export.reads_zero(request.offset, request.length)
        )

    # ---- replies ----

    def _finish(
        self, answer: Answer, request: wire.Request, began: float, completion: Completion[Any]
    ) -> None:
        if completion.error is not None:
            self._fail(answer, request, completion.error)
            return
        seconds = time.monotonic() - began
        self._export.counters.count(VERBS[request.command], request.length, seconds)
        if request.command == wire.CMD_READ and request.length:
            answer.give(self._agreed.data_head(request), lib.MMC_REPLY_BUFFER)
        else:
            answer.give(self._agreed.done(request.cookie))

    def _fail(self, answer: Answer, request: wire.Request, error: BaseException) -> None:
        """Tell the client in words that name no file of this host, and the log all of it."""
        export = self._export
        reason = wire.reason_of(error, export.image.path)
        out = self._agreed.error(request, wire.error_of(error), reason)
        # The kernel may go on with what nobody waits for any more.
        how = lib.MMC_REPLY_LEAK if isinstance(error, Interrupted) else lib.MMC_REPLY_BYTES
        answer.give(out, how)
        export.failed(error)


def _request_of(event: Event) -> wire.Request:
    return wire.Request(event.flags, event.command, event.cookie, event.offset, event.length)


def _payload_of(event: Event) -> memoryview:
    """The pump's buffer for a request; valid until that is answered."""
    if not event.address:
        return _NO_PAYLOAD
    return memoryview(ffi.buffer(ffi.cast("char *", event.address), event.length)).cast("B")
