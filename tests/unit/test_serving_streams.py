# SPDX-License-Identifier: MIT
"""A stream and the end of the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

import mmcow
from tests.unit.nbd_serving import MIB, make_overlay, make_raw
from tests.unit.test_serving import run, until


@pytest.fixture
def disk(tmp_path, rng):
    return make_overlay(tmp_path, make_raw(tmp_path / "base.raw", rng.randbytes(4 * MIB)))


def test_a_stream_that_runs_is_not_idle(disk, tmp_path):
    async def main():
        async with mmcow.serve(disk, socket=tmp_path / "s", exit_when_idle=0.2) as server:
            job = server.stream(rate=1)  # one piece, then twelve days of rest
            waiting = asyncio.create_task(server.wait_quit())
            await asyncio.sleep(0.5)
            assert not waiting.done()
            job.set_rate(0)
            await job
            ended = time.monotonic()
            await asyncio.wait_for(waiting, 10)
            assert time.monotonic() - ended >= 0.18

    run(main)


def test_a_paused_stream_is_idle(disk, tmp_path):
    async def main():
        async with mmcow.serve(disk, socket=tmp_path / "s", exit_when_idle=0.2) as server:
            job = server.stream(rate=1)
            await until(lambda: job.moved)
            job.pause()
            job.resume()
            await asyncio.sleep(0.5)
            waiting = asyncio.create_task(server.wait_quit())
            await asyncio.sleep(0)
            assert not waiting.done()
            job.pause()
            await asyncio.wait_for(waiting, 10)

    run(main)


def test_the_log_says_where_a_stream_was_cut(disk, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mmcow.nbd")

    async def main():
        async with mmcow.serve(disk, socket=tmp_path / "s") as server:
            job = server.stream(rate=1)
            await until(lambda: job.moved)
            server.quit("SIGTERM")

    run(main)
    cut = "export '': stream was cut at 25 % by the server's end; started again, it goes on"
    assert [r.message for r in caplog.records].count(cut) == 1
