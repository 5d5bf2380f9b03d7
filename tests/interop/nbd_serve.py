# SPDX-License-Identifier: MIT
"""A process that serves disks over NBD until it is told to stop; no command line of mmcow in it.

Prints the URI, one line; ends at the end of its input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import mmcow.aio
from mmcow.nbd.server import Server, tls_context


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--tls")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("images", nargs="+", metavar="[NAME=]IMAGE")
    given = parser.parse_args()
    tls = tls_context(given.tls, verify_peer=given.verify) if given.tls else None
    disks = {}
    for image in given.images:
        name, _, path = image.rpartition("=")
        disks[name] = await mmcow.aio.open(path, write=not given.read_only, cache=given.cache)
    async with Server(disks, tls=tls) as server:
        if given.socket:
            uri = await server.listen_unix(given.socket)
        else:
            uri = await server.listen_tcp("127.0.0.1", 0)
        print(uri, flush=True)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
        loop.remove_reader(sys.stdin.fileno())


asyncio.run(main())
