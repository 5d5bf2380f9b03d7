# SPDX-License-Identifier: MIT
"""The guard itself: every broken promise, on either side, is caught at the call that breaks it."""

from __future__ import annotations

import pytest

from mmcow.formats.driver import (
    CheckResult,
    Driver,
    Extent,
    Finding,
    Kind,
    LayerInfo,
    Reservation,
    Staged,
)
from mmcow.formats.guard import Guard
from mmcow.storage.window import Group

C = 4096
SIZE = 16 * C - 512
DATA, ZERO, BELOW, SPECIAL = Kind.DATA, Kind.ZERO, Kind.BELOW, Kind.SPECIAL


class FakeWindow:
    """As much of a window as the guard looks at."""

    def __init__(self):
        self.size = 65536
        self.changed = 0

    def dirty(self):
        return self.changed


class FakeDriver(Driver):
    """An honest driver over a list of kinds; tests replace single methods by liars."""

    def __init__(self):
        self.path = "fake"
        self.info = LayerInfo(
            "fake", "", SIZE, C, True, True, True, True, can_resize=True, one_file=False
        )
        self.window = FakeWindow()
        self.data = None
        self.clusters = [BELOW] * 16
        self.names = ("base", None)
        self.findings = []
        self.settled_with = None

    @property
    def backing(self):
        return self.names

    def map(self, offset, length):
        end = offset + length
        kind = self.clusters[offset // C]
        stop = offset
        while stop < end and self.clusters[stop // C] is kind:
            stop = min((stop // C + 1) * C, end)
        return [Extent(offset, stop - offset, kind, offset if kind in (DATA, SPECIAL) else -1)]

    def reserve(self, offset, length):
        return Reservation(offset, length, [(offset, length, offset)])

    def publish(self, reservation):
        self._set(reservation.offset, reservation.length, DATA)

    def abandon(self, reservation):
        pass

    def unmap(self, offset, length, kind):
        self._set(offset, length, kind)

    def _set(self, offset, length, kind):
        for cluster in range(offset // C, (offset + length) // C):
            self.clusters[cluster] = kind
        self.window.changed = 512

    async def read_special(self, extent, into):
        pass

    def stage(self):
        if not self.window.changed:
            return None
        self.window.changed = 0
        return Staged((Group(self.window, [(0, memoryview(bytes(512)))]),))

    def settled(self, staged):
        self.settled_with = staged

    async def resize(self, size, below):
        self.info = self.info._replace(size=size)

    def allocated(self):
        return self.clusters.count(DATA)

    async def drop_backing(self):
        self.names = None
        self.info = self.info._replace(has_backing=False)

    async def check(self, repair):
        return CheckResult(16, 1, 0, 0, 0, self.findings)

    def describe(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def fake():
    return FakeDriver()


@pytest.fixture
def guard(fake):
    return Guard(fake)


def finish(coroutine):
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    return stop.value.value


def caught(text):
    return pytest.raises(AssertionError, match=text)


def test_an_honest_pair_passes(guard, fake):
    assert guard.map(0, SIZE + 512) == [Extent(0, 16 * C, BELOW, -1)]
    first, second = guard.reserve(0, 2 * C), guard.reserve(4 * C, C)
    guard.publish(first)
    guard.abandon(second)
    guard.publish(guard.reserve(C, 2 * C))
    guard.unmap(0, C, ZERO)
    guard.unmap(C, C, BELOW)
    staged = guard.stage()
    guard.settled(staged)
    assert fake.settled_with is staged
    assert guard.stage() is None
    finish(guard.resize(20 * C, 0))
    assert guard.allocated() == 1
    finish(guard.drop_backing())
    assert guard.backing is None
    finish(guard.check("all"))
    assert guard.path == "fake"
    assert guard.describe() == {}
    guard.close()


# ---- a wrong engine ----


@pytest.mark.parametrize(
    ("offset", "length", "text"),
    [(-1, 5, "offset -1"), (0, 0, "length 0"), (0, 17 * C, "outside"), (16 * C, 1, "outside")],
)
def test_map_range(guard, offset, length, text):
    with caught(text):
        guard.map(offset, length)


@pytest.mark.parametrize("call", ["reserve", "unmap"])
@pytest.mark.parametrize(
    ("offset", "length", "text"), [(512, C, "inside a cluster"), (0, 512, "no multiple")]
)
def test_changes_are_whole_clusters(guard, call, offset, length, text):
    arguments = (offset, length) if call == "reserve" else (offset, length, BELOW)
    with caught(text):
        getattr(guard, call)(*arguments)


def test_reserve_twice(guard):
    guard.reserve(0, 2 * C)
    with caught("meets the reservation"):
        guard.reserve(C, C)


def test_reserve_where_nothing_can_be_allocated(fake, guard):
    fake.info = fake.info._replace(
        can_allocate=False, has_backing=False, can_zero=False, can_unallocate=False
    )
    with caught("without can_allocate"):
        guard.reserve(0, C)


@pytest.mark.parametrize("call", ["publish", "abandon"])
def test_settle_what_was_never_reserved(guard, call):
    with caught("not reserved"):
        getattr(guard, call)(Reservation(0, C, [(0, C, 0)]))


@pytest.mark.parametrize("first", ["publish", "abandon"])
@pytest.mark.parametrize("second", ["publish", "abandon"])
def test_settle_twice(guard, first, second):
    reservation = guard.reserve(0, C)
    getattr(guard, first)(reservation)
    with caught("not reserved"):
        getattr(guard, second)(reservation)


@pytest.mark.parametrize(("kind", "flag"), [(ZERO, "can_zero"), (BELOW, "can_unallocate")])
def test_unmap_without_the_capability(fake, guard, kind, flag):
    fake.info = fake.info._replace(**{flag: False})
    with caught("without " + flag):
        guard.unmap(0, C, kind)


def test_unmap_to_data(guard):
    with caught("unmap to"):
        guard.unmap(0, C, DATA)


def test_unmap_of_what_is_reserved(guard):
    guard.reserve(0, C)
    with caught("meets the reservation"):
        guard.unmap(0, C, BELOW)


def test_settled_without_stage(fake, guard):
    with caught("settled without stage"):
        guard.settled(Staged(()))
    fake.window.changed = 512
    staged = guard.stage()
    guard.settled(staged)
    with caught("settled without stage"):
        guard.settled(staged)


@pytest.mark.parametrize("call", ["resize", "drop_backing"])
def test_whole_layer_calls_need_quiet(fake, guard, call):
    arguments = (C, 0) if call == "resize" else ()
    reservation = guard.reserve(0, C)
    with caught("with reservations open"):
        getattr(guard, call)(*arguments).send(None)
    guard.publish(reservation)
    with caught("before a flush"):
        getattr(guard, call)(*arguments).send(None)


@pytest.mark.parametrize(("size", "below"), [(-512, 0), (100, 0), (512, -1)])
def test_resize_arguments(guard, size, below):
    with caught("size|below"):
        guard.resize(size, below).send(None)


def test_check_argument(guard):
    with caught("repair 'everything'"):
        guard.check("everything").send(None)


def test_read_special_of_data(guard):
    with caught("read_special of"):
        guard.read_special(Extent(0, C, DATA, 0), memoryview(bytearray(C))).send(None)
    with caught("another length"):
        guard.read_special(Extent(0, C, SPECIAL, 0), memoryview(bytearray(1))).send(None)


def test_base_changed_without_a_base(fake, guard):
    assert guard.base_changed(0, 0) is None
    fake.info = fake.info._replace(has_backing=False)
    with caught("a base that this layer does not have"):
        guard.base_changed(0, 0)


def test_use_after_close(guard):
    guard.close()
    for call in (guard.stage, guard.describe, guard.allocated, guard.close):
        with caught("after close"):
            call()
    with caught("after close"):
        guard.map(0, 1)


def test_close_with_a_reservation(guard):
    guard.reserve(0, C)
    with caught("closed with reservations"):
        guard.close()


# ---- a wrong driver ----


@pytest.mark.parametrize(
    ("extents", "text"),
    [
        ([], "answered nothing"),
        ([Extent(C, C, BELOW, -1)], "gap or overlap"),
        ([Extent(0, 0, BELOW, -1)], "no progress"),
        ([Extent(0, C, 3, -1)], "no kind"),
        ([Extent(0, C, DATA, -1)], "no host offset"),
        ([Extent(0, C, BELOW, 0)], "a host offset for nothing"),
        ([Extent(0, C, BELOW, -1), Extent(C, C, BELOW, -1)], "not merged"),
        ([Extent(0, C, DATA, 0), Extent(C, C, DATA, C)], "not merged"),
        ([Extent(0, C, BELOW, -1), Extent(2 * C, C, DATA, C)], "gap or overlap"),
        ([Extent(0, C, BELOW, -1), Extent(0, C, DATA, C)], "gap or overlap"),
        ([Extent(0, 5 * C, BELOW, -1)], "past"),
    ],
)
def test_map_answers(fake, guard, extents, text):
    fake.map = lambda _offset, _length: extents
    with caught(text):
        guard.map(0, 4 * C)


def test_map_may_stop_short_and_may_hold_scattered_data(fake, guard):
    fake.map = lambda _offset, _length: [Extent(0, C, DATA, 0), Extent(C, C, DATA, 8 * C)]
    assert len(guard.map(0, 4 * C)) == 2


def test_map_of_what_cannot_allocate_is_data(fake, guard):
    fake.info = fake.info._replace(
        can_allocate=False, has_backing=False, can_zero=False, can_unallocate=False
    )
    with caught("not DATA"):
        guard.map(0, C)


@pytest.mark.parametrize(
    ("reservation", "text"),
    [
        (Reservation(0, C, [(0, C, 0)]), "another range"),
        (Reservation(0, 2 * C, [(0, C, 0)]), "do not cover"),
        (Reservation(0, 2 * C, [(C, C, 0)]), "gap or overlap"),
        (Reservation(0, 2 * C, [(0, C, 0), (C, 0, C)]), "empty piece"),
        (Reservation(0, 2 * C, [(0, 2 * C, -1)]), "without a place"),
    ],
)
def test_reserve_answers(fake, guard, reservation, text):
    fake.reserve = lambda _offset, _length: reservation
    with caught(text):
        guard.reserve(0, 2 * C)


def test_reserve_becoming_visible(fake, guard):
    def reserve(offset, length):
        fake.clusters[0] = ZERO
        return Reservation(offset, length, [(offset, length, offset)])

    fake.reserve = reserve
    with caught("became visible"):
        guard.reserve(0, C)


def test_reserve_moving_data(fake, guard):
    guard.publish(guard.reserve(0, C))
    fake.reserve = lambda offset, length: Reservation(offset, length, [(offset, length, 9 * C)])
    with caught("lost its place"):
        guard.reserve(0, C)


def test_reserve_promising_one_place_twice(fake, guard):
    fake.reserve = lambda offset, length: Reservation(offset, length, [(offset, length, 0)])
    guard.reserve(0, C)
    with caught("promised twice"):
        guard.reserve(C, C)


def test_publish_not_showing(fake, guard):
    fake.publish = lambda _reservation: None
    with caught("not DATA"):
        guard.publish(guard.reserve(0, C))


def test_publish_elsewhere(fake, guard):
    fake.reserve = lambda offset, length: Reservation(offset, length, [(offset, length, 9 * C)])
    with caught("elsewhere"):
        guard.publish(guard.reserve(0, C))


def test_abandon_becoming_visible(fake, guard):
    fake.abandon = fake.publish
    with caught("became visible"):
        guard.abandon(guard.reserve(0, C))


def test_unmap_not_showing(fake, guard):
    fake.unmap = lambda *_: None
    with caught("after unmap"):
        guard.unmap(0, C, ZERO)


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([], "empty group"),
        ([(0, b"")], "empty run"),
        ([(512, b"x" * 512), (0, b"x" * 512)], "out of order"),
        ([(65536 - 256, b"x" * 512)], "past the window"),
    ],
)
def test_stage_answers(fake, guard, runs, text):
    fake.stage = lambda: Staged((Group(fake.window, runs),))
    with caught(text):
        guard.stage()


def test_stage_without_groups_or_with_rests(fake, guard):
    fake.stage = lambda: Staged(())
    with caught("without a group"):
        guard.stage()
    fake.window.changed = 512
    fake.stage = lambda: None
    with caught("nothing was staged"):
        guard.stage()


def test_resize_to_another_size(fake, guard):
    async def resize(_size, _below):
        fake.info = fake.info._replace(size=512)

    fake.resize = resize
    with caught("another size"):
        guard.resize(1024, 0).send(None)


def test_resize_failing_halfway(fake, guard):
    async def resize(_size, _below):
        fake.info = fake.info._replace(size=512)
        raise OSError

    fake.resize = resize
    with caught("third size"):
        guard.resize(1024, 0).send(None)


def test_resize_left_dirty(fake, guard):
    async def resize(size, _below):
        fake.info = fake.info._replace(size=size)
        fake.window.changed = 512

    fake.resize = resize
    with caught("dirty metadata"):
        guard.resize(1024, 0).send(None)


def test_drop_backing_that_keeps_it(fake, guard):
    async def keep():
        pass

    fake.drop_backing = keep
    with caught("left a name"):
        guard.drop_backing().send(None)
    fake.names = None
    with caught("depending on a base"):
        guard.drop_backing().send(None)


@pytest.mark.parametrize(
    ("findings", "repair", "text"),
    [
        ([Finding("note", "", False)], "", "kind 'note'"),
        ([Finding("leak", "", True)], "", "without being asked"),
        ([Finding("corruption", "", True)], "leaks", "asked for leaks"),
    ],
)
def test_check_findings(fake, guard, findings, repair, text):
    fake.findings = findings
    with caught(text):
        guard.check(repair).send(None)


def test_check_counts(fake, guard):
    async def check(_repair):
        return CheckResult(4, 5, 0, 0, 0, ())

    fake.check = check
    with caught("5 of 4"):
        guard.check("").send(None)


def test_allocated_bounds(fake, guard):
    fake.allocated = lambda: 17
    with caught("17 clusters allocated of 16"):
        guard.allocated()


def test_backing_without_a_name(fake, guard):
    for names in (None, ("", "raw")):
        fake.names = names
        with caught("name"):
            _ = guard.backing


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"size": 100}, "multiple of 512"),
        ({"size": -512}, "negative"),
        ({"cluster_size": 256}, "cluster size 256"),
        ({"cluster_size": 3 * 512}, "power of two"),
        ({"can_allocate": False}, "yet a base"),
        ({"can_allocate": False, "has_backing": False}, "unmaps for good"),
    ],
)
def test_info(fake, facts, text):
    fake.info = fake.info._replace(**facts)
    with caught(text):
        Guard(fake)
