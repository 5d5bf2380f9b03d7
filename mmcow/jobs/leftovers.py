# SPDX-License-Identifier: MIT
"""What a process that was killed left beside an image: found, and removed where nobody can miss it.

Owns: which names are such rests (docs/cli.md "check" tells people), the proof that one holds
nothing and is nobody's.
Never: removes a file with a byte of anybody's data in it, one that is locked, one that another
image of the directory names, or one with a name that a person could have given.

A snapshot, a creation or a copy that is killed leaves files called ``.NAME.XXXXXXXX.mmcow-new``
(``storage.names``); a snapshot also the new layer's data file, ``NAME.N.raw``, into which nothing
was written; or the frozen name as a second name of the layer that still is the top one.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from mmcow.errors import LockedError, MmcowError, StorageError
from mmcow.formats import registry
from mmcow.formats.addcow_header import read_header
from mmcow.formats.driver import Finding
from mmcow.formats.opening import Access, lock_sets, resolve
from mmcow.storage import names
from mmcow.storage.file import Cache

if TYPE_CHECKING:
    from mmcow.image import Image
    from mmcow.storage.host import Handle, Host, Identity

# A larger directory is not looked through: a check must not take minutes for it.
NAMES_MOST = 4096
_HEAD = 4096
_PIECE = 1 << 20
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.mmcow-new", re.DOTALL)
_WRITER = lock_sets(Access(write=True, top=True, share=False, cache=Cache.WRITEBACK), raw=False)


class Leftovers(NamedTuple):
    """What was found beside an image."""

    findings: list[Finding]
    notes: list[str]  # odd, but perhaps wanted


def look(image: Image, *, remove: bool) -> Leftovers:
    """Find the rests beside ``image``; with ``remove``, for which it is open for writing (so that
    no other process is making files for it), delete those that hold nothing and are nobody's."""
    host = image.opener.host
    path = host.real_path(image.location)
    folder, base = os.path.split(path)
    try:
        there = host.names(folder or ".")
    except StorageError:
        return Leftovers([], [])  # the image can be opened without that
    if len(there) > NAMES_MOST:
        return Leftovers([], [])
    search = _Search(host, folder, base, there)
    findings = []
    for name in there:
        if search.is_temporary(name):
            findings += search.examine(name, remove=remove)
    handle = image.layers[0].driver.locked_handles()[0]
    second = search.second_names(handle.identity) if handle.kind == "file" else []
    return Leftovers(findings, [*search.unused_data(), *second])


class _Search:
    """One look through one directory."""

    def __init__(self, host: Host, folder: str, base: str, there: list[str]) -> None:
        self._host = host
        self._folder = folder
        self._base = base
        self._there = there
        self._gone: set[str] = set()
        self._data_name = re.compile(rf"{re.escape(base)}\.[1-9][0-9]*\.raw", re.DOTALL)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def is_temporary(self, name: str) -> bool:
        """Whether it is a temporary name for the image, or for a data file of it."""
        inner = name
        while match := _TEMPORARY.fullmatch(inner):
            inner = match[1]
        if inner == name:
            return False
        own = (self._base, f"{self._base}.raw")
        return inner in {*map(names.shortened, own)} or bool(self._data_name.fullmatch(inner))

    # ---- temporary files ----

    def examine(self, name: str, *, remove: bool) -> list[Finding]:
        """What is to be said about one temporary file, and its data file."""
        path = self._path(name)
        with ExitStack() as stack:
            handle = self._alone(path, stack)
            if handle is None:
                return []  # somebody works on it, or has just finished
            data = self._data_of(path, handle)
            if data is None:
                text = f"{path} is left of a process that was killed; it may hold data: look at it"
                return [Finding("leak", text, False)]
            found = []
            if data and self._is_empty_data(data, name, stack):
                found.append(data)
            found.append(path)
            if remove:
                # The data file first: what names it is how it is found.
                for one in found:
                    names.remove(self._host, one)
            self._gone.update(os.path.basename(one) for one in found)
            return [
                Finding("leak", f"{one} is left of a process that was killed, and empty", remove)
                for one in found
            ]

    def _alone(self, path: str, stack: ExitStack) -> Handle | None:
        """Open a file that nobody else uses, and keep it so; None where somebody does."""
        try:
            if self._host.stat(path).kind != "file" or self._host.real_path(path) != path:
                return None  # a link is not mmcow's
            handle = self._host.open(path, write=False, direct=False)
        except StorageError:
            return None
        stack.callback(handle.close)
        try:
            handle.lock(*_WRITER)
        except LockedError:
            return None
        return handle

    def _data_of(self, path: str, handle: Handle) -> str | None:
        """The path of the data file that an add-cow file without any cluster names; empty for a
        file that holds nothing at all; None for one that may hold data."""
        if handle.next_data(0) >= handle.size():
            return ""
        head = handle.read_at(0, _HEAD)
        if registry.probe(head) != "add-cow":
            return None
        try:
            header = read_header(path, handle)
            if header.all_allocated or _has_bits(handle, header.header_size):
                return None
            return resolve(path, "data file", os.fsdecode(header.image))
        except MmcowError:
            return None

    def _is_empty_data(self, path: str, named_by: str, stack: ExitStack) -> bool:
        """Whether a data file was made for a snapshot, never written to, and is nobody else's."""
        folder, name = os.path.split(path)
        if os.path.normpath(folder) != os.path.normpath(self._folder):
            return False
        if not self._data_name.fullmatch(name) or self._is_named(name, but=named_by):
            return False
        handle = self._alone(path, stack)
        return handle is not None and handle.allocated() == 0

    def _is_named(self, data: str, *, but: str = "") -> bool:
        """Whether an image of the directory names ``data``, or might."""
        return any(
            self._names(name, data) for name in self._there if name not in (but, data, *self._gone)
        )

    def _names(self, name: str, data: str) -> bool:
        try:
            if self._host.stat(self._path(name)).kind != "file":
                return False
            handle = self._host.open(self._path(name), write=False, direct=False)
        except StorageError:
            return False
        try:
            head = handle.read_at(0, _HEAD)
            if registry.probe(head) != "add-cow":
                return False
            return os.path.basename(os.fsdecode(read_header(name, handle).image)) == data
        except MmcowError:
            return True  # who knows what it names
        finally:
            handle.close()

    # ---- what a person could want ----

    def unused_data(self) -> list[str]:
        """Data files that look as if a snapshot had made them, are empty, and that no image here
        names: an image elsewhere might, or a person has plans for them."""
        notes = []
        for name in self._there:
            if name in self._gone or not self._data_name.fullmatch(name):
                continue
            with ExitStack() as stack:
                if (
                    not self._holds_nothing(name)
                    or self._is_named(name)
                    or self._alone(self._path(name), stack) is None
                ):
                    continue
            notes.append(f"{self._path(name)}: is empty, and no image beside it names it")
        return notes

    def _holds_nothing(self, name: str) -> bool:
        try:
            return self._host.stat(self._path(name)).allocated == 0
        except StorageError:
            return False

    def second_names(self, identity: Identity) -> list[str]:
        """Other names of the image: of a snapshot that was cut short, or given by somebody."""
        notes = []
        for name in self._there:
            try:
                same = name != self._base and self._host.stat(self._path(name)).identity == identity
            except StorageError:
                continue  # a dangling link, or gone by now
            if same and self._host.real_path(self._path(name)) == self._path(name):
                notes.append(
                    f"{self._path(name)}: is another name of this very file, not a copy: given by "
                    "somebody, or by a snapshot that was killed before it took effect"
                )
        return notes


def _has_bits(handle: Handle, offset: int) -> bool:
    """Whether anything but zeros lies behind ``offset``."""
    size = handle.size()
    offset = handle.next_data(offset)
    while offset < size:
        if any(handle.read_at(offset, min(_PIECE, size - offset))):
            return True
        offset = handle.next_data(min(offset + _PIECE, size))
    return False
