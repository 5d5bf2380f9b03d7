# SPDX-License-Identifier: MIT
"""The oracle itself: what it allows, and above all what it does not."""

from __future__ import annotations

import pytest

from tests.sim.model import Model, Violation

OLD, A, B, ZERO = (c * 512 for c in (b"o", b"A", b"B", b"\0"))


def model() -> Model:
    return Model.of(OLD * 2)


def write(disk: Model, data: bytes, offset: int = 0) -> None:
    disk.done(disk.begin_write(offset, data))


def flush(disk: Model) -> None:
    disk.flushed(disk.begin_flush())


def survivors(disk: Model) -> set[bytes]:
    """Which of the known values a cut may leave in the first cell."""
    allowed = set()
    for value in (OLD, A, B, ZERO):
        try:
            disk.check_survivor(value + OLD)
        except Violation:
            continue
        allowed.add(value)
    return allowed


def readable(disk: Model) -> set[bytes]:
    allowed = set()
    for value in (OLD, A, B, ZERO):
        began = disk.begin_read()
        disk.end_read(began)
        try:
            disk.check_read(0, value, began)
        except Violation:
            continue
        allowed.add(value)
    return allowed


def test_unflushed_write_may_be_lost_but_is_read() -> None:
    disk = model()
    write(disk, A)
    assert survivors(disk) == {OLD, A}
    assert readable(disk) == {A}


def test_flushed_write_survives() -> None:
    disk = model()
    write(disk, A)
    flush(disk)
    assert survivors(disk) == {A}


def test_flush_covers_what_ended_before_it_began() -> None:
    disk = model()
    operation = disk.begin_write(0, A)
    began = disk.begin_flush()
    disk.done(operation)
    disk.flushed(began)
    assert survivors(disk) == {OLD, A}
    flush(disk)
    assert survivors(disk) == {A}


def test_overlapping_writes_may_end_in_either_order() -> None:
    disk = model()
    first, second = disk.begin_write(0, A), disk.begin_write(0, B)
    disk.done(first)
    disk.done(second)
    flush(disk)
    assert readable(disk) == survivors(disk) == {A, B}
    disk.observe(B + OLD)
    flush(disk)
    assert survivors(disk) == {B}


def test_failed_write_may_have_happened_until_a_later_one() -> None:
    disk = model()
    disk.failed(disk.begin_write(0, A))
    flush(disk)
    assert survivors(disk) == {OLD, A}
    write(disk, B)
    flush(disk)
    assert survivors(disk) == {B}


def test_discard_leaves_old_or_zero() -> None:
    disk = model()
    disk.done(disk.begin_zero(0, 512), sure=False)
    flush(disk)
    assert survivors(disk) == {OLD, ZERO}
    disk.observe(ZERO + OLD)
    flush(disk)
    assert survivors(disk) == {ZERO}


def test_read_under_way_may_see_what_a_flush_has_settled() -> None:
    disk = model()
    began = disk.begin_read()
    write(disk, A)
    flush(disk)
    disk.check_read(0, OLD, began)
    disk.end_read(began)
    assert readable(disk) == {A}


def test_partial_write_keeps_the_rest_of_its_cell() -> None:
    disk = model()
    write(disk, b"A" * 100, offset=100)
    disk.observe(b"o" * 100 + b"A" * 100 + b"o" * 312 + OLD)
    with pytest.raises(Violation):
        disk.observe(OLD * 2)


def test_growing_shows_zeros_and_either_size_until_done() -> None:
    disk = model()
    disk.begin_resize(1536)
    disk.check_survivor(OLD * 2)
    disk.check_survivor(OLD * 2 + ZERO)
    with pytest.raises(Violation):
        disk.check_survivor(OLD * 3)
    disk.resized(1536)
    with pytest.raises(Violation):
        disk.check_survivor(OLD * 2)


def test_killed_process_leaves_what_is_not_yet_durable() -> None:
    disk = model()
    write(disk, A)
    disk.killed(A + OLD)
    assert readable(disk) == {A}
    assert survivors(disk) == {OLD, A}
    flush(disk)
    assert survivors(disk) == {A}
