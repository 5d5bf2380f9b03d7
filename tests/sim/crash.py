# SPDX-License-Identifier: MIT
"""Cut the power of simulated machines, over all formats, until enough was seen.

    python -m tests.sim.crash [--cuts N] [--seed S] [--jobs J] [--format F] [--case C]

Work comes in *cases*: one small disk of one variant with one sequence of operations, both drawn
from one number. The number of a case is all that is needed to repeat it (``--case``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from random import Random
from typing import Any

import mmcow.image
from tests.sim import images
from tests.sim.creation import CreateCase
from tests.sim.model import Violation
from tests.sim.renaming import RenameCase
from tests.sim.serving import ServerCase
from tests.sim.workload import Case, alphabet, random_sequence

BATCH = 20  # cases that a worker takes at a time
CREATE, RENAME, SERVER = "create", "rename", "server"  # beside the variants: of all formats
WITHOUT_REQUESTS: dict[str | None, Any] = {CREATE: CreateCase, RENAME: RenameCase}
OTHERS: dict[str | None, Any] = {**WITHOUT_REQUESTS, SERVER: ServerCase}
WHAT = (*images.VARIANTS, CREATE, RENAME, SERVER)
SHOWN = 3  # violations told in full


def make_case(number: int, variant: str | None = None) -> tuple[Case, list]:
    """The case with a number, and its operations."""
    rng = Random(number)
    shape = images.random_shape(variant or rng.choice(images.VARIANTS), rng)
    kind = rng.random()
    if kind < 0.5:
        ops = [rng.choice(alphabet(shape)) for _ in range(rng.randint(2, 4))]
        case = Case(number, shape, density=1.0)
    elif kind < 0.9:
        ops = random_sequence(rng, shape, rng.randint(10, 40))
        case = Case(number, shape, density=rng.choice((0.1, 0.3, 1.0)))
    else:
        # Requests that are no multiple of a sector: nothing of them runs side by side.
        ops = random_sequence(rng, shape, rng.randint(10, 30), grain=128)
        case = Case(number, shape, density=0.3, cell=128)
    return case, ops


def run_case(number: int, variant: str | None = None) -> int:
    """Run one case; returns the number of power cuts."""
    try:
        if variant in OTHERS:
            other = OTHERS[variant](number)
            other.run()
            return other.cuts
        case, ops = make_case(number, variant)
        case.run(ops)
    except Violation as violation:
        again = f"python -m tests.sim.crash --case {number}"
        again += f" --format {variant}" if variant else ""
        raise Violation(f"{violation}\nagain: {again}") from None
    return case.cuts


def _run_batch(work: tuple[int, str | None]) -> tuple[int, str | None]:
    """Cases of one batch: power cuts, and the story of the first violation."""
    first, variant = work
    mmcow.image.CHECK_DRIVERS = True
    cuts = 0
    for number in range(first, first + BATCH):
        try:
            cuts += run_case(number, variant)
        except Violation as violation:
            return cuts, str(violation)
    return cuts, None


def _batches(seed: int, variant: str | None) -> Iterator[tuple[int, str | None]]:
    variants = [variant] if variant else WHAT
    number = seed * 1_000_000_000
    while True:
        for name in variants:
            yield number, name
        number += BATCH


def run(cuts: int, seed: int, jobs: int, variant: str | None) -> tuple[int, list[str]]:
    """Cut the power ``cuts`` times at least; returns how often it was and the violations."""
    total, violations = 0, []
    source = _batches(seed, variant)
    with ProcessPoolExecutor(jobs) as pool:  # notices a worker that dies
        while total < cuts and not violations:
            # A bounded piece at a time: map would draw from an endless source for ever.
            piece = [next(source) for _ in range(jobs * 8)]
            for done, violation in pool.map(_run_batch, piece):
                total += done
                if violation:
                    violations.append(violation)
    return total, violations


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.crash", description=__doc__)
    parser.add_argument("--cuts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--format", choices=WHAT, default=None)
    parser.add_argument("--case", type=int, default=None, help="run this one case again")
    options = parser.parse_args(arguments)
    seed = Random().randrange(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    if options.case is not None:
        mmcow.image.CHECK_DRIVERS = True
        try:
            total, violations = run_case(options.case, options.format), []
        except Violation as violation:
            total, violations = 0, [str(violation)]
    else:
        total, violations = run(options.cuts, seed, options.jobs, options.format)
    for violation in violations[:SHOWN]:
        print(violation, "\n")
    took = time.monotonic() - started
    print(f"{len(violations)} violations, {took:.0f} s, {total / took:.0f} cuts a second")
    print(f"{total} power cuts")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
