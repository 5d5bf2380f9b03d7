# SPDX-License-Identifier: MIT
"""The one place where written data and metadata become durable, in order.

Owns: the flush (copy of dirty metadata, data sync, metadata groups with a barrier after each),
the sharing of one run by concurrent callers, and the sticky failure.

Order, and why (docs/ARCHITECTURE.md "Flush"): the copy is taken before the data sync, so that
a mapping published meanwhile belongs to the next flush; a mapping that is durable before its
data would show garbage after a power cut.

After a failed sync the kernel has marked the pages clean: the next sync would return 0 while the
disk holds the old bytes. So the layer is failed, for good, until it is opened again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.errors import CorruptError, LayerFailed, StorageError, SyncFailed
from mmcow.tasks import Completion, Reactor

if TYPE_CHECKING:
    from mmcow.engine.hits import Hits
    from mmcow.formats.driver import Driver, Staged


# Metadata written out after which the memory of its pages is given back: each unit of 512 bytes
# keeps a page of 4 KiB, so this is 16 MiB of them at most.
RELEASE_AFTER = 2 << 20


class Flusher:
    """Flushes one layer."""

    def __init__(self, reactor: Reactor, driver: Driver, hits: Hits) -> None:
        self._hits = hits
        self._reactor = reactor
        self._driver = driver
        self._running: Completion[None] | None = None
        self._next: Completion[None] | None = None
        self._written = 0
        self.failure: BaseException | None = None

    def check(self) -> None:
        """Raise LayerFailed if an earlier sync failed, here or below a write."""
        if self._driver.data.sync_failure is not None:
            self.fail(self._driver.data.sync_failure)
        if self.failure is not None:
            raise LayerFailed(self._driver.path, self.failure)

    def fail(self, cause: BaseException) -> None:
        """Refuse every later change and flush: what is on the disk is no longer known."""
        if self.failure is None:
            self.failure = cause
            self._hits.fail()

    @property
    def idle(self) -> bool:
        """No flush is running or waiting to run."""
        return self._running is None and self._next is None

    async def flush(self) -> None:
        """Make everything durable whose request completed before this call.

        A run that has begun took its copy already, so callers join the one after it.
        """
        self.check()
        mine = self._next
        if mine is None:
            mine = self._next = Completion()
            # Runs at once up to its first wait, and is no longer the next one then.
            self._reactor.spawn(self._run(self._running, mine))
        await mine

    async def _run(self, previous: Completion[None] | None, mine: Completion[None]) -> None:
        if previous is not None:
            try:
                await previous
            except Exception:  # noqa: BLE001 - its own callers hear of it; check() is below
                pass
        self._running, self._next = mine, None
        try:
            self.check()
            await self._flush_once()
        except BaseException as error:  # noqa: BLE001 - delivered to every caller
            self._running = None
            mine.fail(error)
        else:
            self._running = None
            mine.set(None)

    async def _flush_once(self) -> None:
        try:
            staged = self._driver.stage()
        except CorruptError as error:
            self.fail(error)  # the file was cut under us, and what was staged is gone with it
            raise
        try:
            await self._driver.data.sync()
        except BaseException as error:
            self.fail(error)
            raise
        # A sync below a write may have failed meanwhile; one that came after it would lie.
        self.check()
        if staged is not None:
            await self._write_groups(staged)
            self.check()
            self._driver.settled(staged)
            self._release(staged)

    def _release(self, staged: Staged) -> None:
        """Give back pages that the file has as they are; those changed meanwhile stay."""
        self._written += sum(group.length for group in staged.groups)
        if self._written >= RELEASE_AFTER:
            self._written = 0
            for window in {group.window for group in staged.groups}:
                window.release()

    async def _write_groups(self, staged: Staged) -> None:
        for number, group in enumerate(staged.groups):
            try:
                await group.window.write_out(group)
            except SyncFailed as error:
                self.fail(error)
                raise
            except StorageError:
                # Nothing is lost: a full disk may be emptied. The next flush tries again, in the
                # same order.
                for left in staged.groups[number:]:
                    left.window.put_back(left)
                raise
            except BaseException as error:
                self.fail(error)
                raise
