# SPDX-License-Identifier: MIT
"""mmcow: copy-on-write disk images for Linux.

::

    import mmcow

    mmcow.create("vm.acow", backing="base.raw", backing_format="raw")
    with mmcow.open("vm.acow", write=True) as disk:
        disk.write(0, b"hello")
        disk.flush()

``mmcow.aio`` has the same verbs for asyncio; ``mmcow.jobs`` the long operations (convert,
compare, commit, stream, snapshot); ``mmcow.serve`` offers disks over NBD; ``mmcow.errors`` has
every error.

Names are imported when they are first used: ``import mmcow`` alone costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers see it; ``typing`` is slow to import
if TYPE_CHECKING:
    from typing import Any

    from mmcow.errors import (
        Cancelled,
        ChainError,
        ClosedError,
        CorruptError,
        DeniedError,
        ForkedError,
        FormatError,
        Interrupted,
        JobError,
        LayerFailed,
        LockedError,
        Mismatch,
        MmcowError,
        ReadOnlyError,
        StorageError,
        SyncFailed,
        UnsupportedError,
        UsageError,
    )
    from mmcow.formats.driver import Kind
    from mmcow.formats.opening import AllowFiles, DenyAll, Policy, Within
    from mmcow.image import BlockStatus, Image, LayerReport
    from mmcow.image import create_image as create
    from mmcow.image import open_image as open
    from mmcow.native import aligned_buffer
    from mmcow.serving import serve

__version__ = "0.1.0"

__all__ = [
    "AllowFiles",
    "BlockStatus",
    "Cancelled",
    "ChainError",
    "ClosedError",
    "CorruptError",
    "DeniedError",
    "DenyAll",
    "ForkedError",
    "FormatError",
    "Image",
    "Interrupted",
    "JobError",
    "Kind",
    "LayerFailed",
    "LayerReport",
    "LockedError",
    "Mismatch",
    "MmcowError",
    "Policy",
    "ReadOnlyError",
    "StorageError",
    "SyncFailed",
    "UnsupportedError",
    "UsageError",
    "Within",
    "aligned_buffer",
    "create",
    "open",
    "serve",
]

# Where each public name lives, and what it is called there if not the same. All others: errors.
_PLACES = {
    "AllowFiles": ("formats.opening", "AllowFiles"),
    "BlockStatus": ("image", "BlockStatus"),
    "DenyAll": ("formats.opening", "DenyAll"),
    "Image": ("image", "Image"),
    "Kind": ("formats.driver", "Kind"),
    "LayerReport": ("image", "LayerReport"),
    "Policy": ("formats.opening", "Policy"),
    "Within": ("formats.opening", "Within"),
    "aligned_buffer": ("native", "aligned_buffer"),
    "create": ("image", "create_image"),
    "open": ("image", "open_image"),
    "serve": ("serving", "serve"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmcow' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - the module itself costs nothing

    module, original = _PLACES.get(name, ("errors", name))
    value = getattr(import_module(f"mmcow.{module}"), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
