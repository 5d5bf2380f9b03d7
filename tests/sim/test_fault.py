# SPDX-License-Identifier: MIT
"""The fault rig in its short form; ``python -m tests.sim.fault`` is the long one."""

from __future__ import annotations

import pytest

from tests.sim import fault

pytestmark = pytest.mark.fault

FIXED = 20_261
EVERY = 5  # fail every fifth call of a workload


@pytest.mark.parametrize("variant", fault.WHAT)
def test_failing_calls_fixed_seed(variant) -> None:
    _fail(variant, FIXED)


@pytest.mark.parametrize("variant", fault.WHAT)
def test_failing_calls_new_seed(variant, rng) -> None:
    """This test fails calls where nobody has before; its seed is in the failure's text."""
    _fail(variant, rng.randrange(1_000_000))


def _fail(variant: str, seed: int) -> None:
    runs = 0
    for number in range(seed * 1_000_000_000, seed * 1_000_000_000 + 3):
        runs += fault.run_case(number, variant, EVERY)[0]
    assert runs
