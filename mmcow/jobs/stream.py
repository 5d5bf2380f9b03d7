# SPDX-License-Identifier: MIT
"""Pull everything from below into the top layer, until nothing below is needed.

Owns: what is copied up in which pieces, and the cut of the chain at the end.
Never: blocks other users of the image for longer than one piece.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mmcow.chain import close_layers
from mmcow.errors import MmcowError, ReadOnlyError, UsageError
from mmcow.jobs.copying import DEPTH, ZERO_STEP
from mmcow.jobs.progress import Meter, Progress
from mmcow.ranges import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.image import Image
    from mmcow.tasks import Task

PIECE = 1 << 20
# A flush lets a stopped job go on from there instead of from the start.
FLUSH_EVERY = 256 << 20


def stream(image: Image, *, progress: Progress | None = None) -> int:
    """Copy what lies below into ``image``, then drop its backing name; durable on return.

    The image stays usable by other threads meanwhile. Afterwards its chain is the top layer alone
    and the files below are closed. A stop keeps what was copied; the next call copies the rest.
    Returns the bytes copied; 0 where there is no base.
    """
    if not image.writable:
        raise ReadOnlyError(image.path, "stream")
    info = image.engine.top.info
    meter = Meter(progress, image.size)
    if info.has_backing and len(image.layers) == 1:
        raise UsageError(f"{image.path}: was opened without its backing file")
    if not info.has_backing:
        meter.finish()
        return 0
    moved = _pull(image, meter)
    image.reactor.run(let_go(image))
    meter.finish()
    return moved


async def let_go(image: Image) -> None:
    """Make the top layer the whole chain, and close what lies below: in one step of the reactor,
    because a snapshot that waits puts a layer on top next, and the old top is below then."""
    await image.engine.drop_backing()
    below = image.layers[1:]
    del image.layers[1:]
    close_layers(below)


def _pull(image: Image, meter: Meter) -> int:
    moved = unflushed = 0
    tasks: deque[Task[int]] = deque()
    try:
        for offset, length in missing(image):
            with image.reactor.lock:
                tasks.append(image.reactor.spawn(image.engine.copy_up(offset, length)))
                image.reactor.poll()
            if len(tasks) >= DEPTH:
                moved += image.reactor.wait(tasks.popleft())
            unflushed += min(length, PIECE)
            if unflushed >= FLUSH_EVERY:
                image.flush()
                unflushed = 0
            meter.reached(offset)
        while tasks:
            moved += image.reactor.wait(tasks.popleft())
    finally:
        for task in tasks:
            try:
                image.reactor.wait(task)
            except MmcowError:
                pass  # the error that ended the job is the one to see
    return moved


def missing(image: Image) -> Iterator[tuple[int, int]]:
    """Ranges of whole clusters that the top layer does not have wholly; zeros in long pieces.

    Clusters that it has may be among them: copying up leaves those alone. So the fragments of a
    piece are one range.
    """
    cluster = image.engine.top.info.cluster_size
    piece = align_up(PIECE, cluster)
    begun = reached = 0  # [begun, reached): data that is still to be handed out
    for status in image.block_status():
        if status.depth == 0:
            continue
        end = align_up(status.offset + status.length, cluster)
        start = max(align_down(status.offset, cluster), reached)
        step = align_up(ZERO_STEP, cluster) if status.is_zero else piece
        while start < end:
            stop = min(end, align_down(start + step, step))
            if begun < reached and (status.is_zero or begun // piece != start // piece):
                yield begun, reached - begun
                begun = reached
            if status.is_zero:
                yield start, stop - start
                begun = stop
            elif begun == reached:
                begun = start
            start = reached = stop
    if begun < reached:
        yield begun, reached - begun
