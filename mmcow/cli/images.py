# SPDX-License-Identifier: MIT
"""Opening images for a verb: with warnings told, and errors that name what was opened.

Owns: the one way in which verbs open an image.

Never: decides what to do with it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import mmcow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.cli.ui import Ui
    from mmcow.image import Image
    from mmcow.storage.host import Host


@contextmanager
def opened(
    ui: Ui,
    path: str,
    *,
    format: str | None = None,
    write: bool = False,
    cache: str = "auto",
    share: bool = False,
    backing_format: str | None = None,
    host: Host | None = None,
    quiet: bool = False,
) -> Iterator[Image]:
    """Open ``path`` for the block; what is odd about it goes to standard error, or nowhere."""
    ui.subject = path
    if write:
        ui.can_share = False  # -U only reads
    image = mmcow.open(
        path,
        format=format,
        write=write,
        cache=cache,
        share=share,
        backing_format=backing_format,
        host=host,
    )
    with image:
        ui.opened(path, image)
        if not quiet:
            warn(ui, path, image)
        yield image


def warn(ui: Ui, path: str, image: Image) -> None:
    """Tell what is odd about an open image."""
    for text in image.warnings:
        ui.warn(text if text.startswith(path) else f"{path}: {text}")
    if image.writable and image.chain[0].probed and image.format == "raw":
        ui.warn(
            f"{path}: taken as raw because it begins like no known format; what would make it "
            "look like one cannot be written to its start. -f raw says that it is raw"
        )
