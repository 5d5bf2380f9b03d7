# SPDX-License-Identifier: MIT
"""The negotiation with one client, from greeting to the first request.

Owns: which options are answered how; what was agreed.
Never: does I/O: bytes of the client go in, bytes for it come out, events tell the connection what
to do (go on to transmission, start TLS, close).
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING

from mmcow.nbd import protocol as wire

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmcow.nbd.export import Export

_CONTEXTS = (wire.BASE_ALLOCATION, wire.ALLOCATION_DEPTH)
# Options of one client, beside those that ask about each export (qemu-nbd --list: two of each, in
# one connection). Ordinary clients send less than ten; without it one that only asks and asks costs
# the loop its time until the negotiation's has run out, and as often as it connects.
OPTIONS_MOST = 1024
OPTIONS_OF_EXPORT = 8
# Options that are refused while the server stops, until the client is left: more than any needs to
# take the hint. Without it a crowd that asks on and on keeps the loop from coming to the end.
REFUSALS_MOST = 32


class Step(Enum):
    """What the connection does next."""

    MORE = "more"  # needs more bytes
    TRANSMIT = "transmit"
    TLS = "tls"  # send what there is, then encrypt, then begin anew
    CLOSE = "close"


class Handshake:
    """One negotiation. ``tls_required``: only STARTTLS and ABORT are answered before TLS is up;
    without it TLS is not offered."""

    def __init__(self, exports: Mapping[str, Export], *, tls_required: bool) -> None:
        self.structured = False
        self.export: Export | None = None
        self.contexts: list[tuple[int, str]] = []
        self._contexts_of: str | None = None
        self._exports = exports
        self._tls_required = tls_required
        self._encrypted = False
        self._no_zeroes = False
        self._fixed = False
        self._greeted = False
        self._refuses = False
        self._refusals = 0
        self._options_left = OPTIONS_MOST + OPTIONS_OF_EXPORT * len(exports)
        self._in = bytearray()
        self._out = bytearray(wire.greeting())

    def take_output(self) -> bytes:
        """Bytes to send now."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def rest(self) -> bytes:
        """Bytes that came behind the negotiation: the first requests."""
        return bytes(self._in)

    def encrypted(self) -> None:
        """TLS is up: all that was agreed before it is void."""
        self._encrypted = True
        self.structured = False
        self.contexts = []

    def refuse(self) -> None:
        """The server stops: every option from now on, the one that is coming too, is refused."""
        self._refuses = True

    def feed(self, data: bytes | memoryview) -> Step:
        """Take bytes of the client; answers collect in ``take_output``. ProtocolError: close."""
        self._in += data
        if not self._greeted and not self._take_client_flags():
            return Step.MORE
        while len(self._in) >= wire.OPTION.size:
            magic, option, length = wire.OPTION.unpack_from(self._in)
            if magic != wire.IHAVEOPT:
                raise wire.ProtocolError(f"option begins with {magic:#x}")
            if length > wire.OPTION_MOST:
                raise wire.ProtocolError(f"option {option} of {length} bytes")
            if len(self._in) < wire.OPTION.size + length:
                return Step.MORE
            body = bytes(self._in[wire.OPTION.size : wire.OPTION.size + length])
            del self._in[: wire.OPTION.size + length]
            self._count_option()
            step = self._option(option, body)
            if step is not Step.MORE:
                return step
        return Step.MORE

    def _count_option(self) -> None:
        if not self._options_left:
            most = OPTIONS_MOST + OPTIONS_OF_EXPORT * len(self._exports)
            raise wire.ProtocolError(f"more than {most} options")
        self._options_left -= 1

    def _take_client_flags(self) -> bool:
        if len(self._in) < wire.CLIENT_FLAGS.size:
            return False
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._in)
        del self._in[: wire.CLIENT_FLAGS.size]
        if flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
            raise wire.ProtocolError(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & wire.FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.FLAG_NO_ZEROES)
        self._greeted = True
        return True

    def _option(self, option: int, body: bytes) -> Step:
        if not self._fixed and option != wire.OPT_EXPORT_NAME:
            raise wire.ProtocolError(f"option {option} of a client without fixed newstyle")
        if self._refuses:
            return self._refuse_option(option)
        if self._tls_required and not self._encrypted:
            return self._option_before_tls(option, body)
        if option == wire.OPT_EXPORT_NAME:
            return self._export_name(body)
        try:
            return self._negotiate(option, body)
        except wire.BadOption as error:
            self._reply(option, error.reply, wire.encode_text(error.text))
            return Step.MORE

    def _refuse_option(self, option: int) -> Step:
        """The client has to leave; it may ask on for a while until it does."""
        if option == wire.OPT_ABORT:
            return self._abort()
        if option == wire.OPT_EXPORT_NAME:
            return Step.CLOSE  # this option has no error reply
        self._reply(option, wire.REP_ERR_SHUTDOWN, b"the server is stopping")
        self._refusals += 1
        return Step.CLOSE if self._refusals == REFUSALS_MOST else Step.MORE

    def _option_before_tls(self, option: int, body: bytes) -> Step:
        if option == wire.OPT_ABORT:
            return self._abort()
        if option == wire.OPT_EXPORT_NAME:
            return Step.CLOSE  # this option has no error reply
        if option != wire.OPT_STARTTLS:
            self._reply(option, wire.REP_ERR_TLS_REQD, b"this server wants TLS first")
            return Step.MORE
        if body:
            self._reply(option, wire.REP_ERR_INVALID, b"STARTTLS takes no data")
            return Step.MORE
        if self._in:  # in clear, and taken for encrypted it could be anybody's
            raise wire.ProtocolError("bytes came behind STARTTLS before TLS began")
        self._reply(option, wire.REP_ACK)
        return Step.TLS

    def _negotiate(self, option: int, body: bytes) -> Step:
        if option == wire.OPT_ABORT:
            return self._abort()
        if option in (wire.OPT_INFO, wire.OPT_GO):
            return self._info(option, body)
        if option == wire.OPT_LIST:
            self._list(body)
        elif option == wire.OPT_STRUCTURED_REPLY:
            if body:
                raise wire.BadOption(wire.REP_ERR_INVALID, "STRUCTURED_REPLY takes no data")
            self.structured = True
            self._reply(option, wire.REP_ACK)
        elif option in (wire.OPT_LIST_META_CONTEXT, wire.OPT_SET_META_CONTEXT):
            self._meta_contexts(option, body)
        elif option == wire.OPT_STARTTLS:
            reply = wire.REP_ERR_INVALID if self._encrypted else wire.REP_ERR_POLICY
            text = "TLS is on already" if self._encrypted else "this server has no certificate"
            raise wire.BadOption(reply, text)
        else:
            raise wire.BadOption(wire.REP_ERR_UNSUP, f"option {option} is not known here")
        return Step.MORE

    def _abort(self) -> Step:
        self._reply(wire.OPT_ABORT, wire.REP_ACK)
        return Step.CLOSE

    def _list(self, body: bytes) -> None:
        if body:
            raise wire.BadOption(wire.REP_ERR_INVALID, "LIST takes no data")
        for name in self._exports:
            encoded = name.encode()
            data = struct.pack(">I", len(encoded)) + encoded
            self._reply(wire.OPT_LIST, wire.REP_SERVER, data)
        self._reply(wire.OPT_LIST, wire.REP_ACK)

    def _find(self, name: str) -> Export:
        export = self._exports.get(name)
        if export is None and not name and len(self._exports) == 1:
            export = next(iter(self._exports.values()))  # one disk: the default export
        if export is None:
            raise wire.BadOption(wire.REP_ERR_UNKNOWN, f"there is no export {name[:256]!r}")
        return export

    def _export_name(self, body: bytes) -> Step:
        try:
            export = self._find(wire.parse_text(body))
        except wire.BadOption:
            return Step.CLOSE  # this option has no error reply
        self._out += struct.pack(">QH", export.size, export.flags(structured=self.structured))
        if not self._no_zeroes:
            self._out += bytes(124)
        self._agree(export)
        return Step.TRANSMIT

    def _info(self, option: int, body: bytes) -> Step:
        name, wanted = wire.parse_info(body)
        export = self._find(name)
        flags = export.flags(structured=self.structured)
        self._reply(
            option, wire.REP_INFO, struct.pack(">HQH", wire.INFO_EXPORT, export.size, flags)
        )
        sizes = struct.pack(">HIII", wire.INFO_BLOCK_SIZE, *export.block_sizes())
        self._reply(option, wire.REP_INFO, sizes)
        if wire.INFO_NAME in wanted:
            encoded = struct.pack(">H", wire.INFO_NAME) + export.name.encode()
            self._reply(option, wire.REP_INFO, encoded)
        self._reply(option, wire.REP_ACK)
        if option == wire.OPT_INFO:
            return Step.MORE
        self._agree(export)
        return Step.TRANSMIT

    def _agree(self, export: Export) -> None:
        self.export = export
        if self._contexts_of != export.name:
            self.contexts = []  # they were agreed for another export

    def _meta_contexts(self, option: int, body: bytes) -> None:
        setting = option == wire.OPT_SET_META_CONTEXT
        if setting:
            self.contexts = []  # also where it fails
        if not self.structured:
            raise wire.BadOption(wire.REP_ERR_INVALID, "structured replies come first")
        name, queries = wire.parse_contexts(body)
        export = self._find(name)
        chosen = [
            (number, context)
            for number, context in enumerate(_CONTEXTS)
            if _selects(queries, context, setting)
        ]
        for number, context in chosen:
            data = struct.pack(">I", number if setting else 0) + context.encode()
            self._reply(option, wire.REP_META_CONTEXT, data)
        if setting:
            self.contexts = chosen
            self._contexts_of = export.name
        self._reply(option, wire.REP_ACK)

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._out += wire.option_reply(option, reply, data)


def _selects(queries: list[str], context: str, setting: bool) -> bool:
    """Whether a query asks for ``context``; in LIST a bare namespace ("base:") asks for all of it,
    and no query at all asks for everything."""
    if setting:
        return context in queries
    return not queries or context in queries or context.partition(":")[0] + ":" in queries
