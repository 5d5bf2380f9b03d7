# SPDX-License-Identifier: MIT
"""Sizes as QEMU's tools read and show them (values taken from qemu-img and qemu-io 7.2)."""

from __future__ import annotations

import pytest

from mmcow.cli.resize import new_size
from mmcow.cli.sizes import SIZE_END, SizeError, exact_size, human_size, io_size, parse_size


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("7", 7),
        ("07", 7),
        ("1b", 1),
        ("1B", 1),
        ("1.0", 1),
        ("1.0b", 1),
        ("1k", 1024),
        ("1K", 1024),
        ("1.k", 1024),
        ("0.5k", 512),
        ("1.5k", 1536),
        ("1.0004k", 1024),
        ("1.0005k", 1025),
        ("1.9999k", 2048),
        ("1M", 1 << 20),
        ("1g", 1 << 30),
        ("2.5G", 5 << 29),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("0x1000", 4096),
        ("0X10", 16),
        (str(SIZE_END - 1), SIZE_END - 1),
    ],
)
def test_parse_size(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "k", "-5", "+5", "1x", "1kb", "4kk", "1e3", ".5k", "1.5", "1.5b", "0x10k", "0x", " 1",
     "1 ", "1_000", "\u0661", "nan", "8E", "9999999E", "18446744073709551616"],
)  # fmt: skip
def test_parse_size_refuses(text):
    with pytest.raises(SizeError) as caught:
        parse_size(text, "new size")
    assert f"new size {text!r}: " in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10240, "10 KiB"),
        (1000448, "977 KiB"),
        (1023 * 1000, "999 KiB"),
        (1023 * 1001, "0.977 MiB"),
        (1181116416, "1.1 GiB"),
        (123457024, "118 MiB"),
        (1 << 40, "1 TiB"),
        (SIZE_END - 1, "8 EiB"),
    ],
)
def test_human_size(value, text):
    assert human_size(value) == text
    assert exact_size(value) == f"{text} ({value} bytes)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (16, "16 bytes"), (4096, "4 KiB"), (65536, "64 KiB"), (1 << 20, "1 MiB"),
     (1344 << 10, "1.312 MiB"), (33514586, "31.962 MiB")],
)  # fmt: skip
def test_io_size(value, text):
    assert io_size(value) == text


@pytest.mark.parametrize(
    ("text", "value"), [("5k", 5120), ("+1k", 2048), ("-512", 512), ("-1k", 0), ("-1M", -1047552)]
)
def test_new_size(text, value):
    assert new_size(text, 1024) == value
