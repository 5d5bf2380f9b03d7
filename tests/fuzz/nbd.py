# SPDX-License-Identifier: MIT
"""Hostile NBD clients from a seed; the long form is ``python -m tests.fuzz.nbd``.

A valid session is built, then damaged: bytes changed, cut, doubled, lengths and offsets replaced by
extreme ones, the connection left at any point. Every WRITE, TRIM and WRITE_ZEROES that could be
meant is aimed at the first half of the disk, or the damage hits; so after every session the second
half must be what it was, unless the damaged bytes themselves spell a change of it, which
``changes`` finds by reading them as the protocol does. Meanwhile a good client reads and writes,
and all it sees must be right.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.unit import nbd_client as nbd
from tests.unit.nbd_serving import MIB, make_overlay, make_raw, serving

SIZE = 4 * MIB
# The good client's own part of the disk: nobody else is ever asked to change it.
OWN = 3 * MIB
EXTREMES = (0, 1, 511, SIZE - 1, SIZE, OWN, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 64) - 1)


def handshake(rng: random.Random) -> list[bytes]:
    """The pieces of a negotiation that mostly leads to the transmission."""

    def option(number: int, data: bytes = b"") -> bytes:
        return struct.pack(">8sII", nbd.IHAVEOPT, number, len(data)) + data

    name = nbd.string(rng.choice(("", "", "", "disk", "x" * 300)))
    queries = rng.sample(("base:allocation", "qemu:allocation-depth", "base:", "q"), 2)
    meta = name + struct.pack(">I", 2) + b"".join(map(nbd.string, queries))
    parts = [struct.pack(">I", rng.choice((3, 3, 3, 1, 0)))]
    choices = [
        option(nbd.LIST), option(nbd.STRUCTURED_REPLY), option(nbd.SET_META_CONTEXT, meta),
        option(nbd.LIST_META_CONTEXT, meta), option(nbd.INFO, name + struct.pack(">HHH", 2, 0, 3)),
        option(nbd.STARTTLS), option(77, b"data"),
    ]  # fmt: skip
    parts += rng.choices(choices, k=rng.randrange(5))
    parts.append(option(nbd.STRUCTURED_REPLY))
    parts.append(option(nbd.SET_META_CONTEXT, nbd.string("") + meta[len(name) :]))
    if rng.random() < 0.7:
        parts.append(option(nbd.GO, nbd.string("") + bytes(2)))
    else:
        parts.append(option(nbd.EXPORT_NAME))
    return parts


def requests(rng: random.Random) -> list[bytes]:
    """Requests that change, if anything, the part below ``OWN``."""
    parts = []
    for cookie in range(rng.randrange(1, 40)):
        command = rng.choice((0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7, rng.randrange(65536)))
        flags = rng.choice((0, 0, 0, 1, 2, 4, 8, 16, rng.randrange(65536)))
        length = rng.choice((0, 512, 4096, 65536, rng.randrange(200000)))
        offset = rng.randrange(OWN - length)
        data = rng.randbytes(length) if command == nbd.WRITE else b""
        parts.append(nbd.request(command, cookie, offset, length, flags) + data)
    if rng.random() < 0.5:
        parts.append(nbd.request(nbd.DISC, 0, 0, 0))
    return parts


def damage(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    """One kind of damage to a few of the pieces."""
    parts = list(parts)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(parts))
        part = bytearray(parts[at])
        kind = rng.randrange(7)
        where = rng.randrange(min(len(part), 64) or 1)
        if kind == 0 and part:
            part[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del part[where:]
        elif kind == 2:
            part[where:where] = rng.randbytes(rng.randrange(64))
        elif kind == 3 and len(part) >= 28:
            part[16:24] = struct.pack(">Q", rng.choice(EXTREMES))
        elif kind == 4 and len(part) >= 28:
            part[24:28] = struct.pack(">I", rng.choice(EXTREMES) & 0xFFFFFFFF)
        elif kind == 5:
            parts.insert(at, parts[rng.randrange(len(parts))])
            continue
        else:
            part = bytearray(rng.randbytes(rng.randrange(200)))
        parts[at] = bytes(part)
    return parts


def aims_at_own(sent: bytes) -> bool:
    """Whether any of the bytes, read from any place, spell a change of the good client's part."""
    magic = struct.pack(">I", 0x25609513)
    at = sent.find(magic)
    while at >= 0:
        if len(sent) >= at + 28:
            _, _, command, _, offset, length = struct.unpack_from(">IHHQQI", sent, at)
            changes = command in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES)
            if changes and length and offset < SIZE and offset + length > OWN:
                return True
        at = sent.find(magic, at + 1)
    return False


def session(rng: random.Random, path: str) -> None:
    """One hostile client."""
    parts = [*handshake(rng), *requests(rng)]
    if rng.random() < 0.9:
        parts = damage(rng, parts)
    if aims_at_own(b"".join(parts)):
        return
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(5)
        one.connect(path)
        with suppress(OSError):
            talk(rng, one, parts)


def talk(rng: random.Random, one: socket.socket, parts: list[bytes]) -> None:
    """Send the pieces in other pieces; read, or do not; leave somehow."""
    data = b"".join(parts)
    reads = rng.random() < 0.7
    stop = rng.randrange(len(data) + 1) if rng.random() < 0.4 else len(data)
    at = 0
    while at < stop:
        step = rng.choice((1, 7, 28, 100, 5000, 1 << 20))
        step = max(step, stop // 200)
        one.sendall(data[at : min(at + step, stop)])
        at += step
        if reads:
            one.setblocking(False)
            with suppress(BlockingIOError):
                while one.recv(1 << 16):
                    pass
            one.settimeout(5)
    if rng.random() < 0.5:
        one.shutdown(socket.SHUT_WR)
        if reads:
            one.settimeout(0.5)
            while one.recv(1 << 16):
                pass


class Good:
    """The client that everything must go right for."""

    def __init__(self, path: str, rng: random.Random) -> None:
        self.model = bytearray(SIZE - OWN)
        self._rng = rng
        self._client = nbd.connect(path)
        self._client.ask(nbd.WRITE_ZEROES, OWN, SIZE - OWN)

    def work(self) -> None:
        """One write, one look at another place."""
        rng = self._rng
        length = rng.choice((512, 4096, rng.randrange(1, 100000)))
        at = rng.randrange(len(self.model) - length + 1)
        data = rng.randbytes(length)
        self._client.write(OWN + at, data, rng.choice((0, 0, 0, nbd.FUA)))
        self.model[at : at + length] = data
        at = rng.randrange(len(self.model) - length + 1)
        assert self._client.read(OWN + at, length) == self.model[at : at + length]

    def end(self) -> None:
        """All of it, once more."""
        assert self._client.read(OWN, SIZE - OWN) == self.model
        self._client.disconnect()


def run(folder: Path, seed: int, seconds: float) -> int:
    """Sessions for some time; returns how many. The server is watched by ``serving``."""
    rng = random.Random(seed)
    base = make_raw(folder / "base.raw", rng.randbytes(SIZE))
    disk = make_overlay(folder, base, cluster_size="64k")
    before = Path(base).read_bytes()
    count = 0
    with serving(disk, folder / "s") as served:
        good = Good(served.path, rng)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            session(random.Random(f"{seed} {count}"), served.path)
            count += 1
            if count % 4 == 0:
                good.work()
        good.end()
        waited = time.monotonic() + 10
        while served.server.connections and time.monotonic() < waited:
            time.sleep(0.01)
    assert Path(base).read_bytes() == before
    return count


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        count = run(Path(folder), arguments.seed, arguments.seconds)
    print(f"{count} sessions, nothing found")


if __name__ == "__main__":
    main()
