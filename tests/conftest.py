# SPDX-License-Identifier: MIT
"""Fixtures for every tier: seeds that are printed, drivers behind the contract guard, both queues.

Unit tests start no programs. ``MMCOW_TEST_SEED`` repeats a run; ``MMCOW_QUEUE`` picks the queue.
"""

from __future__ import annotations

import os
import random
import signal
import zlib

import pytest

import mmcow.image

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores it; the tests of interrupts need what a terminal gives.
    signal.signal(signal.SIGINT, signal.default_int_handler)

mmcow.image.CHECK_DRIVERS = True

SEED = int(os.environ.get("MMCOW_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


def pytest_report_header() -> str:
    return f"mmcow: seed {SEED} (MMCOW_TEST_SEED), queue {os.environ.get('MMCOW_QUEUE', 'auto')}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that depend on the run's seed and the test's name only."""
    return random.Random(SEED ^ zlib.crc32(request.node.nodeid.encode()))
