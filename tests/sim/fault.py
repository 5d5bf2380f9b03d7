# SPDX-License-Identifier: MIT
"""Every storage call of a workload fails, with EIO or ENOSPC, once or from then on.

    python -m tests.sim.fault [--seed S] [--rounds N] [--jobs J] [--format F] [--case C]

A workload is run once to count its calls, then again for each of them with that call failing. What
must hold: an error that reaches the user is one of mmcow's; the disk keeps its promises in memory;
after a failed sync every change is refused (``LayerFailed``) until the disk is opened again; a
full disk while metadata is written can be tried again. Then the fault is lifted and the image is
opened anew: it opens, its content is what the oracle allows, ``check`` is clean, the base is
untouched, and it takes writes again. Power cuts fall in between all the time.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from random import Random

import mmcow.image
from mmcow.errors import LayerFailed, MmcowError, SyncFailed
from tests.sim import images
from tests.sim.crash import WITHOUT_REQUESTS
from tests.sim.faults import Fault
from tests.sim.host import SYNCS
from tests.sim.model import Violation
from tests.sim.workload import SECTOR, Case, Op, alphabet, random_sequence, read_all, show

ERRNOS = (errno.EIO, errno.ENOSPC)
SHOWN = 3
WHAT = (*images.VARIANTS, *WITHOUT_REQUESTS)  # the server draws its own errors (serving)


class FaultCase(Case):
    """A case in which a call fails. Operations may fail with mmcow's errors; the promises hold."""

    def __init__(self, number: int, variant: str, fault: Fault | None) -> None:
        rng = Random(number)
        shape = images.random_shape(variant, rng)
        super().__init__(number, shape, density=0.05)
        self.tolerant = True
        self.ops = _operations(rng, shape)
        self.fault = fault
        self.retried = False
        self.unsized = False
        if fault is not None:
            self.host.faults.append(fault)
            self.model.sync_failed = lambda: not fault.kinds.isdisjoint(SYNCS)

    def run_all(self) -> None:
        """The operations; then the fault is lifted and the disk is used again."""
        try:
            self._run_failing()
            self._use_again()
        except Exception as error:
            raise Violation(self.tell(error)) from error
        finally:
            self.abandon()

    def _run_failing(self) -> None:
        self.open()
        for op in self.ops:
            if self.image is None:  # it could not be opened again
                return
            self.done.append(show(op))
            self.do(op)
            if self.image is not None and self._sync_failed():
                self._check_sticky()
                return
            self._retry()
        self.close()

    def open(self) -> None:
        """Open the disk; it may fail, and then there is no image."""
        self.errors.clear()
        try:
            super().open()
        except MmcowError as error:
            self._failed(error)
            self.abandon()
            self._watch()

    def reopen(self, *, clean: bool) -> None:
        """Open again, unless a sync has failed: that is a story of its own (``_use_again``)."""
        if self._sync_failed():
            return
        if clean:
            self.open()
            return
        try:
            # The last flush failed, so what came since the one before may be lost.
            self.image = self.open_writer()
            self.model.killed(read_all(self.image))
        except MmcowError as error:
            self._failed(error)
            self.abandon()
            self._watch()

    def do_resize(self, size: int) -> None:
        """Change the size. Where its sync fails, nobody knows the size until the disk is opened."""
        super().do_resize(size)
        self.unsized = self._sync_failed()

    def _sync_failed(self) -> bool:
        return any(isinstance(error, SyncFailed) for error in self.errors)

    def _check_sticky(self) -> None:
        """After a failed sync everything but reading is refused, until the disk is opened again."""
        image = self.image
        assert image is not None
        for change in (
            lambda: image.write(0, bytes(SECTOR)),
            lambda: image.write_zeroes(0, SECTOR),
            lambda: image.discard(0, SECTOR),
            image.flush,
            lambda: image.resize(image.size + SECTOR),
        ):
            try:
                change()
            except LayerFailed:
                continue
            raise Violation("after a failed sync a change was accepted")
        if not self.unsized:
            self.do(("look",))
        self.close()

    def _retry(self) -> None:
        """What failed once without a sync having failed can be tried again."""
        fault = self.fault
        if self.image is None or fault is None or not fault.once or not fault.struck:
            return
        if not self.retried:
            self.retried = True
            self.tolerant = False
            self.do(("flush",))
            self.do(("look",))
            self.tolerant = True

    def _use_again(self) -> None:
        """Without the fault: open, compare, check, write, and cut the power again."""
        self.abandon()
        self.host.faults.clear()
        self.done.append("(the fault is lifted)")
        self.tolerant = False
        self.model.sync_failed = lambda: False
        self._go_on("kill", self.host.kill(self.cut_rng))
        self.do(("write", 0, self.model.size))
        self.do(("flush",))
        self.cut()
        self.close()
        self.cut()


def _operations(rng: Random, shape: images.Shape) -> list[Op]:
    """Operations in one process: what kills or crashes it would take the fault away."""
    one = ("crash", "kill", "interrupted", "snapshot")
    if rng.random() < 0.5:
        ops = [rng.choice(alphabet(shape)) for _ in range(rng.randint(2, 4))]
    else:
        ops = random_sequence(rng, shape, rng.randint(6, 14))
    return [op for op in ops if op[0] not in one]


def run_case(number: int, variant: str, every: int) -> tuple[int, int]:
    """Fail every ``every``-th call of a workload in all ways; returns runs and power cuts."""
    runs = cuts = 0
    for at in range(number % every, _calls(number, variant), every):
        for code in ERRNOS:
            for once in (True, False):
                runs += 1
                cuts += _run_one(number, variant, Fault(at, code, once))
    return runs, cuts


def _calls(number: int, variant: str) -> int:
    """How many storage calls the workload makes when none fails."""
    if variant in WITHOUT_REQUESTS:
        other = WITHOUT_REQUESTS[variant](number)
        other.run()
        return int(other.calls)
    case = FaultCase(number, variant, None)
    case.run_all()
    return case.calls


def _run_one(number: int, variant: str, fault: Fault) -> int:
    try:
        if variant in WITHOUT_REQUESTS:
            other = WITHOUT_REQUESTS[variant](number, fault)
            other.run()
            return int(other.cuts)
        case = FaultCase(number, variant, fault)
        case.run_all()
    except Violation as violation:
        raise Violation(
            f"fault: {fault}\n{violation}\n"
            f"again: python -m tests.sim.fault --case {number} --format {variant}"
        ) from None
    return case.cuts


def _work(job: tuple[int, str, int]) -> tuple[int, int, str | None]:
    mmcow.image.CHECK_DRIVERS = True
    try:
        return *run_case(*job), None
    except Violation as violation:
        return 0, 0, str(violation)


def run(
    seed: int, rounds: int, jobs: int, variant: str | None, every: int = 1
) -> tuple[int, int, list[str]]:
    """``rounds`` workloads of every variant; returns failed calls, power cuts, violations."""
    variants = [variant] if variant else WHAT
    first = seed * 1_000_000_000
    work = [(first + i, name, every) for i in range(rounds) for name in variants]
    runs = cuts = 0
    violations = []
    with ProcessPoolExecutor(jobs) as pool:
        for some_runs, some_cuts, violation in pool.map(_work, work):
            runs += some_runs
            cuts += some_cuts
            if violation:
                violations.append(violation)
    return runs, cuts, violations


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.fault", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=20, help="workloads of each variant")
    parser.add_argument("--every", type=int, default=1, help="fail only every n-th call")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--format", choices=WHAT, default=None)
    parser.add_argument("--case", type=int, default=None, help="run this one workload again")
    options = parser.parse_args(arguments)
    seed = Random().randrange(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    if options.case is not None:
        runs, cuts, violation = _work((options.case, options.format, options.every))
        violations = [violation] if violation else []
    else:
        runs, cuts, violations = run(
            seed, options.rounds, options.jobs, options.format, options.every
        )
    for violation in violations[:SHOWN]:
        print(violation, "\n")
    took = time.monotonic() - started
    print(f"{len(violations)} violations, {took:.0f} s")
    print(f"{runs} failed calls, {cuts} power cuts")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
