# SPDX-License-Identifier: MIT
"""Making an add-cow image: the data file first, then the add-cow file over it.

Owns: the ``-o`` options, the order in which two files come into being, the adoption of a
data file that exists already.

Never: changes a data file that it did not make; replaces an add-cow file that somebody has
open; leaves an add-cow file that names a data file which is not durable.

::

    1 lock what exists     the old add-cow file and an adopted data file, as a writer would
    2 data file            temporary name, sparse, synced, linked, directory synced
    3 add-cow file         temporary name, header and bitmap, synced, renamed, directory synced
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, suppress
from itertools import combinations
from typing import TYPE_CHECKING

from mmcow.errors import StorageError, SyncFailed, UnsupportedError, UsageError
from mmcow.formats import addcow_meta as meta
from mmcow.formats import registry
from mmcow.formats.opening import Access, CreateRequest, Opener, Option, resolve
from mmcow.ranges import SECTOR, align_up
from mmcow.storage import names
from mmcow.storage.file import Cache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmcow.storage.host import Handle, Identity

# Chosen by measurement (bench/cluster_size.py, bench/results/cluster_size.json): against 64 KiB,
# first writes of 4 KiB are 3 to 4 times faster and take 16 times less space, larger and sequential
# ones are level within noise. The price: reads of a scattered disk in flight alone are slower
# (0.6), and a 1 TiB bitmap has 32 MiB, of which only what is touched is in memory.
DEFAULT_CLUSTER_SIZE = 4 << 10

OPTIONS = (
    Option("compat", "layout of the add-cow file: v20 (default), v10 or v7"),
    Option("cluster_size", "bytes per bit: 4k to 2M, a power of two (v20 only; default 4k)"),
    Option(
        "image_file", "data file, relative to the image's directory (default: image name + .raw)"
    ),
    Option("image_format", "format of the data file: raw"),
)

_WRITER = Access(write=True, top=True, share=False, cache=Cache.WRITEBACK)
_SIZE = re.compile(r"([0-9]{1,12})([kKmM]?)")
_PIECE = 1 << 20


def create(opener: Opener, path: str, request: CreateRequest) -> int:
    """Make an image; see ``Format.create``. Returns the disk's size."""
    name = request.options.get("image_file") or default_data_name(path)
    raw = _header(path, request, name)
    data_path = resolve(path, "data file", name)
    _refuse_same_files(opener, path, data_path, request.backing)
    with ExitStack() as held:
        old = _hold_image(opener, path, held)
        made = not names.exists(opener.host, data_path)
        if made:
            size = _make_data(opener, path, data_path, request)
        else:
            size = _adopt_data(opener, path, data_path, request, held)
        try:
            _make_image(opener, path, raw, size, ones=not request.backing)
        except BaseException as error:
            if old is not None and isinstance(error, SyncFailed):
                # The old image is gone and the new one complete; only its name may not be durable.
                raise
            # The image's name first: it must never name a file that is gone.
            _remove_new(opener, path, old)
            if made:
                _remove_new(opener, data_path, None)
            raise
    return size


def default_data_name(path: str) -> str:
    """The data file's name for an image at ``path`` where none is given; relative to the image."""
    name = os.path.basename(path) + ".raw"
    # "a:b" would read as a protocol prefix.
    return f"./{name}" if ":" in name else name


def _header(path: str, request: CreateRequest, name: str) -> bytes:
    options = request.options
    compat = options.get("compat", "v20")
    if compat not in ("v20", "v10", "v7"):
        raise UsageError(f"{path}: compat={compat}: must be v20, v10 or v7")
    image_format = options.get("image_format", "raw")
    if image_format != "raw":
        raise UnsupportedError(
            path, "image_format", image_format, "only raw data files are supported"
        )
    if "cluster_size" in options and compat != "v20":
        raise UsageError(f"{path}: cluster_size: {compat} has a fixed cluster size")
    image = os.fsencode(name)
    backing = os.fsencode(request.backing) if request.backing else b""
    if compat == "v7":
        return meta.build_v7(path, backing, image)
    if compat == "v10":
        return meta.build_v10(path, backing, request.backing_is_raw, image)
    return meta.build_v20(
        path,
        _cluster_size(path, options.get("cluster_size")),
        backing,
        request.backing_format,
        image,
        compat_features=0 if backing else meta.COMPAT_ALL_ALLOCATED,
    )


def _cluster_size(path: str, text: str | None) -> int:
    if text is None:
        return DEFAULT_CLUSTER_SIZE
    match = _SIZE.fullmatch(text)
    size = 0
    if match is not None:
        size = int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()]
    if size & (size - 1) or size.bit_length() - 1 not in meta.CLUSTER_BITS_MADE:
        raise UsageError(f"{path}: cluster_size={text}: must be a power of two from 4k to 2M")
    return size


def _refuse_same_files(opener: Opener, path: str, data_path: str, backing: str | None) -> None:
    """Image, data file and base must be three files, by name and, where they exist, by identity."""
    roles = [("the image", path), ("the data file", data_path)]
    if backing:
        roles.append(("the backing file", resolve(path, "backing file", backing)))
    for (role, one), (other_role, other) in combinations(roles, 2):
        if set(_marks(opener, one)) & set(_marks(opener, other)):
            raise UsageError(f"{path}: {role} and {other_role} are the same file: {other}")


def _marks(opener: Opener, path: str) -> Iterator[object]:
    yield os.path.abspath(path)
    try:
        yield opener.host.stat(path).identity
    except StorageError as error:
        # Not there, or not ours to see: its name must do.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise


def _hold_image(opener: Opener, path: str, held: ExitStack) -> Identity | None:
    """An existing add-cow file is replaced only while nobody has it open; returns which it is."""
    if not names.exists(opener.host, path):
        return None
    handle = opener.metadata(path, _WRITER)
    held.callback(handle.close)
    if handle.kind != "file":
        raise UsageError(f"{path}: the image must be a regular file; -o image_file takes a device")
    return handle.identity


def _make_data(opener: Opener, path: str, data_path: str, request: CreateRequest) -> int:
    wanted = request.backing_size if request.size is None else request.size
    if wanted is None:
        raise UsageError(f"{path}: a size must be given: there is no data file {data_path} yet")
    size = align_up(wanted, SECTOR)
    try:
        names.make_file(opener.host, data_path, lambda handle: handle.truncate(size), replace=False)
    except StorageError as error:
        if error.errno != errno.EEXIST:  # else it is somebody's who came between
            _remove_new(opener, data_path, None)
        raise
    return size


def _adopt_data(
    opener: Opener, path: str, data_path: str, request: CreateRequest, held: ExitStack
) -> int:
    """Take an existing file or device as it is: its length is the disk's size."""
    handle = opener.metadata(data_path, _WRITER)
    held.callback(handle.close)
    size = align_up(handle.size(), SECTOR)
    if request.size is not None and request.size != size:
        raise UsageError(
            f"{path}: the data file {data_path} exists and has {handle.size()} bytes, so the disk "
            f"has {size} and not {request.size}; leave the size out, or remove the file"
        )
    found = registry.probe(handle.read_at(0, registry.HEAD))
    if found != "raw" and "image_format" not in request.options:
        raise UsageError(
            f"{path}: the data file {data_path} looks like {found}; -o image_format=raw takes "
            "its bytes as they are"
        )
    handle.datasync()  # its content is the disk's, where there is no base
    return size


def _make_image(opener: Opener, path: str, raw: bytes, size: int, *, ones: bool) -> None:
    header = meta.parse(path, raw, len(raw))

    def fill(handle: Handle) -> None:
        # The length first: to lengthen a file that has dirty pages, xfs writes them out and waits.
        length = header.file_length(size)
        handle.truncate(length)
        # A bit that finds no room on a full disk would waste the data that was written before it.
        handle.reserve(0, length)
        handle.write_at(0, raw)
        if ones:
            _write_ones(handle, header.header_size, header.clusters(size))

    names.make_file(opener.host, path, fill, replace=True)


def _write_ones(handle: Handle, base: int, bits: int) -> None:
    whole, rest = divmod(bits, 8)
    ones = memoryview(b"\xff" * min(whole, _PIECE))
    for offset in range(0, whole, _PIECE):
        handle.write_at(base + offset, ones[: min(_PIECE, whole - offset)])
    if rest:
        handle.write_at(base + whole, bytes([(1 << rest) - 1]))


def _remove_new(opener: Opener, path: str, old: Identity | None) -> None:
    """Remove what stands under ``path``, unless it is what stood there before.

    A file may have its final name although making it failed: the sync of its directory did.
    """
    with suppress(StorageError):  # the first error is the one to report
        if opener.host.stat(path).identity != old:
            names.remove(opener.host, path)
