# SPDX-License-Identifier: MIT
"""raw: the file is the disk.

Owns: nothing on disk. Every byte of the disk stands at its own offset; the disk's size is the
file's length, rounded up to 512. A file with an odd end reads as zero-padded (``File`` does).

Never: is recognised by content (it has no magic), records names, allocates.

::

    0 .................... length .. 512-rounded size
    | the disk, byte for byte    | zeros |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcow.errors import UsageError
from mmcow.formats import registry
from mmcow.formats.driver import (
    CheckResult,
    Driver,
    Extent,
    Kind,
    LayerInfo,
    Reservation,
    Staged,
    Table,
)
from mmcow.formats.opening import Access, CreateRequest, Format, Inspection, Opener, Option
from mmcow.ranges import SECTOR, align_up, units_for
from mmcow.storage import names
from mmcow.storage.file import Cache, File

if TYPE_CHECKING:
    from mmcow.storage.host import Handle

_PREALLOCATION = ("off", "falloc", "full")
# Zeros written at a time by preallocation=full.
_PIECE = 1 << 20


class RawDriver(Driver):
    """A raw file or block device as a layer: one DATA extent, always."""

    def __init__(self, data: File) -> None:
        self.path = data.path
        self.data = data
        self.window = None
        self.info = LayerInfo(
            format="raw",
            variant="",
            size=align_up(data.size, SECTOR),
            cluster_size=SECTOR,
            has_backing=False,
            can_allocate=False,
            can_zero=False,
            can_unallocate=False,
            can_resize=data.handle.kind != "block",
            one_file=False,
        )

    @property
    def backing(self) -> None:
        """None: raw records no base."""
        return None

    def map(self, offset: int, length: int) -> list[Extent]:
        """One DATA extent at identity offset."""
        return [Extent(offset, length, Kind.DATA, offset)]

    def table(self) -> Table:
        """Every byte at its own place."""
        return Table(None, 0, 0, 0)

    def reserve(self, offset: int, length: int) -> Reservation:
        """Never called: ``info.can_allocate`` is False."""
        raise AssertionError("raw allocates nothing")

    def publish(self, reservation: Reservation) -> None:
        """Never called: ``info.can_allocate`` is False."""
        raise AssertionError("raw allocates nothing")

    def abandon(self, reservation: Reservation) -> None:
        """Never called: ``info.can_allocate`` is False."""
        raise AssertionError("raw allocates nothing")

    def unmap(self, offset: int, length: int, kind: Kind) -> None:
        """Never called: ``info`` offers neither kind."""
        raise AssertionError("raw unmaps nothing")

    def stage(self) -> Staged | None:
        """None: there is no metadata."""
        return None

    async def resize(self, size: int, below: int) -> None:
        """Set the file's length. A block device has the length it has: UsageError."""
        if size == self.info.size:
            return
        if not self.info.can_resize:
            raise UsageError(
                f"{self.path}: is a block device of {self.data.size} bytes; resize the device"
            )
        self.data.truncate(size)
        self.info = self.info._replace(size=size)

    def allocated(self) -> int:
        """Every cluster."""
        return units_for(self.info.size, SECTOR)

    async def check(self, repair: str) -> CheckResult:
        """Nothing to check: every content is valid."""
        total = self.allocated()
        return CheckResult(total, total, 0, 0, self.data.size, ())

    def describe(self) -> dict[str, Any]:
        """No facts beyond those of every layer."""
        return {}

    def close(self) -> None:
        """Close the file."""
        self.data.close()


class RawFormat(Format):
    """Opens and makes raw disks."""

    name = "raw"
    options = (Option("preallocation", "off (default), falloc or full"),)

    def recognises(self, head: bytes) -> bool:
        """False: anything may be raw, nothing claims to be."""
        return False

    def open(self, opener: Opener, path: str, access: Access) -> RawDriver:
        """Open a file or block device as a disk."""
        return RawDriver(opener.data(path, access, raw=True))

    def inspect(self, path: str, handle: Handle) -> Inspection:
        """The length is all there is to know."""
        return Inspection("raw", "", align_up(handle.size(), SECTOR), None, None, None, None, {})

    def create(self, opener: Opener, path: str, request: CreateRequest) -> int:
        """Make a disk of zeros.

        An existing file is replaced once nobody uses it; an existing block device is used as it
        is, content and all, if it is large enough.
        """
        preallocation = request.options.get("preallocation", "off")
        if preallocation not in _PREALLOCATION:
            listed = ", ".join(_PREALLOCATION)
            raise UsageError(f"{path}: preallocation={preallocation}: must be one of {listed}")
        if request.backing is not None:
            raise UsageError(f"{path}: a raw disk cannot record a backing file")
        if not names.exists(opener.host, path):
            return self._make(opener, path, request.size, preallocation)
        access = Access(write=True, top=True, share=False, cache=Cache.WRITEBACK)
        held = opener.metadata(path, access)
        try:
            if held.kind == "block":
                return self._adopt(path, held, request.size, preallocation)
            return self._make(opener, path, request.size, preallocation)
        finally:
            held.close()

    def _adopt(self, path: str, device: Handle, size: int | None, preallocation: str) -> int:
        length = device.size()
        if preallocation != "off":
            raise UsageError(f"{path}: preallocation={preallocation}: not for a block device")
        if size is not None and size > length:
            raise UsageError(f"{path}: the block device has {length} bytes, {size} are needed")
        head = device.read_at(0, registry.HEAD)
        if registry.probe(head) != "raw":
            device.write_at(0, bytes(min(len(head), 512)))  # or it would be taken for that format
            device.sync()
        return align_up(length, SECTOR)

    def _make(self, opener: Opener, path: str, size: int | None, preallocation: str) -> int:
        if size is None:
            raise UsageError(f"{path}: the size of a raw disk must be given")
        wanted = align_up(size, SECTOR)

        def fill(handle: Handle) -> None:
            handle.truncate(wanted)
            if preallocation == "off" or not wanted:
                return
            handle.reserve(0, wanted)
            if preallocation == "full":
                _write_zeros(handle, wanted)

        names.make_file(opener.host, path, fill, replace=True)
        return wanted


def _write_zeros(handle: Handle, size: int) -> None:
    zeros = memoryview(bytes(min(size, _PIECE)))
    for offset in range(0, size, _PIECE):
        handle.write_at(offset, zeros[: min(_PIECE, size - offset)])
