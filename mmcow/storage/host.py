# SPDX-License-Identifier: MIT
"""The seam between mmcow and the machine: what the kernel does, as an interface.

Owns: the protocols ``Host`` (names), ``Handle`` (an open file) and ``IOQueue``
(requests in flight), and the values that cross them. Two implementations exist:
``storage.linux`` over system calls and the C helper, and the simulator of
``tests/sim`` over memory, with power cuts and faults. Everything above this line
(alignment, dirty tracking, ordering, allocation) is the same code in both.

Never: decides anything. Policy lives above (``File``, ``Window``, ``names``).

Errors: every method raises ``StorageError`` (errno kept) when the system refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mmcow.storage.facts import Alignment, Identity, Stat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcow.storage.path import NativePath
    from mmcow.tasks import Completion

__all__ = [
    "FALLOCATE_PUNCH",
    "FALLOCATE_RESERVE",
    "FALLOCATE_ZERO",
    "Alignment",
    "Buffer",
    "Handle",
    "Host",
    "IOQueue",
    "Identity",
    "Stat",
    "View",
]

# What can be read from, and what can be written into: any contiguous buffer.
Buffer: TypeAlias = bytes | bytearray | memoryview

# fallocate(2) modes, by what they do here. KEEP_SIZE everywhere: length changes only by truncate.
FALLOCATE_RESERVE = 0x01
FALLOCATE_PUNCH = 0x02 | 0x01
FALLOCATE_ZERO = 0x10 | 0x01


class Handle(Protocol):
    """An open file or block device. Methods here are synchronous and unordered;
    guest data and anything on a hot path goes through an ``IOQueue`` instead."""

    path: str
    writable: bool
    direct: bool
    kind: str
    identity: Identity
    alignment: Alignment

    def size(self) -> int:
        """Current length in bytes (a device's length for a device)."""

    def mtime(self) -> int:
        """Modification time in whole seconds."""

    def allocated(self) -> int:
        """Bytes the file occupies on its file system."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read; shorter only where the file ends."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``."""

    def truncate(self, size: int) -> None:
        """Set the length; new bytes are a hole."""

    def reserve(self, offset: int, length: int) -> None:
        """Make sure that space exists for a range (fallocate, keeps the length)."""

    def datasync(self) -> None:
        """fdatasync: content and length are durable. Raises SyncFailed."""

    def sync(self) -> None:
        """fsync: everything of the file is durable. Raises SyncFailed."""

    def drop_cache(self) -> None:
        """Forget clean cached pages, so that what is read next comes from the disk."""

    def next_data(self, offset: int) -> int:
        """Offset of the first data at or after ``offset``; the size if there is none."""

    def next_hole(self, offset: int) -> int:
        """Offset of the first hole at or after ``offset``; the size if there is none."""

    def lock(self, use: frozenset[int], deny: frozenset[int]) -> None:
        """Take QEMU's byte locks, or raise LockedError and keep what was held before."""

    def close(self) -> None:
        """Close; locks go with it. A second call does nothing."""


class View(Protocol):
    """Live state of a metadata area: see ``mmc_view`` in csrc/mmc_api.h. Offsets are bytes
    of the file, bits count from byte ``base`` with the least significant first."""

    mapped: bool  # False: anonymous memory, filled by reading the file

    def size(self) -> int: ...
    def set_size(self, size: int) -> bool:
        """False where the reserve is too small: make a new view."""

    def load(self, offset: int, length: int) -> bytes: ...
    def store(self, offset: int, data: bytes) -> None: ...
    def bit_runs(self, base: int, first: int, count: int, most: int) -> list[tuple[int, int, int]]:
        """Runs (first bit, how many, 0 or 1) covering the range; at most ``most``."""

    def bits_write(self, base: int, first: int, count: int, value: int) -> None: ...
    def bits_count(self, base: int, first: int, count: int) -> int: ...
    def dirty(self, offset: int, length: int) -> int: ...
    def mark(self, offset: int, length: int) -> None: ...
    def snapshot(self, offset: int, length: int) -> list[tuple[int, memoryview]]:
        """Copies of the dirty units, (offset, bytes), whose marks are cleared."""

    def release(self) -> None: ...
    def close(self) -> None: ...


class IOQueue(Protocol):
    """Requests in flight. Nothing is submitted before ``turn``; completions are delivered by the
    reactor. Buffers are kept referenced until the kernel is done with them.

    ``read`` completes with the number of bytes that the file had; the rest of the
    buffers is zeroed. ``write`` completes with the number of bytes, always all.
    """

    backend: str  # "io_uring", "threads", "simulated"

    @property
    def busy(self) -> bool: ...
    def path(self) -> NativePath | None:
        """A new path, for requests that C finishes by itself; None where there are none."""

    def fileno(self) -> int:
        """Polls readable while completions wait."""

    def read(self, handle: Any, offset: int, buffers: Sequence[Any]) -> Completion[int]: ...
    def write(self, handle: Any, offset: int, buffers: Sequence[Any]) -> Completion[int]: ...
    def datasync(self, handle: Any) -> Completion[int]: ...
    def fallocate(self, handle: Any, mode: int, offset: int, length: int) -> Completion[int]: ...
    def msync(self, handle: Any, view: Any, offset: int, length: int) -> Completion[int]:
        """Barrier over a mapped view's range. Fails with SyncFailed."""

    def changes_in_flight(self, handle: Any, start: int, end: int) -> list[Completion[Any]]:
        """Writes and fallocates of the handle's range that are pending or in flight."""

    def submit(self) -> None: ...
    def turn(self, wait: bool) -> list[tuple[Completion[Any], int]]: ...
    def deliver(self, finished: list[tuple[Completion[Any], int]]) -> None: ...
    def close(self) -> None: ...


class Host(Protocol):
    """Names, handles, views and queues of one machine."""

    def open(self, path: str, *, write: bool, direct: bool) -> Handle:
        """Open an existing regular file or block device; never creates, never truncates.

        FIFOs, sockets, directories and character devices are refused. ``direct``
        raises StorageError EINVAL where the file system refuses O_DIRECT.
        """

    def reopen(self, handle: Handle) -> Handle:
        """A second, buffered handle on an open file, writable like the first: that very file,
        whatever its name leads to by now. It has no locks of its own."""

    def create(self, path: str) -> Handle:
        """Make a new empty regular file, open for buffered read and write; EEXIST if the name is
        taken. The name is durable only after ``sync_directory``."""

    def stat(self, path: str) -> Stat:
        """What ``path`` stands for, following symbolic links."""

    def link(self, source: str, target: str) -> None:
        """A second name for a file; EEXIST if the target is taken."""

    def rename(self, source: str, target: str) -> None:
        """Atomically give ``source`` the name ``target``, replacing what was there."""

    def unlink(self, path: str) -> None: ...
    def real_path(self, path: str) -> str:
        """Where a symbolic link leads; any other path as it is. Need not exist."""

    def absolute(self, path: str) -> str:
        """``path`` from the root, for a program that may change its working directory."""

    def names(self, directory: str) -> list[str]:
        """What a directory holds, sorted."""

    def take_over(self, old: str, new: str) -> None:
        """Give file ``new`` the owner and mode of ``old``, as far as this user may."""

    def sync_directory(self, path: str) -> None:
        """Make the names in directory ``path`` durable."""

    def view(self, handle: Handle, size: int, reserve: int, unit: int, *, mapped: bool) -> View:
        """The live state of the first ``size`` bytes; falls back to memory where the file cannot
        be mapped."""

    def queue(self) -> IOQueue: ...
