# SPDX-License-Identifier: MIT
"""A Linux host whose queue a test watches, holds up, and lets fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmcow.errors import StorageError, SyncFailed
from mmcow.storage.linux import LinuxHost, NativeQueue
from mmcow.tasks import Completion

SYNCS = ("datasync", "msync")


@dataclass
class Spy:
    """What a test asks of the queue. ``log``: (operation, name of the file, offset, length)."""

    log: list[tuple[str, str, int, int]] = field(default_factory=list)
    # (operation, end of the file's name): errno to fail with, until removed.
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    # Operations whose completions are kept back until ``release``.
    hold: set[str] = field(default_factory=set)
    held: list[tuple[Completion[int], Completion[int]]] = field(default_factory=list)

    def count(self, operation: str, name: str = "") -> int:
        return sum(1 for op, path, _, _ in self.log if op == operation and path.endswith(name))

    def release(self) -> None:
        """Let go of everything that was held; the caller turns the reactor."""
        self.hold.clear()
        held, self.held = self.held, []
        for inner, outer in held:
            inner.on_done(lambda done, outer=outer: hand_over(done, outer))


def hand_over(done: Completion[int], outer: Completion[int]) -> None:
    if done.error is not None:
        outer.fail(done.error)
    else:
        outer.set(done.value)


class SpyQueue:
    """Passes everything on to a real queue."""

    def __init__(self, inner: NativeQueue, spy: Spy) -> None:
        self.inner = inner
        self.spy = spy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def path(self):
        """No request gets past the spy."""
        return

    def read(self, handle, offset, buffers):
        length = sum(len(b) for b in buffers)
        return self._pass("read", handle, offset, length, (offset, buffers))

    def write(self, handle, offset, buffers):
        length = sum(len(b) for b in buffers)
        return self._pass("write", handle, offset, length, (offset, buffers))

    def datasync(self, handle):
        return self._pass("datasync", handle, 0, 0, ())

    def fallocate(self, handle, mode, offset, length):
        return self._pass("fallocate", handle, offset, length, (mode, offset, length))

    def msync(self, handle, view, offset, length):
        return self._pass("msync", handle, offset, length, (view, offset, length))

    def _pass(self, operation, handle, offset, length, arguments):
        spy = self.spy
        spy.log.append((operation, handle.path, offset, length))
        for (wanted, name), number in spy.failures.items():
            if wanted == operation and handle.path.endswith(name):
                failed: Completion[int] = Completion()
                kind = SyncFailed if operation in SYNCS else StorageError
                failed.fail(kind(number, operation, handle.path))
                return failed
        completion = getattr(self.inner, operation)(handle, *arguments)
        if operation not in spy.hold:
            return completion
        outer: Completion[int] = Completion(arguments)
        spy.held.append((completion, outer))
        return outer


class SpyHost(LinuxHost):
    """This machine, watched."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__(backend)
        self.spy = Spy()

    def queue(self):
        return SpyQueue(super().queue(), self.spy)
