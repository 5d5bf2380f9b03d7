# SPDX-License-Identifier: MIT
"""A stream and the end of the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

import mmcow
from tests.unit.nbd_serving import MIB
from tests.unit.test_serving import run, until


@pytest.fixture
def disk(tmp_path, rng):
    (tmp_path / "base.raw").write_bytes(rng.randbytes(4 * MIB))
    path = tmp_path / "vm.acow"
    mmcow.create(path, backing="base.raw", backing_format="raw")
    return path


@pytest.fixture
def sock(tmp_path):
    return str(tmp_path / "vm.sock")


def test_a_stream_that_runs_is_not_idle(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock, exit_when_idle=0.2) as server:
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


def test_a_paused_stream_is_idle(disk, sock):
    async def main():
        async with mmcow.serve(disk, socket=sock, exit_when_idle=0.2) as server:
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


def test_the_log_says_where_a_stream_was_cut(disk, sock, caplog):
    caplog.set_level(logging.INFO, "mmcow.nbd")

    async def main():
        async with mmcow.serve(disk, socket=sock) as server:
            job = server.stream(rate=1)
            await until(lambda: job.moved)
            server.quit("SIGTERM")

    run(main)
    cut = "export '': stream was cut at 25 % by the server's end; started again, it goes on"
    assert [r.message for r in caplog.records].count(cut) == 1
