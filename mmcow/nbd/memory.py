# SPDX-License-Identifier: MIT
"""Room for the buffers of all clients of a server together.

Owns: how much memory payloads and replies may take, who waits for room, who is dropped because it
keeps room from others.
Never: allocates; knows what a buffer is for.

Each client may always use ``SHARE``, so that a few that take everything cannot stop the others.
Beyond that room is given in order of arrival. While somebody waits for room, a client that holds
more than its share and for whose bytes the server waits (the rest of a payload, the reading of
replies) must move: at its pace it has to be through with what it holds in ``THROUGH_SECONDS``.
One that is slower from one look to the next is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection

    from mmcow.nbd.pump import Pump

MEMORY_MOST = 256 << 20
SHARE = 256 << 10
# From one look to the next where one client waits; with more it comes sooner, up to so many times.
# Whoever was dropped may be followed by another of its kind: 200 that do not move are gone in half
# a minute, and were not in seven at a look in 15 s.
LOOK_SECONDS = 15.0
SOONER_MOST = 15
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


class Memory:
    """Counts; ``holders`` are all the clients there are."""

    def __init__(self, loop: asyncio.AbstractEventLoop, holders: Collection[Holder]) -> None:
        self.pump: Pump | None = None  # counts for its clients by itself
        self._used = 0
        self._loop = loop
        self._holders = holders
        self._waiting: dict[Holder, int] = {}  # in order of arrival
        self._watch: asyncio.TimerHandle | None = None

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
        """Somebody waits: note where those stand who could be in the way."""
        stands = {
            holder: (holder.memory, moved)
            for holder in self._holders
            if holder.memory > SHARE and (moved := holder.moved()) is not None
        }
        seconds = LOOK_SECONDS / min(max(self._waiting_count, 1), SOONER_MOST)
        self._watch = self._loop.call_later(seconds, self._look_again, stands, seconds)

    def _look_again(self, before: dict[Holder, tuple[int, int]], seconds: float) -> None:
        self._watch = None
        if not self._waiting_count:
            return
        for holder, (held, stood) in before.items():
            moved = holder.moved() if holder in self._holders else None
            if moved is None or holder.memory <= SHARE:
                continue
            # Of what it held all the time.
            if (moved - stood) * THROUGH_SECONDS < min(held, holder.memory) * seconds:
                holder.drop(
                    f"moved {moved - stood} bytes in {seconds:.3g} s, holding {holder.memory}, "
                    "while others wait for memory"
                )
        self._look()

    def close(self) -> None:
        """No more timers, no pump."""
        if self.pump is not None:
            self.pump.close()
        if self._watch is not None:
            self._watch.cancel()
