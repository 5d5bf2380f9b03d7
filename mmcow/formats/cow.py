# SPDX-License-Identifier: MIT
"""The archival cow format: QEMU's "MOOO" images (1.x to 2.1) and those of user-mode Linux.

Owns: what its bitmap says about a disk, the length of its file, its backing name, its
creation. The bytes are ``cow_meta``'s.

Never: moves guest data, writes metadata other than through its window (but for ``create`` and
``rename``, which work on a file nobody has open).

One file holds everything::

    0            bitmap_offset          data_start                       data_end
    | header     | bitmap   | padding   | sector 0 | sector 1 | ...      |
    |<------------- Window ------------>|<----------- File ------------->|

The window and the data are one descriptor: under O_DIRECT the window writes by O_DIRECT too,
because a dirty page beside direct writes lost acknowledged data (docs/ARCHITECTURE.md "The
window"). That needs data_start on a block of the device. Where it is not (data at 1536,
blocks of 4096), everything on the file goes through the page cache and ``describe`` says so.

The length. A fresh QEMU image ends with its bitmap, unaligned; sectors appear as they are
written. Opening for writing makes the file as long as the disk, sparse, durably, before
anything else: no direct write then meets an odd end, and a set bit whose data lie past the end
means that the file was cut. Where that is so already, the length stays, and ``check`` tells.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmcow.errors import ChainError, CorruptError, StorageError, UnsupportedError, UsageError
from mmcow.formats import cow_meta
from mmcow.formats.driver import (
    CheckResult,
    Driver,
    Extent,
    Finding,
    Kind,
    LayerInfo,
    Reservation,
    Staged,
    Table,
)
from mmcow.formats.opening import (
    Access,
    CreateRequest,
    Format,
    Inspection,
    Opener,
    Option,
    resolve,
)
from mmcow.ranges import SECTOR, align_up, units_for
from mmcow.storage.file import Cache
from mmcow.storage.names import exists, make_file
from mmcow.storage.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.formats.cow_meta import Header, Layout
    from mmcow.storage.host import Handle

# As another program writing to the image would open it: used before replacing or renaming.
_EXCLUSIVE = Access(write=True, top=True, share=False, cache=Cache.WRITEBACK)

_UNSEPARATED = (
    "buffered: metadata and data share a block of {block} bytes (data begin at {start}), "
    "and O_DIRECT could not write one without the other"
)


class CowDriver(Driver):
    """One opened cow image. ``layout`` given: whatever the header looks like, it is that one."""

    window: Window

    def __init__(
        self, opener: Opener, path: str, access: Access, layout: Layout | None = None
    ) -> None:
        self.path = path
        self._opener = opener
        self._layout = layout
        self._cache_note: str | None = None
        self._length_at_open = 0
        # That length again, if set bits had their data past it; see ``_extend``.
        self._cut_at: int | None = None
        self.data = opener.data(path, access)
        try:
            self._header = self._read_header()
            self._separate(access)
            if access.write:
                self._refuse_old_layouts()
                self._reach_data_start()
            self.window = self._open_window()
        except BaseException:
            self.data.close()
            raise
        try:
            self._cluster = self._header.sectorsize
            self._bitmap = self._header.geometry.bitmap_offset
            self._start = self._header.geometry.data_start
            self._bits = self._count_bits()
            self.info = self._make_info()
            if access.write:
                self._extend()
        except BaseException:
            self.close()
            raise

    # ---- opening ----

    def _read_header(self) -> Header:
        return read_header(self.path, self.data.handle, self._layout)

    def _separate(self, access: Access) -> None:
        """Reopen buffered where O_DIRECT cannot write metadata and data apart."""
        handle = self.data.handle
        block = handle.alignment.offset
        start = self._header.geometry.data_start
        if not handle.direct or start % block == 0:
            return
        through = self.data.cache.write_through
        cache = Cache.WRITETHROUGH if through else Cache.WRITEBACK
        self._cache_note = _UNSEPARATED.format(block=block, start=start)
        if access.cache is not Cache.AUTO:
            self._opener.warnings.append(f"{self.path}: {self._cache_note}")
        # Locks of one descriptor exclude those of the other, so the first must go before; what the
        # header said meanwhile is asked again.
        self.data.close()
        self.data = self._opener.data(self.path, access._replace(cache=cache))
        self._header = self._read_header()

    def _refuse_old_layouts(self) -> None:
        layout = self._header.layout
        if not layout.writable:
            raise UnsupportedError(
                self.path,
                "version",
                layout.version,
                f"layout {layout.variant} is only read: open it read-only, or convert it",
            )

    def _reach_data_start(self) -> None:
        """Make the file hold the whole window, and end on a block of the device."""
        handle = self.data.handle
        length = handle.size()
        start = self._header.geometry.data_start
        if handle.kind == "block":
            if length < start:
                raise CorruptError(
                    self.path, "length", length, f"the device ends before the data at {start}"
                )
            return
        wanted = align_up(max(length, start), handle.alignment.offset)
        self._length_at_open = length
        if length < wanted:
            self.data.truncate(wanted)
        # A sync that failed before left pages that look written and are not: what is read from here
        # on comes from the disk. Under O_DIRECT, no dirty page may come back later either.
        handle.datasync()
        handle.drop_cache()

    def _open_window(self) -> Window:
        handle = self.data.handle
        size = min(self._header.geometry.data_start, handle.size())
        durable = self.data.cache is not Cache.UNSAFE
        return Window(self._opener.host, self._opener.queue, handle, size, durable=durable)

    def _count_bits(self) -> int:
        room = self.window.size - self._bitmap
        return min(self._header.bits, room * 8)

    def _make_info(self) -> LayerInfo:
        header = self._header
        return LayerInfo(
            format="cow",
            variant=header.layout.variant,
            size=header.disk_size,
            cluster_size=header.sectorsize,
            has_backing=header.name is not None,
            can_allocate=True,
            can_zero=False,
            can_unallocate=True,
            can_resize=False,
            one_file=True,
        )

    def _extend(self) -> None:
        """Make the file as long as its disk, unless that would hide that it was cut."""
        handle = self.data.handle
        if handle.kind == "block":
            return
        if self._lost(self._length_at_open):
            self._cut_at = self._length_at_open
            return
        wanted = align_up(self._header.data_end, handle.alignment.offset)
        if handle.size() < wanted:
            self.data.truncate(wanted)

    # ---- lookup ----

    @property
    def backing(self) -> tuple[str, str | None] | None:
        """The recorded name; the format has no room for the base's format."""
        name = self._header.name
        return None if name is None else (name, None)

    def map(self, offset: int, length: int) -> list[Extent]:
        """See ``Driver.map``."""
        cluster = self._cluster
        end = offset + length
        first = offset // cluster
        count = min(units_for(end, cluster), self._bits) - first
        extents: list[Extent] = []
        if count > 0:
            for bit, bits, value in self.window.bit_runs(self._bitmap, first, count):
                stop = min((bit + bits) * cluster, end)
                if value:
                    extents.append(Extent(offset, stop - offset, Kind.DATA, self._start + offset))
                else:
                    extents.append(Extent(offset, stop - offset, Kind.BELOW, -1))
                offset = stop
        if offset < end and offset >= self._bits * cluster:
            # Sectors that the short bitmaps of UML v1 and v2 have no bit for.
            if extents and extents[-1].kind is Kind.BELOW:
                offset = extents.pop().offset
            extents.append(Extent(offset, end - offset, Kind.BELOW, -1))
        return extents

    def allocated(self) -> int:
        """See ``Driver.allocated``."""
        return self._count(0, self._bits)

    def _count(self, first: int, end: int) -> int:
        """Set bits among clusters [first, end)."""
        return self.window.bits_count(self._bitmap, first, end - first) if first < end else 0

    # ---- allocation: every cluster has its place, only the bits change ----

    def table(self) -> Table | None:
        """The bitmap, where it has a bit for every sector."""
        cluster, view = self._cluster, self.window.native_view
        if view is None or cluster & (cluster - 1) or self._bits * cluster < self.info.size:
            return None
        return Table(view, self._bitmap, cluster.bit_length() - 1, self._start)

    def reserve(self, offset: int, length: int) -> Reservation:
        """See ``Driver.reserve``."""
        return Reservation(offset, length, ((offset, length, self._start + offset),))

    def publish(self, reservation: Reservation) -> None:
        """See ``Driver.publish``."""
        self._write_bits(reservation.offset, reservation.length, 1)

    def abandon(self, reservation: Reservation) -> None:
        """Nothing was taken: bytes under a clear bit are garbage anyway."""

    def unmap(self, offset: int, length: int, kind: Kind) -> None:
        """See ``Driver.unmap``; the engine punches what it gave up."""
        assert kind is Kind.BELOW, "cow has no zero clusters"
        self._write_bits(offset, length, 0)

    def _write_bits(self, offset: int, length: int, value: int) -> None:
        first = offset // self._cluster
        end = min(units_for(offset + length, self._cluster), self._bits)
        if first < end:
            self.window.bits_write(self._bitmap, first, end - first, value)

    def stage(self) -> Staged | None:
        """See ``Driver.stage``."""
        group = self.window.take()
        return None if group is None else Staged((group,))

    async def resize(self, size: int, below: int) -> None:
        """Refuse: a longer bitmap would move every sector."""
        raise UsageError(
            f"{self.path}: a cow image cannot be resized in place (its data would move): "
            "convert it to a new image of that size"
        )

    # ---- the base ----

    def base_changed(self, mtime: int, size: int) -> str | None:
        """See ``Driver.base_changed``.

        UML would refuse to open; an archive is opened all the same, with a warning and a
        finding of ``check``, because the time changes when a base is merely copied.
        """
        header = self._header
        found = f"{self.path}: backing file {header.name!r} has changed since this image was made: "
        if header.mtime and mtime & 0xFFFFFFFF != header.mtime:
            return f"{found}its time is {mtime}, recorded is {header.mtime}"
        # QEMU never compared sizes, and allows a base of another size.
        if header.layout.uml and align_up(size, SECTOR) != align_up(header.size, SECTOR):
            return f"{found}its length is {size}, recorded is {header.size}"
        return None

    def _base_problem(self) -> str | None:
        """What the base's time tells; None where it may not or cannot be asked.

        The base is not opened, so its disk's size stays out of this.
        """
        name = self._header.name
        if name is None:
            return None
        try:
            path = self._opener.permitted(self.path, "backing file", name)
            facts = self._opener.host.stat(path)
        except (ChainError, StorageError):
            return None
        return self.base_changed(facts.mtime, self._header.size) if facts.kind == "file" else None

    async def base_will_change(self) -> None:
        """Record the base's time as unknown (0)."""
        assert self.window.dirty() == 0, "the header shares units with the first bits"
        header = self._header
        if header.mtime:
            stamp = cow_meta.stamp_change(header.layout, 0)
            await self.window.write_through(stamp.offset, stamp.data)
            self._header = header._replace(mtime=0)

    async def drop_backing(self) -> None:
        """See ``Driver.drop_backing``. Only when every bit is set, durably."""
        missing = self._header.clusters - self.allocated()
        if missing:
            raise UsageError(
                f"{self.path}: the backing file is still needed: {missing} sectors are not copied"
            )
        # The header shares units with the first bits: a bit written now would pass its data.
        assert self.window.dirty() == 0, "flush before dropping the base"
        header = self._header
        for change in cow_meta.rename_changes(header.layout, header.backing_file, b"", 0):
            await self.window.write_through(change.offset, change.data)
        self._header = header._replace(backing_file=b"", mtime=0)
        self.info = self._make_info()

    # ---- check ----

    def _lost(self, length: int) -> int:
        """Set bits whose data are not wholly inside a file of ``length`` bytes."""
        if length >= self._start + self._header.disk_size:
            return 0
        return self._count(max(length - self._start, 0) // self._cluster, self._bits)

    def _used_end(self) -> int:
        """Offset behind the data of the last set bit."""
        low, high = 0, self._bits  # the bits at and above ``high`` are clear
        while low < high:
            middle = (low + high) // 2
            if self._count(middle, high):
                low = middle + 1
            else:
                high = middle
        return self._start + min(high * self._cluster, self._header.disk_size)

    async def check(self, repair: str) -> CheckResult:
        """See ``Driver.check``. Findings: a file cut before its data, a changed base.

        Repair "all" makes a cut file whole: what is gone reads as zeros, as it does already.
        A changed base stays a finding until ``rename`` (rebase -u) records its time anew.
        """
        findings = []
        length = self.data.handle.size() if self._cut_at is None else self._cut_at
        lost = self._lost(length)
        if lost:
            fixed = repair == "all" and self._repair_length()
            text = (
                f"data of {lost} sectors lie past the end of the file at {length}: they read as "
                "zeros"
            )
            findings.append(Finding("corruption", text, fixed))
        problem = self._base_problem()
        if problem is not None:
            findings.append(Finding("corruption", problem, fixed=False))
        return CheckResult(
            total=self._header.clusters,
            allocated=self.allocated(),
            fragmented=0,
            compressed=0,
            image_end=self._used_end(),
            findings=findings,
        )

    def _repair_length(self) -> bool:
        handle = self.data.handle
        if handle.kind == "block":
            return False
        wanted = align_up(self._header.data_end, handle.alignment.offset)
        if handle.size() < wanted:
            self.data.truncate(wanted)
        self._cut_at = None
        return True

    def describe(self) -> dict[str, Any]:
        """See ``Driver.describe``."""
        facts = describe_header(self._header)
        facts["cache"] = self.data.cache.value
        facts["cache-note"] = self._cache_note
        facts["backing-changed"] = self._base_problem()
        return facts

    def close(self) -> None:
        """See ``Driver.close``."""
        self.window.close()
        self.data.close()


class CowFormat(Format):
    """Recognises, opens and creates cow images.

    ``layout`` given (one of ``cow_meta``'s): every image is read as that one, for the rare image
    that two layouts fit.
    """

    name = "cow"
    options = (
        Option("compat", "layout: x86-64 (QEMU's; default), i386 (QEMU's), uml3 (user-mode Linux)"),
    )

    def __init__(self, layout: Layout | None = None) -> None:
        self._layout = layout

    def recognises(self, head: bytes) -> bool:
        """See ``Format.recognises``."""
        return cow_meta.claims(head)

    def open(self, opener: Opener, path: str, access: Access) -> CowDriver:
        """See ``Format.open``."""
        return CowDriver(opener, path, access, self._layout)

    def inspect(self, path: str, handle: Handle) -> Inspection:
        """See ``Format.inspect``."""
        header = read_header(path, handle, self._layout)
        return Inspection(
            format=self.name,
            variant=header.layout.variant,
            size=header.disk_size,
            cluster_size=header.sectorsize,
            backing=header.name,
            backing_format=None,
            data_file=None,
            details=describe_header(header),
        )

    def create(self, opener: Opener, path: str, request: CreateRequest) -> int:
        """See ``Format.create``. An existing file is replaced, unless someone uses it."""
        layout = _chosen_layout(path, request.options)
        size = _chosen_size(path, layout, request)
        name = b"" if request.backing is None else _stored_name(path, layout, request.backing)
        where = cow_meta.geometry(layout, size, SECTOR, cow_meta.UML_ALIGNMENT)
        if where.data_start >= cow_meta.DATA_START_MAX:
            raise UsageError(f"{path}: size {size} is too large for a cow image (about 8 TiB)")
        header = cow_meta.build(layout, size, name, request.backing_mtime if name else 0)
        # UML's images are as long as their disk. QEMU's ended with the bitmap, unaligned; here they
        # reach the data, so that the first direct write meets an aligned end.
        length = where.data_start + (size if layout.uml else 0)

        def fill(handle: Handle) -> None:
            handle.truncate(length)
            handle.write_at(0, header)

        with _unused(opener, path) as there:
            make_file(opener.host, path, fill, replace=there)
        return size

    def rename(
        self,
        opener: Opener,
        path: str,
        *,
        backing: tuple[str, str | None] | None = None,
        data_file: tuple[str, str | None] | None = None,
    ) -> None:
        """See ``Format.rename``. Records the time that the new base has now, if it can be seen."""
        if data_file is not None:
            raise UsageError(f"{path}: a cow image has no separate data file to name")
        if backing is None:
            return
        handle = opener.metadata(path, _EXCLUSIVE)
        try:
            handle.sync()
            handle.drop_cache()  # what a failed sync has lost must not be believed
            header = read_header(path, handle, self._layout)
            layout = header.layout
            if not layout.writable:
                raise UnsupportedError(
                    path, "version", layout.version, f"layout {layout.variant} is only read"
                )
            name = _stored_name(path, layout, backing[0]) if backing[0] else b""
            mtime = _mtime_of(opener, path, name)
            for change in cow_meta.rename_changes(layout, header.backing_file, name, mtime):
                handle.write_at(change.offset, change.data)
                handle.datasync()
        finally:
            handle.close()


def read_header(path: str, handle: Handle, layout: Layout | None = None) -> Header:
    """Read and check the header of an open image."""
    length = handle.size()
    head = handle.read_at(0, cow_meta.HEAD_SIZE)
    if layout is not None:
        return cow_meta.parse_as(path, layout, head, length)
    return cow_meta.parse(path, head, length)


def describe_header(header: Header) -> dict[str, Any]:
    """A header's facts for ``info``."""
    return {
        "layout": header.layout.variant,
        "version": header.layout.version,
        "sector-size": header.sectorsize,
        "alignment": header.alignment,
        "backing-mtime": header.mtime,
        "bitmap-offset": header.geometry.bitmap_offset,
        "bitmap-length": header.geometry.bitmap_length,
        "data-offset": header.geometry.data_start,
    }


def _chosen_layout(path: str, options: dict[str, str]) -> Layout:
    compat = options.get("compat", cow_meta.X86_64.variant)
    layout = cow_meta.CREATED.get(compat)
    if layout is None:
        names = ", ".join(cow_meta.CREATED)
        raise UsageError(f"{path}: compat={compat!r}: must be one of {names}")
    return layout


def _chosen_size(path: str, layout: Layout, request: CreateRequest) -> int:
    size = request.backing_size if request.size is None else request.size
    if size is None:
        raise UsageError(f"{path}: a size is needed: there is no backing file to take it from")
    size = align_up(size, SECTOR)
    if not layout.uml:
        return size
    if request.backing is None:
        raise UsageError(f"{path}: compat=uml3 needs a backing file: user-mode Linux has no other")
    base = request.backing_size
    if base is not None and align_up(base, SECTOR) != size:
        raise UsageError(
            f"{path}: compat=uml3: the disk must be as large as its backing file ({base} bytes, "
            f"not {size})"
        )
    return size


def _stored_name(path: str, layout: Layout, name: str) -> bytes:
    """The bytes that record ``name``: as typed for QEMU, absolute for UML."""
    resolved = resolve(path, "backing file", name)
    stored = os.fsencode(os.path.abspath(resolved) if layout.uml else name)
    if len(stored) >= layout.name_size:
        raise UsageError(
            f"{path}: the backing file's name takes {len(stored)} bytes, but layout "
            f"{layout.variant} has room for {layout.name_size - 1}"
        )
    return stored


def _mtime_of(opener: Opener, path: str, name: bytes) -> int:
    """When the base was last changed; 0 (unknown) if it is not there, which ``rename`` allows."""
    if not name:
        return 0
    try:
        return opener.host.stat(resolve(path, "backing file", os.fsdecode(name))).mtime
    except StorageError:
        return 0


@contextmanager
def _unused(opener: Opener, path: str) -> Iterator[bool]:
    """Hold a writer's locks on ``path`` while it is replaced; yields whether it exists."""
    if not exists(opener.host, path):
        yield False
        return
    handle = opener.metadata(path, _EXCLUSIVE)
    try:
        if handle.kind != "file":
            raise UsageError(f"{path}: is a block device: a cow image is made as a file")
        yield True
    finally:
        handle.close()
