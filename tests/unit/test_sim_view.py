# SPDX-License-Identifier: MIT
"""The C helper's memory view against the plain one: the same calls, the same answers."""

from __future__ import annotations

from random import Random

import pytest

from tests.sim.view import PlainView, native_view

SIZE, RESERVE, UNIT = 5000, 1 << 20, 512


@pytest.mark.parametrize("seed", range(20))
def test_views_agree(seed: int) -> None:
    rng = Random(seed)
    content = rng.randbytes(SIZE) if seed % 2 else bytes(SIZE)
    views = [make(content, SIZE, RESERVE, UNIT, "f") for make in (PlainView, native_view)]

    def both(call: str, *arguments: object) -> None:
        plain, real = (getattr(view, call)(*arguments) for view in views)
        if call == "snapshot":
            plain = _bytes_by_unit(plain)
            real = _bytes_by_unit(real)
        assert plain == real, (call, arguments)

    for _ in range(150):
        size = views[0].size()
        at = rng.randrange(size - 16)
        length = rng.randint(1, min(900, size - at))
        base = rng.choice((0, 36, 1048))
        bits = (size - base) * 8
        first = rng.randrange(bits)
        count = rng.randint(1, min(bits - first, rng.choice((3, 70, 5000))))
        calls = [
            ("load", at, length),
            ("store", at, rng.randbytes(length)),
            ("bit_runs", base, first, count, rng.choice((1, 3, 64))),
            ("bits_write", base, first, count, rng.randint(0, 1)),
            ("bits_count", base, first, count),
            ("dirty", at, length),
            ("mark", at, length),
            ("snapshot", at, length),
            ("set_size", rng.randint(SIZE // 2, SIZE)),
        ]
        call, *arguments = rng.choice(calls)
        both(call, *arguments)
        both("dirty", 0, views[0].size())
    both("load", 0, views[0].size())


def _bytes_by_unit(runs: list[tuple[int, memoryview]]) -> dict[int, bytes]:
    return {
        at + i: bytes(data[i : i + UNIT]) for at, data in runs for i in range(0, len(data), UNIT)
    }
