# SPDX-License-Identifier: MIT
"""The C helper as Python sees it; the only importer of ``mmcow._mmc``.

Owns: the translation of -errno into errors, and the few helper calls that want a
Python shape: buffers, addresses, zero scans, O_DIRECT alignment. Queues and views
are used through ``lib`` by ``storage.linux``; csrc/mmc_api.h is their contract.

Never: opens, names or interprets a file.

No local variable holds what exports a memoryview (``ffi.from_buffer``, ``iter_unpack``): a
traceback would keep it, and CPython before 3.12.7 crashes where the collector of cycles meets the
memoryview before its export (gh-77894). An argument is gone before an exception gets out.

Every call through ``lib`` drops the interpreter lock, which costs about 0.1 us: cross
once per batch, never once per request or extent.
"""

from __future__ import annotations

from operator import index

from mmcow._mmc import ffi, lib
from mmcow.errors import StorageError, UsageError

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any

    from typing_extensions import Buffer  # collections.abc.Buffer comes with Python 3.12

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "address_of",
    "aligned",
    "aligned_buffer",
    "check",
    "direct_alignment",
    "ffi",
    "is_zero",
    "lib",
    "queue_backend",
    "zero_run",
]

BACKENDS = {
    "auto": lib.MMC_BACKEND_AUTO,
    "io_uring": lib.MMC_BACKEND_URING,
    "threads": lib.MMC_BACKEND_POOL,
}
BACKEND_NAMES = {lib.MMC_BACKEND_URING: "io_uring", lib.MMC_BACKEND_POOL: "threads"}


def check(
    rc: int, what: str, path: str, offset: int | None = None, length: int | None = None
) -> int:
    """Return the helper's result, or raise StorageError where it is an -errno."""
    if rc < 0:
        raise StorageError(-rc, what, path, offset, length)
    return rc


def address_of(buffer: Buffer) -> int:
    """Address of a contiguous buffer's first byte, read-only buffers included.

    Keeps nothing alive: who hands the address to the kernel keeps the buffer.
    """
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def aligned(size: int, alignment: int = 4096) -> memoryview:
    """Make a zeroed, writable buffer whose address is a multiple of ``alignment``.

    The memory is freed with the last memoryview of it. ``alignment`` is a power of two.
    """
    error = ffi.new("int *")
    pointer: Any = lib.mmc_buffer_alloc(size, alignment, error)
    check(error[0], f"buffer of {size} bytes aligned to {alignment}", "memory")
    return memoryview(ffi.buffer(ffi.gc(pointer, lib.mmc_buffer_free, size), size))


def aligned_buffer(length: int) -> memoryview:
    """Make a zeroed buffer of ``length`` bytes for ``readinto`` and ``write``: direct I/O moves it
    without a copy.

    From 16 KiB on it lies in huge pages where the kernel has them: a large transfer is then one
    piece for the disk instead of one per 4 KiB, which on a virtio disk is two to three times as
    fast. UsageError for a length that cannot be, StorageError (ENOMEM) where there is no memory.
    """
    length = index(length)
    if not 0 <= length < 1 << 63:
        raise UsageError(f"aligned buffer of {length} bytes: must be 0 to {(1 << 63) - 1}")
    return aligned(length)


def is_zero(buffer: Buffer) -> bool:
    """Tell whether every byte is zero; true of an empty buffer."""
    return bool(lib.mmc_is_zero(ffi.from_buffer(buffer), memoryview(buffer).nbytes))


def zero_run(buffer: Buffer, block: int = 4096) -> tuple[int, bool]:
    """Measure the run of equal blocks at the start: (bytes, whether they are zero).

    The last block may be shorter. Slice a memoryview to go on behind the run.
    """
    zero = ffi.new("int *")
    size = memoryview(buffer).nbytes
    length = int(lib.mmc_zero_run(ffi.from_buffer(buffer), size, block, zero))
    return length, bool(zero[0])


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """What O_DIRECT demands on an open file: (memory, offset) in bytes.

    None where the kernel does not know; (0, 0) where it has no direct I/O for the file.
    """
    values = ffi.new("uint32_t[2]")
    rc = lib.mmc_direct_alignment(fd, values, values + 1)
    known = check(rc, "statx", f"descriptor {fd}")
    return (int(values[0]), int(values[1])) if known else None


def queue_backend(choice: str) -> str:
    """Which I/O queue this machine gives to who chooses ``choice`` of ``BACKENDS``."""
    error = ffi.new("int *")
    pointer: Any = lib.mmc_queue_open(BACKENDS[choice], 1, 0, error)
    check(error[0] if pointer == ffi.NULL else 0, f"start of the I/O queue ({choice})", "mmcow")
    try:
        return BACKEND_NAMES[lib.mmc_queue_backend(pointer)]
    finally:
        lib.mmc_queue_close(pointer)
