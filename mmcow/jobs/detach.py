# SPDX-License-Identifier: MIT
"""Turn a complete add-cow image into the plain raw disk that its data file is.

Owns: the proof that nothing is missing, and the order of the steps.
Never: touches the data file's content.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmcow.errors import UsageError
from mmcow.image import open_image
from mmcow.ranges import units_for
from mmcow.storage import names
from mmcow.storage.linux import LinuxHost

if TYPE_CHECKING:
    from mmcow.formats.opening import Policy
    from mmcow.storage.file import Cache
    from mmcow.storage.host import Host


def detach(
    path: str | os.PathLike[str],
    *,
    cache: str | Cache = "auto",
    policy: Policy | None = None,
    host: Host | None = None,
) -> str:
    """Remove an add-cow file whose data file has every cluster; returns the data file's path.

    The data file is durable before the name goes, the removal is on return. UsageError where
    clusters are missing. Nothing records any more that the disk is raw: a guest may have written
    another format's magic into it, so open it as "raw" explicitly.
    """
    host = LinuxHost() if host is None else host
    name = host.real_path(os.fsdecode(path))  # a link's removal would leave the image
    with open_image(
        name, write=True, cache=cache, policy=policy, backing=False, host=host
    ) as image:
        driver = image.engine.top
        if driver.info.format != "add-cow":
            raise UsageError(f"{name}: is {driver.info.format}; only add-cow has a raw data file")
        total = units_for(driver.info.size, driver.info.cluster_size)
        missing = total - driver.allocated()
        if missing:
            raise UsageError(
                f"{name}: {missing} of {total} clusters are not in the data file: copy them from "
                f"below first (mmcow stream {name})"
            )
        image.flush()
        # The locks are held until the name is gone: nobody writes in between.
        names.remove(host, name)
        return driver.data.path
