# SPDX-License-Identifier: MIT
"""Creating images with the power failing: a name is absent, the old image, or the whole new one.

After ``create_image`` has returned the new image is there for good. Before that nothing under the
image's name may be half an image, and what was there before stays whole until it is replaced.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random

from mmcow.errors import MmcowError, StorageError
from mmcow.image import create_image, open_image
from tests.sim import images
from tests.sim.faults import Fault
from tests.sim.host import SimHost
from tests.sim.images import BASE, DATA, TOP, pattern
from tests.sim.model import Violation
from tests.sim.workload import CutFailed, check_clean, random_machine, read_all

# format, options, whether a base is given
_KINDS = (
    ("add-cow", {"cluster_size": "4k"}, True),
    ("add-cow", {"cluster_size": "4k"}, False),
    ("add-cow", {"compat": "v10"}, True),
    ("add-cow", {"compat": "v7"}, True),
    ("cow", {"compat": "x86-64"}, True),
    ("cow", {"compat": "i386"}, True),
    ("cow", {"compat": "uml3"}, True),
    ("raw", {}, False),
)


class CreateCase:
    """One creation, with power cuts at every point of it."""

    def __init__(self, seed: int, fault: Fault | None = None) -> None:
        self.seed = seed
        rng = Random(seed)
        self.cut_rng = Random(seed + 1)
        self.host = SimHost(seed, random_machine(rng))
        self.format, self.options, based = rng.choice(_KINDS)
        self.size = 512 * rng.randint(4, 40)
        if self.format == "cow" and self.options["compat"] == "uml3":
            base_length = self.size
        else:
            base_length = max(self.size + rng.choice((0, -700, 5000)), 100)
        base = pattern("base", base_length)
        self.host.put(BASE, base, mtime=images.MTIME)
        self.backing = BASE if based else None
        self.wanted = (base if based else b"")[: self.size].ljust(self.size, b"\0")
        self.before: bytes | None = None  # content of the image that is replaced
        if self.format == "add-cow" and rng.random() < 0.3:
            # A data file that is there already, content and all, is adopted.
            self.host.put(DATA, pattern("kept", self.size))
            if not based:
                self.wanted = pattern("kept", self.size)
        elif rng.random() < 0.3:
            self._put_older_image()
        self.cuts = self.calls = 0
        self.returned = False
        self.fault = fault
        if fault is not None:
            self.host.faults.append(fault)

    def _put_older_image(self) -> None:
        create_image(TOP, format="raw", size=1024, host=self.host)
        handle = self.host.open(TOP, write=True, direct=False)
        self.before = pattern("older", 1024)
        handle.write_at(0, self.before)
        handle.sync()
        handle.close()

    def run(self) -> None:
        """Create; cut at every call; look once more."""
        try:
            before = self.host.calls
            self.host.watch = lambda _: self.cut()
            try:
                create_image(
                    TOP,
                    format=self.format,
                    size=self.size,
                    backing=self.backing,
                    backing_format="raw" if self.backing else None,
                    options=self.options,
                    host=self.host,
                )
                self.returned = True
            except MmcowError:
                if self.fault is None:
                    raise
                self._check_tidy()
            self.calls = self.host.calls - before
            self.host.watch = None
            self.host.faults.clear()
            self.cut()
            self.examine(self.host)
        except Exception as error:
            raise Violation(self.tell(error)) from error

    def _check_tidy(self) -> None:
        """After one failure nothing half-made is left behind."""
        left = [name for name in self.host.names(images.DIRECTORY) if "mmcow-new" in name]
        assert self.fault is not None
        if self.fault.once and self.fault.struck and left:
            raise Violation(f"left behind: {left}")

    def cut(self) -> None:
        """Cut the power here."""
        self.cuts += 1
        try:
            self.examine(self.host.power_cut(self.cut_rng))
        except Exception as error:
            raise CutFailed(f"power cut {self.cuts}: {type(error).__name__}: {error}") from error

    def examine(self, host: SimHost) -> None:
        """What stands under the image's name now."""
        found = None
        with suppress(StorageError):
            head = host.content(TOP)
            if self.before is not None and head == self.before:
                found = self.before
        if found is None:
            found = self._content(host)
        if found == self.wanted or (not self.returned and found == self.before):
            return
        failed = self.fault is not None and self.fault.struck > 0
        if found is None and (failed or (not self.returned and self.before is None)):
            return  # after an error nothing is left under the name, if it had come that far
        raise Violation(f"under the name is {found and found[:32]!r}, not {self.wanted[:32]!r}")

    def _content(self, host: SimHost) -> bytes | None:
        """The image's content; None if there is no such name."""
        if "top" not in host.names(images.DIRECTORY):
            return None
        image = open_image(TOP, format=self.format, host=host)
        try:
            check_clean(image)
            return read_all(image)
        finally:
            image.close()

    def tell(self, error: Exception) -> str:
        """Everything a reader needs to understand and repeat a violation."""
        replaced = "an older image" if self.before else "nothing"
        what = f"{self.format} {self.options} of {self.size} bytes"
        lines = [
            f"{type(error).__name__}: {error}",
            f"create {what}, base {self.backing}, replacing {replaced}",
            f"creation seed {self.seed}",
            "storage calls, oldest first:",
            *(f"  {line}" for line in self.host.story()),
        ]
        return "\n".join(lines)
