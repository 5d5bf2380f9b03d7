# SPDX-License-Identifier: MIT
"""commit and stream while storage calls fail: the disk reads the same, the next run completes."""

from __future__ import annotations

import errno
import random

import pytest

import mmcow
from mmcow.jobs import commit as commit_module
from mmcow.jobs import copying
from mmcow.jobs import stream as stream_module
from mmcow.jobs.commit import commit
from mmcow.jobs.stream import stream
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.unit.jobs_helpers import KIB
from tests.unit.test_jobs_commit import SIM_CHAINS, committed, read_all, simulated_chain


def run_with_a_fault(seed, job):
    """Returns whether the job failed."""
    print("seed", seed, job)
    rng = random.Random(seed)
    layers = rng.choice(SIM_CHAINS)
    host = SimHost(seed)
    paths, models = simulated_chain(host, layers, rng)
    top, format_, model = paths[-1], layers[-1][0], models[-1]

    def run(machine):
        if job == "commit":
            commit(top, host=machine)
            base, _ = read_all(paths[-2], layers[-2][0], machine)
            assert base == committed(models[-2], model)
        else:
            with mmcow.open(top, format=format_, write=True, host=machine) as disk:
                stream(disk)
        assert read_all(top, format_, machine)[0] == model

    code = rng.choice((errno.EIO, errno.ENOSPC))
    host.faults = [Fault(rng.randrange(120), errno=code, once=rng.random() < 0.7)]
    failed = False
    try:
        run(host)
    except mmcow.MmcowError:
        failed = True
    host.faults = []
    for machine in (host.power_cut(rng), host):
        assert read_all(top, format_, machine)[0] == model
        run(machine)
    return failed


@pytest.mark.parametrize("job", ["commit", "stream"])
def test_one_failing_call(monkeypatch, job):
    monkeypatch.setattr(commit_module, "BATCH", 16 * KIB)
    monkeypatch.setattr(copying, "PIECE", 8 * KIB)
    monkeypatch.setattr(stream_module, "PIECE", 8 * KIB)
    monkeypatch.setattr(stream_module, "FLUSH_EVERY", 24 * KIB)
    assert sum(run_with_a_fault(seed, job) for seed in range(120)) > 20
