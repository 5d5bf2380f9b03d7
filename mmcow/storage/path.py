# SPDX-License-Identifier: MIT
"""The C path: the table by which the helper finds a request's bytes by itself.

Owns: the pointer, the packing of the table. See csrc/path.h for what a hit is.
Never: decides what may be a hit (``engine.hits``), waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mmcow import native
from mmcow.native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

READ, WRITE = lib.MMC_READ, lib.MMC_WRITE
WRITES, ALLOCATES, GUARDED = lib.MMC_PATH_WRITES, lib.MMC_PATH_ALLOCATES, lib.MMC_PATH_GUARDED
HOLD_WRITES, HOLD_ALL = lib.MMC_HOLD_WRITES, lib.MMC_HOLD_ALL
LAYERS_MOST = lib.MMC_PATH_LAYERS
EVERYTHING = (0, (1 << 64) - 1)


class PathLayer(NamedTuple):
    """One layer: ``view`` None where every byte is in the file. Bytes, but for ``shift``."""

    view: Any
    bits: int
    size: int
    start: int
    read_end: int
    write_end: int
    shift: int
    file_align: int
    memory_align: int
    descriptor: int


class NativePath:
    """A path over one queue. Methods may be called from any thread."""

    def __init__(self, queue: Any) -> None:
        error = ffi.new("int *")
        self.pointer: Any = lib.mmc_path_open(queue, error)
        native.check(error[0], "memory for a path", "mmcow")

    def set(self, size: int, layers: Sequence[PathLayer], hits: int) -> None:
        """Replace the table. Everything is held and drained, or nothing uses it yet."""
        table = ffi.new("struct mmc_layer[]", max(len(layers), 1))
        for number, layer in enumerate(layers):
            view = ffi.NULL if layer.view is None else layer.view
            table[number] = (view, *layer[1:])
        native.check(
            lib.mmc_path_set(self.pointer, size, table, len(layers), hits), "path", "mmcow"
        )

    def hold(self, start: int, end: int, kind: int) -> int:
        """Make misses of what touches the range; returns the hold's number."""
        number = int(lib.mmc_path_hold(self.pointer, start, end, kind))
        native.check(min(number, 0), "memory for a hold", "mmcow")
        return number

    def busy(self, start: int, end: int, kind: int) -> bool:
        """Whether transfers are in flight that such a hold would forbid."""
        return bool(lib.mmc_path_busy(self.pointer, start, end, kind))

    def release(self, hold: int) -> None:
        """End a hold."""
        lib.mmc_path_release(self.pointer, hold)

    def awaited(self, yes: bool) -> None:
        """Say whether somebody waits for transfers to end."""
        lib.mmc_path_await(self.pointer, yes)

    def fail(self) -> None:
        """Allow no write any more."""
        lib.mmc_path_fail(self.pointer)

    def take_written(self) -> bool:
        """Whether a sync is due: writes were begun since the last call, or are in flight."""
        return bool(lib.mmc_path_take_written(self.pointer))

    def transfer(self, code: int, offset: int, buffer: memoryview) -> int:
        """Move one range in this thread: its length, 0 for a miss, or -errno."""
        return int(
            lib.mmc_path_transfer(self.pointer, code, offset, ffi.from_buffer(buffer), len(buffer))
        )

    def __del__(self) -> None:
        # With the last user, as a thread may be inside while the image is closed. Not ffi.gc: the
        # collector of cycles would free the path while a coroutine that it finalises later still
        # gives a hold back, or says that its flush has failed. Of NULL that means nothing.
        pointer, self.pointer = self.pointer, ffi.NULL
        lib.mmc_path_close(pointer)
