# SPDX-License-Identifier: MIT
"""The negotiation, against doc/proto.md, by a client that shares no code with the server."""

from __future__ import annotations

import random
import re
import struct

import pytest

from mmcow.errors import UsageError
from mmcow.nbd import connection
from mmcow.nbd import protocol as wire
from mmcow.nbd.handshake import (
    OPTIONS_MOST,
    OPTIONS_OF_EXPORT,
    REFUSALS_MOST,
    Handshake,
    Step,
)
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import Client
from tests.unit.nbd_serving import MIB, make_raw, serving


@pytest.fixture
def path(tmp_path):
    image = make_raw(tmp_path / "disk.raw", random.Random(3).randbytes(MIB))
    with serving(image, tmp_path / "s") as served:
        yield served.path


@pytest.fixture
def several(tmp_path):
    images = {name: make_raw(tmp_path / f"{name}.raw", bytes(MIB)) for name in ("one", "two")}
    with serving(images, tmp_path / "s") as served:
        yield served.path


def errors_then_goes_on(client, option, data, error):
    """The option is refused with that error and the negotiation still works."""
    ((kind, _),) = client.option(option, data)
    assert kind == error
    client.negotiate_structured()
    client.go()
    assert len(client.read(0, 512)) == 512


class TestGreeting:
    def test_unknown_client_flags_end_the_session(self, path):
        with Client(path, flags=4 | 3) as client:
            assert client.at_end()

    def test_plain_newstyle_may_only_name_its_export(self, path):
        with Client(path, flags=0) as client:
            client.export_name()
            assert client.size == MIB
            assert len(client.read(0, 512)) == 512
        with Client(path, flags=0) as client:
            client.send_option(nbd.LIST)
            assert client.at_end()

    @pytest.mark.parametrize("flags", [1, 3])
    def test_export_name_and_its_zeroes(self, path, flags):
        with Client(path, flags=flags) as client:
            client.export_name()
            assert client.size == MIB
            assert client.flags & 1
            assert not client.flags & 1 << 7  # DF only with structured replies
            assert len(client.read(512, 512)) == 512

    def test_export_name_after_structured_replies(self, path):
        with Client(path) as client:
            client.negotiate_structured()
            client.export_name()
            assert client.flags & 1 << 7
            assert client.ask(nbd.READ, 0, 512).kinds == [1]

    @pytest.mark.parametrize("name", [b"nobody", b"\xff\xfe", b"x" * 5000, b"a\0b"])
    def test_export_name_of_nothing_ends_the_session(self, path, name):
        with Client(path) as client:
            client.send_option(nbd.EXPORT_NAME, name)
            assert client.at_end()

    def test_wrong_option_magic(self, path):
        with Client(path) as client:
            client.send(b"IHAVEOPX" + bytes(8))
            assert client.at_end()

    def test_an_option_larger_than_any_ends_the_session(self, path):
        with Client(path) as client:
            client.send(struct.pack(">8sII", nbd.IHAVEOPT, nbd.GO, 0xFFFFFFFF))
            assert client.at_end()


class TestOptions:
    def test_unknown_ones(self, path):
        for option in (4, 11, 0, 0xFFFFFFFF):
            with Client(path) as client:
                errors_then_goes_on(client, option, b"data", nbd.ERR_UNSUP)

    def test_abort(self, path):
        for data in (b"", b"ignored"):
            with Client(path) as client:
                assert client.option(nbd.ABORT, data) == [(nbd.ACK, b"")]
                assert client.at_end()

    def test_list(self, several):
        with Client(several) as client:
            replies = client.option(nbd.LIST)
            assert replies == [
                (nbd.SERVER, nbd.string("one")),
                (nbd.SERVER, nbd.string("two")),
                (nbd.ACK, b""),
            ]
            ((kind, _),) = client.option(nbd.LIST, b"x")
            assert kind == nbd.ERR_INVALID

    def test_starttls_without_a_certificate(self, path):
        with Client(path) as client:
            errors_then_goes_on(client, nbd.STARTTLS, b"", nbd.ERR_POLICY)

    def test_structured_reply_takes_no_data(self, path):
        with Client(path) as client:
            errors_then_goes_on(client, nbd.STRUCTURED_REPLY, b"x", nbd.ERR_INVALID)

    def test_many_at_once_in_pieces(self, path):
        with Client(path) as client:
            option = struct.pack(">8sII", nbd.IHAVEOPT, nbd.LIST, 0)
            for byte in option * 3:
                client.send(bytes([byte]))
            client.send(option * 50)
            for _ in range(53):
                assert client.receive_option_reply(nbd.LIST)[0] == nbd.SERVER
                assert client.receive_option_reply(nbd.LIST)[0] == nbd.ACK


class TestInfoAndGo:
    def test_what_they_tell(self, path):
        with Client(path) as client:
            client.negotiate_structured()
            info = client.info(nbd.INFO, "", 0, 1, 2, 3, 77)
            assert info[1] == b""
            least, preferred, most = struct.unpack(">III", info[3])
            assert (least, most) == (1, 32 * MIB)
            assert preferred >= 512 and preferred & (preferred - 1) == 0
            assert client.info(nbd.GO, "", 0, 1, 2, 3, 77) == info
            assert client.read(0, 1)

    def test_both_go_on_after_an_error(self, path):
        for option in (nbd.INFO, nbd.GO):
            with Client(path) as client:
                with pytest.raises(nbd.NbdError) as caught:
                    client.info(option, "nobody")
                assert caught.value.number == nbd.ERR_UNKNOWN
                client.go()
                assert client.read(0, 1)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0\0\0",
            struct.pack(">I", 5) + b"abc",
            nbd.string(""),
            nbd.string("") + b"\0",
            nbd.string("") + struct.pack(">H", 2) + bytes(2),
            nbd.string("") + struct.pack(">H", 0) + bytes(2),
            struct.pack(">IH", 0xFFFFFFFF, 0),
            struct.pack(">I", 2) + b"\xff\xff" + bytes(2),
            nbd.string("a\0b") + bytes(2),
        ],
    )
    def test_malformed(self, path, data):
        for option in (nbd.INFO, nbd.GO):
            with Client(path) as client:
                ((kind, _),) = client.option(option, data)
                assert kind in (nbd.ERR_INVALID, nbd.ERR_TOO_BIG)
                client.go()
                assert client.read(0, 1)

    def test_an_error_text_is_never_longer_than_a_string_may_be(self, path):
        with Client(path) as client, pytest.raises(nbd.NbdError):
            client.info(nbd.INFO, "\x01" * 4096)  # each is four characters when quoted

    def test_several_exports(self, several):
        with Client(several) as client:
            with pytest.raises(nbd.NbdError):
                client.info(nbd.INFO, "")  # there is no default
            assert client.info(nbd.INFO, "two", 1)[1] == b"two"
            client.go("one")

    def test_a_single_export_with_a_name_is_the_default(self, tmp_path):
        image = make_raw(tmp_path / "disk.raw", bytes(MIB))
        with serving({"vm disk": image}, tmp_path / "s") as served:
            assert "/vm%20disk?" in served.uri
            with Client(served.path) as client:
                assert client.info(nbd.INFO, "", 1)[1] == b"vm disk"
            with nbd.connect(served.path) as client:  # its contexts were asked for as ""
                assert client.ask(nbd.BLOCK_STATUS, 0, 512).status
            with nbd.connect(served.path, "vm disk") as client:
                assert client.ask(nbd.BLOCK_STATUS, 0, 512).status


class TestMetaContexts:
    def names(self, replies):
        assert replies[-1] == (nbd.ACK, b"")
        return [data[4:].decode() for _, data in replies[:-1]]

    def test_list(self, path):
        both = ["base:allocation", "qemu:allocation-depth"]
        with Client(path) as client:
            client.negotiate_structured()
            for queries, expected in [
                ((), both),
                (("base:",), both[:1]),
                (("qemu:",), both[1:]),
                (("base:allocation",), both[:1]),
                (("base:", "qemu:allocation-depth"), both),
                (("base:other", "x-unknown:", "base:allocation2"), []),
                (("base:allocation", "base:allocation"), both[:1]),
            ]:
                replies = client.meta(nbd.LIST_META_CONTEXT, "", *queries)
                assert self.names(replies) == expected
                assert all(data[:4] == bytes(4) for _, data in replies[:-1])

    def test_set(self, path):
        with Client(path) as client:
            client.negotiate_structured()
            for queries, expected in [
                ((), []),
                (("base:",), []),  # no wildcard here
                (("qemu:", "x-unknown:y"), []),
                (("base:allocation", "base:allocation"), ["base:allocation"]),
                (("qemu:allocation-depth",), ["qemu:allocation-depth"]),
            ]:
                client.set_contexts("", *queries)
                assert list(client.contexts.values()) == expected

    def test_need_structured_replies(self, path):
        for option in (nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT):
            with Client(path) as client:
                replies = client.meta(option, "", "base:allocation")
                assert [kind for kind, _ in replies] == [nbd.ERR_INVALID]

    def test_of_an_unknown_export(self, path):
        with Client(path) as client:
            client.negotiate_structured()
            for option in (nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT):
                replies = client.meta(option, "nobody", "base:allocation")
                assert [kind for kind, _ in replies] == [nbd.ERR_UNKNOWN]

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            nbd.string(""),
            nbd.string("") + struct.pack(">I", 1),
            nbd.string("") + struct.pack(">I", 0xFFFFFFFF) + nbd.string("base:"),
            nbd.string("") + struct.pack(">II", 1, 0xFFFFFFFF),
            nbd.string("") + struct.pack(">II", 1, 9) + b"short",
            nbd.string("") + struct.pack(">I", 0) + b"rest",
        ],
    )
    def test_malformed_and_a_set_that_fails_deselects(self, path, data):
        with Client(path) as client:
            client.negotiate_structured()
            client.set_contexts("", "base:allocation")
            ((kind, _),) = client.option(nbd.SET_META_CONTEXT, data)
            assert kind in (nbd.ERR_INVALID, nbd.ERR_TOO_BIG)
            client.go()
            assert client.error_of(nbd.BLOCK_STATUS, 0, 512) == 22

    def test_hold_for_the_export_they_were_asked_for_only(self, several):
        with Client(several) as client:
            client.negotiate_structured()
            client.set_contexts("one", "base:allocation")
            client.go("two")
            assert client.error_of(nbd.BLOCK_STATUS, 0, 512) == 22

    def test_the_last_set_counts(self, path):
        with Client(path) as client:
            client.negotiate_structured()
            client.set_contexts("", "base:allocation")
            client.set_contexts("", "qemu:allocation-depth")
            client.info(nbd.INFO, "")
            client.go()
            assert list(client.ask(nbd.BLOCK_STATUS, 0, 512).status) == list(client.contexts)


class TestBeforeTls:
    """What a server with a certificate answers in clear; the encrypted part is an interop test."""

    def replies(self, *options, flags=3):
        handshake = Handshake({}, tls_required=True)
        handshake.take_output()
        step = handshake.feed(struct.pack(">I", flags))
        for option, data in options:
            step = handshake.feed(struct.pack(">8sII", nbd.IHAVEOPT, option, len(data)) + data)
        return step, handshake.take_output()

    def test_nothing_is_told(self):
        for option in (nbd.LIST, nbd.INFO, nbd.GO, nbd.STRUCTURED_REPLY, 9, 10, 4, 99):
            step, out = self.replies((option, b"junk"))
            assert step is Step.MORE
            assert struct.unpack_from(">II", out, 8) == (option, nbd.ERR_TLS_REQD)

    def test_export_name_ends_the_session(self):
        assert self.replies((nbd.EXPORT_NAME, b"")) == (Step.CLOSE, b"")

    def test_abort_and_starttls(self):
        assert self.replies((nbd.ABORT, b""))[0] is Step.CLOSE
        assert self.replies((nbd.STARTTLS, b"x"))[0] is Step.MORE
        assert self.replies((nbd.STARTTLS, b""))[0] is Step.TLS

    def test_nothing_may_be_slipped_in_behind_starttls(self):
        handshake = Handshake({}, tls_required=True)
        handshake.feed(struct.pack(">I", 3))
        tls = struct.pack(">8sII", nbd.IHAVEOPT, nbd.STARTTLS, 0)
        with pytest.raises(wire.ProtocolError):
            handshake.feed(tls + struct.pack(">8sII", nbd.IHAVEOPT, nbd.LIST, 0))

    def test_all_is_forgotten_when_it_is_up(self):
        handshake = Handshake({}, tls_required=False)
        handshake.structured, handshake.contexts = True, [(0, "base:allocation")]
        handshake.encrypted()
        assert (handshake.structured, handshake.contexts) == (False, [])


class TestStopping:
    """What a server that ends answers to who negotiates."""

    def stopping(self, *, tls=False):
        handshake = Handshake({}, tls_required=tls)
        handshake.feed(struct.pack(">I", 3))
        handshake.take_output()
        return handshake

    @staticmethod
    def option(number, data=b""):
        return struct.pack(">8sII", nbd.IHAVEOPT, number, len(data)) + data

    @pytest.mark.parametrize("tls", [False, True])
    def test_every_option_but_abort_is_refused(self, tls):
        handshake = self.stopping(tls=tls)
        handshake.refuse()
        for number in (nbd.LIST, nbd.STARTTLS, nbd.INFO, nbd.GO, nbd.SET_META_CONTEXT, 77):
            assert handshake.feed(self.option(number, b"junk")) is Step.MORE
            head = struct.unpack_from(">QII", handshake.take_output())
            assert head == (0x3E889045565A9, number, nbd.ERR_SHUTDOWN)
        assert handshake.feed(self.option(nbd.ABORT)) is Step.CLOSE
        assert struct.unpack_from(">II", handshake.take_output(), 8) == (nbd.ABORT, nbd.ACK)

    def test_who_asks_on_and_on_is_left(self):
        handshake = self.stopping()
        handshake.refuse()
        assert handshake.feed(self.option(nbd.LIST) * 20000) is Step.CLOSE
        answers = handshake.take_output()
        assert answers.count(struct.pack(">II", nbd.LIST, nbd.ERR_SHUTDOWN)) == REFUSALS_MOST

    def test_the_option_that_is_coming_is_refused_when_it_is_there(self):
        handshake = self.stopping()
        whole = self.option(nbd.GO, bytes(6))
        assert handshake.feed(whole[:19]) is Step.MORE
        handshake.refuse()
        assert handshake.take_output() == b""
        assert handshake.feed(whole[19:]) is Step.MORE
        assert struct.unpack_from(">II", handshake.take_output(), 8) == (nbd.GO, nbd.ERR_SHUTDOWN)

    def test_export_name_has_no_answer(self):
        handshake = self.stopping()
        handshake.refuse()
        assert handshake.feed(self.option(nbd.EXPORT_NAME)) is Step.CLOSE
        assert handshake.take_output() == b""


def test_as_many_options_as_any_client_needs(several, caplog):
    """Who sends one more is dropped, and the log says why."""
    most = OPTIONS_MOST + 2 * OPTIONS_OF_EXPORT
    with Client(several) as patient, Client(several) as endless:
        for client in (patient, endless):
            for _ in range(most - 2):
                assert client.option(nbd.STARTTLS)[0][0] == nbd.ERR_POLICY
        patient.negotiate_structured()
        patient.go("one")
        assert patient.read(0, 512) == bytes(512)
        for _ in range(2):
            assert endless.option(nbd.LIST)[-1] == (nbd.ACK, b"")
        assert not caplog.records
        endless.send_option(nbd.GO, nbd.string("one") + bytes(2))
        assert endless.at_end()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert re.fullmatch(rf"client dropped \(pid \d+, uid \d+\): more than {most} options", lines[0])


def test_a_negotiation_that_does_not_end(path, monkeypatch):
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.2)
    for said in (b"", struct.pack(">I", 3), struct.pack(">I", 3) + nbd.IHAVEOPT):
        with Client(path, greet=False, timeout=10) as client:
            client.send(said)
            assert len(client.receive(18)) == 18
            assert client.at_end()
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.5)
    with nbd.connect(path) as client:  # who has finished it may be silent for any time
        client.socket.settimeout(1)
        with pytest.raises(TimeoutError):
            client.receive(1)
        assert client.read(0, 1)


@pytest.mark.parametrize("name", ["\udcff.raw", "x" * 4097, "a\0b"])
def test_names_that_no_client_could_ask_for(tmp_path, name):
    image = make_raw(tmp_path / "disk.raw", bytes(MIB))
    with pytest.raises(UsageError):
        serving({name: image}, tmp_path / "s").__enter__()
