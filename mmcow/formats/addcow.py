# SPDX-License-Identifier: MIT
"""add-cow: a raw data file at identity offsets, and one bit per cluster beside it.

Owns: the driver over the bitmap, what a power cut may find at every step of ``resize`` and
``drop_backing``, the checks against the files that a header names, and ``rename``.

Never: reads or writes guest data; shows bytes of the data file under an unset bit (they are
garbage: a crash, an adopted file); trusts a name (the ``Opener`` resolves and asks).

::

    disk.add-cow:  | header (names, cluster size) | bitmap: bit n = cluster n | zero padding |
    disk.raw:      | cluster 0 | cluster 1 | ...                length = the disk's size
    bit 1: the data file has the cluster; bit 0: what lies below shows, or zeros

Header bytes: ``addcow_meta``; rules, decisions and crash states: docs/formats/add-cow.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mmcow.errors import (
    ChainError,
    CorruptError,
    LockedError,
    ReadOnlyError,
    StorageError,
    SyncFailed,
    UsageError,
)
from mmcow.formats import addcow_meta as meta
from mmcow.formats.addcow_create import OPTIONS, create
from mmcow.formats.addcow_header import details, inspect, read_header
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
from mmcow.formats.opening import Access, CreateRequest, Format, Inspection, Opener, resolve
from mmcow.ranges import SECTOR, align_down, align_up
from mmcow.storage.file import Cache, File
from mmcow.storage.window import UNIT, Window

if TYPE_CHECKING:
    from mmcow.storage.host import Handle

# How much of a bitmap is read at a time where it is not mapped.
_PIECE = 1 << 20


class AddCowDriver(Driver):
    """One add-cow layer. ``handle`` and ``data`` are open, locked, and closed by ``close``."""

    window: Window

    def __init__(
        self, opener: Opener, header: meta.Header, handle: Handle, data: File, access: Access
    ) -> None:
        self.path = handle.path
        self.data = data
        self._handle = handle
        self._shift = header.cluster_size.bit_length() - 1
        self._bitmap = header.header_size
        size = align_up(data.size, SECTOR)
        self.window = Window(
            opener.host,
            opener.queue,
            handle,
            _covered(header, handle, size, access),
            durable=access.cache is not Cache.UNSAFE,
        )
        self._follow(header, size)

    def _follow(self, header: meta.Header, size: int) -> None:
        """Take header and size for what the image is from now on."""
        self._header = header
        complete = self._complete = header.all_allocated
        self.info = LayerInfo(
            format="add-cow",
            variant=header.variant,
            size=size,
            cluster_size=header.cluster_size,
            has_backing=bool(header.backing) and not complete,
            can_allocate=not complete,
            can_zero=False,
            can_unallocate=not complete,
            can_resize=self.data.handle.kind != "block",
            one_file=False,
        )

    @property
    def backing(self) -> tuple[str, str | None] | None:
        """The base as recorded; None also where the all-allocated flag sets one aside."""
        if not self.info.has_backing:
            return None
        return os.fsdecode(self._header.backing), self._header.backing_format

    # ---- lookups and changes ----

    def map(self, offset: int, length: int) -> list[Extent]:
        """Runs of equal bits as extents; with the all-allocated flag one DATA extent."""
        if self._complete:
            return [Extent(offset, length, Kind.DATA, offset)]
        shift = self._shift
        end = offset + length
        first = offset >> shift
        runs = self.window.bit_runs(self._bitmap, first, ((end - 1) >> shift) + 1 - first)
        extents = []
        for start, count, value in runs:
            stop = min((start + count) << shift, end)
            if value:
                extents.append(Extent(offset, stop - offset, Kind.DATA, offset))
            else:
                extents.append(Extent(offset, stop - offset, Kind.BELOW, -1))
            offset = stop
        return extents

    def table(self) -> Table | None:
        """The bitmap, or every byte with the all-allocated flag."""
        if self._complete:
            return Table(None, 0, 0, 0)
        view = self.window.native_view
        return None if view is None else Table(view, self._bitmap, self._shift, 0)

    def reserve(self, offset: int, length: int) -> Reservation:
        """The place is the cluster's own: nothing to find, nothing to remember."""
        return Reservation(offset, length, ((offset, length, offset),))

    def publish(self, reservation: Reservation) -> None:
        """Set the clusters' bits."""
        shift = self._shift
        self.window.bits_write(
            self._bitmap, reservation.offset >> shift, reservation.length >> shift, 1
        )

    def abandon(self, reservation: Reservation) -> None:
        """Nothing was taken."""

    def unmap(self, offset: int, length: int, kind: Kind) -> None:
        """Clear the clusters' bits: the base shows again."""
        assert kind is Kind.BELOW
        self.window.bits_write(self._bitmap, offset >> self._shift, length >> self._shift, 0)

    def allocated(self) -> int:
        """Set bits of the disk; all of them under the all-allocated flag."""
        total = self._header.clusters(self.info.size)
        return total if self._complete else self.window.bits_count(self._bitmap, 0, total)

    # ---- write-out ----

    def stage(self) -> Staged | None:
        """One group: bits are independent of each other."""
        group = self.window.take()
        return None if group is None else Staged((group,))

    async def _persist(self) -> None:
        """Write what is dirty, durably, outside of a flush."""
        group = self.window.take()
        if group is None:
            return
        try:
            await self.window.write_out(group)
        except SyncFailed:
            raise
        except StorageError:
            self.window.put_back(group)
            raise

    async def _write_header(self, raw: bytes) -> None:
        """Replace the header durably, sector 0 first.

        It alone decides what the image is; what follows are rests of names.
        """
        old = self._header.raw
        rest = len(raw) - UNIT
        for start, length in ((0, UNIT), (UNIT, rest)):
            new = raw[start : start + length]
            changed = _changed(old[start : start + length], new)
            if changed is None:
                continue
            low, high = changed
            try:
                await self.window.write_through(start + low, new[low:high])
            except SyncFailed:
                raise
            except StorageError:
                # Still dirty, but with what the file has: a later flush changes nothing.
                self.window.store(start, old[start : start + length])
                raise
            written = raw[: start + length] + old[start + length :]
            self._follow(meta.parse(self.path, written, self.window.size), self.info.size)

    # ---- size ----

    async def resize(self, size: int, below: int) -> None:
        """Change the size as docs/formats/add-cow.md "Resize" draws it, state by state.

        After StorageError a grow has not happened; a shrink may have (``info.size`` tells).
        """
        assert size % SECTOR == 0
        if size == self.info.size:
            return
        if not self.info.can_resize:
            raise UsageError(
                f"{self.path}: the data file {self.data.path} is a block device of "
                f"{self.data.size} bytes; resize the device itself"
            )
        if size > self.info.size:
            await self._grow(size, below)
        else:
            await self._shrink(size)

    async def _grow(self, size: int, below: int) -> None:
        header, window, base = self._header, self.window, self._bitmap
        old, new = header.clusters(self.info.size), header.clusters(size)
        # Without a base, or with one that nobody opened (its length is not known), all are set.
        covered = header.clusters(below) if self.info.has_backing and below else new
        ones = min(max(covered, old), new)
        if self.info.has_backing and below > self.info.size:
            self._require_copied_up()
        before = window.size
        # Bits beyond the end mean nothing, so every state up to the truncate is the old disk.
        window.grow(header.file_length(size))
        try:
            if ones > old:
                window.bits_write(base, old, ones - old, 1)
            if ones < new and window.bits_count(base, ones, new - ones):
                window.bits_write(base, ones, new - ones, 0)  # rests of a shrink that was cut
            await self._persist()
            self.data.truncate(size)
        except SyncFailed:
            raise
        except StorageError:
            window.bits_write(base, old, new - old, 0)
            self._give_back(before)
            raise
        self.info = self.info._replace(size=size)

    def _require_copied_up(self) -> None:
        """A partial last cluster left to a longer base would show the base behind the old end."""
        partial = self.info.size % self.info.cluster_size
        if partial and not self._complete:
            last = self.info.size // self.info.cluster_size
            assert self.window.bits_count(self._bitmap, last, 1), "copy up before growing"

    def _give_back(self, length: int) -> None:
        """Cut the bitmap file back after a failed grow; a longer file is only a leak."""
        try:
            self.window.shrink(length)
        except SyncFailed:
            raise
        except StorageError:
            return  # the first error is the one to report

    async def _shrink(self, size: int) -> None:
        header, window, base = self._header, self.window, self._bitmap
        old, new = header.clusters(self.info.size), header.clusters(size)
        self.data.truncate(size)
        # From here the disk has its new size, whatever fails.
        self.info = self.info._replace(size=size)
        length = header.file_length(size)
        kept = min(old, (length - base) * 8)
        if kept > new:
            window.bits_write(base, new, kept - new, 0)
        await self._persist()
        window.shrink(length)

    # ---- the base ----

    async def drop_backing(self) -> None:
        """Flag first, durable; then the name. Between the two the name means nothing."""
        header = self._header
        total = header.clusters(self.info.size)
        missing = total - self.allocated()
        if missing:
            raise UsageError(
                f"{self.path}: {missing} of {total} clusters are only in the backing file"
            )
        assert not self.window.dirty(), "drop_backing only after a flush"
        if header.modern and not header.all_allocated:
            await self._write_header(meta.with_all_allocated(header))
        if self._header.backing:
            await self._write_header(meta.without_backing(self._header))

    # ---- examination ----

    async def check(self, repair: str) -> CheckResult:
        """Header rests and the file's length; bits cannot contradict each other.

        Any bitmap is a valid one, so nothing here is ever data at risk. "leak" is what is left
        over and means nothing: space behind the bitmap, rests of names (an interrupted rename
        leaves them); "corruption" is what is missing.
        """
        if repair and not self._handle.writable:
            raise ReadOnlyError(self.path, "repair")
        findings = [*await self._check_header(repair), *self._check_length(repair)]
        if repair == "all" and self._complete:
            # Valid with any bitmap; ones protect from readers that do not know the flag.
            await self._set_all()
        total = self._header.clusters(self.info.size)
        end = self._header.file_length(self.info.size)
        return CheckResult(total, self.allocated(), 0, 0, end, findings)

    async def _check_header(self, repair: str) -> list[Finding]:
        stray = self._header.stray()
        if stray and repair:
            await self._write_header(meta.without_stray(self._header))
        return [
            Finding("leak", f"header has non-zero bytes outside fields and names "
                    f"between {offset} and {offset + length}", bool(repair))
            for offset, length in stray
        ]  # fmt: skip

    def _check_length(self, repair: str) -> list[Finding]:
        length, right = self._handle.size(), self._header.file_length(self.info.size)
        if length > right:
            if repair:
                self.window.shrink(right)
            text = f"file has {length - right} bytes behind the bitmap"
            return [Finding("leak", text, bool(repair))]
        if length < right:
            # Opening for writing adds it: seen only by readers.
            return [Finding("corruption", f"{right - length} bytes of padding are missing", False)]
        return []

    async def _set_all(self) -> None:
        total = self._header.clusters(self.info.size)
        if self.window.bits_count(self._bitmap, 0, total) < total:
            self.window.bits_write(self._bitmap, 0, total, 1)
            await self._persist()

    def describe(self) -> dict[str, Any]:
        """Variant, flag, data file, and whether every bit is set (even where the flag rules)."""
        total = self._header.clusters(self.info.size)
        ones = self.window.bits_count(self._bitmap, 0, total)
        return {**details(self._header), "bitmap-complete": ones == total}

    def locked_handles(self) -> tuple[Handle, ...]:
        """The add-cow file and the data file."""
        return (self._handle, self.data.handle)

    def close(self) -> None:
        """Release the window and both files."""
        self.window.close()
        self._handle.close()
        self.data.close()


def _covered(header: meta.Header, handle: Handle, size: int, access: Access) -> int:
    """Bytes of the file that the window covers; padding that is missing is added for a writer."""
    length, least, right = handle.size(), header.least_length(size), header.file_length(size)
    if length < least:
        raise CorruptError(
            handle.path,
            "length",
            length,
            f"a disk of {size} bytes has {header.clusters(size)} clusters: {least} are needed",
        )
    if length < right and access.write:
        handle.truncate(right)
        handle.sync()
        length = right
    return min(length, right)


def _changed(old: bytes, new: bytes) -> tuple[int, int] | None:
    """The range in which two byte strings of one length differ; None if they do not."""
    if old == new:
        return None
    low = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    high = next(i for i in range(len(old), 0, -1) if old[i - 1] != new[i - 1])
    return low, high


class AddCowFormat(Format):
    """Recognises, opens, makes and renames add-cow images."""

    name = "add-cow"
    options = OPTIONS

    def recognises(self, head: bytes) -> bool:
        """Whether the file begins with either magic."""
        return head.startswith((meta.MAGIC_V20, meta.MAGIC_OLD))

    def open(self, opener: Opener, path: str, access: Access) -> AddCowDriver:
        """Open the image and its data file."""
        handle = opener.metadata(path, access)
        try:
            if access.write:
                # After a sync that failed in another process the cache may show what the disk
                # does not have; only a drop of clean pages makes the next read truthful.
                handle.datasync()
                handle.drop_cache()
            header = read_header(path, handle)
            data = _open_data(opener, path, handle, header, access)
            try:
                return AddCowDriver(opener, header, handle, data, access)
            except BaseException:
                data.close()
                raise
        except BaseException:
            handle.close()
            raise

    def inspect(self, path: str, handle: Handle) -> Inspection:
        """The header's facts; the size is the data file's and stays unknown."""
        return inspect(path, handle)

    def create(self, opener: Opener, path: str, request: CreateRequest) -> int:
        """Make the data file, unless it exists, then the add-cow file over it."""
        return create(opener, path, request)

    def rename(
        self,
        opener: Opener,
        path: str,
        *,
        backing: tuple[str, str | None] | None = None,
        data_file: tuple[str, str | None] | None = None,
    ) -> None:
        """Record other names; ``addcow_meta.steps_to`` tells what a power cut leaves.

        Removing the base needs every bit set; giving one to an all-allocated image takes the
        flag away, which needs the same. Only the size of a data file is looked at for that.
        """
        access = Access(write=True, top=True, share=False, cache=Cache.WRITEBACK)
        handle = opener.metadata(path, access)
        try:
            # The bits first, if they are looked at; and nothing of what a failed sync has lost.
            handle.sync()
            handle.drop_cache()
            header = read_header(path, handle)
            target = _renamed(opener, handle, header, backing, data_file)
            before = header.raw
            for raw in meta.steps_to(path, header, target):
                meta.parse(path, raw, handle.size())  # what would not open is never written
                changed = _changed(before, raw)
                if changed is not None:
                    low, high = align_down(changed[0], UNIT), align_up(changed[1], UNIT)
                    handle.write_at(low, raw[low:high])
                    handle.sync()
                before = raw
        finally:
            handle.close()


def _open_data(
    opener: Opener, path: str, handle: Handle, header: meta.Header, access: Access
) -> File:
    """Open the data file that the header names; the image itself, by any name, is refused."""
    name = os.fsdecode(header.image)
    problem = "is the image file itself"
    try:
        data = opener.named_data(path, name, access)
    except LockedError as error:
        # Our own lock on the image excludes us just as another process's would.
        if opener.host.stat(resolve(path, "data file", name)).identity == handle.identity:
            raise ChainError(path, "data file", name, problem) from error
        raise
    if data.handle.identity == handle.identity:
        data.close()
        raise ChainError(path, "data file", name, problem)
    return data


def _renamed(
    opener: Opener,
    handle: Handle,
    header: meta.Header,
    backing: tuple[str, str | None] | None,
    data_file: tuple[str, str | None] | None,
) -> bytes:
    """The header with other names."""
    path = handle.path
    image = header.image
    if data_file is not None:
        image = _new_name(path, "data file", data_file[0])
        if data_file[1] not in (None, "raw"):
            raise UsageError(f"{path}: format of the data file {data_file[1]!r}: must be raw")
    if backing is None:
        return meta.rebuild(path, header, header.backing, header.backing_format, image)
    name, backing_format = backing
    if not name:
        return _without_base(opener, handle, header, image)
    if header.all_allocated and not header.backing:
        _require_complete(opener, handle, header, image)
        header = meta.parse(path, meta.without_all_allocated(header), handle.size())
    if backing_format is None and header.backing:
        backing_format = header.backing_format
    return meta.rebuild(path, header, _new_name(path, "backing file", name), backing_format, image)


def _without_base(opener: Opener, handle: Handle, header: meta.Header, image: bytes) -> bytes:
    if not header.backing:
        return meta.rebuild(handle.path, header, b"", None, image)
    if not header.all_allocated:
        _require_complete(opener, handle, header, image)
    raw = meta.with_all_allocated(header) if header.modern else header.raw
    flagged = meta.parse(handle.path, raw, handle.size())
    if image != header.image:
        return meta.rebuild(handle.path, flagged, b"", None, image)
    return meta.without_backing(flagged)


def _new_name(path: str, role: str, name: str) -> bytes:
    """Refuse a name that no opening would follow, or that is the image's own."""
    resolved = resolve(path, role, name)
    if os.path.abspath(resolved) == os.path.abspath(path):
        raise UsageError(f"{path}: {role} {name!r} is the image itself")
    return os.fsencode(name)


def _require_complete(opener: Opener, handle: Handle, header: meta.Header, image: bytes) -> None:
    """Refuse unless every bit of the disk is set in the file."""
    path, name = handle.path, os.fsdecode(image)
    resolved = opener.permitted(path, "data file", name)
    try:
        facts = opener.host.stat(resolved)
        size = facts.size
        if facts.kind == "block":  # stat does not know a device's length
            device = opener.host.open(resolved, write=False, direct=False)
            size = device.size()
            device.close()
    except StorageError as error:
        raise ChainError(path, "data file", name, str(error)) from error
    clusters = header.clusters(align_up(size, SECTOR))
    if not _all_set(handle, header.header_size, clusters):
        raise UsageError(
            f"{path}: not every cluster is in the data file {name!r}: without the backing file "
            "the others would be lost (stream copies them)"
        )


def _all_set(handle: Handle, base: int, bits: int) -> bool:
    whole, rest = divmod(bits, 8)
    for offset in range(0, whole, _PIECE):
        length = min(_PIECE, whole - offset)
        if handle.read_at(base + offset, length) != b"\xff" * length:
            return False
    if not rest:
        return True
    last = handle.read_at(base + whole, 1)
    mask = (1 << rest) - 1
    return bool(last) and last[0] & mask == mask
