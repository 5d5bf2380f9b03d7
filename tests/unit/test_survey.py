# SPDX-License-Identifier: MIT
"""Block status by the thousand says what the walk extent by extent says."""

import random

import pytest

import mmcow
from mmcow.engine import survey
from mmcow.engine.lookup import Lookup

CLUSTER = 4096
CLUSTERS = 3000


def fill(path, seed, share, size):
    """Clusters written, zeroed by half, or left; the data file then has runs that are mixed."""
    chance = random.Random(seed)
    with mmcow.open(path, write=True) as image:
        for cluster in range(size // CLUSTER):
            if chance.random() >= share:
                continue
            image.write(cluster * CLUSTER, b"x" * CLUSTER)
            if chance.random() < 0.01:
                image.discard(cluster * CLUSTER, CLUSTER)


@pytest.fixture(params=["add-cow", "cow"])
def disk(request, tmp_path):
    """An overlay with thousands of runs over a shorter base with holes."""
    base, top = tmp_path / "base.raw", tmp_path / "top"
    mmcow.create(base, size=CLUSTER * (CLUSTERS - 500), format="raw")
    with mmcow.open(base, format="raw", write=True) as image:
        image.write(CLUSTER * 700, b"y" * (CLUSTER * 900))
    kept = {"size": CLUSTER * CLUSTERS} if request.param == "add-cow" else {}
    mmcow.create(top, format=request.param, backing="base.raw", backing_format="raw", **kept)
    with mmcow.open(top) as image:
        size = image.size
    fill(top, 7, 0.4, size)
    return top


def statuses(image, monkeypatch, *, surveyed, **asked):
    counts = []

    def count(layers, *args, **named):
        found = survey.survey(layers, *args, **named) if surveyed else None
        counts.append(0 if found is None else len(found))
        return found

    monkeypatch.setattr("mmcow.engine.lookup.survey", count)
    return list(image.block_status(**asked)), sum(counts)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_a_survey_says_what_the_walk_says(disk, layer, monkeypatch):
    with mmcow.open(disk) as image:
        chance = random.Random(3)
        ranges = [(0, image.size)]
        for _ in range(20):
            start = chance.randrange(image.size)
            ranges.append((start, chance.randrange(image.size - start) + 1))
        rows = 0
        for start, length in ranges:
            asked = {"offset": start, "length": length, "layer": layer}
            quick, count = statuses(image, monkeypatch, surveyed=True, **asked)
            slow, _ = statuses(image, monkeypatch, surveyed=False, **asked)
            assert quick == slow, (start, length)
            assert all(isinstance(status, mmcow.BlockStatus) for status in quick)
            rows += count
        # A raw layer has no bits; of the others most was surveyed.
        assert (rows == 0) if layer == 1 else (rows > CLUSTERS)


def test_a_run_that_is_half_a_hole_is_told_in_parts(tmp_path, monkeypatch):
    base, top = tmp_path / "base.raw", tmp_path / "top"
    unit = 65536
    mmcow.create(base, size=unit * 200, format="raw")
    options = {"cluster_size": str(unit)}
    mmcow.create(top, backing="base.raw", backing_format="raw", options=options)
    with mmcow.open(top, write=True) as image:
        for cluster in range(0, 200, 2):
            image.write(cluster * unit, b"x" * unit)
        for cluster in (70, 130):
            image.discard(cluster * unit + 8192, 16384)
        image.flush()
        quick, rows = statuses(image, monkeypatch, surveyed=True)
        slow, _ = statuses(image, monkeypatch, surveyed=False)
    assert quick == slow
    assert rows >= 70
    holes = [s for s in quick if s.kind is mmcow.Kind.ZERO and s.depth == 0]
    assert [(s.offset % unit, s.length) for s in holes] == [(8192, 16384)] * 2


def test_a_layer_without_a_table_is_left_to_the_walk(disk):
    with mmcow.open(disk) as image:
        drivers = image.engine.layers
        lookup = Lookup(drivers)
        drivers[0].inner.table = lambda: None
        assert lookup.survey(0, image.size, 0, tuple, alone=False, regions={}) is None


def test_what_is_written_meanwhile_is_no_hole(tmp_path):
    base, top = tmp_path / "base.raw", tmp_path / "top"
    mmcow.create(base, size=CLUSTER * CLUSTERS, format="raw")
    mmcow.create(top, backing="base.raw", backing_format="raw")
    with mmcow.open(top, write=True) as image:
        for cluster in range(0, CLUSTERS, 2):
            image.write(cluster * CLUSTER, b"x" * CLUSTER)
            image.discard(cluster * CLUSTER, CLUSTER)
        walk = image.block_status()
        assert next(walk).kind is mmcow.Kind.ZERO
        image.write((CLUSTERS - 2) * CLUSTER, b"y" * CLUSTER)
        found = [status.offset // CLUSTER for status in walk if status.kind is mmcow.Kind.DATA]
        assert found == [CLUSTERS - 2]
