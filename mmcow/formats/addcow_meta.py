# SPDX-License-Identifier: MIT
"""The bytes of an add-cow header: v20 (with v19 and v18), v10 and v7.

Owns: the on-disk structures with the specification's field names, every rule about them
as a check, the building of headers, and the arithmetic of the bitmap behind them. Pure
functions over bytes.

Never: opens or writes a file, follows a name, knows where the data is.

::

    v20, little-endian          v10, little-endian          v7, big-endian
     0 magic "ACOW"              0 magic "ADD_COW" FF        0 magic "ADD_COW" FF
     4 backing name offset       8 version 1                 8 version 1
     8 backing name size        12 backing name offset      12 backing_file[1024]
    12 image name offset        16 backing name size      1036 image_file[1024]
    16 image name size          20 image name offset      2060 reserved[500]
    20 cluster_bits             24 image name size        2560 bitmap: 1 bit/sector
    24 features                 28 features
    32 compatible features      36 names ...
    40 HEADER_SIZE = H        4096 bitmap: 1 bit/64 KiB
    44 backing format[16]
    60 image format[16]
    76 names ... zero ...
     H bitmap: 1 bit/cluster, padded to a cluster

Bits count from the bitmap's first byte, least significant first. Rules: docs/formats/add-cow.md.

Deviations: v18's looser rules (cluster_bits from 9, format names of 16 characters) are read
and never written; a header size other than max(4096, cluster size) is refused, as QEMU did.
"""

from __future__ import annotations

from mmcow.errors import CorruptError, UnsupportedError, UsageError
from mmcow.ranges import SECTOR, align_up, units_for
from mmcow.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAGIC_V20 = b"ACOW"
MAGIC_OLD = b"ADD_COW\xff"

V20_FIXED = 76
V10_FIXED = 36
V10_HEADER = 4096
V7_HEADER = 2560
V7_NAME = 1024
V10_CLUSTER_BITS = 16

FORMAT_NAME = 16
CLUSTER_BITS_READ = range(9, 22)  # v18 allowed 512-byte clusters; 21 is QEMU's limit
CLUSTER_BITS_MADE = range(12, 22)
HEADER_MOST = 1 << 21

COMPAT_ALL_ALLOCATED = 1
V10_BACKING_FILE = 1
V10_NO_PROBE = 2


# The fixed parts: fields with their sizes in bytes. Up to 8 bytes make a number, but for "magic".
_V20 = (
    ("magic", 4),
    ("backing_filename_offset", 4),
    ("backing_filename_size", 4),
    ("image_filename_offset", 4),
    ("image_filename_size", 4),
    ("cluster_bits", 4),
    ("features", 8),
    ("compat_features", 8),
    ("header_size", 4),
    ("backing_fmt", FORMAT_NAME),
    ("image_fmt", FORMAT_NAME),
)
_V10 = (
    ("magic", 8),
    ("version", 4),
    ("backing_filename_offset", 4),
    ("backing_filename_size", 4),
    ("image_filename_offset", 4),
    ("image_filename_size", 4),
    ("features", 8),
)
_V7 = (
    ("magic", 8),
    ("version", 4),
    ("backing_file", V7_NAME),
    ("image_file", V7_NAME),
    ("reserved", 500),
)
_STRUCTURES = {"HeaderV20": _V20, "HeaderV10": _V10, "HeaderV7": _V7}


def _is_number(name: str, size: int) -> bool:
    return size <= 8 and name != "magic"


def _read(fields: tuple[tuple[str, int], ...], data: bytes) -> dict[str, int]:
    """The numbers of a little-endian fixed part; without ctypes, which is slow to import."""
    values = {}
    start = 0
    for name, size in fields:
        if _is_number(name, size):
            values[name] = int.from_bytes(data[start : start + size], "little")
        start += size
    return values


def _place(fields: tuple[tuple[str, int], ...], name: str) -> int:
    """The offset of a field."""
    start = 0
    for field, size in fields:
        if field == name:
            return start
        start += size
    raise AssertionError(name)


def __getattr__(name: str) -> Any:
    """The ctypes structures ``HeaderV20``, ``HeaderV10`` and ``HeaderV7``, for those who change a
    header: made when first asked for."""
    if name not in _STRUCTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import ctypes  # noqa: PLC0415 - not for those who only read

    numbers = {4: ctypes.c_uint32, 8: ctypes.c_uint64}
    base: Any = ctypes.BigEndianStructure if name == "HeaderV7" else ctypes.LittleEndianStructure
    fields = [
        (field, numbers[size] if _is_number(field, size) else ctypes.c_uint8 * size)
        for field, size in _STRUCTURES[name]
    ]
    made = type(base)(name, (base,), {"_pack_": 1, "_fields_": fields})
    globals()[name] = made
    return made


def _structure(name: str) -> Any:
    return globals().get(name) or __getattr__(name)


class Span(tuple[int, int]):
    """Where a name stands in the header: (offset, size)."""

    __slots__ = ()

    def cut(self, data: bytes) -> bytes:
        """The name's bytes."""
        return data[self[0] : self[0] + self[1]]


_NOWHERE = Span((0, 0))


class Header(Record):
    """A valid header, and the arithmetic of the bitmap that follows it."""

    variant: str  # "v20", "v18", "v10", "v7"
    raw: bytes  # the header's bytes, ``header_size`` of them
    cluster_size: int
    backing_span: Span
    image_span: Span
    backing_format: str | None  # as recorded; None where this variant cannot or does not
    image_format: str
    compat_features: int

    @property
    def header_size(self) -> int:
        """Bytes before the bitmap."""
        return len(self.raw)

    @property
    def backing(self) -> bytes:
        """The backing file's name, b"" without one."""
        return self.backing_span.cut(self.raw)

    @property
    def image(self) -> bytes:
        """The data file's name."""
        return self.image_span.cut(self.raw)

    @property
    def all_allocated(self) -> bool:
        """The flag that sets bitmap and backing file aside."""
        return bool(self.compat_features & COMPAT_ALL_ALLOCATED)

    @property
    def modern(self) -> bool:
        """v18 and later: flag, format names and a padded bitmap exist."""
        return self.variant in ("v20", "v18")

    def clusters(self, size: int) -> int:
        """Clusters of a disk of ``size`` bytes, the last one rounded up."""
        return units_for(size, self.cluster_size)

    def least_length(self, size: int) -> int:
        """The shortest file that holds every bit of a disk of ``size`` bytes."""
        return self.header_size + units_for(self.clusters(size), 8)

    def file_length(self, size: int) -> int:
        """The file's right length for a disk of ``size`` bytes: with v20's padding."""
        bitmap = units_for(self.clusters(size), 8)
        return self.header_size + (align_up(bitmap, self.cluster_size) if self.modern else bitmap)

    def stray(self) -> list[tuple[int, int]]:
        """Ranges (offset, length) of the header that must be zero and are not.

        v10 has no such rule: its text calls the rest of the header reserved and no more.
        """
        if self.variant == "v10":
            return []
        rest = bytearray(self.raw)
        fixed = V20_FIXED if self.modern else 12
        for start, size in (Span((0, fixed)), self.backing_span, self.image_span):
            rest[start : start + size] = bytes(size)
        return _nonzero_ranges(bytes(rest))


def _nonzero_ranges(data: bytes) -> list[tuple[int, int]]:
    """At most one range, from the first byte that is not zero to the last: enough to tell."""
    end = len(data.rstrip(b"\0"))
    if not end:
        return []
    start = len(data) - len(data.lstrip(b"\0"))
    return [(start, end - start)]


# ---- reading ----


def header_bytes(prefix: bytes) -> int:
    """How many bytes ``parse`` wants to see, told by the file's first 4096 (any bytes at all)."""
    if not prefix.startswith(MAGIC_V20) or len(prefix) < V20_FIXED:
        return V10_HEADER
    return min(max(_read(_V20, prefix)["header_size"], V20_FIXED), HEADER_MOST)


def parse(path: str, data: bytes, length: int) -> Header:
    """Check every rule of the header ``data`` (the first bytes of a file of ``length`` bytes).

    Raises CorruptError or UnsupportedError naming ``path``, the field and its value.
    """
    if data.startswith(MAGIC_V20):
        return _parse_v20(path, data, length)
    if not data.startswith(MAGIC_OLD):
        raise CorruptError(path, "magic", data[:8], "not an add-cow image")
    _require_length(path, length, 12)
    if data[8:12] == b"\0\0\0\1":
        return _parse_v7(path, data, length)
    if data[8:12] == b"\1\0\0\0":
        return _parse_v10(path, data, length)
    raise UnsupportedError(
        path,
        "version",
        int.from_bytes(data[8:12], "little"),
        "only v7 and v10 of this magic are known",
    )


def _require_length(path: str, length: int, needed: int) -> None:
    if length < needed:
        raise CorruptError(path, "length", length, f"the header alone has {needed} bytes")


def _parse_v20(path: str, data: bytes, length: int) -> Header:
    _require_length(path, length, V20_FIXED)
    fields = _read(_V20, data)
    if fields["features"]:
        problem = "an unknown incompatible feature"
        raise UnsupportedError(path, "features", fields["features"], problem)
    bits = fields["cluster_bits"]
    if bits not in CLUSTER_BITS_READ:
        kind = CorruptError if bits < CLUSTER_BITS_READ.start else UnsupportedError
        raise kind(path, "cluster_bits", bits, "must be 12 to 21 (9 to 21 in v18)")
    size = max(4096, 1 << bits)
    if fields["header_size"] != size:
        problem = f"only {size} is supported"
        raise UnsupportedError(path, "HEADER_SIZE", fields["header_size"], problem)
    _require_length(path, length, size)
    raw = data[:size]
    backing = _span(path, "backing", fields, V20_FIXED, raw, strict=True)
    image = _span(path, "image", fields, V20_FIXED, raw, strict=True)
    backing_format = _format_name(path, "backing_fmt", raw[44:60])
    image_format = _format_name(path, "image_fmt", raw[60:76])
    if bool(backing_format) != bool(backing[1]):
        problem = "empty beside a backing file" if backing[1] else "there is no backing file"
        raise CorruptError(path, "backing_fmt", backing_format, problem)
    if not image_format:
        raise CorruptError(path, "image_fmt", image_format, "must not be empty")
    if image_format != "raw":
        raise UnsupportedError(path, "image_fmt", image_format, "only raw data files are supported")
    loose = bits < CLUSTER_BITS_MADE.start or FORMAT_NAME in (
        len(backing_format),
        len(image_format),
    )
    return _with_names(
        path,
        Header(
            "v18" if loose else "v20",
            raw,
            1 << bits,
            backing,
            image,
            backing_format or None,
            image_format,
            fields["compat_features"],
        ),
    )


def _parse_v10(path: str, data: bytes, length: int) -> Header:
    _require_length(path, length, V10_HEADER)
    raw = data[:V10_HEADER]
    fields = _read(_V10, raw)
    if fields["features"] & ~(V10_BACKING_FILE | V10_NO_PROBE):
        raise UnsupportedError(path, "features", fields["features"], "an unknown feature")
    # "Undefined if none", says the text of the backing name's size.
    backing = _span(path, "backing", fields, V10_FIXED, raw, strict=False)
    image = _span(path, "image", fields, V10_FIXED, raw, strict=True)
    if bool(fields["features"] & V10_BACKING_FILE) != bool(backing[1]):
        raise CorruptError(
            path,
            "features",
            fields["features"],
            "disagrees with backing_filename_offset on a backing file",
        )
    known = "raw" if backing[1] and fields["features"] & V10_NO_PROBE else None
    header = Header("v10", raw, 1 << V10_CLUSTER_BITS, backing, image, known, "raw", 0)
    return _with_names(path, header)


def _parse_v7(path: str, data: bytes, length: int) -> Header:
    _require_length(path, length, V7_HEADER)
    raw = data[:V7_HEADER]
    spans = []
    for field in ("backing_file", "image_file"):
        start = _place(_V7, field)
        area = raw[start : start + V7_NAME]
        # What follows the first NUL is a finding of ``check`` only: removing a name longer than
        # a sector would otherwise have a moment in which the image does not open.
        size = area.find(b"\0")
        if size < 0:
            raise CorruptError(path, field, area[:32], f"no NUL in its {V7_NAME} bytes")
        spans.append(Span((start, size)))
    backing, image = spans
    if not image[1]:
        raise CorruptError(path, "image_file", "", "must not be empty")
    return _with_names(path, Header("v7", raw, SECTOR, backing, image, None, "raw", 0))


def _span(
    path: str, role: str, fields: dict[str, int], low: int, raw: bytes, *, strict: bool
) -> Span:
    """Check a name's bounds: low <= offset <= end - 2, 0 < size < end - low, offset + size <= end.

    Only a backing name may be absent (offset 0); ``strict``: its size is 0 then.
    """
    end = len(raw)
    offset_field, size_field = f"{role}_filename_offset", f"{role}_filename_size"
    offset, size = fields[offset_field], fields[size_field]
    if offset == 0 and role == "backing":
        if size and strict:
            raise CorruptError(path, size_field, size, "must be 0: there is no backing file")
        return _NOWHERE
    if not low <= offset <= end - 2:
        raise CorruptError(path, offset_field, offset, f"must be {low} to {end - 2}")
    if not 0 < size < end - low:
        raise CorruptError(path, size_field, size, f"must be 1 to {end - low - 1}")
    if offset + size > end:
        raise CorruptError(path, size_field, size, f"the name reaches past the header's end {end}")
    return Span((offset, size))


def _format_name(path: str, field: str, value: bytes) -> str:
    name, _, rest = value.partition(b"\0")
    if rest.strip(b"\0"):
        raise CorruptError(path, field, value, "is not padded with zeros")
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise CorruptError(path, field, value, "is not ASCII") from None


def _with_names(path: str, header: Header) -> Header:
    """The rules about the names' text."""
    for field, name in (("backing_filename", header.backing), ("image_filename", header.image)):
        if b"\0" in name:
            raise CorruptError(path, field, name[:64], "contains a NUL byte")
    if header.image == header.backing:
        raise CorruptError(
            path, "image_filename", header.image[:64], "equals the backing file's name"
        )
    return header


# ---- building ----


def build_v20(
    path: str,
    cluster_size: int,
    backing: bytes,
    backing_format: str | None,
    image: bytes,
    *,
    compat_features: int = 0,
) -> bytes:
    """A v20 header of ``max(4096, cluster_size)`` bytes for the image ``path``.

    Both names stand back to back from byte 76, the backing file's first. UsageError tells
    the limit that a name breaks.
    """
    end = max(4096, cluster_size)
    _require_names(path, backing, image, V20_FIXED, end)
    fields = _structure("HeaderV20")(
        cluster_bits=cluster_size.bit_length() - 1,
        compat_features=compat_features,
        header_size=end,
        image_filename_offset=V20_FIXED + len(backing),
        image_filename_size=len(image),
    )
    _put(fields.magic, MAGIC_V20)
    _put(fields.image_fmt, b"raw")
    if backing:
        if not backing_format:
            raise UsageError(f"{path}: the format of backing file {_shown(backing)} must be given")
        fields.backing_filename_offset = V20_FIXED
        fields.backing_filename_size = len(backing)
        _put(fields.backing_fmt, _format_bytes(path, backing_format))
    return (bytes(fields) + backing + image).ljust(end, b"\0")


def build_v10(path: str, backing: bytes, backing_is_raw: bool, image: bytes) -> bytes:
    """A v10 header (4096 bytes). ``backing_is_raw`` sets the flag that forbids probing."""
    _require_names(path, backing, image, V10_FIXED, V10_HEADER)
    fields = _structure("HeaderV10")(
        version=1,
        image_filename_offset=V10_FIXED + len(backing),
        image_filename_size=len(image),
    )
    _put(fields.magic, MAGIC_OLD)
    if backing:
        fields.backing_filename_offset = V10_FIXED
        fields.backing_filename_size = len(backing)
        fields.features = V10_BACKING_FILE | (V10_NO_PROBE if backing_is_raw else 0)
    return (bytes(fields) + backing + image).ljust(V10_HEADER, b"\0")


def build_v7(path: str, backing: bytes, image: bytes) -> bytes:
    """A v7 header (2560 bytes)."""
    most = V7_NAME - 1
    for name in (backing, image):
        if len(name) > most:
            raise UsageError(f"{path}: name {_shown(name)} has {len(name)} bytes, v7 takes {most}")
    _require_text(path, backing, image)
    fields = _structure("HeaderV7")(version=1)
    _put(fields.magic, MAGIC_OLD)
    _put(fields.backing_file, backing)
    _put(fields.image_file, image)
    return bytes(fields)


def rebuild(
    path: str, header: Header, backing: bytes, backing_format: str | None, image: bytes
) -> bytes:
    """The header with other names and formats; everything else as it was, but for zeroed rests."""
    if header.variant == "v7":
        return build_v7(path, backing, image)
    if header.variant == "v10":
        return build_v10(path, backing, backing_format == "raw", image)
    return build_v20(
        path,
        header.cluster_size,
        backing,
        backing_format,
        image,
        compat_features=header.compat_features,
    )


def with_all_allocated(header: Header) -> bytes:
    """The header's bytes with v20's all-allocated flag set."""
    return _with_compat(header, header.compat_features | COMPAT_ALL_ALLOCATED)


def without_all_allocated(header: Header) -> bytes:
    """The header's bytes with that flag cleared: only where every bit is set."""
    return _with_compat(header, header.compat_features & ~COMPAT_ALL_ALLOCATED)


def _with_compat(header: Header, compat_features: int) -> bytes:
    raw = bytearray(header.raw)
    _structure("HeaderV20").from_buffer(raw).compat_features = compat_features
    return bytes(raw)


def without_backing(header: Header) -> bytes:
    """The header's bytes without the backing file's name and format; the image's name stays put."""
    raw = bytearray(header.raw)
    start, size = header.backing_span
    kept = header.image
    raw[start : start + size] = bytes(size)
    image_start, image_size = header.image_span
    raw[image_start : image_start + image_size] = kept  # a foreign file's names may overlap
    if header.modern:
        fields = _structure("HeaderV20").from_buffer(raw)
        fields.backing_filename_offset = fields.backing_filename_size = 0
        _put(fields.backing_fmt, b"")
    elif header.variant == "v10":
        old = _structure("HeaderV10").from_buffer(raw)
        old.backing_filename_offset = old.backing_filename_size = 0
        old.features = 0
    return bytes(raw)


def steps_to(path: str, header: Header, target: bytes) -> list[bytes]:
    """Headers to write one after the other, each durable, that lead from ``header`` to ``target``.

    A power cut tears a write between sectors. So where more than one sector changes, new names
    are first put where nothing stands, then sector 0 is swung over to them, then the old ones
    are zeroed; the last header may have its names elsewhere than ``target``. Where there is no
    room for that it is one step that a cut may tear. In v7 names have fixed places: see
    ``_v7_steps``.
    """
    old = header.raw
    if old[SECTOR:] == target[SECTOR:]:
        return [target]
    new = parse(path, target, len(target))
    if not new.backing and (new.image_span, new.image) == (header.image_span, header.image):
        return [target[:SECTOR] + old[SECTOR:], target]  # without its pointer a name is a rest
    if header.variant == "v7":
        return _v7_steps(header, target)
    start = min(span[0] for span in (new.backing_span, new.image_span) if span[0])
    end = sum(new.image_span)
    low = min(span[0] for span in (header.backing_span, header.image_span) if span[0])
    free = max(start, sum(header.backing_span), sum(header.image_span))
    if end <= low:
        free = start  # an earlier change has left room in front
    delta = free - start
    if end + delta > len(old) or new.image_span[0] + delta > len(old) - 2:
        return [target]
    moved = _with_names_moved(new, delta)
    beside = bytearray(old)
    beside[free : end + delta] = target[start:end]
    beside[:SECTOR] = old[:SECTOR]
    return [bytes(beside), moved[:SECTOR] + bytes(beside[SECTOR:]), moved]


def _v7_steps(header: Header, target: bytes) -> list[bytes]:
    """One name after the other. What of it lies beyond its first sector is written while the NUL
    of a short name in that sector hides it. Only between two names of 500 bytes and more there
    is no safe order."""
    raw, steps = header.raw, []
    image, backing = _place(_V7, "image_file"), _place(_V7, "backing_file")
    for offset, name in ((image, header.image), (backing, header.backing)):
        border = offset + SECTOR - offset % SECTOR
        parts = [(border, offset + 1024), (offset, border)]
        for start, end in parts if len(name) < border - offset else reversed(parts):
            raw = raw[:start] + target[start:end] + raw[end:]
            steps.append(raw)
    return steps


def _with_names_moved(header: Header, delta: int) -> bytes:
    """The header with both names ``delta`` bytes further; not for v7."""
    structure = _structure("HeaderV20" if header.modern else "HeaderV10")
    fixed = V20_FIXED if header.modern else V10_FIXED
    raw = bytearray(header.raw[:fixed] + bytes(delta) + header.raw[fixed : len(header.raw) - delta])
    fields = structure.from_buffer(raw)
    fields.image_filename_offset += delta
    if header.backing:
        fields.backing_filename_offset += delta
    return bytes(raw)


def without_stray(header: Header) -> bytes:
    """The header's bytes with zeros wherever no field and no name stands."""
    raw = bytearray(len(header.raw))
    fixed = V20_FIXED if header.modern else 12
    for start, size in (Span((0, fixed)), header.backing_span, header.image_span):
        raw[start : start + size] = header.raw[start : start + size]
    return bytes(raw)


def _require_names(path: str, backing: bytes, image: bytes, low: int, end: int) -> None:
    """Both names fit back to back between ``low`` and ``end``, within the format's bounds."""
    _require_text(path, backing, image)
    room = end - low
    for name in (backing, image):
        if len(name) >= room:
            raise UsageError(
                f"{path}: name {_shown(name)} has {len(name)} bytes, the header takes {room - 1}"
            )
    if len(backing) + len(image) > room or len(backing) > room - 2:
        raise UsageError(
            f"{path}: the names of backing file and data file have "
            f"{len(backing) + len(image)} bytes, the header takes {room} together"
        )


def _require_text(path: str, backing: bytes, image: bytes) -> None:
    if not image:
        raise UsageError(f"{path}: the data file's name must not be empty")
    if b"\0" in backing or b"\0" in image:
        raise UsageError(f"{path}: a name contains a NUL byte")
    if backing == image:
        raise UsageError(f"{path}: backing file and data file are both {_shown(image)}")


def _format_bytes(path: str, name: str) -> bytes:
    value = name.encode("ascii", "replace")
    if len(value) >= FORMAT_NAME or value.decode() != name:
        raise UsageError(
            f"{path}: format name {name!r}: at most {FORMAT_NAME - 1} ASCII characters"
        )
    return value


def _shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 64 else text[:61] + "...")


def _put(field: Any, value: bytes) -> None:
    """Fill a byte array field, zero-padded."""
    assert len(value) <= len(field)
    field[:] = list(value.ljust(len(field), b"\0"))
