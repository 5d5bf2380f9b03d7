# SPDX-License-Identifier: MIT
"""A server in a thread of the test's own process, watched for everything that must not happen.

``stop`` fails where the loop met an unhandled exception, or where a task, a file descriptor, a
connection or a byte of buffer memory is left over.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from contextlib import contextmanager

import mmcow
import mmcow.aio
from mmcow.nbd import pump
from mmcow.nbd.server import Server

KIB, MIB = 1 << 10, 1 << 20


class Serving:
    """``images``: export names to paths. ``path`` is the socket's. ``hits`` False: every request
    goes the engine's own way, where a test can get hold of it."""

    def __init__(self, images, path, *, opening=None, hits=True, in_plain_loop=False, **options):
        gc.collect()
        self._descriptors = open_descriptors()
        self.path = str(path)
        self.images = images
        self.problems = []
        self.server = None
        self.loop = None
        self.uri = ""
        self._opening = {"write": True} | (opening or {})
        self._options = options
        self._hits = hits
        self._end = None
        self._failed = None
        self._ready = threading.Event()
        # As ``mmcow serve`` runs it, or in a loop that knows of no pump.
        run = asyncio.run if in_plain_loop else pump.run
        self._thread = threading.Thread(target=lambda: run(self._main()))
        self._thread.start()
        assert self._ready.wait(30)
        if self._failed is not None:
            self._thread.join()
            raise self._failed

    async def _main(self):
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self._end = asyncio.Event()
        disks = {}
        try:
            for name, image in self.images.items():
                disks[name] = disk = await mmcow.aio.open(image, **self._opening)
                if not self._hits:
                    disk.engine.hits.path = None
            self.server = Server(disks, **self._options)
            self.uri = await self.server.listen_unix(self.path)
        except BaseException as error:  # noqa: BLE001
            for disk in disks.values():
                await disk.close()
            self._failed = error
            self._ready.set()
            return
        self._ready.set()
        await self._end.wait()
        try:
            await self.server.close()
        except Exception as error:  # noqa: BLE001
            self._failed = error
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=1)  # accepts under way
        self.problems += [task for task in left if not task.done()]

    def engine(self, name=""):
        return self.server.exports[name].image.engine

    def run(self, work):
        """Call ``work`` in the server's loop; a coroutine function is awaited."""

        async def call():
            found = work()
            return await found if asyncio.iscoroutine(found) else found

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)

    def end(self):
        """Close the server and wait for that."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join(60)
        assert not self._thread.is_alive()

    def stop(self):
        """End it and look at what is left; returns the error that closing raised, if it did."""
        self.end()
        assert self.problems == []
        assert not self.server.connections
        assert self.server.memory.used == 0
        assert [e.connections for e in self.server.exports.values() if e.connections] == []
        self.server.exports.clear()
        gc.collect()
        assert open_descriptors() == self._descriptors
        return self._failed


@contextmanager
def serving(images, path, **options):
    """A ``Serving``, whose end is checked unless the test failed before."""
    served = Serving(images if isinstance(images, dict) else {"": str(images)}, path, **options)
    try:
        yield served
    except BaseException as error:
        served.end()
        for problem in served.problems:
            error.add_note(f"in the server's loop: {problem}")
        raise
    error = served.stop()
    if error is not None:
        raise error


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def resident():
    """Of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_raw(path, content):
    path.write_bytes(content)
    return str(path)


def make_overlay(folder, base, size=None, **options):
    """An add-cow over a raw base; returns its path."""
    path = str(folder / "top.acow")
    mmcow.create(
        path, format="add-cow", size=size, backing=base, backing_format="raw", options=options
    )
    return path

def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
