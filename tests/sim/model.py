# SPDX-License-Identifier: MIT
"""The oracle: what a disk may show, now and after a power cut.

The disk is a row of cells (a sector each, or smaller). Every change of a cell is a *version* with
the times at which its operation began and ended. Two rules say everything:

- A version is **superseded** once a sure later one has ended before the moment that counts;
  later means: it began after the first had ended. Versions of overlapping operations do not
  supersede each other: either may come last.
- A **read** counts from its own start. A **power cut** counts from the start of the last
  successful flush: what had ended by then is durable, what came later may or may not be. An
  operation that was asked to be durable by itself (FUA) is so from its end.

A version is *sure* if its operation succeeded and must take effect. Not sure are operations that
failed, those that are still under way, and discards, which are hints: the old value and zero are
both right until something shows which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

NEVER = 1 << 62  # the end of an operation that is under way
ALWAYS = -1


class Violation(AssertionError):
    """A promise of the disk was broken."""


@dataclass(slots=True)
class Version:
    """Values of which a cell may have had one from some time on."""

    values: tuple[bytes, ...]
    start: int
    end: int
    sure: bool
    durable: bool = False  # on the disk since its end, whatever was flushed


@dataclass(slots=True)
class Operation:
    """A change under way: one version of every cell it touches."""

    versions: list[Version]


@dataclass(slots=True)
class Model:
    """What may be read from a disk of ``size`` bytes."""

    size: int
    cell: int = 512
    now: int = 0
    barrier: int = 0  # start of the last successful flush
    sizes: list[int] = field(default_factory=list)  # that a cut may show
    cells: list[list[Version]] = field(default_factory=list)
    reading: list[int] = field(default_factory=list)  # when reads under way began
    # After a failed sync readers may be shown whatever the disk has where something was changed,
    # also what lay in the data file before. Nothing on the disk may refer to that, though.
    sync_failed: Callable[[], bool] = lambda: False

    @classmethod
    def of(cls, content: bytes, cell: int = 512) -> Model:
        """A disk whose content is known and durable."""
        model = cls(len(content), cell)
        model.sizes = [len(content)]
        model.cells = [
            [Version((content[at : at + cell],), ALWAYS, ALWAYS, True)]
            for at in range(0, len(content), cell)
        ]
        return model

    # ---- operations ----

    def begin_write(self, offset: int, data: bytes) -> Operation:
        """A write begins. Nothing else may touch partly written cells meanwhile."""
        self.now += 1
        operation = Operation([])
        end = offset + len(data)
        for index in range(offset // self.cell, -(-end // self.cell)):
            at = index * self.cell
            first, last = max(offset, at), min(end, at + self.cell)
            piece = data[first - offset : last - offset]
            if len(piece) == self.cell:
                values: tuple[bytes, ...] = (piece,)
            else:
                values = tuple(
                    old[: first - at] + piece + old[last - at :]
                    for old in sorted(self._visible(index, self.now))
                )
            version = Version(values, self.now, NEVER, False)
            self.cells[index].append(version)
            operation.versions.append(version)
        return operation

    def begin_zero(self, offset: int, length: int) -> Operation:
        """A write of zeros begins."""
        return self.begin_write(offset, bytes(length))

    def done(self, operation: Operation, *, sure: bool = True, durable: bool = False) -> None:
        """The change has succeeded; a discard is not ``sure``."""
        self.now += 1
        for version in operation.versions:
            version.end = self.now
            version.sure = sure
            version.durable = durable

    def failed(self, operation: Operation) -> None:
        """The change has failed: it may have happened all the same, to any cell."""
        self.done(operation, sure=False)

    def begin_flush(self) -> int:
        """A flush begins; give the answer to ``flushed``."""
        self.now += 1
        return self.now

    def flushed(self, began: int) -> None:
        """A flush has succeeded."""
        self.barrier = max(self.barrier, began)
        # Forget what nobody may see any more; a read that began before may still see it.
        moment = min(self.barrier, *self.reading, NEVER)
        for index, versions in enumerate(self.cells):
            if len(versions) > 1:
                self.cells[index] = _standing(versions, moment)

    def begin_resize(self, size: int) -> None:
        """A change of size begins: a cut may show either."""
        self.sizes.append(size)

    def resized(self, size: int) -> None:
        """The change of size has succeeded; it is durable, and so are the zeros of new cells."""
        self.now += 1
        self.size = size
        self.sizes = [size]
        count = -(-size // self.cell)
        del self.cells[count:]
        while len(self.cells) < count:
            zero = Version((bytes(self.cell),), self.now, self.now, True)
            self.cells.append([zero])

    # ---- what may be seen ----

    def begin_read(self) -> int:
        """A read begins; give the answer to ``end_read`` and ``check_read``."""
        self.now += 1
        self.reading.append(self.now)
        return self.now

    def end_read(self, began: int) -> None:
        """The read is over."""
        self.reading.remove(began)

    def check_read(self, offset: int, data: bytes, began: int) -> None:
        """A read that began at time ``began`` has brought these bytes."""
        sync_failed = self.sync_failed()
        end = offset + len(data)
        for index in range(offset // self.cell, -(-end // self.cell)):
            if sync_failed and len(self.cells[index]) > 1:
                continue
            start = index * self.cell
            first, last = max(offset, start), min(end, start + self.cell)
            found = data[first - offset : last - offset]
            allowed = self._visible(index, began)
            if len(found) < self.cell:
                allowed = {value[first - start : last - start] for value in allowed}
            if found not in allowed:
                raise Violation(self._explain("a read", index, found, allowed))

    def observe(self, data: bytes) -> None:
        """The whole disk was read with nothing under way: what was open is known now."""
        self.check_read(0, data, self.now)
        if self.sync_failed():
            return
        self.now += 1
        for index, versions in enumerate(self.cells):
            if len(_values(versions)) > 1:
                found = data[index * self.cell : (index + 1) * self.cell]
                versions.append(Version((found,), self.now, self.now, True))

    def check_survivor(self, data: bytes) -> None:
        """The whole disk as read after a power cut."""
        sizes = {self.size, *self.sizes}
        if len(data) not in sizes:
            raise Violation(f"after the cut the size is {len(data)}, allowed: {sorted(sizes)}")
        cell = self.cell
        for index, versions in enumerate(self.cells[: len(data) // cell]):
            found = data[index * cell : (index + 1) * cell]
            if len(versions) == 1 and found in versions[0].values:
                continue
            allowed = _values(_standing(versions, self.barrier, cut=True))
            if found not in allowed:
                raise Violation(self._explain("after the cut", index, found, allowed))
        beyond = len(self.cells) * cell
        if any(data[beyond:]):
            at = next(i for i in range(beyond, len(data)) if data[i])
            what = show(data[at : at + 16])
            raise Violation(f"after the cut: new space is not zero at {at}: {what}")

    def survivor(self, data: bytes) -> Model:
        """The model of a disk found after a power cut."""
        return Model.of(data, self.cell)

    def killed(self, data: bytes) -> None:
        """The whole disk as read after the process was killed.

        Un-flushed metadata died with it, so the same is allowed as after a power cut; but what
        was found need not be durable before the next flush.
        """
        self.check_survivor(data)
        self.reading.clear()
        self.now += 1
        for versions in self.cells:
            for version in versions:
                version.end = min(version.end, self.now)
        self.resized(len(data))
        self.now += 1
        cell = self.cell
        for index, versions in enumerate(self.cells):
            found = data[index * cell : (index + 1) * cell]
            versions.append(Version((found,), self.now, self.now, True))

    def _visible(self, index: int, began: int) -> set[bytes]:
        return _values(_standing(self.cells[index], began))

    def _explain(self, when: str, index: int, found: bytes, allowed: set[bytes]) -> str:
        at = index * self.cell
        wanted = " or ".join(sorted(show(value) for value in allowed))
        return f"{when}: bytes {at}..{at + self.cell} are {show(found)}, allowed: {wanted}"


def _standing(versions: list[Version], moment: int, *, cut: bool = False) -> list[Version]:
    """Versions that no sure later one, ended before ``moment`` (or durable at a ``cut``), has
    superseded."""
    newest = max(
        (v.start for v in versions if v.sure and (v.end < moment or (cut and v.durable))),
        default=ALWAYS - 1,
    )
    # A version of time ALWAYS is the first: everything sure supersedes it.
    return [v for v in versions if v.end >= newest]


def _values(versions: list[Version]) -> set[bytes]:
    return {value for version in versions for value in version.values}


def show(value: bytes) -> str:
    """A short form of a cell's content. Test data names its origin in its first bytes."""
    if not any(value):
        return "zeros"
    head = value[:16].split(b"\0")[0]
    text = head.decode("ascii", "replace") if head.isascii() else head.hex()
    same = "" if value == (value[:16] * (len(value) // 16)) else " (mixed)"
    return f"<{text}{same}>"
