# SPDX-License-Identifier: MIT
"""Which storage call fails, how, and for how long."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Fail calls of the simulated machine.

    ``at`` is the number of the first call that fails, counted over the calls that ``kind`` and
    ``path`` (None: any) select. ``once`` ends it there; otherwise every later one
    of the selection fails too.
    """

    at: int
    errno: int = errno.EIO
    once: bool = True
    kind: str | None = None
    path: str | None = None
    seen: int = 0
    struck: int = 0  # calls that failed
    kinds: set[str] = field(default_factory=set)  # of the calls that failed

    def strikes(self, kind: str, path: str) -> bool:
        """Whether this call fails."""
        if (self.kind is not None and kind != self.kind) or (
            self.path is not None and path != self.path
        ):
            return False
        self.seen += 1
        hit = self.seen == self.at + 1 if self.once else self.seen > self.at
        if hit:
            self.struck += 1
            self.kinds.add(kind)
        return hit

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno, str(self.errno))
        what = f"{self.kind or 'call'} {self.at}" + (f" of {self.path}" if self.path else "")
        return f"{name} {'once' if self.once else 'always from'} at {what}"
