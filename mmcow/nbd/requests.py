# SPDX-License-Identifier: MIT
"""What a request asks, whether it may, and how it is answered; the same for every connection.

Owns: the refusals, the way from a command to the export's verb, the replies' bytes as agreed.
Never: receives or sends, keeps state.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow.nbd import protocol as wire

if TYPE_CHECKING:
    from mmcow.nbd.export import Export
    from mmcow.nbd.handshake import Handshake
    from mmcow.tasks import Completion

# Whether a read meets nothing but zeros is looked up before it is begun; a small one costs less
# read than looked up.
HOLE_LEAST = 32 << 10

SHUTDOWN = (wire.ESHUTDOWN, "the server is being shut down")
VERBS = {
    wire.CMD_READ: "read",
    wire.CMD_WRITE: "write",
    wire.CMD_FLUSH: "flush",
    wire.CMD_TRIM: "trim",
    wire.CMD_CACHE: "cache",
    wire.CMD_WRITE_ZEROES: "write_zeroes",
    wire.CMD_BLOCK_STATUS: "block_status",
}
_CHANGES = frozenset((wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES))
_READ_HEAD = struct.Struct(">IHHQIQ")  # chunk head and the offset of OFFSET_DATA


class Agreed(NamedTuple):
    """What was negotiated with one client, and the replies that follow from it."""

    structured: bool
    contexts: list[tuple[int, str]]

    @classmethod
    def of(cls, handshake: Handshake) -> Agreed:
        """The outcome of a negotiation."""
        return cls(handshake.structured, handshake.contexts)

    def done(self, cookie: int) -> bytes:
        """An answer without payload."""
        if self.structured:
            return wire.chunk(cookie, wire.REPLY_TYPE_NONE, 0)
        return wire.simple_reply(cookie, 0)

    def data_head(self, request: wire.Request) -> bytes:
        """What goes before the payload of a READ."""
        if not self.structured:
            return wire.simple_reply(request.cookie, 0)
        return _READ_HEAD.pack(
            wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.REPLY_TYPE_OFFSET_DATA,
            request.cookie, 8 + request.length, request.offset,
        )  # fmt: skip

    def hole(self, request: wire.Request) -> bytes:
        """The answer to a READ of nothing but zeros; only where structured replies were agreed."""
        payload = struct.pack(">QI", request.offset, request.length)
        return wire.chunk(request.cookie, wire.REPLY_TYPE_OFFSET_HOLE, len(payload)) + payload

    def error(self, request: wire.Request, error: int, text: str) -> bytes:
        """An error; the text is for people."""
        if self.structured:
            return wire.error_chunk(request.cookie, error, text)
        return wire.simple_reply(request.cookie, error)

    def status(self, export: Export, request: wire.Request) -> bytes:
        """The answer to BLOCK_STATUS: every context agreed on."""
        one = bool(request.flags & wire.CMD_FLAG_REQ_ONE)
        out = bytearray()
        for position, (number, context) in enumerate(self.contexts):
            extents = export.extents(request.offset, request.length, context, one=one)
            last = position == len(self.contexts) - 1
            out += wire.block_status(request.cookie, number, extents, done=last)
        return bytes(out)


def refusal(export: Export, agreed: Agreed, request: wire.Request) -> tuple[int, str] | None:
    """Why a request cannot even be begun."""
    flags, command = request.flags, request.command
    known = wire.KNOWN_FLAGS.get(command)
    if known is None:
        return wire.EINVAL, f"unknown command {command}"
    if flags and (flags & ~known or (flags & wire.CMD_FLAG_DF and not agreed.structured)):
        return wire.EINVAL, f"flags {flags:#x} do not go with command {command}"
    if command in _CHANGES and export.read_only:
        return wire.EPERM, "the export is read-only"
    return _range_refusal(export.size, agreed, request)


def _range_refusal(size: int, agreed: Agreed, request: wire.Request) -> tuple[int, str] | None:
    _, command, _, offset, length = request
    error, text = wire.EINVAL, ""
    if command == wire.CMD_DISC:
        pass
    elif offset + length > size:
        text = f"{offset}+{length} is beyond {size}"
        if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES):
            error = wire.ENOSPC
    elif command in (wire.CMD_READ, wire.CMD_WRITE):
        if length > wire.PAYLOAD_MOST:
            text = f"{VERBS[command]} of {length} bytes; the most is {wire.PAYLOAD_MOST}"
    elif command == wire.CMD_FLUSH:
        if offset or length:
            text = "flush takes no range"
    elif command == wire.CMD_BLOCK_STATUS and not (agreed.contexts and length):
        text = "no metadata context was agreed, or the range is empty"
    return (error, text) if text else None


def begin(export: Export, request: wire.Request, payload: memoryview) -> Completion[Any]:
    """Hand a request to the engine. ``payload``: what a WRITE writes or a READ fills. Under the
    reactor's lock."""
    flags, command, _, offset, length = request
    durable = bool(flags & wire.CMD_FLAG_FUA)
    if command == wire.CMD_READ:
        return export.read(offset, payload)
    if command == wire.CMD_WRITE:
        return export.write(offset, payload, durable=durable)
    if command == wire.CMD_FLUSH:
        return export.flush()
    if command == wire.CMD_TRIM:
        return export.trim(offset, length, durable=durable)
    if command == wire.CMD_WRITE_ZEROES:
        return export.write_zeroes(
            offset,
            length,
            may_unmap=not flags & wire.CMD_FLAG_NO_HOLE,
            fast=bool(flags & wire.CMD_FLAG_FAST_ZERO),
            durable=durable,
        )
    return export.cache()
