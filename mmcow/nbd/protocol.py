# SPDX-License-Identifier: MIT
"""The NBD protocol as bytes: numbers, requests parsed, replies built.

Source: NetworkBlockDevice/nbd, doc/proto.md; names are its names. All integers are big-endian.

Owns: the wire. Never: does I/O, knows images.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

from mmcow.errors import LayerFailed, MmcowError, UsageError

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

# Handshake flags (server) and client flags: the same bits.
FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 0x80000001
REP_ERR_POLICY = 0x80000002
REP_ERR_INVALID = 0x80000003
REP_ERR_TLS_REQD = 0x80000005
REP_ERR_UNKNOWN = 0x80000006
REP_ERR_SHUTDOWN = 0x80000007
REP_ERR_TOO_BIG = 0x80000009

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# Transmission flags.
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4

# Which flags each command may carry; anything else is EINVAL. FUA goes with every command: some
# clients set it where nothing is written, and there it means nothing.
KNOWN_FLAGS = {
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_DISC: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}

REPLY_FLAG_DONE = 1 << 0
REPLY_TYPE_NONE = 0
REPLY_TYPE_OFFSET_DATA = 1
REPLY_TYPE_OFFSET_HOLE = 2
REPLY_TYPE_BLOCK_STATUS = 5
REPLY_TYPE_ERROR = 0x8001

STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
# ENOTSUP is missing: only a FAST_ZERO that would not be fast may be answered with it.
_ERRNO = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
}

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")

STRING_MOST = 4096  # the protocol's limit for names
OPTION_MOST = 64 << 10
PAYLOAD_MOST = 32 << 20


class ProtocolError(MmcowError):
    """The client broke the protocol: nothing can follow, the connection is closed."""


class BadOption(MmcowError):
    """An option that is answered with an error reply; the negotiation goes on."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class NotFast(MmcowError):
    """A FAST_ZERO that would not be faster than writing zeros: the client writes instead."""


class Request(NamedTuple):
    """A request of the transmission phase, without its payload."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def greeting() -> bytes:
    """What the server says first."""
    return GREETING.pack(NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)


def parse_request(data: bytes | bytearray | memoryview, at: int = 0) -> Request:
    """The request in ``data`` (28 bytes). ProtocolError where it does not begin like one."""
    magic, flags, command, cookie, offset, length = REQUEST.unpack_from(data, at)
    if magic != REQUEST_MAGIC:
        raise ProtocolError(f"request begins with {magic:#x}, not {REQUEST_MAGIC:#x}")
    return Request(flags, command, cookie, offset, length)


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """One answer to an option."""
    return OPTION_REPLY.pack(REPLY_MAGIC, option, reply, len(data)) + data


def simple_reply(cookie: int, error: int) -> bytes:
    """An answer without payload, or the head of one with it."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(cookie: int, kind: int, length: int, flags: int = REPLY_FLAG_DONE) -> bytes:
    """The head of a structured reply chunk with ``length`` bytes of payload."""
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def block_status(cookie: int, context: int, extents: list[tuple[int, int]], *, done: bool) -> bytes:
    """What one metadata context says: (length, flags) of consecutive ranges."""
    numbers = [number for extent in extents for number in extent]
    payload = struct.pack(f">I{len(numbers)}I", context, *numbers)
    flags = REPLY_FLAG_DONE if done else 0
    return chunk(cookie, REPLY_TYPE_BLOCK_STATUS, len(payload), flags) + payload


def encode_text(text: str) -> bytes:
    """A string for people as the protocol wants it: UTF-8 without NUL, of bounded length."""
    whole = text.replace("\0", "?").encode(errors="replace")
    return whole[:STRING_MOST].decode(errors="ignore").encode()


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """A structured error; the text is for people."""
    message = encode_text(text)
    payload = struct.pack(">IH", error, len(message)) + message
    return chunk(cookie, REPLY_TYPE_ERROR, len(payload)) + payload


def error_of(error: BaseException) -> int:
    """The NBD error for what went wrong below; EIO where it has none of its own."""
    if isinstance(error, NotFast):
        return ENOTSUP
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO.get(error.errno, EIO)
    if isinstance(error, MemoryError):
        return ENOMEM
    if isinstance(error, ValueError):  # UsageError: a range or a mode
        return EINVAL
    return EIO


def reason_of(error: BaseException, name: str) -> str:
    """What a client of disk ``name`` is told of an error besides its number. Errors name files of
    this host, which are none of its business: only what is known to name none is passed on."""
    text = str(error)
    if isinstance(error, NotFast):
        return text
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, LayerFailed):
        return "refused after an earlier failure"
    if isinstance(error, UsageError) and text.startswith(f"{name}: "):  # the engine's, of this disk
        told = text.removeprefix(f"{name}: ")
        return told if "/" not in told else "refused"
    return "failed"


def parse_name(data: bytes, at: int = 0) -> tuple[str, int]:
    """A length-prefixed string in an option; returns it and where it ends."""
    if len(data) < at + 4:
        raise BadOption(REP_ERR_INVALID, "the option is too short for a name")
    (length,) = struct.unpack_from(">I", data, at)
    if length > STRING_MOST:
        raise BadOption(REP_ERR_TOO_BIG, f"a name of {length} bytes is too long")
    end = at + 4 + length
    if len(data) < end:
        raise BadOption(REP_ERR_INVALID, "a name reaches past the option's end")
    return parse_text(data[at + 4 : end]), end


def parse_text(data: bytes) -> str:
    """A string of the client."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadOption(REP_ERR_INVALID, "a name is not UTF-8") from None
    if "\0" in text:
        raise BadOption(REP_ERR_INVALID, "a name contains NUL")
    return text


def parse_info(data: bytes) -> tuple[str, list[int]]:
    """The export name and the information wanted, of OPT_INFO and OPT_GO."""
    name, at = parse_name(data)
    if len(data) < at + 2:
        raise BadOption(REP_ERR_INVALID, "the option is too short for its requests")
    (count,) = struct.unpack_from(">H", data, at)
    if len(data) != at + 2 + 2 * count:
        raise BadOption(REP_ERR_INVALID, f"the option does not hold {count} requests")
    return name, list(struct.unpack_from(f">{count}H", data, at + 2))


def parse_contexts(data: bytes) -> tuple[str, list[str]]:
    """The export name and the queries of OPT_LIST_ and OPT_SET_META_CONTEXT."""
    name, at = parse_name(data)
    if len(data) < at + 4:
        raise BadOption(REP_ERR_INVALID, "the option is too short for its queries")
    (count,) = struct.unpack_from(">I", data, at)
    at += 4
    if count > (len(data) - at) // 4:
        raise BadOption(REP_ERR_INVALID, f"the option does not hold {count} queries")
    queries = []
    for _ in range(count):
        query, at = parse_name(data, at)
        queries.append(query)
    if at != len(data):
        raise BadOption(REP_ERR_INVALID, "bytes follow the last query")
    return name, queries
