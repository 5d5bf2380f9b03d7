# SPDX-License-Identifier: MIT
"""Room for the buffers of all clients of a server together.

Owns: how much memory payloads and replies may take, who waits for room, who is dropped because it
keeps room from others.
Never: allocates; knows what a buffer is for.

Each client may always use ``SHARE``, so that a few that take everything cannot stop the others.
Beyond that room is given in order of arrival. While somebody waits for room, a client that holds
more than its share and for whose bytes the server waits (the rest of a payload, the reading of
replies) must move: at its pace it has to be through with what it holds in ``THROUGH_SECONDS``.
One that was slower for ``PATIENCE_SECONDS`` is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection

    from mmcow.nbd.pump import Pump

MEMORY_MOST = 256 << 20
SHARE = 256 << 10
# How long a pace is watched where one client waits; with more it is shorter, up to so many times:
# who is dropped may be followed by others of its kind.
PATIENCE_SECONDS = 15.0
SOONER_MOST = 15
LOOKS = 4  # in that time
THROUGH_SECONDS = 60.0


class Holder(Protocol):
    """A client that takes room."""

    @property
    def memory(self) -> int:
        """What it holds; it adds and subtracts by itself."""

    def room_came(self) -> None:
        """Trying again is worth it."""

    def moved(self) -> int | None:
        """Bytes received and sent so far; None while the server does not wait for this client."""

    def drop(self, why: str) -> None:
        """Close at once."""


class _Stand(NamedTuple):
    """Of a client that somebody may be waiting for."""

    since: float  # in the loop's time
    moved: int  # then
    held: int  # at least, all the time


class Memory:
    """Counts; ``holders`` are all the clients there are."""

    def __init__(self, loop: asyncio.AbstractEventLoop, holders: Collection[Holder]) -> None:
        self.pump: Pump | None = None  # counts for its clients by itself
        self._used = 0
        self._loop = loop
        self._holders = holders
        self._waiting: dict[Holder, int] = {}  # in order of arrival
        self._watch: asyncio.TimerHandle | None = None
        self._stands: dict[Holder, _Stand] = {}

    @property
    def used(self) -> int:
        """Bytes of buffers, of all clients."""
        return self._used if self.pump is None else self._used + self.pump.room

    def take(self, holder: Holder, length: int) -> bool:
        """Charge ``length``. False: no room yet, ``holder.room_came`` is called later."""
        is_next = not self._waiting or next(iter(self._waiting)) is holder
        if holder.memory + length > SHARE and not (is_next and self._fits(length)):
            self._waiting[holder] = length
            self.watch()
            return False
        self._used += length
        if self._waiting:
            self._waiting.pop(holder, None)
            self._wake()
        return True

    def give(self, length: int) -> None:
        """Take back what was charged."""
        self._used -= length
        if self._waiting:
            self._wake()

    def forget(self, holder: Holder) -> None:
        """It is gone and waits no more."""
        if self._waiting.pop(holder, None) is not None:
            self._wake()

    def _fits(self, length: int) -> bool:
        return self.used + length <= MEMORY_MOST

    def _wake(self) -> None:
        """Let the first in the line try again; its success wakes the next."""
        for holder, length in self._waiting.items():
            if self._fits(length):
                self._loop.call_soon(holder.room_came)
            return

    def watch(self) -> None:
        """Somebody waits for room: see that nobody keeps it for nothing."""
        if self._watch is None:
            self._look()

    @property
    def _waiting_count(self) -> int:
        return len(self._waiting) + (self.pump.waiting if self.pump is not None else 0)

    def _look(self) -> None:
        """While somebody waits: see where those stand who could be in the way."""
        self._watch = None
        waiting = self._waiting_count
        before, self._stands = self._stands, {}
        if not waiting:
            return
        patience = PATIENCE_SECONDS / min(waiting, SOONER_MOST)
        now = self._loop.time()
        for holder in list(self._holders):
            moved = holder.moved() if holder.memory > SHARE else None
            if moved is not None:
                stand = before.get(holder) or _Stand(now, moved, holder.memory)
                self._stands[holder] = self._judge(holder, stand, moved, patience)
        self._watch = self._loop.call_later(patience / LOOKS, self._look)

    def _judge(self, holder: Holder, stand: _Stand, moved: int, patience: float) -> _Stand:
        """Drop one that was too slow for so long; returns where it stands from now on."""
        held = min(stand.held, holder.memory)
        seconds = self._loop.time() - stand.since
        if seconds < patience:
            return stand._replace(held=held)
        done = moved - stand.moved
        if done * THROUGH_SECONDS < held * seconds:
            holder.drop(
                f"moved {done} bytes in {seconds:.3g} s, holding {held}, "
                "while others wait for memory"
            )
        return _Stand(self._loop.time(), moved, holder.memory)

    def close(self) -> None:
        """No more timers, no pump."""
        if self.pump is not None:
            self.pump.close()
        if self._watch is not None:
            self._watch.cancel()
