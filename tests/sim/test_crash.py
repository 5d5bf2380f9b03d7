# SPDX-License-Identifier: MIT
"""The crash rig in its short form; ``python -m tests.sim.crash`` is the long one."""

from __future__ import annotations

import pytest

from tests.sim import crash, images
from tests.sim.images import Shape
from tests.sim.workload import Case, short_sequences

pytestmark = pytest.mark.crash

FIXED = 20_261
CUTS = 400  # of each variant

# Where most can go wrong: clusters of several sectors, an end inside one, a longer base.
EXHAUSTIVE = (
    Shape("v20", 8192 + 512, 4096, 16384),
    Shape("v18", 2048 + 512, 1024, 4096, frozenset({1})),
    Shape("v7", 2048, 512, 1300, frozenset({0})),
    Shape("x86-64", 2048, 512, 2048, frozenset({2})),
)


@pytest.mark.parametrize("variant", crash.WHAT)
def test_power_cuts_fixed_seed(variant) -> None:
    _cut(variant, FIXED)


@pytest.mark.parametrize("variant", crash.WHAT)
def test_power_cuts_new_seed(variant, rng) -> None:
    """This test cuts where nobody has cut before; its seed is in the failure's text."""
    _cut(variant, rng.randrange(1_000_000))


def _cut(variant: str, seed: int) -> None:
    cuts, number = 0, seed * 1_000_000_000
    while cuts < CUTS:
        cuts += crash.run_case(number, variant)
        number += 1


@pytest.mark.parametrize("shape", EXHAUSTIVE, ids=lambda shape: shape.variant)
def test_all_short_sequences(shape) -> None:
    """This test cuts the power at every point of all sequences of two operations."""
    assert isinstance(shape, images.Shape)
    for number, ops in enumerate(short_sequences(shape, 2)):
        Case(number, shape).run(ops)


@pytest.mark.parametrize("variant", images.VARIANTS)
def test_case_is_repeated_exactly(variant) -> None:
    """This test needs the same storage calls in the same order whenever a case is run again."""

    def story(number: int) -> tuple[int, list[str]]:
        case, ops = crash.make_case(number, variant)
        case.run(ops)
        # Temporary names are drawn from the system, not from the seed.
        return case.cuts, [line for line in case.host.story() if "mmcow-new" not in line]

    for number in range(FIXED, FIXED + 5):
        assert story(number) == story(number)
