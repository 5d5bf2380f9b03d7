# SPDX-License-Identifier: MIT
"""add-cow files from strangers: whatever stands in them, an error names the file, and fast."""

from __future__ import annotations

import time

import pytest

from mmcow.errors import ChainError, CorruptError, FormatError, StorageError
from mmcow.formats import addcow_meta as meta
from tests.sim.host import SimHost
from tests.unit.addcow_support import Rig, kinds, v7, v10, v20

pytestmark = pytest.mark.hostile

TOP = "/sim/top"
SIZE = 40 * 512
GOOD = {
    "v20": v20(bits=12, bitmap=bytes(4096)),
    "v20 flagged": v20(bits=12, compat=1, bitmap=bytes(4096)),
    "v18": v20(bits=9, bitmap=bytes(512)),
    "v10": v10(features=3, bitmap=bytes(1)),
    "v7": v7(bitmap=bytes(5)),
}
STRUCTURES = {
    "v20": meta.HeaderV20,
    "v20 flagged": meta.HeaderV20,
    "v18": meta.HeaderV20,
    "v10": meta.HeaderV10,
    "v7": meta.HeaderV7,
}
# What an opening may raise: the bytes are wrong, or what they name cannot be used.
TOLD = (FormatError, ChainError)


def host_with(content, size=SIZE):
    host = SimHost(1)
    host.put("/sim/disk.raw", b"\xee" * size)
    host.put("/sim/base.raw", b"B" * size)
    host.put(TOP, content)
    return host


def attempt(content, size=SIZE, *, write=True):
    """Open and use a file; the error if it is refused, None if it opens and behaves."""
    rig = Rig(host_with(content, size))
    started = time.monotonic()
    try:
        rig.inspect(TOP)
        driver = rig.open(TOP, write=write)
        kinds(driver)
        driver.allocated()
        driver.describe()
        rig.run(driver.check("all" if write else ""))
    except TOLD as error:
        return _named(error)
    finally:
        assert time.monotonic() - started < 1
        rig.close()
    return None


def _named(error):
    assert TOP in str(error)
    assert error.path == TOP
    return error


def values(size, here):
    """0, 1, the edges of the field, and the neighbours of what stands there."""
    most = (1 << (8 * size)) - 1
    edges = {0, 1, 75, 76, 77, 4094, 4095, 4096, 4097, most >> 1, (most >> 1) + 1, most - 1, most}
    return sorted(v for v in edges | {here - 1, here + 1} if 0 <= v <= most)


@pytest.mark.parametrize("variant", GOOD)
def test_good_files_open(variant):
    assert attempt(GOOD[variant]) is None


@pytest.mark.parametrize("variant", GOOD)
def test_every_integer_field_at_every_edge(variant):
    structure = STRUCTURES[variant]
    order = "big" if variant == "v7" else "little"
    for name, kind, *_ in structure._fields_:
        field = getattr(structure, name)
        if hasattr(kind, "_length_"):
            continue
        start, end = field.offset, field.offset + field.size
        here = int.from_bytes(GOOD[variant][start:end], order)
        for value in values(field.size, here):
            content = bytearray(GOOD[variant])
            content[start:end] = value.to_bytes(field.size, order)
            attempt(bytes(content))


@pytest.mark.parametrize("variant", GOOD)
def test_every_byte_of_the_fixed_part_changed(variant):
    fixed = {"v10": 36, "v7": 40}.get(variant, 76)
    for place in range(fixed):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            content = bytearray(GOOD[variant])
            content[place] = value
            if content[:4] in (b"ACOW", b"ADD_"):
                attempt(bytes(content), write=False)


@pytest.mark.parametrize("variant", GOOD)
def test_random_headers(rng, variant):
    for _ in range(300):
        content = bytearray(GOOD[variant])
        for _ in range(rng.randint(1, 12)):
            content[rng.randrange(4, 100)] = rng.randrange(256)
        attempt(bytes(content), write=rng.random() < 0.5)


@pytest.mark.parametrize("variant", GOOD)
def test_header_cut_at_every_length(variant):
    """This test cuts the bytes everywhere behind the magic, where they have to be that format."""
    header = {"v10": 4096, "v7": 2560}.get(variant, 4096)
    for length in range(4 if variant.startswith(("v20", "v18")) else 8, header):
        with pytest.raises(CorruptError) as caught:
            meta.parse(TOP, GOOD[variant][:length], length)
        assert (caught.value.path, caught.value.field, caught.value.value) == (
            TOP,
            "length",
            length,
        )


@pytest.mark.parametrize("variant", GOOD)
def test_file_cut_anywhere_does_not_open(variant):
    header = {"v10": 4096, "v7": 2560}.get(variant, 4096)
    needed = header + {"v20": 1, "v20 flagged": 1, "v18": 5, "v10": 1, "v7": 5}[variant]
    for length in [*range(100), *range(100, needed, 61), *range(header - 2, needed)]:
        assert isinstance(attempt(GOOD[variant][:length]), CorruptError), length
    assert attempt(GOOD[variant][:needed]) is None


def test_cut_before_the_magic_is_no_add_cow():
    for length in range(4):
        with pytest.raises(CorruptError, match="magic"):
            meta.parse(TOP, GOOD["v20"][:length], length)


@pytest.mark.parametrize("spans", [(76, 100, 80, 4), (76, 8, 76, 4), (84, 8, 76, 16)])
def test_overlapping_names_open_and_are_never_written(spans):
    names = b"base.rawdisk.raw".ljust(100, b"x")
    content = v20(bits=12, backing=names, image=b"", backing_at=spans[:2], image_at=spans[2:])
    host = host_with(content + bytes(4096))
    for offset, size in (spans[:2], spans[2:]):
        name = content[offset : offset + size].decode()
        if name not in host.names("/sim"):
            host.put(f"/sim/{name}", bytes(SIZE))
    rig = Rig(host)
    rig.rename(TOP, backing=("fresh", "raw"))
    header = meta.parse(TOP, host.content(TOP)[:4096], 8192)
    (first, length), (second, _) = header.backing_span, header.image_span
    assert first + length <= second
    rig.close()


@pytest.mark.parametrize("name", [b"\0", b"a\0b", b"disk.raw\0"])
@pytest.mark.parametrize("make", [v20, v10])
def test_nul_in_a_name(make, name):
    for role in ("image", "backing"):
        error = attempt(make(**{role: name}, bitmap=bytes(4096)))
        assert isinstance(error, CorruptError)
        assert "NUL" in str(error)


@pytest.mark.parametrize(
    "name",
    [b"x" * 3000, b"missing", b".", b"..", b"/", b"/dev/null", b"nbd:x", b"json:{}", b"top",
     b"./top", b"\xff\xfe", b"disk.raw/x", b"\n", b"-"],
)  # fmt: skip
def test_data_file_names(tmp_path, name):
    """This test opens on the real host: long names, devices, directories, what is not there."""
    path = tmp_path / "top"
    path.write_bytes(v20(bits=12, image=name, bitmap=bytes(4096)))
    rig = Rig()
    with pytest.raises(ChainError) as caught:
        rig.open(path)
    assert caught.value.path == str(path)
    rig.close()


def test_gigantic_data_file_needs_a_bitmap_that_is_not_there(tmp_path):
    path = tmp_path / "top"
    path.write_bytes(v7(bitmap=bytes(100)))
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(1 << 43)
    rig = Rig()
    with pytest.raises(CorruptError, match="length is 2660"):
        rig.open(path)
    rig.close()


def test_bitmap_cut_while_open_is_told_by_name(tmp_path):
    path = tmp_path / "top"
    path.write_bytes(v7(bitmap=bytes(1 << 20)))
    with open(tmp_path / "disk.raw", "wb") as file:
        file.truncate(512 << 23)
    rig = Rig()
    driver = rig.open(path)
    with open(path, "r+b") as file:
        file.truncate(2560)
    with pytest.raises((CorruptError, StorageError), match=str(path)):
        driver.map(512 << 22, 512)
    rig.close()
