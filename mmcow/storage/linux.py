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
from typing import TYPE_CHECKING, Any

from mmcow import native
from mmcow.errors import ClosedError, StorageError, SyncFailed, UsageError
from mmcow.native import BACKEND_NAMES, ffi, lib
from mmcow.native import BACKENDS as BACKENDS  # noqa: PLC0414 - for those who choose one
from mmcow.storage.handle import FileHost, LinuxHandle, fail
from mmcow.storage.path import NativePath
from mmcow.tasks import Completion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcow.storage.host import Handle, View

_CREATE_MODE = 0o644


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
        end = offset + length
        try:
            # Upwards only: what another thread changes again behind this stays dirty. Two copies of
            # one unit would be written side by side, and the older might land last.
            while offset < end and (units := self.dirty(offset, end - offset)):
                copy = native.aligned(units * self._unit, 4096)
                n = lib.mmc_view_snapshot(
                    self._view, offset, end - offset, self._runs, self.MOST_RUNS,
                    ffi.from_buffer(copy), len(copy),
                )  # fmt: skip
                native.check(n, "copy of mapped metadata", self._path, offset)
                values = self._run_values[: 3 * n].tolist()
                for start, count, position in zip(
                    values[0::3], values[1::3], values[2::3], strict=True
                ):
                    taken.append((start, copy[position : position + count]))
                    offset = start + count
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


class NativeQueue:
    """The C queue. See ``storage.host.IOQueue``; ``submit`` may be called beside a ``turn``."""

    DEPTH = 256
    MOST_DONE = 256

    def __init__(
        self,
        backend: str = "auto",
        *,
        hits: bool = True,
        depth: int = DEPTH,
        one_thread: bool = False,
    ) -> None:
        self._hits = hits
        error = ffi.new("int *")
        flags = lib.MMC_QUEUE_ONE_THREAD if one_thread else 0
        pointer = lib.mmc_queue_open(BACKENDS[backend], depth, flags, error)
        if pointer == ffi.NULL:
            raise StorageError(-error[0], f"start of the I/O queue ({backend})", "mmcow")
        self._queue: Any = pointer
        self.backend = BACKEND_NAMES[lib.mmc_queue_backend(pointer)]
        self._in_flight: dict[int, Request] = {}
        self._pending = bytearray()
        self._pending_lock = threading.Lock()
        self._token = 0
        self._is_shared = False
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
        self._is_shared = True  # another thread waits in ``turn``
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
        n = 0
        if wait and count == 1 and not self._is_shared:
            # Of several threads the others would wait for this one.
            n = lib.mmc_queue_alone(self._queue, ops, self._done)
        if n == 0:
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
        # A copy, as bytes: see ``native`` on exported memoryviews.
        values = done[: count * _DONE.size].tobytes()
        return [(in_flight.pop(token), result) for token, result in _DONE.iter_unpack(values)]

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


class LinuxHost(FileHost):
    """This machine. ``backend``: "auto", "io_uring" or "threads"; by default what the environment
    variable MMCOW_QUEUE says, else auto. ``hits`` False (MMCOW_HITS=off): C finishes no request by
    itself. ``depth``: how many requests of an image are given to the kernel at once.
    ``one_thread``: an image is used by one thread at a time, which need not be interrupted for what
    has completed; another thread's requests might wait for its next system call."""

    def __init__(
        self,
        backend: str | None = None,
        *,
        hits: bool | None = None,
        depth: int = NativeQueue.DEPTH,
        one_thread: bool = False,
    ) -> None:
        self.depth = depth
        self.one_thread = one_thread
        self.hits = os.environ.get("MMCOW_HITS", "on") != "off" if hits is None else hits
        self.backend = backend or os.environ.get("MMCOW_QUEUE", "auto")
        if self.backend not in BACKENDS:
            raise UsageError(f"I/O queue {self.backend!r}: must be one of {', '.join(BACKENDS)}")

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
            fail(error, "open again", handle.path)
        return LinuxHandle(handle.path, descriptor, writable=handle.writable, direct=False)

    def create(self, path: str) -> LinuxHandle:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, _CREATE_MODE)
        except OSError as error:
            fail(error, "create", path)
        return LinuxHandle(path, descriptor, writable=True, direct=False)

    def link(self, source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            fail(error, "create", target)

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(source, target)
        except OSError as error:
            fail(error, f"rename to {target}", source)

    def unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            fail(error, "remove", path)

    def real_path(self, path: str) -> str:
        return os.path.realpath(path) if os.path.islink(path) else path

    def absolute(self, path: str) -> str:
        return os.path.join(os.getcwd(), path)  # not abspath: "a/.." need not be "."

    def names(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except OSError as error:
            fail(error, "list", directory)

    def take_over(self, old: str, new: str) -> None:
        try:
            facts = os.stat(old)
            with suppress(PermissionError):
                os.chown(new, facts.st_uid, facts.st_gid)
            os.chmod(new, stat_bits.S_IMODE(facts.st_mode))
        except OSError as error:
            fail(error, "chmod", new)

    def sync_directory(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            fail(error, "open", path)
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
        return NativeQueue(
            self.backend, hits=self.hits, depth=self.depth, one_thread=self.one_thread
        )


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
