# SPDX-License-Identifier: MIT
"""An open file on Linux, and what a name stands for; cheap to import.

Owns: descriptors, and the translation of errno into errors.
Never: decides anything (``storage.host`` says what each method means).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat as stat_bits

from mmcow import native
from mmcow.errors import LockedError, StorageError, SyncFailed
from mmcow.native import lib
from mmcow.ranges import align_up
from mmcow.storage import locks
from mmcow.storage.facts import Alignment, Identity, Stat

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import NoReturn

    from mmcow.storage.host import Buffer

_BLKROGET = 0x125E  # linux/fs.h; on a few machines (POWER, MIPS) it is another number
_KINDS = {stat_bits.S_IFREG: "file", stat_bits.S_IFBLK: "block", stat_bits.S_IFDIR: "directory"}


def fail(error: OSError, what: str, path: str, *where: int) -> NoReturn:
    """Raise the system's error as ours."""
    raise StorageError(error.errno or errno.EIO, what, path, *where) from error


def stat_of(result: os.stat_result, size: int) -> Stat:
    """The facts of one ``stat`` call; ``size`` is the caller's to know."""
    kind = _KINDS.get(stat_bits.S_IFMT(result.st_mode), "other")
    if kind == "block":
        identity = Identity(-1, result.st_rdev)  # two nodes of one device are the same disk
    else:
        identity = Identity(result.st_dev, result.st_ino)
    return Stat(kind, size, identity, int(result.st_mtime), result.st_blocks * 512)


class LinuxHandle:
    """A descriptor. See ``storage.host.Handle``."""

    def __init__(self, path: str, descriptor: int, *, writable: bool, direct: bool) -> None:
        facts = stat_of(os.fstat(descriptor), 0)
        self.path = path
        self.writable = writable
        self.direct = direct
        self.kind = facts.kind
        self.identity = facts.identity
        self.descriptor = descriptor
        self._locked: frozenset[int] = frozenset()
        self.alignment = self._find_alignment() if direct else Alignment(1, 1)

    def _find_alignment(self) -> Alignment:
        known = native.direct_alignment(self.descriptor)
        if known is not None:
            memory, offset = known
            if offset == 0:  # the kernel says: no direct I/O on this file
                raise StorageError(errno.EINVAL, "open with O_DIRECT", self.path)
            return Alignment(memory, offset)
        # statx does not tell (before Linux 6.1, some file systems): try a sector, else a page.
        try:
            os.preadv(self.descriptor, [native.aligned(512, 4096)], 0)
        except OSError:
            return Alignment(4096, 4096)
        return Alignment(4096, 512)

    def size(self) -> int:
        try:
            if self.kind == "block":
                return os.lseek(self.descriptor, 0, os.SEEK_END)
            return os.fstat(self.descriptor).st_size
        except OSError as error:
            fail(error, "stat", self.path)

    def mtime(self) -> int:
        return int(os.fstat(self.descriptor).st_mtime)

    def allocated(self) -> int:
        return os.fstat(self.descriptor).st_blocks * 512

    def read_at(self, offset: int, length: int) -> bytes:
        if self.direct:
            return self._read_direct(offset, length)
        parts = []
        try:
            while length > 0:
                part = os.pread(self.descriptor, length, offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            fail(error, "read", self.path, offset, length)
        return b"".join(parts)

    def _read_direct(self, offset: int, length: int) -> bytes:
        whole = align_up(length, self.alignment.offset)  # up to the odd end of a file
        buffer = native.aligned(whole, max(4096, self.alignment.memory))
        try:
            return bytes(buffer[: min(os.preadv(self.descriptor, [buffer], offset), length)])
        except OSError as error:
            fail(error, "read", self.path, offset, length)

    def write_at(self, offset: int, data: Buffer) -> None:
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self.descriptor, left, offset)
                if written == 0:
                    raise OSError(errno.EIO, "a write made no progress")  # noqa: TRY301
                left = left[written:]
                offset += written
        except OSError as error:
            fail(error, "write", self.path, offset, len(left))

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            fail(error, f"truncate to {size}", self.path)

    def reserve(self, offset: int, length: int) -> None:
        if length == 0:
            return
        rc = lib.mmc_fallocate(self.descriptor, 0x01, offset, length)
        if rc not in (-errno.EOPNOTSUPP, -errno.ENOSYS):
            native.check(rc, "fallocate", self.path, offset)

    def datasync(self) -> None:
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise SyncFailed(error.errno or errno.EIO, "fdatasync", self.path) from error

    def sync(self) -> None:
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise SyncFailed(error.errno or errno.EIO, "fsync", self.path) from error

    def drop_cache(self) -> None:
        try:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # advice

    def next_data(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_DATA)

    def next_hole(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_HOLE)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self.descriptor, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size()
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # no holes known: all data
                return offset if whence == os.SEEK_DATA else self.size()
            fail(error, "lseek", self.path, offset)

    def lock(self, use: frozenset[int], deny: frozenset[int]) -> None:
        self._locked = locks.acquire(
            self.descriptor, self.path, self.identity, self._locked, use, deny
        )

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class FileHost:
    """The part of the host that opens files and looks at them. See ``storage.host.Host``."""

    def open(self, path: str, *, write: bool, direct: bool) -> LinuxHandle:
        kind = self.stat(path).kind
        self._refuse_kind(path, kind)
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if write else os.O_RDONLY)
        if write and kind == "block":
            flags |= os.O_EXCL  # EBUSY where a mounted file system, RAID or swap owns the device
        try:
            descriptor = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno == errno.EBUSY and flags & os.O_EXCL:
                raise _busy(path) from error
            refused = direct and error.errno == errno.EINVAL
            fail(error, "open with O_DIRECT" if refused else "open", path)
        try:
            handle = LinuxHandle(path, descriptor, writable=write, direct=direct)
            self._refuse_kind(path, handle.kind)  # it may have been swapped since the stat
            if write and handle.kind == "block":
                _refuse_read_only(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return handle

    @staticmethod
    def _refuse_kind(path: str, kind: str) -> None:
        if kind == "directory":
            raise StorageError(errno.EISDIR, "open", path)
        if kind == "other":
            what = "open (it is neither a regular file nor a block device)"
            raise StorageError(errno.ENOTBLK, what, path)

    def stat(self, path: str) -> Stat:
        try:
            result = os.stat(path)
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
            raise StorageError(number, "open", path) from error
        return stat_of(result, result.st_size)


def _refuse_read_only(path: str, descriptor: int) -> None:
    """The kernel opens a read-only device for writing, and refuses the writes (BLKROGET)."""
    flag = bytearray(4)
    try:
        fcntl.ioctl(descriptor, _BLKROGET, flag)
    except OSError:
        return  # not to be known: the writes will tell
    if any(flag):
        raise StorageError(errno.EACCES, "open for writing (the device is read-only)", path)


def _busy(path: str) -> StorageError:
    """Why a block device cannot be had alone: named where the kernel lets it be known."""
    try:
        identity = stat_of(os.stat(path), 0).identity
    except OSError:
        return StorageError(errno.EBUSY, "open", path)
    from mmcow.storage import holders  # noqa: PLC0415 - slow, and only for this error

    use = holders.device_use(identity)
    if use is not None:
        return StorageError(errno.EBUSY, f"open (the device is {use})", path)
    who = tuple(holders.describe(pid) for pid in holders.device_writers(identity))
    if who:
        return LockedError(errno.EBUSY, "open", path, who)
    return StorageError(errno.EBUSY, "open", path)
