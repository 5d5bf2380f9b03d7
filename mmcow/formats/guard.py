# SPDX-License-Identifier: MIT
"""A driver that watches another: the contract of ``formats.driver``, asserted on every call.

Owns: the promises of both sides. A wrong engine dies on the way down, a wrong driver on
the way up, each at the call that broke the contract. All tests run through it.

Never: changes an answer, hides an error, runs where nobody asked for it (it maps every range
a second time).

::

    engine  --range, alignment, capability, pairing-->  Guard  --the same call-->  driver
    engine  <--order, cover, kinds, visibility--------  Guard  <--the answer-----  driver
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcow.errors import ClosedError
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
from mmcow.ranges import SECTOR, align_up, overlaps, units_for

if TYPE_CHECKING:
    from mmcow.storage.file import File
    from mmcow.storage.host import Handle
    from mmcow.storage.window import Window

_HOSTED = (Kind.DATA, Kind.SPECIAL)
_REPAIRS = ("", "leaks", "all")
_FINDINGS = ("leak", "corruption")


class Guard(Driver):
    """Passes every call on to ``inner`` and asserts the contract around it."""

    def __init__(self, inner: Driver) -> None:
        self.inner = inner
        self._reservations: list[Reservation] = []
        self._staged: Staged | None = None
        self._closed = False
        _check_info(inner.info)

    # ---- attributes ----

    @property
    def path(self) -> str:  # type: ignore[override]
        """The driver's."""
        return self.inner.path

    @property
    def info(self) -> LayerInfo:  # type: ignore[override]
        """The driver's, checked."""
        _check_info(self.inner.info)
        return self.inner.info

    @property
    def data(self) -> File:  # type: ignore[override]
        """The driver's."""
        return self.inner.data

    @property
    def window(self) -> Window | None:  # type: ignore[override]
        """The driver's."""
        return self.inner.window

    @property
    def backing(self) -> tuple[str, str | None] | None:
        """The driver's; a layer that shows what lies below names it."""
        backing = self.inner.backing
        assert backing is not None or not self.inner.info.has_backing, "has_backing without a name"
        assert backing is None or backing[0], "the base's name is empty"
        return backing

    # ---- lookups and changes ----

    def table(self) -> Table | None:
        """The driver's; clusters are powers of two there."""
        table = self.inner.table()
        if table is not None and table.view is not None:
            assert 1 << table.shift == self.inner.info.cluster_size, "table of other clusters"
        return table

    def map(self, offset: int, length: int) -> list[Extent]:
        """Check the range on the way down, the extents on the way up."""
        self._check_range(offset, length)
        extents = self.inner.map(offset, length)
        self._check_extents(extents, offset, length)
        return extents

    def reserve(self, offset: int, length: int) -> Reservation:
        """Check that the clusters are whole and free of reservations, and that nothing shows."""
        assert self.inner.info.can_allocate, "reserve without can_allocate"
        self._check_clusters(offset, length)
        self._check_free(offset, length)
        before = self._map_all(offset, length)
        reservation = self.inner.reserve(offset, length)
        self._check_reservation(reservation, offset, length, before)
        assert self._map_all(offset, length) == before, "reserve became visible"
        self._reservations.append(reservation)
        return reservation

    def publish(self, reservation: Reservation) -> None:
        """Check that it was reserved, and that it shows where it was promised."""
        self._settle_reservation(reservation)
        self.inner.publish(reservation)
        shown = [(e.offset, e.length, e.host) for e in self._published(reservation)]
        assert shown == _merged(reservation.pieces), "published elsewhere than reserved"

    def abandon(self, reservation: Reservation) -> None:
        """Check that it was reserved and that nothing of it was or becomes visible."""
        self._settle_reservation(reservation)
        try:
            before = self._map_all(reservation.offset, reservation.length)
        except ClosedError:  # a request that dies with its image: there is nothing to look at
            self.inner.abandon(reservation)
            return
        self.inner.abandon(reservation)
        after = self._map_all(reservation.offset, reservation.length)
        assert after == before, "abandon became visible"

    def unmap(self, offset: int, length: int, kind: Kind) -> None:
        """Check the capability and that the range has the new kind afterwards."""
        info = self.inner.info
        assert kind in (Kind.ZERO, Kind.BELOW), f"unmap to {kind!r}"
        assert info.can_zero or kind is not Kind.ZERO, "unmap to ZERO without can_zero"
        assert info.can_unallocate or kind is not Kind.BELOW, "unmap without can_unallocate"
        self._check_clusters(offset, length)
        self._check_free(offset, length)
        self.inner.unmap(offset, length, kind)
        assert all(e.kind is kind for e in self._map_all(offset, length)), (
            f"not {kind!r} after unmap"
        )

    async def read_special(self, extent: Extent, into: memoryview) -> None:
        """Check that it is a whole SPECIAL extent as ``map`` tells it."""
        self._check_open()
        assert extent.kind is Kind.SPECIAL, f"read_special of {extent.kind!r}"
        assert len(into) == extent.length, "read_special into a buffer of another length"
        await self.inner.read_special(extent, into)

    # ---- write-out ----

    def stage(self) -> Staged | None:
        """Check that groups are there, in the windows, in order, and that nothing is left dirty."""
        self._check_open()
        staged = self.inner.stage()
        if staged is None:
            window = self.inner.window
            assert window is None or not window.dirty(), "dirty, but nothing was staged"
            return None
        assert staged.groups, "staged without a group"
        for group in staged.groups:
            end = 0
            assert group.runs, "an empty group"
            for offset, data in group.runs:
                assert offset >= end, "runs out of order"
                assert len(data), "an empty run"
                end = offset + len(data)
            assert end <= group.window.size, "a run reaches past the window"
        self._staged = staged
        return staged

    def settled(self, staged: Staged) -> None:
        """Check that it is what was staged last, once."""
        self._check_open()
        assert staged is self._staged, "settled without stage, twice, or out of order"
        self._staged = None
        self.inner.settled(staged)

    # ---- whole layer ----

    async def resize(self, size: int, below: int) -> None:
        """Check that the layer is quiet and that the size is the new one, or still the old one."""
        self._check_quiet("resize")
        old = self.inner.info.size
        assert size >= 0, "a negative size"
        assert size % SECTOR == 0, "a size that is no multiple of 512"
        assert below >= 0, "a negative length below"
        try:
            await self.inner.resize(size, below)
        except Exception:
            assert self.inner.info.size in (old, size), "a failed resize left a third size"
            raise
        assert self.info.size == size, "resize left another size"
        assert not self._is_dirty(), "resize returned with dirty metadata"

    def allocated(self) -> int:
        """Check the bounds."""
        self._check_open()
        count = self.inner.allocated()
        assert 0 <= count <= self._clusters(), f"{count} clusters allocated of {self._clusters()}"
        return count

    async def drop_backing(self) -> None:
        """Check that nothing depends on the base before, and that none is left after."""
        self._check_quiet("drop_backing")
        await self.inner.drop_backing()
        assert self.inner.backing is None, "drop_backing left a name"
        assert not self.info.has_backing, "drop_backing left the layer depending on a base"
        assert not self._is_dirty(), "drop_backing returned with dirty metadata"

    def base_changed(self, mtime: int, size: int) -> str | None:
        """Check that there is a base to compare with."""
        self._check_open()
        assert self.inner.info.has_backing, "asked about a base that this layer does not have"
        return self.inner.base_changed(mtime, size)

    async def check(self, repair: str) -> CheckResult:
        """Check the counts and that nothing is repaired that nobody asked for."""
        self._check_open()
        assert repair in _REPAIRS, f"check with repair {repair!r}"
        result = await self.inner.check(repair)
        for count in (result.allocated, result.fragmented, result.compressed):
            assert 0 <= count <= result.total, f"{count} of {result.total} clusters"
        for finding in result.findings:
            assert finding.kind in _FINDINGS, f"finding of kind {finding.kind!r}"
            assert repair or not finding.fixed, "repaired without being asked"
            assert repair != "leaks" or finding.kind == "leak" or not finding.fixed, (
                "repaired a corruption when asked for leaks"
            )
        return result

    def describe(self) -> dict[str, Any]:
        """The driver's."""
        self._check_open()
        return self.inner.describe()

    async def base_will_change(self) -> None:
        """Passed on."""
        await self.inner.base_will_change()

    def locked_handles(self) -> tuple[Handle, ...]:
        """The driver's."""
        return self.inner.locked_handles()

    def moved(self, path: str) -> None:
        """Passed on."""
        self.inner.moved(path)

    def close(self) -> None:
        """Check that no reservation is left, after closing."""
        self._check_open()
        self._closed = True
        self.inner.close()
        assert not self._reservations, "closed with reservations neither published nor abandoned"

    # ---- the way down ----

    def _check_open(self) -> None:
        assert not self._closed, "used after close"

    def _rounded_size(self) -> int:
        return align_up(self.inner.info.size, self.inner.info.cluster_size)

    def _clusters(self) -> int:
        return units_for(self.inner.info.size, self.inner.info.cluster_size)

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        assert offset >= 0, f"offset {offset}"
        assert length > 0, f"length {length}"
        assert offset + length <= self._rounded_size(), f"{offset}+{length} is outside the disk"

    def _check_clusters(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        cluster = self.inner.info.cluster_size
        assert offset % cluster == 0, f"offset {offset} is inside a cluster"
        assert length % cluster == 0, f"length {length} is no multiple of a cluster"

    def _check_free(self, offset: int, length: int) -> None:
        for other in self._reservations:
            assert not overlaps(
                offset, offset + length, other.offset, other.offset + other.length
            ), f"{offset}+{length} meets the reservation {other.offset}+{other.length}"

    def _settle_reservation(self, reservation: Reservation) -> None:
        self._check_open()
        for i, known in enumerate(self._reservations):
            if known is reservation:
                del self._reservations[i]
                return
        raise AssertionError("published or abandoned what is not reserved")

    def _is_dirty(self) -> bool:
        return self.inner.window is not None and self.inner.window.dirty() > 0

    def _check_quiet(self, what: str) -> None:
        self._check_open()
        assert not self._reservations, f"{what} with reservations open"
        assert not self._is_dirty(), f"{what} before a flush"

    # ---- the way up ----

    def _map_all(self, offset: int, length: int) -> list[Extent]:
        """The whole range, merged over as many answers as it takes."""
        end = offset + length
        found: list[Extent] = []
        while offset < end:
            extents = self.inner.map(offset, end - offset)
            self._check_extents(extents, offset, end - offset)
            for extent in extents:
                if found and _adjoins(found[-1], extent):
                    found[-1] = found[-1]._replace(length=found[-1].length + extent.length)
                else:
                    found.append(extent)
            offset = extents[-1].offset + extents[-1].length
        return found

    def _published(self, reservation: Reservation) -> list[Extent]:
        extents = self._map_all(reservation.offset, reservation.length)
        assert all(e.kind is Kind.DATA for e in extents), "published, but not DATA"
        return extents

    def _check_extents(self, extents: list[Extent], offset: int, length: int) -> None:
        assert extents, "map answered nothing"
        position = offset
        before: Extent | None = None
        for extent in extents:
            assert extent.offset == position, f"gap or overlap at {position}: {extent}"
            assert extent.length > 0, f"no progress: {extent}"
            assert isinstance(extent.kind, Kind), f"no kind: {extent}"
            if extent.kind in _HOSTED:
                assert extent.host >= 0, f"no host offset: {extent}"
            else:
                assert extent.host == -1, f"a host offset for nothing: {extent}"
            assert before is None or not _adjoins(before, extent), f"not merged: {before}, {extent}"
            if not self.inner.info.can_allocate:
                assert extent.kind is Kind.DATA, f"cannot allocate, and yet not DATA: {extent}"
            position += extent.length
            before = extent
        assert position <= offset + length, f"map answered past {offset}+{length}"

    def _check_reservation(
        self, reservation: Reservation, offset: int, length: int, before: list[Extent]
    ) -> None:
        assert (reservation.offset, reservation.length) == (offset, length), (
            "another range reserved"
        )
        position = offset
        for start, count, host in reservation.pieces:
            assert start == position, f"gap or overlap in the pieces at {position}"
            assert count > 0, "an empty piece"
            assert host >= 0, "a piece without a place"
            position += count
        assert position == offset + length, "the pieces do not cover the range"
        for extent in before:
            if extent.kind is Kind.DATA:
                for start, count, host in reservation.pieces:
                    if overlaps(start, start + count, extent.offset, extent.offset + extent.length):
                        assert host - start == extent.host - extent.offset, "DATA lost its place"
        for other in self._reservations:
            for _, count, host in reservation.pieces:
                for _, other_count, other_host in other.pieces:
                    assert not overlaps(host, host + count, other_host, other_host + other_count), (
                        "one place promised twice"
                    )


def _check_info(info: LayerInfo) -> None:
    assert info.size >= 0, "a negative size"
    assert info.size % SECTOR == 0, "a size that is no multiple of 512"
    cluster = info.cluster_size
    assert cluster >= SECTOR, f"cluster size {cluster}"
    assert cluster & (cluster - 1) == 0, f"cluster size {cluster} is no power of two"
    assert info.can_allocate or not info.has_backing, "nothing to allocate, and yet a base"
    assert info.can_allocate or not (info.can_zero or info.can_unallocate), "unmaps for good"


def _adjoins(first: Extent, second: Extent) -> bool:
    """Whether ``second`` only continues ``first``: such extents are to be one.

    SPECIAL never does: each is read whole.
    """
    if first.kind is not second.kind or first.kind is Kind.SPECIAL:
        return False
    return first.kind is not Kind.DATA or first.host + first.length == second.host


def _merged(pieces: Any) -> list[tuple[int, int, int]]:
    """The pieces with continuing ones joined, as ``map`` shows them."""
    merged: list[tuple[int, int, int]] = []
    for start, count, host in pieces:
        if merged and merged[-1][2] + merged[-1][1] == host:
            last = merged[-1]
            merged[-1] = (last[0], last[1] + count, last[2])
        else:
            merged.append((start, count, host))
    return merged
