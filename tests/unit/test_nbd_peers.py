# SPDX-License-Identifier: MIT
"""Who a client is in the log, and that strangers cannot fill it."""

from __future__ import annotations

import logging
import socket
import struct

import pytest

from mmcow.nbd import peers
from mmcow.nbd.peers import Sparing, Told, peer_of


class Transport:
    """Knows what it is given."""

    def __init__(self, **known):
        self._known = known

    def get_extra_info(self, name):
        return self._known.get(name)


class Unix:
    """A Unix socket whose peer is anybody."""

    family = socket.AF_UNIX

    def __init__(self, pid, uid):
        self._told = struct.pack("iII", pid, uid, 7)

    def getsockopt(self, level, name, length):
        assert (level, name, length) == (socket.SOL_SOCKET, socket.SO_PEERCRED, len(self._told))
        return self._told


class Silent(Unix):
    def getsockopt(self, *_):
        raise OSError


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ({"socket": Unix(71, 0), "peername": ""}, " (pid 71, uid 0)"),
        ({"socket": Unix(71, 0xFFFFFFFE)}, " (pid 71, uid 4294967294)"),
        ({"socket": Unix(0, 65534)}, " (uid 65534)"),  # of another pid namespace
        ({"socket": Silent(1, 1), "peername": ""}, ""),
        ({"peername": ("192.0.2.1", 50112)}, " (192.0.2.1:50112)"),
        ({"peername": ("fe80::1%eth0", 10809, 0, 2)}, " ([fe80::1%eth0]:10809)"),
        ({"peername": None}, ""),
        ({}, ""),
    ],
)
def test_peer_of(known, text):
    assert peer_of(Transport(**known)) == text


def test_lines_are_bounded_and_none_is_lost(caplog):
    """A client every tenth of a second for a quarter of an hour."""
    now = 0.0
    sparing = Sparing(lambda: now)
    for number in range(9000):
        sparing.tell(f"client {number} refused")
        now = (number + 1) / 10
    spans = 900 / peers.LINES_SECONDS
    lines = [record.message for record in caplog.records]
    assert peers.LINES_MOST < len(lines) <= spans * peers.LINES_MOST
    assert lines[: peers.LINES_MOST] == [
        f"client {number} refused" for number in range(peers.LINES_MOST)
    ]
    sparing.rest()
    sparing.rest()
    left = [record.message for record in caplog.records][len(lines) :]
    assert len(left) == 1
    counted = len(lines) + int(left[0].split()[0])
    counted += sum(int(line.split("(and ")[1].split()[0]) for line in lines if "(and " in line)
    assert counted == 9000


def test_nothing_is_said_of_nobody(caplog):
    sparing = Sparing(lambda: 0.0)
    sparing.tell("one")
    sparing.rest()
    assert [record.message for record in caplog.records] == ["one"]


def test_ordinary_use_loses_no_line(caplog):
    """For ten minutes: nbdcopy with 16 connections every four seconds, while 40 machines start."""
    caplog.set_level(logging.INFO, "mmcow.nbd")
    now = 0.0
    told = Told(lambda: now)
    said = [f"machine {number} attached" for number in range(40)]
    said += [f"copy {copy} attached {number}" for copy in range(150) for number in range(16)]
    for number, line in enumerate(said):
        now = max(0.0, (number - 40) / 4)
        told.attached.tell(line)
    told.rest()
    assert [record.message for record in caplog.records] == said
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_each_kind_has_its_own_bound(caplog):
    caplog.set_level(logging.INFO, "mmcow.nbd")
    told = Told(lambda: 0.0)
    for _ in range(9000):
        told.attached.tell("attached")
        told.turned_away.tell("refused")
    told.dropped.tell("a client that was served")
    told.rest()
    lines = [record.message for record in caplog.records]
    assert lines.count("attached") == peers.SERVED_LINES_MOST
    assert lines.count("refused") == peers.LINES_MOST
    assert lines[-3:] == [
        "a client that was served",
        f"{9000 - peers.SERVED_LINES_MOST} more clients attached",
        f"{9000 - peers.LINES_MOST} more clients were refused or dropped",
    ]
