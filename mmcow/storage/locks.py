# SPDX-License-Identifier: MIT
"""QEMU's image locks: byte ranges that qemu-img, a running QEMU and mmcow all respect.

Byte 100+i held says "I use permission i", byte 200+i "I let no other use permission i". Every
lock is a shared (read) lock of one byte on an open file description, so it goes when the last
descriptor is closed, however the process ends. Taking: lock what is wanted first, then test
whether anybody else holds a byte that contradicts it; that order makes it free of races.

Owns: taking, changing and dropping the bytes of one descriptor.
Never: knows which role wants which bytes (``formats.opening.lock_sets``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

from mmcow.errors import LockedError, StorageError

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from mmcow.storage.host import Identity

USE = 100
DENY = 200
# A lock that no process holds is that of a killed one, whose io_uring the kernel has not yet torn
# down (up to 20 ms measured; requests of it may still be in flight): seconds to wait for that.
GRACE = 0.5

_NAMES = {0: "read", 1: "write", 2: "write unchanged data", 3: "resize"}
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid


def acquire(  # noqa: PLR0917 - internal, called in one place
    descriptor: int,
    path: str,
    identity: Identity,
    held: frozenset[int],
    use: frozenset[int],
    deny: frozenset[int],
) -> frozenset[int]:
    """Change the bytes that ``descriptor`` holds from ``held`` to those of ``use`` and ``deny``.

    Returns the new set. On LockedError the old set is still held.
    """
    end = time.monotonic() + GRACE
    while True:
        try:
            return _acquire(descriptor, path, identity, held, (use, deny))
        except LockedError as error:
            if error.holders or time.monotonic() > end:
                raise
        time.sleep(0.005)


def _acquire(
    descriptor: int,
    path: str,
    identity: Identity,
    held: frozenset[int],
    use_deny: tuple[frozenset[int], frozenset[int]],
) -> frozenset[int]:
    use, deny = use_deny
    wanted = frozenset(USE + bit for bit in use) | frozenset(DENY + bit for bit in deny)
    taken: list[int] = []
    try:
        for byte in sorted(wanted - held):
            _set(descriptor, path, byte, fcntl.F_RDLCK)
            taken.append(byte)
        for bit in sorted(use):
            _test(descriptor, path, identity, DENY + bit, f"{_NAMES.get(bit, bit)} is denied")
        for bit in sorted(deny):
            _test(descriptor, path, identity, USE + bit, f"{_NAMES.get(bit, bit)} is in use")
    except StorageError:
        for byte in taken:
            _set(descriptor, path, byte, fcntl.F_UNLCK)
        raise
    for byte in held - wanted:
        _set(descriptor, path, byte, fcntl.F_UNLCK)
    return wanted


def _set(descriptor: int, path: str, byte: int, kind: int) -> None:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            # Somebody holds a write lock, which QEMU's scheme never takes: a foreign tool.
            raise LockedError(errno.EAGAIN, "lock", path) from error
        raise StorageError(error.errno or errno.EIO, "lock", path) from error


def _test(descriptor: int, path: str, identity: Identity, byte: int, problem: str) -> None:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, "lock", path) from error
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        # We hold the bytes that we want ourselves at this point.
        from mmcow.storage import holders  # noqa: PLC0415 - slow, and only for this error

        found = holders.lock_holders(identity, (byte,), but=(os.getpid(), descriptor))
        who = tuple(holders.describe(pid) for pid in found)
        raise LockedError(errno.EAGAIN, f"lock ({problem})", path, who)
