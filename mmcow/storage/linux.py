# SPDX-License-Identifier: MIT
"""The host seam over Linux: system calls from Python where one call is enough, the C helper
for batches, mappings and what Python has no call for.

Owns: descriptors, the translation of errno into errors, the packing of requests for C.
Never: decides anything (``storage.host`` says what each method means).
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from mmcow import native
from mmcow.errors import ClosedError, LockedError, StorageError, SyncFailed, UsageError
from mmcow.native import ffi, lib
from mmcow.ranges import align_up
from mmcow.storage import holders, locks
from mmcow.storage.host import Alignment, Buffer, Handle, Identity, Stat, View
from mmcow.storage.path import NativePath
from mmcow.tasks import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS = {stat_bits.S_IFREG: "file", stat_bits.S_IFBLK: "block", stat_bits.S_IFDIR: "directory"}
_CREATE_MODE = 0o644


def _raise(error: OSError, what: str, path: str, *where: int) -> NoReturn:
    raise StorageError(error.errno or errno.EIO, what, path, *where) from error


def _stat_of(result: os.stat_result, size: int) -> Stat:
    kind = _KINDS.get(stat_bits.S_IFMT(result.st_mode), "other")
    if kind == "block":
        identity = Identity(-1, result.st_rdev)  # two nodes of one device are the same disk
    else:
        identity = Identity(result.st_dev, result.st_ino)
    return Stat(kind, size, identity, int(result.st_mtime), result.st_blocks * 512)


def _busy(path: str) -> StorageError:
    """Why a block device cannot be had alone: named where the kernel lets it be known."""
    try:
        identity = _stat_of(os.stat(path), 0).identity
    except OSError:
        return StorageError(errno.EBUSY, "open", path)
    use = holders.device_use(identity)
    if use is not None:
        return StorageError(errno.EBUSY, f"open (the device is {use})", path)
    who = tuple(holders.describe(pid) for pid in holders.device_writers(identity))
    if who:
        return LockedError(errno.EBUSY, "open", path, who)
    return StorageError(errno.EBUSY, "open", path)


class LinuxHandle:
    """A descriptor. See ``storage.host.Handle``."""

    def __init__(self, path: str, descriptor: int, *, writable: bool, direct: bool) -> None:
        facts = _stat_of(os.fstat(descriptor), 0)
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
            _raise(error, "stat", self.path)

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
            _raise(error, "read", self.path, offset, length)
        return b"".join(parts)

    def _read_direct(self, offset: int, length: int) -> bytes:
        whole = align_up(length, self.alignment.offset)  # up to the odd end of a file
        buffer = native.aligned(whole, max(4096, self.alignment.memory))
        try:
            return bytes(buffer[: min(os.preadv(self.descriptor, [buffer], offset), length)])
        except OSError as error:
            _raise(error, "read", self.path, offset, length)

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
            _raise(error, "write", self.path, offset, len(left))

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            _raise(error, f"truncate to {size}", self.path)

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
            _raise(error, "lseek", self.path, offset)

    def lock(self, use: frozenset[int], deny: frozenset[int]) -> None:
        self._locked = locks.acquire(
            self.descriptor, self.path, self.identity, self._locked, use, deny
        )

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class NativeView:
    """A C view. See ``storage.host.View``."""

    MOST_RUNS = 256

    def __init__(self, pointer: Any, path: str, unit: int) -> None:
        self._view: Any = pointer
        self._path = path
        self._unit = unit
        self._runs = ffi.new("struct mmc_run[]", self.MOST_RUNS)
        self._run_values = memoryview(ffi.buffer(self._runs)).cast("B").cast("Q")
        self.mapped = lib.mmc_view_shared(pointer) != 0

    @property
    def pointer(self) -> Any:
        """For tables that C reads."""
        return self._view

    def size(self) -> int:
        return int(lib.mmc_view_size(self._view))

    def set_size(self, size: int) -> bool:
        rc = lib.mmc_view_set_size(self._view, size)
        if rc == -errno.ENOSPC:
            return False
        native.check(rc, "resize of the mapped metadata", self._path)
        return True

    def shared_address(self) -> int:
        """Where msync finds the file's pages."""
        return int(lib.mmc_view_shared(self._view))

    def load(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        rc = lib.mmc_view_load(self._view, offset, ffi.from_buffer(data), length)
        native.check(rc, "read of mapped metadata", self._path, offset)
        return bytes(data)

    def store(self, offset: int, data: bytes) -> None:
        rc = lib.mmc_view_store(self._view, offset, ffi.from_buffer(data), len(data))
        native.check(rc, "change of mapped metadata", self._path, offset)

    def fill(self, offset: int, data: bytes) -> None:
        """Put bytes read from the file in place, without marking them dirty."""
        rc = lib.mmc_view_fill(self._view, offset, ffi.from_buffer(data), len(data))
        native.check(rc, "change of mapped metadata", self._path, offset)

    def bit_runs(self, base: int, first: int, count: int, most: int) -> list[tuple[int, int, int]]:
        most = min(most, self.MOST_RUNS)
        n = lib.mmc_view_bit_runs(self._view, base, first, count, self._runs, most)
        if n == 1:
            one = self._run_values
            return [(one[0], one[1], one[2])]
        native.check(n, "scan of mapped metadata", self._path, base + first // 8)
        values = self._run_values[: 3 * n].tolist()
        return list(zip(values[0::3], values[1::3], values[2::3], strict=True))

    def bits_write(self, base: int, first: int, count: int, value: int) -> None:
        rc = lib.mmc_view_bits_write(self._view, base, first, count, value)
        native.check(rc, "change of mapped metadata", self._path, base + first // 8)

    def bits_count(self, base: int, first: int, count: int) -> int:
        n = int(lib.mmc_view_bits_count(self._view, base, first, count))
        native.check(min(n, 0), "scan of mapped metadata", self._path, base + first // 8)
        return n

    def dirty(self, offset: int, length: int) -> int:
        return int(lib.mmc_view_dirty(self._view, offset, length))

    def mark(self, offset: int, length: int) -> None:
        lib.mmc_view_mark(self._view, offset, length)

    def snapshot(self, offset: int, length: int) -> list[tuple[int, memoryview]]:
        taken: list[tuple[int, memoryview]] = []
        try:
            while units := self.dirty(offset, length):
                copy = native.aligned(units * self._unit, 4096)
                n = lib.mmc_view_snapshot(
                    self._view, offset, length, self._runs, self.MOST_RUNS,
                    ffi.from_buffer(copy), len(copy),
                )  # fmt: skip
                native.check(n, "copy of mapped metadata", self._path, offset)
                values = self._run_values[: 3 * n].tolist()
                for start, count, position in zip(
                    values[0::3], values[1::3], values[2::3], strict=True
                ):
                    taken.append((start, copy[position : position + count]))
        except StorageError:
            for start, data in taken:
                self.mark(start, len(data))
            raise
        return taken

    def release(self) -> None:
        lib.mmc_view_release(self._view)

    def close(self) -> None:
        view, self._view = self._view, None
        self.__class__ = _ClosedView
        lib.mmc_view_close(view)

    def __del__(self) -> None:
        # Not ffi.gc: the collector of cycles would free the view while a coroutine that it
        # finalises later still asks it.
        self.close()


class _ClosedView(NativeView):
    """What a view is once closed: an error for whoever still asks, never freed memory."""

    @property
    def _view(self) -> Any:
        raise ClosedError(self._path)

    def close(self) -> None:
        """Nothing is left to close."""


class Request(Completion[int]):
    """One request to the kernel."""

    __slots__ = ("code", "handle", "length", "offset")

    def __init__(self, handle: LinuxHandle, code: int, offset: int, length: int, keep: Any) -> None:
        super().__init__(keep)
        self.handle = handle
        self.code = code
        self.offset = offset
        self.length = length


_READ, _WRITE = lib.MMC_READ, lib.MMC_WRITE
_READV, _WRITEV = lib.MMC_READV, lib.MMC_WRITEV
_DATASYNC, _FALLOCATE, _MSYNC = lib.MMC_DATASYNC, lib.MMC_FALLOCATE, lib.MMC_MSYNC
_CHANGES = frozenset((_WRITE, _WRITEV, _FALLOCATE))
_WHAT = {
    _READ: "read", _READV: "read", _WRITE: "write", _WRITEV: "write",
    _DATASYNC: "fdatasync", _FALLOCATE: "fallocate", _MSYNC: "msync",
}  # fmt: skip
_OP = struct.Struct("<QQQQiiii")
_DONE = struct.Struct("<Qq")
_IOVEC = struct.Struct("@PN")

BACKENDS = {
    "auto": lib.MMC_BACKEND_AUTO,
    "io_uring": lib.MMC_BACKEND_URING,
    "threads": lib.MMC_BACKEND_POOL,
}
_BACKEND_NAMES = {lib.MMC_BACKEND_URING: "io_uring", lib.MMC_BACKEND_POOL: "threads"}


class NativeQueue:
    """The C queue. See ``storage.host.IOQueue``; ``submit`` may be called beside a ``turn``."""

    DEPTH = 256
    MOST_DONE = 256

    def __init__(self, backend: str = "auto", *, hits: bool = True, depth: int = DEPTH) -> None:
        self._hits = hits
        error = ffi.new("int *")
        pointer = lib.mmc_queue_open(BACKENDS[backend], depth, error)
        if pointer == ffi.NULL:
            raise StorageError(-error[0], f"start of the I/O queue ({backend})", "mmcow")
        self._queue: Any = pointer
        self.backend = _BACKEND_NAMES[lib.mmc_queue_backend(pointer)]
        self._in_flight: dict[int, Request] = {}
        self._pending = bytearray()
        self._pending_lock = threading.Lock()
        self._token = 0
        self._done = ffi.new("struct mmc_done[]", self.MOST_DONE)
        self._done_bytes = memoryview(ffi.buffer(self._done))

    @property
    def pointer(self) -> Any:
        """For the helper, which may turn it as well: see ``taken``."""
        return self._queue

    @property
    def busy(self) -> bool:
        return bool(self._in_flight) or lib.mmc_queue_busy(self._queue) > 0

    def path(self) -> NativePath | None:
        return NativePath(self._queue) if self._hits else None

    def fileno(self) -> int:
        return int(lib.mmc_queue_fd(self._queue))

    def read(self, handle: LinuxHandle, offset: int, buffers: Sequence[Any]) -> Request:
        return self._transfer(_READ, handle, offset, buffers)

    def write(self, handle: LinuxHandle, offset: int, buffers: Sequence[Any]) -> Request:
        return self._transfer(_WRITE, handle, offset, buffers)

    def _transfer(
        self, code: int, handle: LinuxHandle, offset: int, buffers: Sequence[Any]
    ) -> Request:
        if len(buffers) == 1:
            buffer = buffers[0]
            length = len(buffer)
            request = Request(handle, code, offset, length, buffer)
            self._add(request, offset, length, native.address_of(buffer), 0)
            return request
        vector = b"".join(_IOVEC.pack(native.address_of(b), len(b)) for b in buffers)
        length = sum(len(b) for b in buffers)
        code = _READV if code == _READ else _WRITEV
        request = Request(handle, code, offset, length, (vector, buffers))
        self._add(request, offset, len(buffers), native.address_of(vector), 0)
        return request

    def datasync(self, handle: LinuxHandle) -> Request:
        request = Request(handle, _DATASYNC, 0, 0, None)
        self._add(request, 0, 0, 0, 0)
        return request

    def fallocate(self, handle: LinuxHandle, mode: int, offset: int, length: int) -> Request:
        request = Request(handle, _FALLOCATE, offset, length, None)
        self._add(request, offset, length, 0, mode)
        return request

    def msync(self, handle: LinuxHandle, view: NativeView, offset: int, length: int) -> Request:
        request = Request(handle, _MSYNC, offset, length, view)
        self._add(request, 0, length, view.shared_address() + offset, 0)
        return request

    def _add(self, request: Request, offset: int, length: int, address: int, mode: int) -> None:
        token = self._token = self._token + 1
        self._in_flight[token] = request
        op = _OP.pack(
            token, offset, length, address, request.handle.descriptor, request.code, mode, 0
        )
        with self._pending_lock:
            self._pending += op

    def changes_in_flight(self, handle: LinuxHandle, start: int, end: int) -> list[Completion[Any]]:
        # A copy: the thread that waits in ``turn`` takes out what is done meanwhile.
        return [
            r
            for r in list(self._in_flight.values())
            if r.handle is handle
            and r.code in _CHANGES
            and r.offset < end
            and start < r.offset + r.length
        ]

    def submit(self) -> None:
        pending, count = self._take_pending()
        if not count:
            return
        ops = ffi.from_buffer("struct mmc_op[]", pending)
        n = lib.mmc_queue_turn(self._queue, ops, count, ffi.NULL, 0, 0)
        if n < 0 and n != -errno.EINTR:
            self.deliver(self._refuse(pending, n))

    def turn(self, wait: bool) -> list[tuple[Completion[Any], int]]:
        pending, count = self._take_pending()
        if not count and not self.busy:
            return []
        ops = ffi.from_buffer("struct mmc_op[]", pending) if count else ffi.NULL
        n = lib.mmc_queue_turn(
            self._queue, ops, count, self._done, self.MOST_DONE, -1 if wait else 0
        )
        if n == -errno.EINTR:
            return []  # the interpreter runs the signal's handler on the way back
        if n < 0:
            return self._refuse(pending, n)
        return self.taken(self._done_bytes, n)

    def taken(self, done: memoryview, count: int) -> list[tuple[Completion[Any], int]]:
        """What belongs to the results (``struct mmc_done[]``) that a turn in C has collected."""
        in_flight = self._in_flight
        done = done[: count * _DONE.size]
        return [(in_flight.pop(token), result) for token, result in _DONE.iter_unpack(done)]

    def _take_pending(self) -> tuple[bytearray, int]:
        with self._pending_lock:
            pending, self._pending = self._pending, bytearray()
        return pending, len(pending) // _OP.size

    def _refuse(self, pending: bytearray, result: int) -> list[tuple[Completion[Any], int]]:
        """The kernel took none of the requests: each fails with that error."""
        tokens = [op[0] for op in _OP.iter_unpack(pending)]
        return [(self._in_flight.pop(token), result) for token in tokens]

    def deliver(self, finished: list[tuple[Completion[Any], int]]) -> None:
        for request, result in finished:
            if result >= 0:
                request.set(result)
            else:
                request.fail(_error_of(request, -result))

    def close(self) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            lib.mmc_queue_close(queue)
            self._in_flight.clear()


def _error_of(request: Any, number: int) -> StorageError:
    what, path = _WHAT[request.code], request.handle.path
    if request.code in (_DATASYNC, _MSYNC):
        return SyncFailed(number, what, path)
    return StorageError(number, what, path, request.offset, request.length)


class LinuxHost:
    """This machine. ``backend``: "auto", "io_uring" or "threads"; by default what the environment
    variable MMCOW_QUEUE says, else auto. ``hits`` False (MMCOW_HITS=off): C finishes no request by
    itself. ``depth``: how many requests of an image are given to the kernel at once."""

    def __init__(
        self,
        backend: str | None = None,
        *,
        hits: bool | None = None,
        depth: int = NativeQueue.DEPTH,
    ) -> None:
        self.depth = depth
        self.hits = os.environ.get("MMCOW_HITS", "on") != "off" if hits is None else hits
        self.backend = backend or os.environ.get("MMCOW_QUEUE", "auto")
        if self.backend not in BACKENDS:
            raise UsageError(f"I/O queue {self.backend!r}: must be one of {', '.join(BACKENDS)}")

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
            _raise(error, "open with O_DIRECT" if refused else "open", path)
        try:
            handle = LinuxHandle(path, descriptor, writable=write, direct=direct)
            self._refuse_kind(path, handle.kind)  # it may have been swapped since the stat
        except BaseException:
            os.close(descriptor)
            raise
        return handle

    def reopen(self, handle: Handle) -> LinuxHandle:
        assert isinstance(handle, LinuxHandle)
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if handle.writable else os.O_RDONLY)
        try:
            descriptor = os.open(f"/proc/self/fd/{handle.descriptor}", flags)
        except FileNotFoundError:  # no /proc: by name then, if it still is the same file
            other = self.open(handle.path, write=handle.writable, direct=False)
            if other.identity == handle.identity:
                return other
            other.close()
            raise StorageError(errno.ESTALE, "open again", handle.path) from None
        except OSError as error:
            _raise(error, "open again", handle.path)
        return LinuxHandle(handle.path, descriptor, writable=handle.writable, direct=False)

    @staticmethod
    def _refuse_kind(path: str, kind: str) -> None:
        if kind == "directory":
            raise StorageError(errno.EISDIR, "open", path)
        if kind == "other":
            what = "open (it is neither a regular file nor a block device)"
            raise StorageError(errno.ENOTBLK, what, path)

    def create(self, path: str) -> LinuxHandle:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, _CREATE_MODE)
        except OSError as error:
            _raise(error, "create", path)
        return LinuxHandle(path, descriptor, writable=True, direct=False)

    def stat(self, path: str) -> Stat:
        try:
            result = os.stat(path)
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
            raise StorageError(number, "open", path) from error
        return _stat_of(result, result.st_size)

    def link(self, source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            _raise(error, "create", target)

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(source, target)
        except OSError as error:
            _raise(error, f"rename to {target}", source)

    def unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            _raise(error, "remove", path)

    def real_path(self, path: str) -> str:
        return os.path.realpath(path) if os.path.islink(path) else path

    def absolute(self, path: str) -> str:
        return os.path.join(os.getcwd(), path)  # not abspath: "a/.." need not be "."

    def names(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except OSError as error:
            _raise(error, "list", directory)

    def take_over(self, old: str, new: str) -> None:
        try:
            facts = os.stat(old)
            with suppress(PermissionError):
                os.chown(new, facts.st_uid, facts.st_gid)
            os.chmod(new, stat_bits.S_IMODE(facts.st_mode))
        except OSError as error:
            _raise(error, "chmod", new)

    def sync_directory(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            _raise(error, "open", path)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise SyncFailed(error.errno or errno.EIO, "fsync of the directory", path) from error
        finally:
            os.close(descriptor)

    def view(self, handle: Handle, size: int, reserve: int, unit: int, *, mapped: bool) -> View:
        assert isinstance(handle, LinuxHandle)
        error = ffi.new("int *")
        if mapped:
            pointer = lib.mmc_view_map(handle.descriptor, size, reserve, unit, error)
            if pointer != ffi.NULL:
                return NativeView(pointer, handle.path, unit)
        pointer = lib.mmc_view_memory(size, reserve, unit, error)
        if pointer == ffi.NULL:
            native.check(error[0], "memory for metadata", handle.path)
        view = NativeView(pointer, handle.path, unit)
        _fill(view, handle, size)
        return view

    def queue(self) -> NativeQueue:
        return NativeQueue(self.backend, hits=self.hits, depth=self.depth)


def _fill(view: NativeView, handle: Handle, size: int) -> None:
    """Read a metadata area into a memory view, skipping holes."""
    step = 1 << 20
    offset = 0
    while offset < size:
        start = handle.next_data(offset)
        if start >= size:
            return
        start -= start % 4096
        data = handle.read_at(start, min(step, size - start))
        if not data:
            return
        view.fill(start, data)
        offset = start + len(data)
