# SPDX-License-Identifier: MIT
"""The cow headers as pure functions over bytes: layouts, rules, arithmetic, changes of a name."""

from __future__ import annotations

import ctypes
import itertools

import pytest

from mmcow.errors import CorruptError, FormatError, UnsupportedError
from mmcow.formats import cow_meta
from mmcow.formats.cow_meta import (
    I386,
    UML1_BIG,
    UML1_LITTLE,
    UML2,
    UML3,
    UML3_UNPACKED,
    X86_64,
    Geometry,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ALL = (X86_64, I386, UML1_BIG, UML1_LITTLE, UML2, UML3, UML3_UNPACKED)


def header_bytes(layout, *, size=MIB, name=b"base.img", **fields):
    """A header of any layout, also of those that mmcow never writes."""
    header = layout.structure()
    header.magic = cow_meta.COW_MAGIC
    header.version = layout.version
    header.backing_file = name
    header.mtime = 0x540866E8
    header.size = size
    header.sectorsize = 512
    if layout.aligned:
        header.alignment = 4096
    for field, value in fields.items():
        setattr(header, field, value)
    return bytes(header)


def image_bytes(layout, **fields):
    """Header, empty bitmap, zeros up to the data."""
    head = header_bytes(layout, **fields)
    sectorsize = fields.get("sectorsize", 512)
    where = cow_meta.geometry(
        layout, fields.get("size", MIB), sectorsize, fields.get("alignment", 4096)
    )
    return head + bytes(where.data_start - len(head))


def parse(content):
    return cow_meta.parse("disk.cow", content[: cow_meta.HEAD_SIZE], len(content))


# ---- structures: the offsets of the specification ----


@pytest.mark.parametrize(
    ("layout", "offsets", "size"),
    [
        (X86_64, {"backing_file": 8, "mtime": 1032, "size": 1040, "sectorsize": 1048}, 1056),
        (I386, {"backing_file": 8, "mtime": 1032, "size": 1036, "sectorsize": 1044}, 1048),
        (UML1_BIG, {"backing_file": 8, "mtime": 264, "size": 268, "sectorsize": 276}, 280),
        (UML1_LITTLE, {"backing_file": 8, "mtime": 264, "size": 268, "sectorsize": 276}, 280),
        (UML2, {"backing_file": 8, "mtime": 4104, "size": 4108, "sectorsize": 4116}, 4120),
        (
            UML3,
            {"mtime": 8, "size": 12, "sectorsize": 20, "alignment": 24, "cow_format": 28,
             "backing_file": 32},
            4128,
        ),
        (
            UML3_UNPACKED,
            {"mtime": 8, "size": 16, "sectorsize": 24, "alignment": 28, "cow_format": 32,
             "backing_file": 36},
            4136,
        ),
    ],
    ids=lambda value: value.variant if isinstance(value, cow_meta.Layout) else "",
)  # fmt: skip
def test_structure_offsets_are_the_specifications(layout, offsets, size):
    found = {name: getattr(layout.structure, name).offset for name in offsets}
    assert found == offsets
    assert ctypes.sizeof(layout.structure) == layout.header_size == size


# ---- arithmetic: computed in the specification ----


@pytest.mark.parametrize(
    ("size", "data_start"),
    [(0, 1536), (512, 1536), (MIB, 1536), (64 * MIB, 17920), (GIB, 263680), (8 * GIB, 2098688)],
)
def test_geometry_x86_64_data_start(size, data_start):
    assert cow_meta.geometry(X86_64, size, 512, 0).data_start == data_start


def test_geometry_x86_64_1_mib_was_created_with_1312_bytes():
    assert cow_meta.geometry(X86_64, MIB, 512, 0).bitmap_end == 1312


@pytest.mark.parametrize(
    ("size", "data_start", "length"),
    [(MIB, 12288, 1060864), (GIB, 270336, 270336 + GIB), (8 * GIB, 2105344, 2105344 + 8 * GIB)],
)
def test_geometry_uml3_data_start_and_length(size, data_start, length):
    where = cow_meta.geometry(UML3, size, 512, 4096)
    assert where.bitmap_offset == 8192
    assert where.data_start == data_start
    assert where.data_start + size == length


def test_geometry_uml3_unpacked_bitmap_follows_its_longer_header():
    assert cow_meta.geometry(UML3_UNPACKED, MIB, 512, 512) == Geometry(4608, 256, 5120)
    assert cow_meta.geometry(UML3_UNPACKED, MIB, 512, 4096).bitmap_offset == 8192


@pytest.mark.parametrize("layout", [UML1_BIG, UML2], ids=["v1", "v2"])
def test_geometry_uml_v1_v2_round_the_bitmap_down(layout):
    assert cow_meta.geometry(layout, 9 * 512, 512, 512).bitmap_length == 1
    assert cow_meta.geometry(layout, 16 * 512, 512, 512).bitmap_length == 2


def test_geometry_qemu_floors_the_size_to_512():
    assert cow_meta.geometry(X86_64, 8 * 512 + 511, 512, 0).bitmap_length == 1
    assert parse(image_bytes(X86_64, size=1023)).disk_size == 512


def test_bits_beyond_a_short_bitmap_lie_in_the_padding():
    header = parse(image_bytes(UML2, size=9 * 512))
    assert (header.geometry.bitmap_length, header.clusters, header.bits) == (1, 9, 9)


def test_bits_never_lie_in_the_data():
    """UML v2 with a bitmap that ends, rounded down, exactly where the data begin."""
    bits = (4608 - 4120) * 8
    header = parse(image_bytes(UML2, size=(bits + 1) * 512))
    assert header.geometry.bitmap_end == header.geometry.data_start == 4608
    assert (header.clusters, header.bits) == (bits + 1, bits)


# ---- the one real image whose bytes are known ----

# The header fields of a 1 MiB image made on i386 in 2014, at the offsets its dump showed.
DUMP = {0x408: "540866e8", 0x40C: "0000000000100000", 0x414: "00000200"}


def test_parse_real_i386_dump():
    content = bytearray(1304)
    content[:8] = bytes.fromhex("4f4f4f4d00000002")
    for offset, digits in DUMP.items():
        content[offset : offset + len(digits) // 2] = bytes.fromhex(digits)
    header = parse(bytes(content))
    assert header.layout is I386
    assert header.size == MIB
    assert header.mtime == 0x540866E8
    assert header.geometry.bitmap_end == 1304
    assert header.geometry.data_start == 1536


def test_build_i386_has_the_bytes_of_the_real_dump():
    built = cow_meta.build(I386, MIB, b"", 0x540866E8)
    for offset, digits in DUMP.items():
        assert built[offset : offset + len(digits) // 2].hex() == digits
    assert len(built) + 256 == 1304


# ---- telling layouts apart ----


@pytest.mark.parametrize(
    "layout", ALL, ids=lambda layout: f"{layout.variant}-{layout.structure.__name__}"
)
@pytest.mark.parametrize("size", [512, MIB, 5 * GIB])
def test_parse_finds_each_layout(layout, size):
    header = parse(image_bytes(layout, size=size))
    assert header.layout is layout
    assert (header.size, header.mtime, header.backing_file) == (size, 0x540866E8, b"base.img")


@pytest.mark.parametrize(
    ("content", "variant"),
    [
        (cow_meta.MAGIC_BIG + b"\0\0\0\1", "uml1"),
        (cow_meta.MAGIC_LITTLE + b"\1\0\0\0", "uml1"),
    ],
    ids=["big", "little"],
)
def test_claims_and_parse_take_both_byte_orders_of_v1(content, variant):
    assert cow_meta.claims(content)
    layout = UML1_BIG if content[:4] == cow_meta.MAGIC_BIG else UML1_LITTLE
    image = image_bytes(layout)
    assert image[:8] == content
    assert parse(image).layout.variant == variant


@pytest.mark.parametrize("version", [2, 3])
def test_parse_little_endian_v2_v3_refused(version):
    content = cow_meta.MAGIC_LITTLE + version.to_bytes(4, "little") + bytes(9000)
    with pytest.raises(UnsupportedError, match="always big-endian"):
        parse(content)


@pytest.mark.parametrize("version", [0, 4, 1 << 24, 0xFFFFFFFF])
def test_parse_unknown_version_refused(version):
    content = cow_meta.MAGIC_BIG + version.to_bytes(4, "big") + bytes(9000)
    with pytest.raises(UnsupportedError) as caught:
        parse(content)
    assert (caught.value.field, caught.value.value) == ("version", version)


@pytest.mark.parametrize("length", [1057, 1536, 2048, 4096])
def test_parse_x86_64_of_512_bytes_is_no_i386_image(length):
    """Its size field's low half is 512, where i386 has its sectorsize; a set bit would be needed
    for i386 that no sector of such an image has."""
    content = image_bytes(X86_64, size=512)[:length].ljust(length, b"\0")
    assert content[0x414:0x418] == content[0x418:0x41C] == b"\0\0\2\0"
    assert parse(content).layout is X86_64


@pytest.mark.parametrize("high", [1, 18, 2047])
def test_parse_both_qemu_layouts_length_decides_for_x86_64(high):
    size = (high << 32) + 512
    head = header_bytes(X86_64, size=size)
    length = cow_meta.geometry(X86_64, size, 512, 0).bitmap_end
    assert cow_meta.parse("d", head + bytes(8192 - len(head)), length).layout is X86_64


@pytest.mark.parametrize("extra", [0, 512 * 17, 512 * 100])
def test_parse_both_qemu_layouts_length_decides_for_i386(extra):
    """An i386 image of which, of its first 32 sectors, only sector 17 is allocated."""
    content = bytearray(image_bytes(I386, size=64 * KIB) + bytes(extra))
    content[1048 + 2] = 1 << (17 % 8)
    assert content[0x418:0x41C] == b"\0\0\2\0"
    assert content[0x40C:0x410] == bytes(4)
    header = parse(bytes(content))
    assert (header.layout, header.size) == (I386, 64 * KIB)


def test_parse_both_qemu_layouts_and_a_length_of_neither_is_refused():
    content = bytearray(image_bytes(I386, size=64 * KIB))
    content[1048 + 2] = 2
    with pytest.raises(FormatError, match="say the layout"):
        cow_meta.parse("d", bytes(content.ljust(8192, b"\0")), 10 * MIB)
    header = cow_meta.parse_as("d", I386, bytes(content.ljust(8192, b"\0")), 10 * MIB)
    assert header.layout is I386


def test_parse_qemu_whatever_its_guest_wrote_where_uml_has_its_fields():
    """This test puts a whole UML v2 tail into the guest data of a QEMU image."""
    uml = header_bytes(UML2, size=MIB)
    for layout in (X86_64, I386):
        content = bytearray(image_bytes(layout, size=MIB) + bytes(8192))
        content[4104:4120] = uml[4104:4120]
        assert parse(bytes(content)).layout is layout


def test_parse_uml_v2_with_rests_behind_its_name():
    """UML did not clear the header's memory: anything may follow the name's NUL."""
    content = bytearray(image_bytes(UML2))
    content[100:4104] = bytes(itertools.islice(itertools.cycle(range(1, 256)), 4004))
    assert parse(bytes(content)).layout is UML2
    assert parse(bytes(content)).backing_file == b"base.img"


def test_parse_uml_v2_with_a_name_longer_than_qemus():
    name = b"/" + b"d" * 2000
    assert parse(image_bytes(UML2, name=name)).backing_file == name


def test_parse_v3_without_four_letters_is_the_unpacked_structure():
    assert parse(image_bytes(UML3_UNPACKED, name=b"/b")).layout is UML3_UNPACKED
    assert parse(image_bytes(UML3, name=b"/")).layout is UML3


def test_build_uml3_without_name_is_still_the_packed_structure():
    content = cow_meta.build(UML3, MIB, b"", 0)
    header = parse(content + bytes(12288 - len(content)))
    assert header.layout is UML3
    assert header.name is None


@pytest.mark.parametrize("layout", list(cow_meta.CREATED.values()), ids=list(cow_meta.CREATED))
@pytest.mark.parametrize("name", [b"", b"base.raw", b"\xff\xfe not utf-8"])
def test_build_parse_round_trip(layout, name):
    built = cow_meta.build(layout, 3 * GIB, name, -1)
    header = cow_meta.parse("d", built.ljust(8192, b"\0"), 1 << 40)
    assert header.layout is layout
    assert (header.size, header.backing_file, header.mtime) == (3 * GIB, name, 0xFFFFFFFF)
    assert header.geometry == cow_meta.geometry(layout, 3 * GIB, 512, 4096)


# ---- fields ----


@pytest.mark.parametrize(
    "layout", ALL, ids=lambda layout: f"{layout.variant}-{layout.structure.__name__}"
)
def test_parse_longest_name_needs_its_nul(layout):
    longest = b"n" * (layout.name_size - 1)
    assert parse(image_bytes(layout, name=longest)).backing_file == longest
    with pytest.raises(CorruptError) as caught:
        parse(image_bytes(layout, name=longest + b"n"))
    assert caught.value.field == "backing_file"


@pytest.mark.parametrize("layout", [UML1_BIG, UML2, UML3], ids=["v1", "v2", "v3"])
@pytest.mark.parametrize(
    "sectorsize", [0, 1, 511, 513, 1000, 0xFFFFFFFF, 0x80000000, 1536, 4 * MIB]
)
def test_parse_uml_sector_sizes_not_powers_of_two_refused(layout, sectorsize):
    content = header_bytes(layout, sectorsize=sectorsize) + bytes(9000)
    with pytest.raises(FormatError) as caught:
        parse(content)
    assert caught.value.field == "sectorsize"


@pytest.mark.parametrize("alignment", [0, 1, 511, 4095, 0x80000000, 0xFFFFFFFF])
def test_parse_uml_alignment_not_a_multiple_of_512_refused(alignment):
    content = header_bytes(UML3, alignment=alignment) + bytes(9000)
    with pytest.raises(FormatError) as caught:
        parse(content)
    assert (caught.value.field, caught.value.value) == ("alignment", alignment)


@pytest.mark.parametrize("cow_format", [1, 0xFFFFFFFF])
def test_parse_uml_other_cow_format_refused(cow_format):
    content = header_bytes(UML3, cow_format=cow_format) + bytes(9000)
    with pytest.raises(UnsupportedError) as caught:
        parse(content)
    assert caught.value.field == "cow_format"


@pytest.mark.parametrize("sectorsize", [512, 1024, 4096, 2 * MIB])
def test_parse_uml_sector_size_is_the_cluster(sectorsize):
    header = parse(image_bytes(UML3, size=10 * MIB + 512, sectorsize=sectorsize))
    assert header.sectorsize == sectorsize
    assert header.clusters == -(-(10 * MIB + 512) // sectorsize)
    assert header.data_end >= header.geometry.data_start + header.disk_size


@pytest.mark.parametrize(
    "layout", ALL, ids=lambda layout: f"{layout.variant}-{layout.structure.__name__}"
)
def test_parse_file_must_hold_the_bitmap(layout):
    head = header_bytes(layout, size=64 * MIB)
    where = cow_meta.geometry(layout, 64 * MIB, 512, 4096)
    padded = head.ljust(8192, b"\0")
    assert cow_meta.parse("d", padded, where.bitmap_end).layout is layout
    with pytest.raises(CorruptError) as caught:
        cow_meta.parse("d", padded, where.bitmap_end - 1)
    assert (caught.value.field, caught.value.value) == ("length", where.bitmap_end - 1)


@pytest.mark.parametrize(
    "layout", ALL, ids=lambda layout: f"{layout.variant}-{layout.structure.__name__}"
)
def test_parse_size_bounds(layout):
    padded = header_bytes(layout, size=1 << 63).ljust(8192, b"\0")
    with pytest.raises(FormatError) as caught:
        cow_meta.parse("d", padded, 1 << 62)
    assert caught.value.field == "size"
    padded = header_bytes(layout, size=(1 << 63) - 1).ljust(8192, b"\0")
    with pytest.raises(UnsupportedError) as caught:
        cow_meta.parse("d", padded, 1 << 62)
    assert caught.value.field == "size"


# ---- changing a name in place ----

NAMES = {
    "none": b"",
    "short": b"base.img",
    "other": b"/srv/images/old/base.raw",
    "edge": b"e" * 479,
    "long": b"l" * 700,
}


@pytest.mark.parametrize("layout", list(cow_meta.CREATED.values()), ids=list(cow_meta.CREATED))
@pytest.mark.parametrize(
    ("old", "new"),
    list(itertools.permutations(NAMES, 2)),
    ids=lambda name: name,
)
def test_rename_changes_name_no_third_file_after_a_power_cut(layout, old, new):
    """This test cuts the power inside each step: any subset of its sectors may have survived."""
    before = cow_meta.build(layout, MIB, NAMES[old], 1).ljust(8192, b"\0")
    content = bytearray(before)
    allowed = {NAMES[old], NAMES[new]}
    for change in cow_meta.rename_changes(layout, NAMES[old], NAMES[new], 2):
        end = change.offset + len(change.data)
        borders = sorted({change.offset, end, *range(-(-change.offset // 512) * 512, end, 512)})
        sectors = list(itertools.pairwise(borders))
        for mask in range(1 << min(len(sectors), 8)):
            torn = bytearray(content)
            for number, (start, stop) in enumerate(sectors):
                if mask >> min(number, 7) & 1:
                    torn[start:stop] = change.data[start - change.offset : stop - change.offset]
            assert cow_meta.parse("d", bytes(torn), MIB).backing_file in allowed
        content[change.offset : end] = change.data
    assert bytes(content) == cow_meta.build(layout, MIB, NAMES[new], 2).ljust(8192, b"\0")
