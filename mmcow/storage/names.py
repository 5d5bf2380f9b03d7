# SPDX-License-Identifier: MIT
"""Names that survive a power cut.

Owns: making a file under a temporary name, filling and syncing it, giving it its name and
syncing the directory, in that order; removing a file so that the removal is durable; not relying
on a name that somebody else gave before it is durable.

Never: leaves a half-written file under the final name.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from mmcow.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcow.storage.host import Handle, Host

# A directory of somebody else, a file system without such a thing, a file without a name.
_NOTHING_TO_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOENT, errno.ENOTDIR)


def directory_of(path: str) -> str:
    """The directory that holds ``path``'s name."""
    return os.path.dirname(path) or "."


def temporary_name(path: str) -> str:
    """A free name in ``path``'s directory for what will become ``path``."""
    directory, base = os.path.split(path)
    return os.path.join(directory, f".{shortened(base)}.{os.urandom(4).hex()}.mmcow-new")


def shortened(base: str) -> str:
    """What of a name stands in a temporary one: names are limited in bytes, not in letters."""
    return os.fsdecode(os.fsencode(base)[:200])


def make_file(host: Host, path: str, fill: Callable[[Handle], None], *, replace: bool) -> None:
    """Make ``path`` with the content that ``fill`` writes; durable on return.

    A crash leaves the old file (or none) or the complete new one under the name; at worst a
    temporary file ``.NAME.XXXXXXXX.mmcow-new`` stays behind. Without ``replace`` an existing
    name raises StorageError EEXIST.
    """
    temporary = temporary_name(path)
    handle = host.create(temporary)
    try:
        try:
            fill(handle)
            handle.sync()
        finally:
            handle.close()
        if not replace:
            _link_new(host, temporary, path)
    except BaseException as error:
        discard(host, temporary)
        if isinstance(error, StorageError) and error.path == temporary:
            error.path = error.filename = path  # the name that the user knows
        raise
    if replace:
        install(host, temporary, path)
    else:
        host.sync_directory(directory_of(path))


def install(host: Host, temporary: str, path: str) -> None:
    """Give a complete and synced file its name, durably; what had it before is replaced in one
    step, and its owner and mode are taken over. On an error before that step the temporary file is
    removed."""
    try:
        if exists(host, path):
            host.take_over(path, temporary)
        host.rename(temporary, path)
    except BaseException:
        discard(host, temporary)
        raise
    host.sync_directory(directory_of(path))


def confirm(host: Host, path: str) -> None:
    """Make the name durable under which ``path`` was found: whoever gave it may have been killed
    before that, and what is flushed into a file is lost with its name. Where the directory cannot
    be opened, or has no sync, nothing can be done about it."""
    try:
        host.sync_directory(directory_of(host.real_path(path)))
    except StorageError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise


def _link_new(host: Host, temporary: str, path: str) -> None:
    """Give the final name only if it is free; rename would replace what came meanwhile."""
    try:
        host.link(temporary, path)
    except StorageError as error:
        # File systems without hard links (vfat, some FUSE): a check and a rename must do.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if exists(host, path):
            raise StorageError(errno.EEXIST, "create", path) from error
        host.rename(temporary, path)
        return
    host.unlink(temporary)


def discard(host: Host, path: str) -> None:
    """Remove a name that nothing relies on, if that can be done."""
    try:
        host.unlink(path)
    except StorageError:
        pass  # the first error is the one to report


def remove(host: Host, path: str) -> None:
    """Remove a name; durable on return."""
    host.unlink(path)
    host.sync_directory(directory_of(path))


def exists(host: Host, path: str) -> bool:
    """Whether ``path`` names anything (a dangling symbolic link does not count)."""
    try:
        host.stat(path)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True
