# SPDX-License-Identifier: MIT
"""Examine the metadata of one image file, and repair it if asked.

Owns: how it is opened for that, and the counts. The format does the examining.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from mmcow.errors import SyncFailed, UsageError
from mmcow.image import open_image
from mmcow.jobs.leftovers import look

if TYPE_CHECKING:
    from mmcow.formats.driver import CheckResult
    from mmcow.storage.host import Host

_REPAIRS = ("", "leaks", "all")


class CheckReport(NamedTuple):
    """What was found. ``corruptions`` and ``leaks`` are those still there; ``notes`` are about
    files beside the image that are odd but perhaps wanted."""

    filename: str
    format: str
    result: CheckResult
    corruptions: int
    leaks: int
    corruptions_fixed: int
    leaks_fixed: int
    notes: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Nothing is left to be mended."""
        return not self.corruptions and not self.leaks


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    repair: str = "",
    share: bool = False,
    host: Host | None = None,
) -> CheckReport:
    """Check one layer; the files below it are not opened. ``repair``: "", "leaks" or "all".

    Files that killed processes left beside it are leaks too (``jobs.leftovers``).

    Repairing needs the image for itself. An image that cannot be opened at all is an error, not
    a report.
    """
    name = os.fsdecode(path)
    if repair not in _REPAIRS:
        raise UsageError(f"repair {repair!r}: must be one of leaks, all")
    if repair and share:
        raise UsageError(f"{name}: share is for looking only, not for repair")
    with open_image(
        name, format=format, write=bool(repair), share=share, backing=False, host=host
    ) as image:
        engine = image.engine
        try:
            result = image.reactor.run(engine.top.check(repair))
        except SyncFailed as error:
            engine.flusher.fail(error)
            raise
        left = look(image, remove=bool(repair))
        result = result._replace(findings=[*result.findings, *left.findings])
        counts = {
            (kind, fixed): sum(f.kind == kind and f.fixed is fixed for f in result.findings)
            for kind in ("corruption", "leak")
            for fixed in (False, True)
        }
        return CheckReport(
            name,
            image.format,
            result,
            counts["corruption", False],
            counts["leak", False],
            counts["corruption", True],
            counts["leak", True],
            tuple(left.notes),
        )
