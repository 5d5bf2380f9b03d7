# SPDX-License-Identifier: MIT
"""Copy a whole disk, whatever its chain, into another image.

Owns: what is copied, what is zeroed, what is left out.
Never: creates the target, changes its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcow.errors import ReadOnlyError, UsageError
from mmcow.jobs.copying import ZERO_STEP, Copier, ranges, write_unit
from mmcow.jobs.progress import Meter, Progress

if TYPE_CHECKING:
    from mmcow.image import Image


def convert(
    source: Image, target: Image, *, progress: Progress | None = None, target_is_zero: bool = False
) -> int:
    """Copy the content of ``source`` (all its layers) to ``target``; durable on return.

    ``target`` is open for writing and at least as large; what it has more reads as zeros
    afterwards. Known zeros are not read, and blocks of 4 KiB (or the target's clusters) that
    hold only zeros are not written but punched. ``target_is_zero``: the caller knows that the
    target reads as zeros everywhere (it is new), so zeros are left out altogether.

    Returns the number of bytes written as data. A stop leaves a target that is partly written.
    """
    _check(source, target)
    unit = write_unit(target)
    meter = Meter(progress, target.size)
    with Copier(target, block=unit, target_is_zero=target_is_zero) as copier:
        for found in ranges(source, unit):
            if found.zero:
                copier.zero(found.offset, found.length)
            else:
                copier.copy(source, found.offset, found.length)
            meter.reached(found.offset + found.length)
        for start in range(source.size, target.size, ZERO_STEP):
            copier.zero(start, min(ZERO_STEP, target.size - start))
            meter.reached(start)
    target.flush()
    meter.finish()
    return copier.moved


def _check(source: Image, target: Image) -> None:
    if source is target:
        raise UsageError(f"{source.path}: cannot be converted into itself")
    if not target.writable:
        raise ReadOnlyError(target.path, "convert")
    if target.size < source.size:
        raise UsageError(
            f"{target.path}: has {target.size} bytes, the source {source.path} has {source.size}: "
            "resize the target first"
        )
