# SPDX-License-Identifier: MIT
"""The contract between the engine and a format: where bytes are, where new ones may go.

Owns: ``Driver`` (about ten methods that every format implements), the values they
speak (``Extent``, ``Reservation``, ``Staged``) and the facts about a layer
(``LayerInfo``). ``formats.guard`` asserts this contract in all tests.

Never: moves guest data. The engine does every transfer, alignment, fill, lock and
barrier, once for all formats. A driver changes metadata only in its ``Window``'s
memory; the engine's flush writes it out, in the order of ``Staged.groups``.

Words: offsets without a qualifier are of the virtual disk; ``host`` is an offset in the
layer's data file (``Driver.data``). Ranges are (offset, length), bytes, half-open.
All methods that are not coroutines are called under the reactor's lock and must not
block (metadata is mapped; a page fault is the only wait).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcow.storage.file import File
    from mmcow.storage.host import Handle
    from mmcow.storage.window import Group, Window


class Kind(IntEnum):
    """What a layer, alone, says about a range."""

    DATA = 1  # stored in the data file at ``host``
    ZERO = 2  # reads as zeros, says this layer
    BELOW = 3  # not in this layer: what lies below shows
    SPECIAL = 4  # stored, but not plainly: ask ``read_special`` (compressed clusters)


class Extent(NamedTuple):
    """A range of one layer with one answer. ``host`` is -1 unless DATA or SPECIAL."""

    offset: int
    length: int
    kind: Kind
    host: int


class LayerInfo(NamedTuple):
    """Facts about a layer. Capabilities a format lacks are facts here, not errors to provoke."""

    format: str  # "raw", "add-cow", "cow", "qcow2", "vhdx"
    variant: str  # "v20", "v10", "v7", "x86-64", "i386", "uml3", ... or ""
    size: int  # of the virtual disk, a multiple of 512
    cluster_size: int  # allocation unit in bytes
    has_backing: bool  # unallocated ranges show what lies below
    can_allocate: bool  # False: everything is DATA already (raw): reserve is never called
    can_zero: bool  # ``unmap(..., Kind.ZERO)`` works: zeros without data
    can_unallocate: bool  # ``unmap(..., Kind.BELOW)`` works: show the base again (commit)
    can_resize: bool
    one_file: bool  # metadata and data share a file


class Table(NamedTuple):
    """How C finds this layer's bytes: one bit per cluster of ``1 << shift`` bytes, from byte
    ``bits`` of ``view`` on, least significant first; every byte where ``view`` is None. A byte of
    the disk is at that offset plus ``start`` in the data file."""

    view: Any
    bits: int
    shift: int
    start: int


class Reservation(NamedTuple):
    """Room for new bytes: promised to one writer, visible to nobody.

    ``offset`` and ``length`` are whole clusters (the last may reach past the disk's end);
    ``pieces`` say where, in order, without gaps. ``token`` is the driver's own.
    """

    offset: int
    length: int
    pieces: Sequence[tuple[int, int, int]]  # (offset, length, host)
    token: Any = None


class Staged(NamedTuple):
    """Metadata changes taken out for one flush: groups in the order they must become durable."""

    groups: Sequence[Group]
    token: Any = None


class Finding(NamedTuple):
    """One thing ``check`` found. ``kind``: "leak" (space lost) or "corruption" (data at risk)."""

    kind: str
    text: str
    fixed: bool


class CheckResult(NamedTuple):
    """What ``check`` reports; the counts are in clusters."""

    total: int
    allocated: int
    fragmented: int
    compressed: int
    image_end: int  # offset behind the last byte in use of the image file
    findings: Sequence[Finding]


class Driver(ABC):
    """One layer of one image. Made by the format module's ``open``."""

    path: str
    info: LayerInfo  # replaced as a whole when the size changes
    data: File  # where DATA extents live
    window: Window | None  # the metadata; None for a format that has none

    @property
    @abstractmethod
    def backing(self) -> tuple[str, str | None] | None:
        """Name of the base as recorded, and its format if recorded; None without a base."""

    @abstractmethod
    def map(self, offset: int, length: int) -> list[Extent]:
        """Say where this layer alone keeps a range, in order and without gaps from ``offset``.

        At least one extent; may stop short of ``length`` (the caller asks again from
        there). Adjacent extents differ in kind or are not adjacent in the data file.
        The range lies inside the disk rounded up to a cluster.
        """

    def table(self) -> Table | None:
        """The same answers as ``map`` gives, as a table; None where they do not fit in one.

        Valid until the layer is resized, closed or stops depending on its base.
        """
        return None

    @abstractmethod
    def reserve(self, offset: int, length: int) -> Reservation:
        """Find room for whole clusters. Nothing becomes visible; clusters that this layer has as
        DATA already keep their place in the answer. Never called twice for a cluster without
        ``publish`` or ``abandon`` in between."""

    @abstractmethod
    def publish(self, reservation: Reservation) -> None:
        """Make reserved clusters this layer's DATA: their bytes are written (not yet durable).
        From here ``map`` shows them; on disk only after the next flush."""

    @abstractmethod
    def abandon(self, reservation: Reservation) -> None:
        """Give the room back: the write failed. Nothing of it was ever visible."""

    @abstractmethod
    def unmap(self, offset: int, length: int, kind: Kind) -> None:
        """Make whole clusters ZERO or BELOW (as ``info`` says it can), in memory until the
        next flush. Host space is given back by the driver once the removal is durable."""

    async def read_special(self, extent: Extent, into: memoryview) -> None:
        """Read a SPECIAL extent (whole ``extent``) into ``into``."""
        raise AssertionError(f"{self.info.format} has no special extents")

    @abstractmethod
    def stage(self) -> Staged | None:
        """Take a copy of everything changed since the last call, in ordered groups; None when
        nothing is dirty. Called before the data sync: what is published later belongs to
        the next flush (DESIGN: copying after the sync persisted one bit in ten too early)."""

    def settled(self, staged: Staged) -> None:
        """All groups of ``staged`` are durable: freed space may be reused."""
        return

    @abstractmethod
    async def resize(self, size: int, below: int) -> None:
        """Change the disk's size. The engine has drained requests, flushed, and copied up the last
        partial cluster where needed; ``below`` is the length of what lies below (0: no base).
        Leaves a valid image whenever it stops, and is durable when it returns."""

    @abstractmethod
    def allocated(self) -> int:
        """Clusters of the disk that this layer has itself."""

    async def drop_backing(self) -> None:
        """Every cluster is in this layer, durably: stop depending on the base. Formats that can
        mark the image complete do so first, durably, and then remove the name."""
        raise AssertionError(f"{self.info.format} records no base")

    def base_changed(self, mtime: int, size: int) -> str | None:
        """What to tell the user where the image recorded its base's modification time (whole
        seconds) or size and the base has others now; None where nothing differs or is known."""
        return None

    async def base_will_change(self) -> None:
        """The base is about to be changed on purpose (commit): durably forget what was recorded of
        its state, so that a stop in the middle does not look like somebody else's change. With
        everything flushed."""
        return

    @abstractmethod
    async def check(self, repair: str) -> CheckResult:
        """Examine the metadata. ``repair``: "" (look only), "leaks" or "all"."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Format-specific facts for ``info``, as JSON-ready values."""

    def locked_handles(self) -> tuple[Handle, ...]:
        """The descriptors that carry this layer's locks."""
        return (self.data.handle,)

    def moved(self, path: str) -> None:
        """The image file has another name now; errors and later openings use it."""
        old, self.path = self.path, path
        for handle in self.locked_handles():
            if handle.path == old:
                handle.path = path
        if self.data.path == old:
            self.data.path = path
        if self.window is not None:
            self.window.path = path

    @abstractmethod
    def close(self) -> None:
        """Release the window and the files. Does not flush: the engine does, before."""
