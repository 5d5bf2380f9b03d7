# SPDX-License-Identifier: MIT
"""The suites as data, and the requests that are made of them."""

from __future__ import annotations

import math

import pytest

from bench import sessions
from bench.lab import FULL, QUICK
from bench.model import (
    FIO,
    GIB,
    KIB,
    MIB,
    MMCOW,
    NBDKIT,
    PYTHON,
    QCOW2,
    QCOW2_EL2,
    Cell,
    Life,
    Requests,
    Served,
    base_side,
    programs,
)
from bench.suites import SUITES

BY_NAME = {suite.name: suite for suite in SUITES}
CELLS = [(suite, cell) for suite in SUITES for cell in suite.cells]


def aims(cell):
    return {aim.peers: aim.at_least for aim in cell.aims}


def test_names_are_unique():
    assert len(BY_NAME) == len(SUITES)
    for suite in SUITES:
        names = [cell.name for cell in suite.cells]
        assert len(set(names)) == len(names), suite.name


@pytest.mark.parametrize(("suite", "cell"), CELLS, ids=[f"{s.name}: {c.name}" for s, c in CELLS])
def test_a_cell_can_be_run_and_judged(suite, cell):
    assert type(cell.work) in sessions.SESSIONS
    assert cell.aims or cell.limit is not None
    peers = {peer for aim in cell.aims for peer in aim.peers}
    assert peers == set(cell.sides[1:]), "every other side is a peer of an aim"
    if suite.name != "noise":
        assert base_side(cell.sides[0]) == MMCOW


def test_every_suite_has_a_part_in_the_quick_form():
    assert all(any(cell.quick for cell in suite.cells) for suite in SUITES)
    assert sum(cell.quick for _, cell in CELLS) < len(CELLS) / 2


def test_mapped_requests_are_measured_at_each_depth_against_qcow2_and_fio():
    cells = BY_NAME["mapped"].cells
    assert {(c.work.op, c.work.depth) for c in cells} == {
        (op, depth) for op in ("read", "write") for depth in (1, 16, 64)
    }
    for cell in cells:
        assert (cell.work.size, cell.work.layout) == (4 * KIB, "mapped")
        assert aims(cell) == {(QCOW2,): 1.0, (FIO,): 0.95}


def test_raw_requests_are_measured_at_depth_64_against_fio_alone():
    cells = BY_NAME["raw"].cells
    assert {(c.work.op, c.work.size, c.work.depth, c.work.layout) for c in cells} == {
        (op, 4 * KIB, 64, "raw") for op in ("read", "write")
    }
    assert all(aims(cell) == {(FIO,): 0.95} for cell in cells)


def test_first_writes_are_measured_against_the_better_qcow2():
    suite = BY_NAME["first"]
    assert {(c.work.size, c.work.depth) for c in suite.cells} == {
        (size, depth) for size in (4 * KIB, 64 * KIB) for depth in (1, 16)
    }
    for cell in suite.cells:
        assert aims(cell) == {(QCOW2, QCOW2_EL2): 1.0}
    assert [(aim.peers, aim.at_least) for aim in suite.overall] == [((QCOW2, QCOW2_EL2), 1.5)]


def test_nbd_is_measured_over_the_whole_grid():
    suite = BY_NAME["nbd"]
    grid = {(c.work.op, c.work.size, c.work.depth, c.work.layout) for c in suite.cells}
    small = [
        (op, size, depth, layout)
        for size in (4 * KIB, 64 * KIB)
        for depth in (1, 16, 64)
        for op, layout in (("read", "mapped"), ("write", "mapped"), ("write", "first"))
    ]
    large = [
        (op, MIB, 8, layout)
        for op, layout in (("read", "mapped"), ("write", "mapped"), ("write", "first"))
    ]
    assert grid == {*small, *large}
    assert len(suite.cells) == len(grid)
    assert [aim.at_least for aim in suite.overall] == [1.5]


def test_limits_and_aims_of_the_other_suites():
    assert [aims(c) for c in BY_NAME["extents"].cells] == [{(QCOW2,): 10.0}, {(QCOW2,): 1.0}]
    assert {a for c in BY_NAME["nbd_raw"].cells for a in aims(c).items()} == {((NBDKIT,), 0.8)}
    assert [a for c in BY_NAME["start"].cells for a in aims(c).items()] == [((PYTHON,), 1 / 1.5)]
    assert {c.limit for c in BY_NAME["life"].cells if isinstance(c.work, Life)} == {5.0}
    flush = {c.name: list(aims(c).values()) for c in BY_NAME["flush"].cells}
    assert flush == {"first write + flush": [1.2], "mapped write + flush": [1.0]}


def test_a_cell_needs_the_programs_of_its_peers_and_of_its_client():
    def needs(suite, name):
        return programs(next(c for c in BY_NAME[suite].cells if c.name == name))

    assert needs("mapped", "4K read, QD 1") == {"qemu-img", "fio"}
    assert needs("nbd", "4K read, QD 1") == {"qemu-nbd", "qemu-img", "fio"}
    assert needs("nbd_raw", "4K read, QD 1") == {"nbdkit", "fio"}
    assert needs("copy", "out") == {"qemu-nbd", "qemu-img", "nbdcopy"}
    assert needs("extents", "command") == {"qemu-img", "qemu-io"}
    assert needs("life", "open 1 GiB") == set()


# ---- strides and counts ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB])
@pytest.mark.parametrize("disk", [64 * MIB, 96 * MIB])
def test_a_stride_visits_every_block_once_before_any_twice(disk, size):
    step = sessions.stride(disk, size)
    assert step % size == 0
    blocks = disk // size
    assert len({n * step % disk // size for n in range(blocks)}) == blocks


@pytest.mark.parametrize("scale", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB])
def test_first_writes_each_meet_a_cluster_of_their_own(scale, size):
    work = Requests("write", size, 1, "first")
    count = sessions.count_most(work, scale.disk)
    step = sessions.stride(scale.disk, size)
    clusters = {n * step % scale.disk // (128 * KIB) for n in range(count)}
    assert len(clusters) == count
    assert count >= 300
    assert count / (scale.disk / size) / 2 <= 0.02, "random ones repeat more"


def test_counts_fit_the_time_and_the_disk():
    assert sessions.count_for([1000.0, 2000.0], 1.0, 10**6) == 2000
    assert sessions.count_for([100.0, 100000.0], 1.0, 10**6) == 400  # the slow one: 4 s
    assert sessions.count_for([1000.0], 1.0, 300) == 300
    assert sessions.count_for([1.0], 1.0, 300) == 50
    sequential = Served("write", MIB, 8, "first", sequential=True)
    assert sessions.count_most(sequential, 2 * GIB) == 2048


def test_a_stride_in_sequence_is_one_request():
    assert sessions.stride(GIB, MIB, sequential=True) == MIB
    assert math.gcd(sessions.stride(GIB, 4 * KIB) // (4 * KIB), GIB) == 1


def test_trials_of_what_is_slow_are_short():
    assert sessions.trial_count(Requests("read", 4 * KIB, 1), 10**6) == 3000
    assert sessions.trial_count(Requests("read", MIB, 8), 10**6) == 64
    assert sessions.trial_count(Requests("write", 4 * KIB, 1, flush=True), 10**6) == 200
    assert sessions.trial_count(Served("write", 4 * KIB, 1, "first"), 77) == 77


def test_a_limit_needs_no_peer():
    cell = Cell("x", Life("open", GIB), (MMCOW,), limit=5.0)
    assert programs(cell) == set()
