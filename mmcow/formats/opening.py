# SPDX-License-Identifier: MIT
"""How a format gets at files: resolved, permitted, locked, in the right cache mode.

Owns: ``Opener`` (the only way a format opens anything), ``Access`` (what a layer is opened
for), ``Policy`` (the caller's say over names found inside images), the locks each role takes,
and the contract ``Format`` of a format module.

Never: reads image content, walks chains (``chain`` does).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mmcow.errors import (
    ChainError,
    CorruptError,
    DeniedError,
    LockedError,
    StorageError,
    UsageError,
)
from mmcow.formats.naming import Inspection as Inspection  # noqa: PLC0414 - part of this contract
from mmcow.formats.naming import lock_sets as lock_sets  # noqa: PLC0414
from mmcow.formats.naming import resolve as resolve  # noqa: PLC0414
from mmcow.ranges import SIZE_MOST
from mmcow.storage.file import Cache, File

if TYPE_CHECKING:
    from mmcow.formats.driver import Driver
    from mmcow.storage.host import Handle, Host, IOQueue
    from mmcow.tasks import Reactor


class Policy(Protocol):
    """Decides about every file that an image names. Raise DeniedError to refuse."""

    def check(self, path: str, role: str, name: str, resolved: str) -> None:
        """``path`` (an image) names ``name`` as its ``role`` ("backing file" or "data file"),
        which resolves to the path ``resolved``."""


class AllowFiles:
    """The default: any regular file or block device (other kinds are refused by the opening)."""

    def check(self, path: str, role: str, name: str, resolved: str) -> None:
        """Allow."""


class DenyAll:
    """No image may name another file: for images from strangers."""

    def check(self, path: str, role: str, name: str, resolved: str) -> None:
        """Refuse."""
        raise DeniedError(path, role, name, "the open policy allows no other files")


class Within:
    """Only files below given directories, symbolic links resolved."""

    def __init__(self, *directories: str) -> None:
        self._roots = [os.path.realpath(d) for d in directories]

    def check(self, path: str, role: str, name: str, resolved: str) -> None:
        """Allow what lies below one of the directories."""
        real = os.path.realpath(resolved)
        if not any(os.path.commonpath([root, real]) == root for root in self._roots):
            raise DeniedError(path, role, name, "the open policy allows only given directories")


class Access(NamedTuple):
    """What a layer is opened for."""

    write: bool  # guest data or metadata will change
    top: bool  # False for everything below the top layer
    share: bool  # -U: tolerate writers, take no denying lock
    cache: Cache


class Opener:
    """Opens the files of one image: the only way a format gets a file."""

    def __init__(
        self, host: Host, reactor: Reactor, queue: IOQueue, policy: Policy | None = None
    ) -> None:
        self.host = host
        self.reactor = reactor
        self.queue = queue
        self.policy: Policy = AllowFiles() if policy is None else policy
        self.warnings: list[str] = []  # oddities that did not keep the image from opening

    def metadata(self, path: str, access: Access) -> Handle:
        """A buffered, locked handle on an image file, for its header and window."""
        handle = self.host.open(path, write=access.write, direct=False)
        try:
            handle.lock(*lock_sets(access, raw=False))
        except BaseException:
            handle.close()
            raise
        return handle

    def data(self, path: str, access: Access, *, raw: bool = False) -> File:
        """A locked data file in the access's cache mode. ``raw``: it is a raw disk by itself."""
        file = File.open(
            self.host, self.reactor, self.queue, path, access.cache, write=access.write
        )
        try:
            file.handle.lock(*lock_sets(access, raw=raw))
            if access.write and file.cache is not Cache.UNSAFE:
                # After a sync that failed in another process, content and length may be shown that
                # the disk does not have, and later syncs would succeed: from here on they are true.
                file.handle.datasync()
                file.handle.drop_cache()
        except BaseException:
            file.close()
            raise
        if file.refresh_size() > SIZE_MOST:
            size = file.size
            file.close()
            raise CorruptError(path, "length", size, f"a disk has at most {SIZE_MOST} bytes")
        return file

    def permitted(self, path: str, role: str, name: str) -> str:
        """Resolve a name found in image ``path`` and ask the policy; returns the path to open."""
        resolved = resolve(path, role, name)
        self.policy.check(path, role, name, resolved)
        return resolved

    def named_data(self, path: str, name: str, access: Access) -> File:
        """Open the data file that image ``path`` names; ChainError tells both names."""
        resolved = self.permitted(path, "data file", name)
        try:
            return self.data(resolved, access)
        except LockedError:
            raise
        except StorageError as error:
            raise ChainError(path, "data file", name, f"{error.what}: {error.strerror}") from error


class Option(NamedTuple):
    """A ``-o`` option of ``create``."""

    name: str
    help: str


class CreateRequest(NamedTuple):
    """What ``create`` is asked for. ``size`` None: taken from the base or the data file."""

    size: int | None  # bytes, already rounded up to 512
    backing: str | None  # name to record, as typed
    backing_format: str | None
    backing_size: int | None  # of the base's disk; None when not opened (-u) or no base
    backing_mtime: int  # seconds; 0 when unknown
    backing_is_raw: bool
    options: dict[str, str]


class Format(ABC):
    """One image format: recognise, open, create."""

    name: str
    options: tuple[Option, ...] = ()

    @abstractmethod
    def recognises(self, head: bytes) -> bool:
        """Whether a file that begins with ``head`` (up to 4096 bytes) claims to be this format,
        however short or damaged it is: the magic alone decides. Raw never claims."""

    @abstractmethod
    def open(self, opener: Opener, path: str, access: Access) -> Driver:
        """Open ``path`` as this format. Raises FormatError naming file, field and value; nothing
        stays open after an error."""

    @abstractmethod
    def inspect(self, path: str, handle: Handle) -> Inspection:
        """Read the header only; opens nothing that it names."""

    @abstractmethod
    def create(self, opener: Opener, path: str, request: CreateRequest) -> int:
        """Make a new image; durable on return, or nothing under the final name after an error.
        Returns the disk's size. Unknown options were refused by the caller (``options``)."""

    def rename(
        self,
        opener: Opener,
        path: str,
        *,
        backing: tuple[str, str | None] | None = None,
        data_file: tuple[str, str | None] | None = None,
    ) -> None:
        """Record other names and formats (``rebase -u``) without opening what they name: (name,
        format), None to leave as it is, name "" to remove the backing name."""
        raise UsageError(f"{path}: format {self.name} records no names")
