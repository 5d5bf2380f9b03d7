# SPDX-License-Identifier: MIT
"""The simulated machine itself: it must be as cruel as it says, and never crueller."""

from __future__ import annotations

import errno
from random import Random

import pytest

from mmcow.errors import LockedError, StorageError, SyncFailed
from tests.sim.faults import Fault
from tests.sim.host import Machine, SimHost

A, B, C = b"A" * 512, b"B" * 512, b"C" * 512
OLD = b"o" * 1024


def machine(**behaviour) -> SimHost:
    host = SimHost(1, Machine(**behaviour))
    host.put("/d/f", OLD)
    return host


def turn_all(queue) -> None:
    while queue.busy:
        queue.deliver(queue.turn(True))


def found_after_cuts(host: SimHost, count: int = 200) -> set[bytes]:
    rng = Random(2)
    return {host.power_cut(rng).content("/d/f") for _ in range(count)}


def test_unsynced_sectors_survive_independently() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=False)
    handle.write_at(0, A + B)
    old = OLD[:512]
    assert found_after_cuts(host) == {old + old, A + old, old + B, A + B}
    assert host.content("/d/f") == A + B


def test_each_version_of_a_sector_may_survive() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=False)
    handle.write_at(0, A)
    handle.write_at(0, B)
    assert {found[:1] for found in found_after_cuts(host)} == {b"o", b"A", b"B"}


def test_sync_makes_everything_before_it_durable() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=False)
    handle.write_at(0, A)
    handle.datasync()
    handle.write_at(0, B)
    assert {found[:1] for found in found_after_cuts(host)} == {b"A", b"B"}


def test_write_in_flight_may_be_torn() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=True)
    queue = host.queue()
    queue.write(handle, 0, (A + B,))
    assert len(found_after_cuts(host)) == 4
    assert host.content("/d/f") == OLD


def test_write_completed_during_a_sync_may_stay_behind() -> None:
    """This test finds a write that completes between a sync's start and end lost, and kept."""
    kept = set()
    for seed in range(60):
        host = SimHost(seed)
        host.put("/d/f", OLD)
        handle = host.open("/d/f", write=True, direct=True)
        queue = host.queue()
        first = queue.write(handle, 0, (A,))
        while not first.done:
            queue.deliver(queue.turn(True))
        sync = queue.datasync(handle)
        queue.write(handle, 512, (B,))
        turn_all(queue)
        assert sync.done
        contents = found_after_cuts(host, 20)
        assert {found[:512] for found in contents} == {A}
        kept.add(len({found[512:] for found in contents}))
    assert kept == {1, 2}


@pytest.mark.parametrize("length", [1024, 1124])  # where the file ends: at a sector's end, within
def test_what_a_sync_covered_beyond_the_length_is_there_with_the_length(length: int) -> None:
    found = set()
    for seed in range(60):
        host = SimHost(seed)
        host.put("/d/f", b"o" * length)
        handle = host.open("/d/f", write=True, direct=False)
        queue = host.queue()
        early = queue.datasync(handle)
        handle.write_at(1024, A + B)
        turn_all(queue)
        assert early.done
        found |= {content[1024:] for content in found_after_cuts(host, 20)}
        handle.datasync()
        assert found_after_cuts(host, 20) == {b"o" * 1024 + A + B}
    old = b"o" * (length - 1024)
    assert {old, A[: length - 1024], A + B} <= found


def test_completions_come_in_any_order() -> None:
    orders = set()
    for seed in range(50):
        host = SimHost(seed)
        host.put("/d/f", OLD)
        handle = host.open("/d/f", write=True, direct=True)
        queue = host.queue()
        order: list[str] = []
        for name, data in (("a", A), ("b", B), ("c", C)):
            queue.write(handle, 0, (data,)).on_done(
                lambda _, name=name, order=order: order.append(name)
            )
        turn_all(queue)
        orders.add("".join(order))
        assert host.content("/d/f")[:1].lower().decode() == order[-1]
    assert len(orders) == 6


def test_length_is_chosen_independently_of_data() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=False)
    handle.write_at(1024, A)
    assert found_after_cuts(host) == {OLD, OLD + A, OLD + bytes(512)}
    handle.datasync()
    assert found_after_cuts(host) == {OLD + A}


def test_truncation_cuts_content_and_length_together() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=False)
    handle.truncate(100)
    assert found_after_cuts(host) == {OLD, OLD[:100]}
    handle.truncate(1024)
    assert found_after_cuts(host) == {OLD, OLD[:100], OLD[:100] + bytes(924)}
    handle.sync()
    assert found_after_cuts(host) == {OLD[:100] + bytes(924)}


def test_punch_leaves_old_or_zero() -> None:
    host = machine()
    handle = host.open("/d/f", write=True, direct=True)
    queue = host.queue()
    queue.fallocate(handle, 0x03, 0, 512)
    turn_all(queue)
    assert {found[:1] for found in found_after_cuts(host)} == {b"o", b"\0"}
    assert host.content("/d/f") == bytes(512) + OLD[512:]


def test_refused_fallocate_says_so() -> None:
    host = machine(can_punch=False)
    handle = host.open("/d/f", write=True, direct=True)
    queue = host.queue()
    request = queue.fallocate(handle, 0x03, 0, 512)
    turn_all(queue)
    assert isinstance(request.error, StorageError) and request.error.errno == errno.EOPNOTSUPP


def test_new_name_may_vanish_until_its_directory_is_synced() -> None:
    host = machine()
    handle = host.create("/d/new")
    handle.write_at(0, A)
    handle.sync()
    rng = Random(3)
    assert {tuple(host.power_cut(rng).names("/d")) for _ in range(50)} == {("f",), ("f", "new")}
    host.sync_directory("/d")
    survivor = host.power_cut(rng)
    assert survivor.names("/d") == ["f", "new"] and survivor.content("/d/new") == A


def test_rename_happens_for_both_names_or_not_at_all() -> None:
    host = machine()
    host.put("/d/g", A)
    host.rename("/d/g", "/d/f")
    rng = Random(4)
    found = set()
    for _ in range(50):
        survivor = host.power_cut(rng)
        found.add((tuple(survivor.names("/d")), survivor.content("/d/f")))
    assert found == {(("f", "g"), OLD), (("f",), A)}


def test_failed_sync_loses_what_readers_still_see() -> None:
    """This test finds versions lost by a failed sync that the next, good one does not save."""
    outcomes = set()
    for seed in range(40):
        host = SimHost(seed)
        host.put("/d/f", OLD)
        host.faults.append(Fault(0, kind="datasync"))
        handle = host.open("/d/f", write=True, direct=False)
        handle.write_at(0, A)
        with pytest.raises(SyncFailed):
            handle.datasync()
        handle.datasync()
        assert host.content("/d/f")[:512] == A
        durable = {found[:512] for found in found_after_cuts(host, 10)}
        assert len(durable) == 1
        outcomes |= durable
        handle.drop_cache()
        assert {host.content("/d/f")[:512]} == durable
        handle.write_at(0, B)
        handle.datasync()
        assert {found[:512] for found in found_after_cuts(host, 10)} == {B}
    assert outcomes == {A, OLD[:512]}


def test_killed_process_leaves_the_page_cache() -> None:
    host = machine()
    host.open("/d/f", write=True, direct=False).write_at(0, A)
    after = host.kill(Random(5))
    assert after.content("/d/f")[:512] == A
    assert {found[:1] for found in found_after_cuts(after)} == {b"o", b"A"}


def test_locks_exclude_as_qemu_does() -> None:
    host = machine()
    writer = host.open("/d/f", write=True, direct=False)
    reader = host.open("/d/f", write=False, direct=False)
    writer.lock(frozenset({0, 1}), frozenset({1}))
    with pytest.raises(LockedError):
        reader.lock(frozenset({0}), frozenset({1}))
    reader.lock(frozenset({0}), frozenset())
    writer.close()
    reader.lock(frozenset({0}), frozenset({1}))


def test_unaligned_direct_request_is_refused() -> None:
    host = machine(direct_align=4096)
    handle = host.open("/d/f", write=True, direct=True)
    with pytest.raises(AssertionError):
        host.queue().write(handle, 0, (A,))


def test_msync_covers_its_range_alone() -> None:
    host = machine(mapped=True)
    host.put("/d/f2", bytes(8192))
    handle = host.open("/d/f2", write=True, direct=False)
    view = host.view(handle, 8192, 1 << 20, 512, mapped=True)
    handle.write_at(0, A)
    handle.write_at(4096, B)
    queue = host.queue()
    queue.msync(handle, view, 0, 4096)
    turn_all(queue)
    rng = Random(6)
    found = {host.power_cut(rng).content("/d/f2")[4096:4097] for _ in range(50)}
    assert found == {b"\0", b"B"}
    assert host.power_cut(rng).content("/d/f2")[:512] == A


def test_fault_fails_the_selected_call_once_or_always() -> None:
    for once, failures in ((True, 1), (False, 3)):
        host = machine()
        host.faults.append(Fault(1, errno.ENOSPC, once, kind="write_at"))
        handle = host.open("/d/f", write=True, direct=False)
        failed = 0
        for _ in range(4):
            try:
                handle.write_at(0, A)
            except StorageError as error:
                assert error.errno == errno.ENOSPC
                failed += 1
        assert failed == failures


def test_same_seed_same_story() -> None:
    def run(seed: int) -> tuple[list[str], bytes]:
        host = SimHost(seed)
        host.put("/d/f", OLD)
        handle = host.open("/d/f", write=True, direct=True)
        queue = host.queue()
        for data in (A, B, C):
            queue.write(handle, 0, (data,))
            queue.datasync(handle)
        turn_all(queue)
        return host.story(), host.power_cut(Random(seed)).content("/d/f")

    assert run(7) == run(7)
    assert run(7) != run(8)
