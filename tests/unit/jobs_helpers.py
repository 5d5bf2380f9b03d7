# SPDX-License-Identifier: MIT
"""What the job tests share: chains over real files with a bytearray beside each layer."""

from __future__ import annotations

import os
import random
import shutil

import mmcow

KIB, MIB = 1 << 10, 1 << 20


class Stop(Exception):
    """Raised by a progress callback."""


def stop_at(number):
    """A progress callback that raises at its call ``number`` (from 0); ``.calls`` counts."""

    def progress(done, total):
        assert 0 <= done <= total
        progress.seen.append((done, total))
        if len(progress.seen) - 1 == number:
            raise Stop

    progress.seen = []
    return progress


def scribble(rng, disk, model, count, most=200 * KIB):
    """Write ``count`` random things, zeros among them, to ``disk`` and ``model``."""
    for _ in range(count):
        length = rng.choice((512, 4096, rng.randrange(1, 64 * KIB), rng.randrange(1, most)))
        length = min(length, len(model))
        offset = rng.randrange(0, len(model) - length + 1)
        what = rng.random()
        if what < 0.2:
            disk.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
            continue
        data = bytes(length) if what < 0.3 else rng.randbytes(length)
        disk.write(offset, data)
        model[offset : offset + length] = data


def fitted(model, size):
    """What an overlay of ``size`` shows of a base."""
    return bytearray(model[:size]) + bytes(max(size - len(model), 0))


class Chain:
    """Layers made from a seed. ``layers``: (format, size, options), the base first.

    ``paths`` and ``models`` are in the same order; ``models[n]`` is what layer n shows.
    """

    def __init__(self, directory, layers, seed, writes=12):
        print("seed", seed)
        rng = random.Random(seed)
        self.directory = str(directory)
        self.formats = [layer[0] for layer in layers]
        self.names = []
        self.models = []
        os.makedirs(self.directory, exist_ok=True)
        for number, (format_, size, options) in enumerate(layers):
            name = f"{number}.{format_}"
            path = os.path.join(self.directory, name)
            under = self.models[-1] if self.models else b""
            if number == 0 and format_ == "raw":
                with open(path, "wb") as file:
                    file.truncate(size)
            else:
                mmcow.create(
                    path,
                    format=format_,
                    size=size,
                    backing=self.names[-1] if self.names else None,
                    backing_format=self.formats[number - 1] if self.names else None,
                    options=options,
                )
            model = fitted(under, -(-size // 512) * 512)
            self.names.append(name)
            self.models.append(model)
            with self.open(number, write=True) as disk:
                assert disk.size == len(model)
                scribble(rng, disk, model, writes)
                # A magic of another format must not appear by chance.
                disk.write(0, b"\1")
                model[0] = 1

    def path(self, number):
        return os.path.join(self.directory, self.names[number])

    @property
    def top(self):
        return self.path(-1)

    def open(self, number=-1, **options):
        number %= len(self.names)
        if number and self.formats[number] == "cow":
            options.setdefault("backing_format", self.formats[number - 1])
        return mmcow.open(self.path(number), format=self.formats[number], **options)

    def copy(self, directory):
        """The same chain elsewhere; names inside are relative."""
        shutil.copytree(self.directory, directory)
        other = object.__new__(Chain)
        other.__dict__.update(self.__dict__)
        other.directory = str(directory)
        other.models = [bytearray(model) for model in self.models]
        return other


def content_of(path, **options):
    with mmcow.open(path, **options) as disk:
        return disk.read(0, disk.size)


def first_difference(one, other):
    """Where two byte strings differ, for messages; None if they do not."""
    if one == other:
        return None
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def check_content(chain, number, model):
    with chain.open(number) as disk:
        found = disk.read(0, disk.size)
    assert len(found) == len(model)
    assert first_difference(found, bytes(model)) is None
