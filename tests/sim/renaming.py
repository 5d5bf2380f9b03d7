# SPDX-License-Identifier: MIT
"""Recording other names (``rebase -u``) with the power failing: the old name or the new, no third.

The base exists under two names of any length, with the same content; so does the data file. At
every moment the image must open and read the same, through one or the other.
"""

from __future__ import annotations

import os
from random import Random

from mmcow.errors import MmcowError
from mmcow.image import open_image
from mmcow.jobs.rebase import rename
from tests.sim import images
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.sim.images import BASE, DATA, DIRECTORY, TOP
from tests.sim.model import Violation
from tests.sim.workload import CutFailed, check_clean, random_machine, read_all

LONG = 600  # so that old and new names fit side by side into the header
# Where names have fixed places and both the old and the new one pass the first sector, there is no
# safe order: a long one follows a short one only.
SHORT = 400
FIXED_PLACES = ("v7", *images.COW)


class RenameCase:
    """Some renamings of one image, with power cuts at every point of them."""

    def __init__(self, seed: int, fault: Fault | None = None) -> None:
        self.seed = seed
        rng = Random(seed)
        self.cut_rng = Random(seed + 1)
        self.host = SimHost(seed, random_machine(rng))
        variant = rng.choice((*images.ADD_COW, *images.COW))
        shape = images.random_shape(variant, rng)
        self.shape = images.Shape(
            variant, shape.size, shape.cluster, shape.base or shape.size, shape.allocated
        )
        self.content = images.put(self.host, self.shape)
        # That the base and the data file may be recorded under.
        self.names = {os.path.basename(BASE)}
        self.data_names = {os.path.basename(DATA)}
        self.long: set[str] = set()  # roles whose name passes the first sector
        self.changes = [self._change(rng, i) for i in range(rng.randint(1, 3))]
        self.cuts = self.calls = 0
        self.fault = fault
        if fault is not None:
            self.host.faults.append(fault)

    def _change(self, rng: Random, number: int) -> tuple[str, str]:
        """A new name and whose it is; the file is placed under it."""
        role = rng.choice(("backing", "data_file")) if self.shape.format == "add-cow" else "backing"
        most = SHORT if role in self.long else LONG
        length = rng.choice((1, 30, rng.randint(1, most), most - 5))
        if length > SHORT and self.shape.variant in FIXED_PLACES:
            self.long.add(role)
        else:
            self.long.discard(role)
        name = f"n{number}" + "x" * length
        path = os.path.join(DIRECTORY, name)
        source = BASE if role == "backing" else DATA
        self.host.put(path, self.host.content(source), mtime=images.MTIME)
        return role, name

    def run(self) -> None:
        """Rename; cut at every call; look once more."""
        before = self.host.calls
        try:
            self.host.watch = lambda _: self.cut()
            for role, name in self.changes:
                self._rename(role, name)
            self.calls = self.host.calls - before
            self.host.watch = None
            self.host.faults.clear()
            self.cut()
            self.examine(self.host)
        except Exception as error:
            raise Violation(self.tell(error)) from error

    def _rename(self, role: str, name: str) -> None:
        allowed = self.names if role == "backing" else self.data_names
        allowed.add(name)
        kind = "raw" if self.shape.format == "add-cow" else None
        try:
            if role == "backing":
                rename(TOP, backing=name, backing_format=kind, host=self.host)
            else:
                rename(TOP, data_file=name, data_file_format=kind, host=self.host)
        except MmcowError:
            if self.fault is None:
                raise
        else:
            allowed.clear()
            allowed.add(name)

    def cut(self) -> None:
        """Cut the power here."""
        self.cuts += 1
        try:
            self.examine(self.host.power_cut(self.cut_rng))
        except Exception as error:
            raise CutFailed(f"power cut {self.cuts}: {type(error).__name__}: {error}") from error

    def examine(self, host: SimHost) -> None:
        """The image opens, reads the same, and records a name that it was given."""
        image = open_image(TOP, format=self.shape.format, host=host)
        try:
            if read_all(image) != self.content:
                raise Violation("the disk reads differently")
            check_clean(image)
            recorded = image.chain[0].backing
            if recorded is None or os.path.basename(recorded) not in self.names:
                raise Violation(f"the base is recorded as {recorded!r}, not one of {self.names}")
            data = os.path.basename(image.chain[0].data_file)
            if self.shape.format == "add-cow" and data not in self.data_names:
                raise Violation(f"the data file is {data!r}, not one of {self.data_names}")
        finally:
            image.close()

    def tell(self, error: Exception) -> str:
        """Everything a reader needs to understand and repeat a violation."""
        changes = ", ".join(f"{role} to a name of {len(name)}" for role, name in self.changes)
        lines = [
            f"{type(error).__name__}: {error}",
            f"disk: {self.shape}",
            f"renaming seed {self.seed}: {changes}",
            "the last storage calls, oldest first:",
            *(f"  {line[:120]}" for line in self.host.story()[-60:]),
        ]
        return "\n".join(lines)
