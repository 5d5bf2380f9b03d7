# SPDX-License-Identifier: MIT
"""Who may be inside the engine at once: requests side by side, or one exclusive operation.

Owns: the count of requests in flight, the exclusive turn (resize, commit of a batch, close), and
the ranges in which clusters are being allocated.
Never: touches data. All under the reactor's lock; waiting is awaiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.ranges import overlaps
from mmcow.tasks import Completion

if TYPE_CHECKING:
    from mmcow.engine.hits import Hits


class Gate:
    """Counts requests; lets one exclusive operation in when none is left.

    Requests that arrive while somebody is, or waits to be, exclusive wait for the end of it,
    so an exclusive operation cannot starve.
    """

    def __init__(self, hits: Hits) -> None:
        self.inside = 0
        self._hits = hits
        self._hold = 0
        self._exclusive: Completion[None] | None = None
        self._empty: Completion[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether a new request has to wait: then ``enter`` must be awaited."""
        return self._exclusive is not None

    async def enter(self) -> None:
        """Come in as a request; pair with ``leave``."""
        while self._exclusive is not None:
            await self._exclusive
        self.inside += 1

    def leave(self) -> None:
        """End a request."""
        self.inside -= 1
        if self.inside == 0 and self._empty is not None:
            empty, self._empty = self._empty, None
            empty.set(None)

    async def close(self) -> None:
        """Come in alone: wait until every request has left; pair with ``open``."""
        while self._exclusive is not None:
            await self._exclusive
        self._hold = self._hits.hold_all()  # first: it may fail, and somebody must end the turn
        self._exclusive = Completion()
        if self.inside:
            self._empty = Completion()
            await self._empty
        await self._hits.all_drained()

    def open(self) -> None:
        """End an exclusive operation."""
        exclusive, self._exclusive = self._exclusive, None
        assert exclusive is not None
        self._hits.refresh()
        self._hits.release(self._hold)
        exclusive.set(None)


class Claim:
    """A range of clusters that one request is allocating."""

    __slots__ = ("end", "hold", "released", "start")

    def __init__(self, start: int, end: int, hold: int) -> None:
        self.hold = hold
        self.start = start
        self.end = end
        self.released: Completion[None] = Completion()


class Claims:
    """Ranges being allocated. Overlapping claims are served in order of arrival.

    A request holds one claim at a time, so claims cannot deadlock.
    """

    def __init__(self, hits: Hits) -> None:
        self._hits = hits
        self._claims: list[Claim] = []

    async def take(self, start: int, end: int) -> Claim:
        """Wait for every earlier overlapping claim and for hits that allocate there, then hold
        this one."""
        claim = Claim(start, end, self._hits.hold(start, end))
        earlier = [c for c in self._claims if overlaps(start, end, c.start, c.end)]
        self._claims.append(claim)
        for other in earlier:
            await other.released
        await self._hits.drained(start, end)
        return claim

    def drop(self, claim: Claim) -> None:
        """Let the next one go on."""
        self._claims.remove(claim)
        self._hits.release(claim.hold)
        claim.released.set(None)
