# SPDX-License-Identifier: MIT
"""Damaged and malicious cow images: an error that names the file, in bounded memory and time.

Whatever the bytes, opening either works or raises FormatError or ChainError; what opens can
be read, mapped and checked to its end.
"""

from __future__ import annotations

import os
import time
import tracemalloc

import pytest

import mmcow
from mmcow.errors import ChainError, CorruptError, DeniedError, FormatError
from mmcow.formats import cow_meta
from mmcow.storage.file import Cache
from mmcow.storage.linux import LinuxHost
from tests.unit.test_cow import MIB, Bench
from tests.unit.test_cow_meta import ALL, header_bytes, image_bytes

pytestmark = pytest.mark.hostile

MEMORY = 8 << 20
SECONDS = 2.0  # of this process, however busy the machine is

NAME = b"base.img"


def layout_id(layout):
    return layout.structure.__name__


def field_values(width, current):
    """Border values of an integer field of ``width`` bytes."""
    top = (1 << 8 * width) - 1
    values = {0, 1, top, top - 1, top >> 1, (top >> 1) + 1, current - 1, current + 1, current * 2}
    values |= {1 << bit for bit in range(0, 8 * width, 3)}
    return sorted(value & top for value in values)


def damaged_headers():
    for layout in ALL:
        for name, *_ in layout.structure._fields_:
            if name == "backing_file":
                continue
            current = getattr(layout.structure.from_buffer_copy(header_bytes(layout)), name)
            width = getattr(layout.structure, name).size
            for value in field_values(width, current):
                yield pytest.param(
                    layout, name, value, id=f"{layout.structure.__name__}-{name}-{value:#x}"
                )


DAMAGED = list(damaged_headers())


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path, LinuxHost())
    yield made
    made.close()


def named(error, path):
    """The error, which tells the file."""
    assert str(error).startswith(path)
    return error


def exercise(bench, name="disk.cow", *, write=False):
    """Open, map, read here and there, and check; returns the error of opening, if it is ours."""
    tracemalloc.start()
    started = time.process_time()
    try:
        driver = bench.open(name, write=write, cache=Cache.WRITEBACK)
    except (FormatError, ChainError) as error:
        return named(error, bench.path(name))
    else:
        size = driver.info.size
        engine = bench.engine(driver, write=write)
        for offset in {0, max(size - 4096, 0), size // 2 // 512 * 512}:
            length = min(4096, size - offset)
            if length:
                driver.map(offset, length)
                bench.read(engine, offset, length)
        result = bench.check(driver)
        assert 0 <= result.allocated <= result.total
        bench.drivers.pop().close()
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
        assert time.process_time() - started < SECONDS


@pytest.mark.parametrize(("layout", "field", "value"), DAMAGED)
def test_hostile_field(bench, layout, field, value):
    content = image_bytes(layout, name=NAME)
    head = header_bytes(layout, name=NAME, **{field: value})
    bench.put(head + content[len(head) :])
    exercise(bench)


@pytest.mark.parametrize(("layout", "field", "value"), DAMAGED)
def test_hostile_field_in_a_file_as_long_as_it_asks_for(tmp_path, layout, field, value):
    """This test gives the damaged header a sparse file of 8 TiB, so that sizes are believed."""
    bench = Bench(tmp_path, LinuxHost())
    try:
        bench.put(header_bytes(layout, name=NAME, **{field: value}))
        os.truncate(bench.path(), 8 << 40)
        exercise(bench)
    finally:
        bench.close()


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_hostile_file_cut_anywhere_in_the_header(layout):
    """This test cuts at every byte; the driver sees some of them below."""
    content = image_bytes(layout, size=MIB, name=NAME)
    where = cow_meta.geometry(layout, MIB, 512, 4096)
    for length in range(where.bitmap_end):
        with pytest.raises(FormatError) as caught:
            cow_meta.parse("disk.cow", content[:length][: cow_meta.HEAD_SIZE], length)
        assert str(caught.value).startswith("disk.cow: ")
    for length in range(where.bitmap_end, len(content), 97):
        cow_meta.parse("disk.cow", content[:length][: cow_meta.HEAD_SIZE], length)


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_hostile_file_cut_opened(bench, layout):
    content = image_bytes(layout, size=MIB, name=NAME)
    where = cow_meta.geometry(layout, MIB, 512, 4096)
    head = layout.header_size
    cuts = {0, 1, 3, 4, 7, 8, 9, 512, head - 1, head, head + 1, where.bitmap_end - 1}
    for length in sorted(cuts):
        if length < where.bitmap_end:
            bench.put(content[:length])
            assert isinstance(exercise(bench), FormatError)
    bench.put(content[: where.bitmap_end])
    assert exercise(bench) is None


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
@pytest.mark.parametrize("place", [0, 1, 3, 4, 100])
def test_hostile_nul_in_the_name_ends_it(bench, layout, place):
    name = bytearray(b"n" * 200)
    name[place] = 0
    content = bytearray(image_bytes(layout, name=b"x"))
    content[layout.name_offset : layout.name_offset + 200] = name
    bench.put(content)
    driver = bench.open(write=False)
    # Four zero bytes would be the other UML v3; a single one is an empty name.
    expected = "n" * place if place else None
    assert (driver.backing and driver.backing[0]) == expected


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_hostile_name_without_nul(bench, layout):
    content = bytearray(image_bytes(layout, name=NAME))
    content[layout.name_offset : layout.name_offset + layout.name_size] = b"n" * layout.name_size
    bench.put(content)
    error = exercise(bench)
    assert isinstance(error, CorruptError)
    assert error.field == "backing_file"


@pytest.mark.parametrize("value", [1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1 << 62, 9 << 40])
@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_hostile_size(bench, layout, value):
    bench.put(header_bytes(layout, size=value))
    os.truncate(bench.path(), 8 << 40)
    error = exercise(bench)
    assert isinstance(error, FormatError)
    assert error.field == "size"


def test_hostile_largest_size_that_is_taken(bench):
    """This test opens a sparse bitmap of nearly 2 GiB, for reading and for writing."""
    bench.put(header_bytes(cow_meta.X86_64, size=(8 << 40) - (16 << 20)))
    os.truncate(bench.path(), 3 << 30)
    assert exercise(bench) is None
    started = time.process_time()
    bench.open(write=True, cache=Cache.WRITEBACK)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_hostile_bitmap_of_garbage(bench, layout, rng):
    content = bytearray(image_bytes(layout, size=MIB, name=NAME))
    where = cow_meta.geometry(layout, MIB, 512, 4096)
    content[where.bitmap_offset :] = rng.randbytes(len(content) - where.bitmap_offset)
    bench.put(content)
    error = exercise(bench)
    # QEMU's two layouts may look alike after this; that is told, too.
    assert error is None or not layout.uml


def test_hostile_random_bytes_after_the_magic(bench, rng):
    for _ in range(300):
        content = bytearray(rng.randbytes(rng.choice((20, 300, 1100, 2000, 5000, 9000))))
        content[:4] = rng.choice((cow_meta.MAGIC_BIG, cow_meta.MAGIC_LITTLE))
        content[4:8] = rng.choice((b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\3", b"\1\0\0\0"))
        bench.put(content)
        exercise(bench)


def test_hostile_flipped_bytes(bench, rng):
    """This test changes a few bytes anywhere before the data of valid images."""
    images = [image_bytes(layout, size=MIB, name=NAME) for layout in ALL]
    for _ in range(500):
        content = bytearray(rng.choice(images))
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(4, min(len(content), 4200))] = rng.choice((0, 1, 0x7F, 0xFF))
        bench.put(content)
        exercise(bench)
        exercise(bench, write=True)


# ---- names, through the chain ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"nbd:localhost:10809", DeniedError),
        (b"json:{}", DeniedError),
        (b"file:base.raw", DeniedError),
        (b"no-such-file", ChainError),
        (b"/proc/no/such", ChainError),
        (b"/dev/null", ChainError),
        (b"/dev/zero", ChainError),
        (b".", ChainError),
        (b"disk.cow", ChainError),
        (b"./././disk.cow", ChainError),
        (b"\xff\xfe\xfd", ChainError),
        (b"n" * 1000, ChainError),
        (b"disk.cow/below", ChainError),
    ],
)
@pytest.mark.parametrize("layout", [cow_meta.X86_64, cow_meta.I386, cow_meta.UML3], ids=layout_id)
def test_hostile_backing_name(bench, layout, name, kind):
    path = bench.put(image_bytes(layout, name=name))
    with pytest.raises(kind) as caught:
        mmcow.open(path)
    assert str(caught.value).startswith(path)


def test_hostile_backing_fifo(bench):
    os.mkfifo(bench.path("pipe"))
    path = bench.put(image_bytes(cow_meta.X86_64, name=b"pipe"))
    with pytest.raises(ChainError, match="pipe"):
        mmcow.open(path)


def test_hostile_guest_cannot_turn_its_image_into_another(bench):
    """This test lets the guest write UML's fields where a UML v2 header would have them."""
    bench.create()
    uml = header_bytes(cow_meta.UML2, size=64 * MIB, name=b"/etc/shadow")
    engine = bench.engine(bench.open())
    for start in range(0, 8192, 512):
        bench.write(engine, start, uml[start : start + 512].ljust(512, b"\0"))
    bench.run(engine.flush())
    bench.drivers.pop().close()
    driver = bench.open(write=False)
    assert (driver.info.variant, driver.backing) == ("x86-64", None)
