# SPDX-License-Identifier: MIT
"""add-cow headers as pure functions over bytes: layouts, rules, sizes, changes of a name."""

from __future__ import annotations

import ctypes

import pytest

from mmcow.errors import CorruptError, UnsupportedError, UsageError
from mmcow.formats import addcow_meta as meta
from tests.unit.addcow_support import GIB, KIB, MIB, TIB, v7, v10, v20

PATH = "disk.add-cow"

VECTOR = bytes.fromhex(
    "41434f574c0000000800000054000000080000001000000000000000000000000000000000000000"
    "0000010072617700000000000000000000000000726177000000000000000000000000006261736"
    "52e7261776469736b2e726177"
)


def parse(content):
    return meta.parse(PATH, content, len(content))


# ---- layout ----


def test_build_v20_reproduces_the_test_vector():
    built = meta.build_v20(PATH, 64 * KIB, b"base.raw", "raw", b"disk.raw")
    assert built[:92] == VECTOR
    assert built[92:] == bytes(65536 - 92)


def test_parse_reads_the_test_vector():
    header = parse(VECTOR.ljust(65536, b"\0"))
    assert (header.variant, header.cluster_size, header.header_size) == ("v20", 65536, 65536)
    assert (header.backing, header.backing_format) == (b"base.raw", "raw")
    assert (header.image, header.image_format) == (b"disk.raw", "raw")
    assert not header.all_allocated


@pytest.mark.parametrize(
    ("structure", "offsets", "size"),
    [
        (
            meta.HeaderV20,
            {
                "magic": 0,
                "backing_filename_offset": 4,
                "backing_filename_size": 8,
                "image_filename_offset": 12,
                "image_filename_size": 16,
                "cluster_bits": 20,
                "features": 24,
                "compat_features": 32,
                "header_size": 40,
                "backing_fmt": 44,
                "image_fmt": 60,
            },
            76,
        ),
        (
            meta.HeaderV10,
            {
                "magic": 0,
                "version": 8,
                "backing_filename_offset": 12,
                "backing_filename_size": 16,
                "image_filename_offset": 20,
                "image_filename_size": 24,
                "features": 28,
            },
            36,
        ),
        (
            meta.HeaderV7,
            {"magic": 0, "version": 8, "backing_file": 12, "image_file": 1036, "reserved": 2060},
            2560,
        ),
    ],
    ids=["v20", "v10", "v7"],
)
def test_structure_has_the_offsets_of_the_specification(structure, offsets, size):
    assert {name: getattr(structure, name).offset for name, *_ in structure._fields_} == offsets
    assert ctypes.sizeof(structure) == size


@pytest.mark.parametrize("backing", [b"base.raw", b""])
def test_build_equals_an_independent_writer(backing):
    fmt = "raw" if backing else None
    assert meta.build_v20(PATH, 4096, backing, fmt, b"disk.raw") == v20(bits=12, backing=backing)
    assert meta.build_v10(PATH, backing, True, b"disk.raw") == v10(backing=backing, features=3)
    assert meta.build_v10(PATH, backing, False, b"disk.raw") == v10(backing=backing, features=1)
    assert meta.build_v7(PATH, backing, b"disk.raw") == v7(backing=backing)


@pytest.mark.parametrize(
    ("size", "cluster", "header", "clusters", "least", "length"),
    [
        (8 * GIB, 64 * KIB, 65536, 131072, 16384, 131072),
        (GIB, 4 * KIB, 4096, 262144, 32768, 36864),
        (TIB, 64 * KIB, 65536, 16777216, 2097152, 2162688),
        (33 * GIB, 64 * KIB, 65536, 540672, 67584, 65536 + 131072),
        (10 * MIB + 512, 64 * KIB, 65536, 161, 21, 131072),
        (TIB, 2 * MIB, 2 * MIB, 524288, 65536, 4 * MIB),
        (0, 64 * KIB, 65536, 0, 0, 65536),
    ],
)
def test_sizes_are_those_computed_in_the_specification(
    size, cluster, header, clusters, least, length
):
    parsed = parse(meta.build_v20(PATH, cluster, b"", None, b"disk.raw"))
    assert parsed.header_size == header
    assert parsed.clusters(size) == clusters
    assert parsed.least_length(size) == header + least
    assert parsed.file_length(size) == length


@pytest.mark.parametrize(
    ("content", "size", "length"),
    [
        (v7(), 512 * 9, 2560 + 2),
        (v7(), 0, 2560),
        (v10(), 65536 * 8, 4096 + 1),
        (v10(), 65536 * 8 + 512, 4096 + 2),
    ],
)
def test_old_variants_pad_nothing(content, size, length):
    header = parse(content)
    assert header.file_length(size) == header.least_length(size) == length


# ---- v10, v7, v18 ----


def test_parse_v10():
    header = parse(v10(features=3))
    assert (header.variant, header.cluster_size, header.header_size) == ("v10", 65536, 4096)
    assert (header.backing, header.backing_format, header.image) == (
        b"base.raw",
        "raw",
        b"disk.raw",
    )
    assert parse(v10(features=1)).backing_format is None
    assert parse(v10(backing=b"")).backing_format is None


def test_parse_v10_ignores_the_backing_size_without_an_offset():
    header = parse(v10(backing=b"", at=(0, 0xFFFFFFFF, 36, 8)))
    assert header.backing == b""


def test_parse_v7():
    header = parse(v7())
    assert (header.variant, header.cluster_size, header.header_size) == ("v7", 512, 2560)
    assert (header.backing, header.backing_format, header.image) == (
        b"base.raw",
        None,
        b"disk.raw",
    )


@pytest.mark.parametrize("bits", [9, 10, 11])
def test_parse_v18_reads_small_clusters(bits):
    header = parse(v20(bits=bits))
    assert (header.variant, header.cluster_size, header.header_size) == ("v18", 1 << bits, 4096)


def test_parse_v18_reads_unterminated_format_names():
    header = parse(v20(backing_fmt=b"sixteen-letters!"))
    assert (header.variant, header.backing_format) == ("v18", "sixteen-letters!")


def test_parse_ignores_and_keeps_unknown_compatible_features():
    header = parse(v20(compat=0xF0 | 1))
    assert header.all_allocated
    rebuilt = parse(meta.rebuild(PATH, header, b"other", "raw", b"disk.raw"))
    assert rebuilt.compat_features == 0xF1


def test_parse_accepts_overlapping_names():
    header = parse(v20(backing=b"abcdef", image=b"", image_at=(78, 4)))
    assert (header.backing, header.image) == (b"abcdef", b"cdef")


# ---- bounds ----


@pytest.mark.parametrize(
    ("offset", "size", "good"),
    [
        (76, 1, True),
        (75, 1, False),
        (65536 - 2, 2, True),
        (65536 - 2, 3, False),
        (65536 - 1, 1, False),
        (76, 65536 - 77, True),
        (76, 65536 - 76, False),
        (77, 65536 - 77, True),
        (78, 65536 - 77, False),
        (76, 0, False),
        (0, 0, False),
        (0, 5, False),
        (0xFFFFFFFF, 0xFFFFFFFF, False),
    ],
)
def test_image_name_bounds_of_v20(offset, size, good):
    content = bytearray(v20(backing=b"", image_at=(offset, size)))
    content[76:] = b"n" * (len(content) - 76)
    if good:
        assert parse(bytes(content)).image == b"n" * size
    else:
        with pytest.raises(CorruptError, match="image_filename_") as caught:
            parse(bytes(content))
        assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("offset", "size", "good"),
    [(36, 1, True), (35, 1, False), (4094, 2, True), (4095, 1, False), (36, 4059, True),
     (36, 4060, False), (37, 4059, True), (38, 4059, False), (36, 0, False), (0, 0, False)],
)  # fmt: skip
def test_image_name_bounds_of_v10(offset, size, good):
    content = bytearray(v10(backing=b"", at=(0, 0, offset, size)))
    content[36:] = b"n" * (len(content) - 36)
    if good:
        assert parse(bytes(content)).image == b"n" * size
    else:
        with pytest.raises(CorruptError, match="image_filename_"):
            parse(bytes(content))


@pytest.mark.parametrize(
    ("content", "error", "field"),
    [
        (v20(features=1), UnsupportedError, "features"),
        (v20(features=1 << 63), UnsupportedError, "features"),
        (v20(bits=8), CorruptError, "cluster_bits"),
        (v20(bits=22, header_size=0), UnsupportedError, "cluster_bits"),
        (v20(header_size=4096), UnsupportedError, "HEADER_SIZE"),
        (v20(bits=12, header_size=8192), UnsupportedError, "HEADER_SIZE"),
        (v20(backing=b"", backing_fmt=b"raw"), None, ""),
        (v20(backing_fmt=b""), CorruptError, "backing_fmt"),
        (v20(backing_fmt=b"raw\0x"), CorruptError, "backing_fmt"),
        (v20(backing_fmt=b"r\xffw"), CorruptError, "backing_fmt"),
        (v20(image_fmt=b""), CorruptError, "image_fmt"),
        (v20(image_fmt=b"qcow2"), UnsupportedError, "image_fmt"),
        (v20(backing=b"same", image=b"same"), CorruptError, "image_filename"),
        (v20(backing=b"ba\0se"), CorruptError, "backing_filename"),
        (v20(image=b"di\0sk"), CorruptError, "image_filename"),
        (v20(backing_at=(0, 4)), CorruptError, "backing_filename_size"),
        (v20(backing_at=(76, 0)), CorruptError, "backing_filename_size"),
        (v10(version=2), UnsupportedError, "version"),
        (v10(features=4), UnsupportedError, "features"),
        (v10(features=0), CorruptError, "features"),
        (v10(features=2), CorruptError, "features"),
        (v10(backing=b"same", image=b"same"), CorruptError, "image_filename"),
        (v7(version=2), UnsupportedError, "version"),
        (v7(image=b""), CorruptError, "image_file"),
        (v7(image=b"x" * 1024), CorruptError, "image_file"),
        (v7(backing=b"x" * 1024), CorruptError, "backing_file"),
        (v7(backing=b"same", image=b"same"), CorruptError, "image_filename"),
    ],
)
def test_parse_names_the_field(content, error, field):
    if error is None:
        parse(content)
        return
    with pytest.raises(error) as caught:
        parse(content)
    assert (caught.value.path, caught.value.field) == (PATH, field)


def test_parse_refuses_a_format_without_a_backing_file():
    content = bytearray(v20(backing=b""))
    content[44:47] = b"raw"
    with pytest.raises(CorruptError, match="backing_fmt"):
        parse(bytes(content))


def test_v10_flag_without_a_name_is_refused():
    content = bytearray(v10(backing=b""))
    content[28] = 1
    with pytest.raises(CorruptError, match="features"):
        parse(bytes(content))


# ---- building ----


@pytest.mark.parametrize(
    "build",
    [
        lambda b, i: meta.build_v20(PATH, 4096, b, "raw", i),
        lambda b, i: meta.build_v10(PATH, b, True, i),
        lambda b, i: meta.build_v7(PATH, b, i),
    ],
    ids=["v20", "v10", "v7"],
)
@pytest.mark.parametrize(
    ("backing", "image"),
    [(b"same", b"same"), (b"base", b""), (b"", b"a\0b"), (b"a\0b", b"i"), (b"", b"x" * 5000),
     (b"x" * 5000, b"i")],
)  # fmt: skip
def test_build_refuses_names_that_parse_would(build, backing, image):
    with pytest.raises(UsageError, match=r"disk\.add-cow"):
        build(backing, image)


@pytest.mark.parametrize("lengths", [(2000, 2020), (4017, 2), (1, 4018), (0, 4019), (2000, 1)])
def test_build_v20_writes_what_parse_accepts_up_to_the_limit(lengths):
    backing, image = b"b" * lengths[0], b"i" * lengths[1]
    if sum(lengths) > 4020 or lengths[0] > 4018:
        with pytest.raises(UsageError, match="4020 together"):
            meta.build_v20(PATH, 4096, backing, "raw", image)
        return
    header = parse(meta.build_v20(PATH, 4096, backing, "raw" if backing else None, image))
    assert (header.backing, header.image) == (backing, image)
    assert header.backing_span[0] + header.backing_span[1] <= header.image_span[0]


def test_build_v20_needs_the_format_of_the_base():
    with pytest.raises(UsageError, match="format of backing file 'base' must be given"):
        meta.build_v20(PATH, 4096, b"base", None, b"disk")


@pytest.mark.parametrize("name", ["sixteen-letters!", "räw"])
def test_build_v20_refuses_format_names_that_do_not_fit(name):
    with pytest.raises(UsageError, match="15 ASCII"):
        meta.build_v20(PATH, 4096, b"base", name, b"disk")


def test_build_v7_takes_1023_bytes():
    name = b"n" * 1023
    assert parse(meta.build_v7(PATH, b"", name)).image == name
    with pytest.raises(UsageError, match="v7 takes 1023"):
        meta.build_v7(PATH, b"", name + b"n")


# ---- changing ----


@pytest.mark.parametrize("content", [v20(), v10(features=3), v7()], ids=["v20", "v10", "v7"])
def test_without_backing_removes_every_trace(content):
    raw = meta.without_backing(parse(content))
    header = parse(raw)
    assert (header.backing, header.backing_format, header.image) == (b"", None, b"disk.raw")
    assert b"base" not in raw
    assert header.stray() == []


def test_without_backing_keeps_an_image_name_that_overlaps():
    header = parse(v20(backing=b"abcdef", image=b"", image_at=(78, 4)))
    assert parse(meta.without_backing(header)).image == b"cdef"


def test_all_allocated_flag_changes_one_bit():
    content = v20(compat=0x100)
    flagged = meta.with_all_allocated(parse(content))
    assert [i for i in range(len(content)) if content[i] != flagged[i]] == [32]
    assert meta.without_all_allocated(parse(flagged)) == content


@pytest.mark.parametrize("place", [200, 4095, 65535])
def test_stray_bytes_are_found_and_removed(place):
    content = bytearray(v20())
    content[place] = 7
    header = parse(bytes(content))
    assert header.stray() == [(place, 1)]
    assert meta.without_stray(header) == v20()


def test_stray_bytes_of_v7_include_what_follows_a_name():
    header = parse(v7(backing=b"base\0left"))
    assert header.backing == b"base"
    assert header.stray() == [(12 + 5, 4)]
    assert parse(meta.without_stray(header)).stray() == []


def test_v10_has_no_rule_about_stray_bytes():
    content = bytearray(v10())
    content[4000] = 1
    assert parse(bytes(content)).stray() == []
