# SPDX-License-Identifier: MIT
"""The archival cow format on disk: headers in, facts out; facts in, headers out.

Owns: the five header structures with the specifications' field names, how they are told
apart, the check of every field, the arithmetic of bitmap and data, the bytes of new
headers and of changed names. Pure functions over bytes.

Never: opens or reads a file, trusts a field.

One magic, 4F 4F 4F 4D, two families that never agreed on what follows it::

    QEMU version 2 (the struct was not packed, so it depends on the machine)
              x86-64                       i386
       0  magic, version 2              magic, version 2
       8  backing_file[1024]            backing_file[1024]
    1032  mtime                         mtime
    1036  padding, zero                 size (8 bytes)
    1040  size (8 bytes)
    1044                                sectorsize = 512
    1048  sectorsize = 512              bitmap
    1052  padding, zero
    1056  bitmap

    User-mode Linux (integers of version 1 in the byte order of the machine, else big-endian)
              v1                 v2                  v3                  v3, not packed
       0  magic, version     magic, version      magic, version      magic, version
       8  backing_file[256]  backing_file[4096]  mtime               mtime
      12                                         size (8 bytes)      padding
      16                                                             size (8 bytes)
      20                                         sectorsize
      24                                         alignment           sectorsize
      28                                         cow_format = 0      alignment
      32                                         backing_file[4096]  cow_format = 0
      36                                                             backing_file[4096]
     264  mtime
     268  size (8 bytes)
     276  sectorsize
     280  bitmap
    4104                     mtime
    4108                     size (8 bytes)
    4116                     sectorsize
    4120                     bitmap              (4128: rounded up to alignment, the bitmap)

Then, in all of them: the bitmap, one bit per sector, least significant bit first, 1 = "in this
file"; then, rounded up, the data: sector s at data_start + s * sectorsize, in a sparse file.

Rules of ours, where no specification gives one (docs/formats/cow.md says why):

- What follows the first NUL of a name is ignored; a name without NUL is an error.
- ``sectorsize`` must be 512 (QEMU) or a power of two from 512 to 2 MiB (UML).
- A bitmap ends below 2 GiB: UML keeps the data's offset in a signed 32-bit integer.
- A UML v3 header without a name stores it as NUL and three marker bytes: four zero bytes
  there would be the sign of the structure that is not packed.
"""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple, Protocol

from mmcow.errors import CorruptError, FormatError, UnsupportedError
from mmcow.ranges import SECTOR, align_down, align_up, units_for

COW_MAGIC = 0x4F4F4F4D
MAGIC_BIG = COW_MAGIC.to_bytes(4, "big")
MAGIC_LITTLE = COW_MAGIC.to_bytes(4, "little")

# Every header fits, and it is a multiple of any alignment that direct I/O demands.
HEAD_SIZE = 8192
# UML keeps the data's offset in a signed 32-bit integer, so no image of its own reaches further.
DATA_START_MAX = 1 << 31
SIZE_MAX = 1 << 63
# The engine copies up whole sectors through memory; add-cow's largest cluster is as large.
SECTOR_SIZE_MAX = 2 << 20
UML_ALIGNMENT = 4096

# "No name" in a packed UML v3 header (see the module's rules).
_NO_NAME_V3 = b"\0mmc"


class QemuHeaderX8664(ctypes.BigEndianStructure):
    """QEMU's cow_header_v2 where 64-bit integers are aligned to 8 bytes."""

    _pack_ = 1
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 1024),
        ("mtime", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("sectorsize", ctypes.c_uint32),
        ("padding_end", ctypes.c_uint32),
    )


class QemuHeaderI386(ctypes.BigEndianStructure):
    """QEMU's cow_header_v2 where 64-bit integers are aligned to 4 bytes."""

    _pack_ = 1
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 1024),
        ("mtime", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("sectorsize", ctypes.c_uint32),
    )


_UML_V1_FIELDS = (
    ("magic", ctypes.c_uint32),
    ("version", ctypes.c_uint32),
    ("backing_file", ctypes.c_char * 256),
    ("mtime", ctypes.c_uint32),
    ("size", ctypes.c_uint64),
    ("sectorsize", ctypes.c_uint32),
)


class UmlHeaderV1Big(ctypes.BigEndianStructure):
    """UML's cow_header_v1, written by a big-endian machine."""

    _pack_ = 1
    _fields_ = _UML_V1_FIELDS


class UmlHeaderV1Little(ctypes.LittleEndianStructure):
    """UML's cow_header_v1, written by a little-endian machine."""

    _pack_ = 1
    _fields_ = _UML_V1_FIELDS


class UmlHeaderV2(ctypes.BigEndianStructure):
    """UML's cow_header_v2."""

    _pack_ = 1
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 4096),
        ("mtime", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("sectorsize", ctypes.c_uint32),
    )


class UmlHeaderV3(ctypes.BigEndianStructure):
    """UML's cow_header_v3, packed as Linux writes it since December 2005."""

    _pack_ = 1
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("mtime", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("sectorsize", ctypes.c_uint32),
        ("alignment", ctypes.c_uint32),
        ("cow_format", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 4096),
    )


class UmlHeaderV3Unpacked(ctypes.BigEndianStructure):
    """UML's cow_header_v3 as 64-bit builds wrote it before it was packed."""

    _pack_ = 1
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("mtime", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("sectorsize", ctypes.c_uint32),
        ("alignment", ctypes.c_uint32),
        ("cow_format", ctypes.c_uint32),
        ("backing_file", ctypes.c_char * 4096),
        ("padding_end", ctypes.c_uint32),
    )


class _Field(Protocol):
    """What ctypes tells about a field of a structure."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


def _field(structure: type[ctypes.Structure], name: str) -> _Field:
    field: _Field = getattr(structure, name)
    return field


class Layout(NamedTuple):
    """One of the header structures and what follows from it."""

    variant: str  # LayerInfo.variant
    structure: type[ctypes.Structure]
    version: int
    uml: bool  # bitmap and data follow UML's rules, else QEMU's
    writable: bool  # mmcow changes such images
    aligned: bool  # has the fields alignment and cow_format

    @property
    def header_size(self) -> int:
        """Bytes of the structure."""
        return ctypes.sizeof(self.structure)

    @property
    def name_offset(self) -> int:
        """Where backing_file stands."""
        return _field(self.structure, "backing_file").offset

    @property
    def name_size(self) -> int:
        """Bytes of backing_file, its NUL included."""
        return _field(self.structure, "backing_file").size

    @property
    def no_name(self) -> bytes:
        """What backing_file begins with when there is no backing file."""
        return _NO_NAME_V3 if self is UML3 else b"\0"


X86_64 = Layout("x86-64", QemuHeaderX8664, 2, False, True, False)
I386 = Layout("i386", QemuHeaderI386, 2, False, True, False)
UML1_BIG = Layout("uml1", UmlHeaderV1Big, 1, True, False, False)
UML1_LITTLE = Layout("uml1", UmlHeaderV1Little, 1, True, False, False)
UML2 = Layout("uml2", UmlHeaderV2, 2, True, False, False)
UML3 = Layout("uml3", UmlHeaderV3, 3, True, True, True)
UML3_UNPACKED = Layout("uml3-unpacked", UmlHeaderV3Unpacked, 3, True, False, True)

# What create can make.
CREATED = {layout.variant: layout for layout in (X86_64, I386, UML3)}


class Geometry(NamedTuple):
    """Where bitmap and data lie."""

    bitmap_offset: int
    bitmap_length: int
    data_start: int

    @property
    def bitmap_end(self) -> int:
        """Offset behind the bitmap: what a file must hold at least."""
        return self.bitmap_offset + self.bitmap_length


class Header(NamedTuple):
    """A validated header."""

    layout: Layout
    backing_file: bytes  # up to its NUL; empty without a backing file
    mtime: int  # of the backing file, 32 bits; 0 when unknown
    size: int  # as stored
    sectorsize: int
    alignment: int  # of bitmap and data
    geometry: Geometry

    @property
    def disk_size(self) -> int:
        """Bytes of the virtual disk: whole sectors of 512, as QEMU and Linux count."""
        return align_down(self.size, SECTOR)

    @property
    def clusters(self) -> int:
        """Allocation units (sectors of ``sectorsize``) of the virtual disk."""
        return units_for(self.disk_size, self.sectorsize)

    @property
    def bits(self) -> int:
        """How many of the clusters have a bit; fewer only where UML v1 and v2 rounded down.

        The bitmap they counted is up to a byte too short, but the words they wrote reached into
        the padding before the data: bits there are theirs. There are none where the data begin.
        """
        room = self.geometry.data_start - self.geometry.bitmap_offset
        return min(self.clusters, room * 8)

    @property
    def data_end(self) -> int:
        """Offset behind the last cluster's data."""
        return self.geometry.data_start + self.clusters * self.sectorsize

    @property
    def name(self) -> str | None:
        """The backing file's name."""
        return os.fsdecode(self.backing_file) if self.backing_file else None


def claims(head: bytes) -> bool:
    """Whether a file that begins with ``head`` has the magic, in either byte order."""
    return head[:4] in (MAGIC_BIG, MAGIC_LITTLE)


def geometry(layout: Layout, size: int, sectorsize: int, alignment: int) -> Geometry:
    """Where bitmap and data lie. The arguments are valid."""
    if not layout.uml:
        bitmap_offset = layout.header_size
        length = units_for(align_down(size, SECTOR) // SECTOR, 8)
        return Geometry(bitmap_offset, length, align_up(bitmap_offset + length, SECTOR))
    if layout.version < 3:
        bitmap_offset = layout.header_size
        # The rounding bug of these versions: 9 sectors give 1 byte. See Header.bits.
        length = (size + sectorsize - 1) // (8 * sectorsize)
        return Geometry(bitmap_offset, length, align_up(bitmap_offset + length, sectorsize))
    bitmap_offset = align_up(layout.header_size, alignment)
    length = units_for(units_for(size, sectorsize), 8)
    return Geometry(bitmap_offset, length, align_up(bitmap_offset + length, alignment))


# ---- reading ----


def parse(path: str, head: bytes, length: int) -> Header:
    """Tell the layout of a file of ``length`` bytes that begins with ``head``, and check it.

    ``head`` holds the first HEAD_SIZE bytes, fewer only where the file ends. Raises FormatError
    (or a subclass) that names path, field and value for whatever is not as it must be.
    """
    if not claims(head):
        raise FormatError(path, "magic", bytes(head[:4]), "this is not a cow image")
    if len(head) < 8:
        raise FormatError(path, "length", length, "the file ends inside the header")
    little = head[:4] == MAGIC_LITTLE
    version = int.from_bytes(head[4:8], "little" if little else "big")
    if version == 1:
        return _validated(path, UML1_LITTLE if little else UML1_BIG, head, length)
    if version not in (2, 3):
        raise UnsupportedError(path, "version", version, "only versions 1, 2 and 3 exist")
    if little:
        # Linux would read magic and version in either order and the rest as big-endian;
        # nothing ever wrote such a file.
        raise UnsupportedError(
            path, "magic", bytes(head[:4]), f"version {version} is always big-endian"
        )
    if version == 3:
        # cow_format of the structure that is not packed, or the first letters of a path.
        unpacked = head[32:36] == bytes(4)
        return _validated(path, UML3_UNPACKED if unpacked else UML3, head, length)
    return _parse_version_2(path, head, length)


def _be32(head: bytes, offset: int) -> int | None:
    """The big-endian integer at ``offset``; None where the file ends before."""
    if len(head) < offset + 4:
        return None
    return int.from_bytes(head[offset : offset + 4], "big")


def _parse_version_2(path: str, head: bytes, length: int) -> Header:
    """QEMU in either layout, or UML: told apart by where sectorsize stands.

    QEMU's fields come first: no guest can change them, while UML's sectorsize lies where a
    QEMU image has bitmap or guest data.
    """
    x86_64 = _be32(head, 0x418) == SECTOR and _be32(head, 0x40C) == 0
    i386 = _be32(head, 0x414) == SECTOR
    if x86_64 and i386:
        return _parse_either_qemu(path, head, length)
    if x86_64:
        return _validated(path, X86_64, head, length)
    if i386:
        return _validated(path, I386, head, length)
    uml_sector_size = _be32(head, _field(UmlHeaderV2, "sectorsize").offset)
    if uml_sector_size is not None and _is_sector_size(uml_sector_size):
        return _validated(path, UML2, head, length)
    if len(head) < I386.header_size:
        raise FormatError(path, "length", length, "the file ends inside the header")
    raise FormatError(
        path,
        "sectorsize",
        _be32(head, 0x414),
        "it is not 512 at 0x414 (QEMU on i386) or 0x418 (QEMU on x86-64), "
        f"nor is {uml_sector_size} at 0x1014 (UML) a sector size",
    )


def _parse_either_qemu(path: str, head: bytes, length: int) -> Header:
    """Both of QEMU's layouts have their sectorsize: the bitmap or the length decides.

    An x86-64 image with size k * 2**32 + 512 looks so, and an i386 image below 4 GiB that has, of
    its first 32 sectors, sector 17 alone. Read as i386 that bit must belong to a sector.
    """
    fitting = []
    for layout in (X86_64, I386):
        try:
            header = _validated(path, layout, head, length)
        except FormatError:
            continue
        # A file ends with its bitmap at the earliest and with its last cluster at the latest,
        # rounded up to what direct I/O needs.
        longest = align_up(header.data_end, HEAD_SIZE)
        if length <= longest and (layout is X86_64 or header.clusters > 17):
            fitting.append(header)
    if len(fitting) == 1:
        return fitting[0]
    raise FormatError(
        path,
        "sectorsize",
        SECTOR,
        "it stands both at 0x414 (i386) and 0x418 (x86-64), and the file's length "
        f"{length} does not tell which: say the layout",
    )


def _is_sector_size(value: int) -> bool:
    return SECTOR <= value <= SECTOR_SIZE_MAX and value & (value - 1) == 0


def parse_as(path: str, layout: Layout, head: bytes, length: int) -> Header:
    """Check a header that is known to have ``layout``."""
    if not claims(head):
        raise FormatError(path, "magic", bytes(head[:4]), "this is not a cow image")
    return _validated(path, layout, head, length)


def _validated(path: str, layout: Layout, head: bytes, length: int) -> Header:
    """Check every field of a header; ``head`` begins with the magic."""
    if len(head) < layout.header_size:
        raise FormatError(path, "length", length, "the file ends inside the header")
    fields = layout.structure.from_buffer_copy(head)
    if fields.version != layout.version:
        raise FormatError(path, "version", fields.version, f"must be {layout.version}")
    name: bytes = fields.backing_file  # ctypes ends it at the first NUL
    if len(name) >= layout.name_size:
        raise CorruptError(path, "backing_file", name[:16] + b"...", "no NUL ends the name")
    size: int = fields.size
    if size >= SIZE_MAX:
        raise FormatError(path, "size", size, "must be below 2**63")
    sectorsize = _check_sector_size(path, layout, fields.sectorsize)
    alignment = sectorsize
    if layout.aligned:
        alignment = _check_alignment(path, fields.alignment, fields.cow_format)
    where = geometry(layout, size, sectorsize, alignment)
    if where.data_start >= DATA_START_MAX:
        raise UnsupportedError(
            path, "size", size, f"its data would begin at {where.data_start}, past 2 GiB"
        )
    if length < where.bitmap_end:
        raise CorruptError(
            path, "length", length, f"header and bitmap take {where.bitmap_end} bytes"
        )
    return Header(layout, name, fields.mtime, size, sectorsize, alignment, where)


def _check_sector_size(path: str, layout: Layout, value: int) -> int:
    if not layout.uml and value != SECTOR:
        raise FormatError(path, "sectorsize", value, "must be 512")
    if not _is_sector_size(value):
        raise FormatError(path, "sectorsize", value, "must be a power of two from 512 to 2 MiB")
    return value


def _check_alignment(path: str, alignment: int, cow_format: int) -> int:
    if cow_format != 0:
        raise UnsupportedError(path, "cow_format", cow_format, "must be 0, a bitmap")
    # Linux only complains about 0 and then divides by it.
    if alignment == 0 or alignment % SECTOR or alignment >= DATA_START_MAX:
        raise FormatError(path, "alignment", alignment, "must be a multiple of 512, below 2 GiB")
    return alignment


# ---- writing ----


def build(layout: Layout, size: int, name: bytes, mtime: int) -> bytes:
    """The header of a new image. ``name`` is empty without a backing file and was checked."""
    assert layout.writable
    assert len(name) < layout.name_size
    fields = layout.structure()
    fields.magic = COW_MAGIC
    fields.version = layout.version
    fields.mtime = mtime & 0xFFFFFFFF
    fields.size = size
    fields.sectorsize = SECTOR
    if layout.aligned:
        fields.alignment = UML_ALIGNMENT
    header = bytearray(fields)
    stored = name or layout.no_name
    header[layout.name_offset : layout.name_offset + len(stored)] = stored
    return bytes(header)


class Change(NamedTuple):
    """Bytes to store at an offset, durable before the next change."""

    offset: int
    data: bytes


def stamp_change(layout: Layout, mtime: int) -> Change:
    """The bytes that record the base's time (seconds; 0: unknown)."""
    offset = _field(layout.structure, "mtime").offset
    return Change(offset, (mtime & 0xFFFFFFFF).to_bytes(4, "big"))


def rename_changes(layout: Layout, old: bytes, new: bytes, mtime: int) -> list[Change]:
    """How to replace the backing name in place, step by durable step.

    A power cut keeps or loses whole sectors. A header must not name a third file in between, so
    the part of the new name beyond the first sector is written while the old name, ended by
    its NUL in the first sector, hides it; then the first sector switches, alone. Only a change
    between two names that both pass the first sector (504 bytes on with QEMU, 480 with UML) has
    no safe order.
    """
    name = new or layout.no_name
    offset, end = layout.name_offset, layout.name_offset + layout.name_size
    area = name + bytes(layout.name_size - len(name))
    room = SECTOR - offset
    first, rest = Change(offset, area[:room]), Change(SECTOR, area[room:])
    assert rest.offset + len(rest.data) == end
    stamp = stamp_change(layout, mtime)
    if len(old) < room:
        return [rest, first, stamp]
    return [first, rest, stamp]
