# SPDX-License-Identifier: MIT
"""Numbers of bytes, as QEMU's tools read and show them.

Owns: "1.5G" to bytes and back, and the plain numbers that ``io`` takes.

Never: rounds to sectors (the library does), knows an option's name.
"""

from __future__ import annotations

from math import frexp

from mmcow.errors import UsageError

_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DECIMAL = r"(?ia)([0-9]+)(\.[0-9]*)?([bkmgtpe]?)"
_HEX = r"(?ia)0x[0-9a-f]+"
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")

SIZE_END = 1 << 63


class SizeError(UsageError):
    """Text that should be a number of bytes and is not."""

    def __init__(self, what: str, text: str, problem: str) -> None:
        super().__init__(f"{what} {text!r}: {problem}")
        self.what = what
        self.text = text


def parse_size(text: str, what: str = "size") -> int:
    """Bytes from a number with an optional fraction and suffix b, k, M, G, T, P or E.

    Powers of 1024; either case; a fraction needs a suffix (or is zero). Hexadecimal numbers
    take no suffix. ``what`` names the value in errors.
    """
    import re  # noqa: PLC0415 - slow, and showing sizes needs none of it

    if re.fullmatch(_HEX, text):
        return _bounded(int(text, 16), text, what)
    match = re.fullmatch(_DECIMAL, text)
    if match is None:
        raise SizeError(
            what, text, "must be a number of bytes, or one followed by k, M, G, T, P or E"
        )
    digits, fraction, suffix = match[1], (match[2] or ".")[1:], match[3].lower()
    shift = _SHIFTS[suffix]
    value = int(digits) << shift
    if fraction.strip("0"):
        if shift == 0:
            raise SizeError(what, text, "a fraction of a byte; add k, M, G, T, P or E")
        unit = 10 ** len(fraction)
        value += ((int(fraction) << (shift + 1)) + unit) // (2 * unit)  # half a byte rounds up
    return _bounded(value, text, what)


def _bounded(value: int, text: str, what: str) -> int:
    if value >= SIZE_END:
        raise SizeError(what, text, f"must be below {SIZE_END}")
    return value


def human_size(value: int) -> str:
    """Three significant digits, as qemu-img shows sizes: "1.5 GiB", "977 KiB", "512 B"."""
    # The unit changes where the number would need a fourth digit: not at 1024, and at 999.5, which
    # rounds to 1000.
    exponent = frexp(value / (999.5 / 1024))[1]
    index = max((exponent - 1) // 10, 0)
    return f"{value / (1 << 10 * index):.3g} {_UNITS[index]}B"


def exact_size(value: int) -> str:
    """Both ways: "1.5 GiB (1610612736 bytes)"."""
    return f"{human_size(value)} ({value} bytes)"


def io_size(value: float) -> str:
    """As qemu-io shows amounts: "4 KiB", "31.963 MiB", "16 bytes"."""
    for index in range(len(_UNITS) - 1, 0, -1):
        if value >= 1 << 10 * index:
            return f"{_trimmed(value / (1 << 10 * index))} {_UNITS[index]}B"
    return f"{_trimmed(value)} bytes"


def _trimmed(value: float) -> str:
    return f"{value:.3f}".removesuffix(".000")
