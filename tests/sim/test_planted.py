# SPDX-License-Identifier: MIT
"""Bugs put in on purpose: the rig must see every one of them.

Each bug replaces a few lines of the real code by lines that somebody might have written. The
same cases pass without it (``test_control``). A rig that has not been seen failing proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

import mmcow.formats.cow
import mmcow.formats.raw
import mmcow.image
import mmcow.storage.file
from mmcow.chain import Layer
from mmcow.engine.engine import Engine
from mmcow.engine.flush import Flusher
from mmcow.engine.gate import Claim, Claims
from mmcow.errors import StorageError
from mmcow.formats.addcow import AddCowDriver
from mmcow.formats.cow import CowDriver
from mmcow.formats.driver import Kind
from mmcow.jobs import commit, snapshot
from mmcow.native import aligned
from mmcow.ranges import align_down, align_up
from mmcow.storage import names
from mmcow.storage.file import File, _Exclusive
from mmcow.storage.window import Window
from mmcow.tasks import completed
from tests.sim import fault
from tests.sim.crash import CREATE, run_case
from tests.sim.host import SimHandle, _Request
from tests.sim.model import Violation

pytestmark = [pytest.mark.crash, pytest.mark.fault]

MOST_CUTS = 30_000  # within so many power cuts the bug must be seen
FIRST = 5_000_000


@pytest.fixture(autouse=True)
def _checked_drivers(monkeypatch):
    monkeypatch.setattr(mmcow.image, "CHECK_DRIVERS", False)  # the rig is on its own here


def cuts_until_seen(variants: tuple[str, ...], most: int = MOST_CUTS) -> int | None:
    """Power cuts until a violation; None if there was none."""
    cuts, number = 0, FIRST
    while cuts < most:
        for variant in variants:
            try:
                cuts += max(run_case(number, variant), 1)
            except Violation:
                return cuts
        number += 1
    return None


# ---- the bugs ----


def publish_before_write(patch) -> None:
    """The bit is set when room is reserved, before the data is written."""
    for driver in (AddCowDriver, CowDriver):
        reserve = driver.reserve

        def early(self, offset, length, reserve=reserve):
            reservation = reserve(self, offset, length)
            self.publish(reservation)
            return reservation

        patch.setattr(driver, "reserve", early)


def snapshot_after_sync(patch) -> None:
    """Bits published during the data sync are written out with the others."""

    async def flush_once(self) -> None:
        await self._driver.data.sync()
        staged = self._driver.stage()
        if staged is not None:
            await self._write_groups(staged)
            self._driver.settled(staged)

    patch.setattr(Flusher, "_flush_once", flush_once)


def metadata_before_data(patch) -> None:
    """Bits are written out before the data sync."""

    async def flush_once(self) -> None:
        staged = self._driver.stage()
        if staged is not None:
            await self._write_groups(staged)
            self._driver.settled(staged)
        await self._driver.data.sync()

    patch.setattr(Flusher, "_flush_once", flush_once)


def no_barrier(patch) -> None:
    """Bits are written, and the flush returns without waiting for the disk."""

    async def barrier(self, group) -> None:
        return

    patch.setattr(Window, "_barrier", barrier)


def no_data_sync(patch) -> None:
    """The flush makes bits durable, and leaves the data to chance."""
    patch.setattr(File, "sync", lambda self: completed(0))


def sync_forgets_writes_in_flight(patch) -> None:
    """A write that completes during a sync is believed to be covered by it."""

    def sync(self):
        if not self.unsynced:
            return completed(0)
        self.unsynced = False
        return self._queue.datasync(self.handle)

    patch.setattr(File, "sync", sync)


def flush_joins_running(patch) -> None:
    """A second flush is content with the end of the one that runs already."""

    async def flush(self) -> None:
        self.check()
        if self._running is not None:
            await self._running
            return
        mine = self._next = mmcow.tasks.Completion()
        self._reactor.spawn(self._run(None, mine))
        await mine

    patch.setattr(Flusher, "flush", flush)


def grow_data_first(patch) -> None:
    """The data file gets its new length before the new bits are durable."""

    async def grow(self, size, below) -> None:
        header, window = self._header, self.window
        old, new = header.clusters(self.info.size), header.clusters(size)
        self.data.truncate(size)
        window.grow(header.file_length(size))
        covered = header.clusters(below) if self.info.has_backing else new
        ones = min(max(covered, old), new)
        window.bits_write(self._bitmap, old, ones - old, 1)
        window.bits_write(self._bitmap, ones, new - ones, 0)
        await self._persist()
        self.info = self.info._replace(size=size)

    patch.setattr(AddCowDriver, "_grow", grow)


def grow_without_bits(patch) -> None:
    """New clusters are left to the base, which is longer."""

    async def grow(self, size, below) -> None:
        self.window.grow(self._header.file_length(size))
        self.data.truncate(size)
        self.info = self.info._replace(size=size)

    patch.setattr(AddCowDriver, "_grow", grow)


def grow_without_copy_up(patch) -> None:
    """The last partial cluster is not copied up before the disk grows over a longer base."""
    copy_up = Engine._copy_up

    async def skip(self, offset, end):
        if self.gate.closed:
            return 0
        return await copy_up(self, offset, end)

    patch.setattr(Engine, "_copy_up", skip)
    patch.setattr(AddCowDriver, "_require_copied_up", lambda self: None)


def shrink_clears_first(patch) -> None:
    """The bits behind the new end are cleared before the data file is cut."""

    async def shrink(self, size) -> None:
        header, window = self._header, self.window
        old, new = header.clusters(self.info.size), header.clusters(size)
        window.bits_write(self._bitmap, new, old - new, 0)
        await self._persist()
        self.data.truncate(size)
        self.info = self.info._replace(size=size)
        window.shrink(header.file_length(size))

    patch.setattr(AddCowDriver, "_shrink", shrink)


def resize_not_synced(patch) -> None:
    """The new length is set and not synced."""

    def truncate(self, size) -> None:
        self.handle.truncate(size)
        self.size = size

    patch.setattr(File, "truncate", truncate)


def no_head_fill(patch) -> None:
    """The part of a cluster before the guest's bytes is not filled from below."""
    fills = Engine._fills

    async def headless(self, *arguments):
        _, tail = await fills(self, *arguments)
        return aligned(0), tail

    patch.setattr(Engine, "_fills", headless)


def no_tail_fill(patch) -> None:
    """The part of a cluster behind the guest's bytes is not filled from below."""
    fills = Engine._fills

    async def tailless(self, *arguments):
        head, _ = await fills(self, *arguments)
        return head, aligned(0)

    patch.setattr(Engine, "_fills", tailless)


def zero_by_bit_alone(patch) -> None:
    """Whole clusters are zeroed by their bit, over whatever the data file holds there."""

    async def zero_clusters(self, first, last, may_unmap) -> None:
        self.top.publish(self.top.reserve(first, last - first))

    patch.setattr(Engine, "_zero_clusters", zero_clusters)


def discard_shows_base(patch) -> None:
    """A discarded cluster loses its bit, and old bytes of the base come back."""

    async def discard_extent(self, extent) -> None:
        if extent.kind is not Kind.DATA or not self.top.info.can_unallocate:
            return
        cluster = self.top.info.cluster_size
        first = align_up(extent.offset, cluster)
        last = align_down(extent.offset + extent.length, cluster)
        if first < last:
            self.top.unmap(first, last - first, Kind.BELOW)

    patch.setattr(Engine, "_discard_extent", discard_extent)


def no_claims(patch) -> None:
    """Two writers may fill and publish one cluster at the same time."""

    async def take(self, start, end):
        claim = Claim(start, end)
        self._claims.append(claim)
        return claim

    patch.setattr(Claims, "take", take)


def no_exclusion(patch) -> None:
    """A block may be written while another request reads, modifies and writes it."""

    async def take(self, start, end):
        held = _Exclusive(start, end)
        self._exclusive.append(held)
        return held

    async def wait(self, start, end) -> None:
        return

    patch.setattr(File, "_take_exclusive", take)
    patch.setattr(File, "_wait_exclusive", wait)


def open_without_sync(patch) -> None:
    """What a killed process left in the page cache is taken for durable."""
    patch.setattr(SimHandle, "datasync", lambda self: None)


def name_not_synced(patch) -> None:
    """A new file's directory is not synced."""
    make = names.make_file

    class Forgetful:
        def __init__(self, host) -> None:
            self._host = host

        def __getattr__(self, name):
            return getattr(self._host, name)

        def sync_directory(self, path) -> None:
            return

    def make_file(host, path, fill, *, replace) -> None:
        make(Forgetful(host), path, fill, replace=replace)

    patch.setattr(names, "make_file", make_file)
    patch.setattr(mmcow.formats.cow, "make_file", make_file)


def file_not_synced_before_its_name(patch) -> None:
    """A new file gets its name before its content is durable."""

    def make_file(host, path, fill, *, replace) -> None:
        temporary = path + ".mmcow-new"
        handle = host.create(temporary)
        fill(handle)
        handle.close()
        if replace:
            host.rename(temporary, path)
        else:
            names._link_new(host, temporary, path)
        host.sync_directory(names.directory_of(path))

    patch.setattr(names, "make_file", make_file)
    patch.setattr(mmcow.formats.cow, "make_file", make_file)


def commit_without_base_sync(patch) -> None:
    """A commit clears the overlay's bits before the base is durable."""
    merge = commit._merge

    def hasty(layers, target, **options):
        target.flush = lambda: None
        return merge(layers, target, **options)

    patch.setattr(commit, "_merge", hasty)


def commit_punches_first(patch) -> None:
    """A commit gives the space back before the cleared bits are durable."""

    async def give_up(self, offset, length) -> None:
        await self.gate.close()
        try:
            for extent in self.lookup.extents(offset, align_up(offset + length, self._cluster)):
                if extent.kind is Kind.DATA:
                    self.top.unmap(extent.offset, extent.length, Kind.BELOW)
                    await self.top.data.discard(extent.host, extent.length)
            await self.flusher.flush()
        finally:
            self.gate.open()

    patch.setattr(Engine, "give_up", give_up)


def _pivot_without(step: str):
    async def pivot(image, fresh, frozen) -> None:
        host, served, old = image.opener.host, image.path, image.layers[0].driver
        if step != "flush":
            await image.engine.flusher.flush()
        host.link(served, frozen)
        if step != "sync":
            host.sync_directory(names.directory_of(served))
        host.rename(fresh.path, served)
        old.moved(frozen)
        fresh.moved(served)
        image.push(Layer(fresh, "add-cow", False))
        host.sync_directory(names.directory_of(served))

    return pivot


def snapshot_without_flush(patch) -> None:
    """The frozen layer's un-flushed bits stay behind: nobody will ever write them."""
    patch.setattr(snapshot, "_pivot", _pivot_without("flush"))


def snapshot_renames_too_early(patch) -> None:
    """The served name changes hands before the frozen layer's own name is durable."""
    patch.setattr(snapshot, "_pivot", _pivot_without("sync"))


def write_through_without_flush(patch) -> None:
    """Write-through modes acknowledge what is not durable."""

    async def change(self, work, length):
        await self.gate.enter()
        try:
            await work
        finally:
            self.gate.leave()
        return length

    patch.setattr(Engine, "_change", change)


ADD_COW = ("v20", "v18", "v7")
LAYERED = ("v20", "v18", "v7", "x86-64")
BUGS: tuple[tuple[Callable, tuple[str, ...]], ...] = (
    (publish_before_write, LAYERED),
    (snapshot_after_sync, LAYERED),
    (metadata_before_data, LAYERED),
    (no_barrier, LAYERED),
    (no_data_sync, LAYERED),
    (sync_forgets_writes_in_flight, LAYERED),
    (flush_joins_running, LAYERED),
    (grow_data_first, ADD_COW),
    (grow_without_bits, ADD_COW),
    (grow_without_copy_up, ("v20",)),
    (shrink_clears_first, ADD_COW),
    (resize_not_synced, ADD_COW),
    (no_head_fill, ("v20",)),
    (no_tail_fill, ("v20",)),
    (zero_by_bit_alone, LAYERED),
    (discard_shows_base, LAYERED),
    (no_claims, ("v20", "v18")),
    (no_exclusion, LAYERED),
    (open_without_sync, ADD_COW),
    (commit_without_base_sync, LAYERED),
    (commit_punches_first, ("v20",)),
    (snapshot_without_flush, LAYERED),
    (snapshot_renames_too_early, LAYERED),
    (write_through_without_flush, LAYERED),
    (name_not_synced, (CREATE,)),
    (file_not_synced_before_its_name, (CREATE,)),
)


@pytest.mark.parametrize(("bug", "variants"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
def test_bug_is_seen(bug, variants, monkeypatch) -> None:
    bug(monkeypatch)
    cuts = cuts_until_seen(variants)
    assert cuts is not None, f"{bug.__doc__} Not seen in {MOST_CUTS} power cuts."
    print(f"{bug.__name__}: seen after {cuts} power cuts")


# ---- bugs that only a failing call brings to light ----


def failure_not_sticky(patch) -> None:
    """After a failed sync the next one is believed."""
    patch.setattr(Flusher, "fail", lambda self, cause: None)


def staged_bits_forgotten(patch) -> None:
    """Bits whose write-out failed are not put back: the flush that comes next has nothing to do."""
    patch.setattr(Window, "put_back", lambda self, group: None)


def failed_write_published(patch) -> None:
    """A cluster is published although its write has failed."""
    write = Engine._write_reserved

    async def careless(self, *arguments) -> None:
        with suppress(StorageError):
            await write(self, *arguments)

    patch.setattr(Engine, "_write_reserved", careless)


def other_error_raised(patch) -> None:
    """A failing call comes out as an error that is not mmcow's."""

    def fail(self, error) -> None:
        self.error = OSError(5, "Input/output error")
        self._finish()

    patch.setattr(_Request, "fail", fail)


FAULTS = (failure_not_sticky, staged_bits_forgotten, failed_write_published, other_error_raised)


@pytest.mark.parametrize("bug", FAULTS, ids=lambda bug: bug.__name__)
def test_bug_is_seen_by_faults(bug, monkeypatch) -> None:
    bug(monkeypatch)
    runs = 0
    for number in range(FIRST, FIRST + 20):
        for variant in LAYERED:
            try:
                runs += fault.run_case(number, variant, 3)[0]
            except Violation:
                print(f"{bug.__name__}: seen after {runs} failing calls")
                return
    pytest.fail(f"{bug.__doc__} Not seen in {runs} failing calls.")


@pytest.mark.parametrize("variants", sorted({variants for _, variants in BUGS}), ids="-".join)
def test_control(variants) -> None:
    """This test runs the same cases without any bug."""
    assert cuts_until_seen(variants, most=6000) is None
