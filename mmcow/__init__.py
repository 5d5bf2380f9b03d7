# SPDX-License-Identifier: MIT
"""mmcow: copy-on-write disk images for Linux.

::

    import mmcow

    mmcow.create("vm.acow", backing="base.raw", backing_format="raw")
    with mmcow.open("vm.acow", write=True) as disk:
        disk.write(0, b"hello")
        disk.flush()

``mmcow.aio`` has the same verbs for asyncio; ``mmcow.jobs`` the long operations (convert,
compare, commit, stream); ``mmcow.errors`` every error.
"""

from __future__ import annotations

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
    "create",
    "open",
]
