# SPDX-License-Identifier: MIT
"""The transmission phase, against doc/proto.md and against a bytearray."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time

import pytest

import mmcow
from mmcow.errors import StorageError, SyncFailed
from mmcow.nbd import connection, export
from mmcow.nbd import protocol as wire
from mmcow.tasks import Completion
from tests.unit import nbd_client as nbd
from tests.unit.nbd_client import Client, connect
from tests.unit.nbd_serving import KIB, MIB, make_overlay, make_raw, serving

pytestmark = pytest.mark.usefixtures("way")

SIZE = 4 * MIB
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95


@pytest.fixture
def model():
    """The base has data in its first half and is shorter than the disk."""
    return bytearray(random.Random(1).randbytes(2 * MIB) + bytes(2 * MIB))


@pytest.fixture
def served(tmp_path, model):
    base = make_raw(tmp_path / "base.raw", bytes(model[: 2 * MIB]))
    top = make_overlay(tmp_path, base, SIZE, cluster_size="64k")
    with serving(top, tmp_path / "s") as served:
        yield served


@pytest.fixture
def unhit(tmp_path, model):
    """The same, but every request goes the engine's own way, where errors can be put in."""
    base = make_raw(tmp_path / "base.raw", bytes(model[: 2 * MIB]))
    top = make_overlay(tmp_path, base, SIZE, cluster_size="64k")
    with serving(top, tmp_path / "s", hits=False) as served:
        yield served


@pytest.fixture
def client(served):
    with connect(served.path) as client:
        yield client


class TestRead:
    @pytest.mark.parametrize("structured", [True, False])
    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 512), (0, SIZE), (1, 1), (511, 2), (SIZE - 1, 1), (2 * MIB - 5, 10), (3 * MIB, 65536)],
    )
    def test_any_range(self, served, model, structured, offset, length):
        with connect(served.path, structured=structured) as client:
            assert client.read(offset, length) == model[offset : offset + length]

    def test_holes_are_told_not_sent(self, client):
        assert client.ask(nbd.READ, 3 * MIB, 64 * KIB).kinds == [2]
        assert client.ask(nbd.READ, 3 * MIB, 64 * KIB, flags=nbd.DF).kinds == [2]
        reply = client.ask(nbd.READ, 2 * MIB - 64 * KIB, 128 * KIB, flags=nbd.DF)
        assert reply.kinds == [1]
        client.write(3 * MIB + 300 * KIB, b"y" * 65536)  # a hole at first, then data
        expected = bytes(300 * KIB) + b"y" * 65536
        assert client.read(3 * MIB, len(expected)) == expected
        client.write(3 * MIB + 4096, b"x")
        assert client.ask(nbd.READ, 3 * MIB, 64 * KIB).kinds == [1]

    def test_of_nothing(self, served, client):
        assert client.read(0, 0) == b""
        assert client.read(SIZE, 0) == b""
        with connect(served.path, structured=False) as plain:
            assert plain.read(0, 0) == b""

    def test_df_needs_structured_replies(self, served):
        with connect(served.path, structured=False) as client:
            assert client.error_of(nbd.READ, 0, 512, flags=nbd.DF) == EINVAL

    def test_the_greatest_and_one_more(self, tmp_path):
        content = random.Random(2).randbytes(33 * MIB)
        with serving(make_raw(tmp_path / "big", content), tmp_path / "b") as served:
            for structured in (True, False):
                with connect(served.path, structured=structured) as client:
                    assert client.read(5, 32 * MIB) == content[5 : 5 + 32 * MIB]
                    assert client.error_of(nbd.READ, 0, 32 * MIB + 1) == EINVAL
                    client.write(7, content[: 32 * MIB])
                    assert client.read(0, 9) == content[:7] + content[:2]
                    client.write(0, content[:MIB])
                    client.write(MIB, content[MIB : 32 * MIB])
                    client.write(32 * MIB, content[32 * MIB :])


class TestRangesAndFlags:
    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (SIZE, 1),
            (SIZE - 1, 2),
            ((1 << 64) - 1, 1),
            ((1 << 64) - 1, 0),
            ((1 << 63) - 1, 4096),
            (0, 0xFFFFFFFF),
            ((1 << 64) - 512, 512),
        ],
    )
    def test_beyond_the_end(self, client, model, offset, length):
        for command, expected in [
            (nbd.READ, EINVAL),
            (nbd.TRIM, EINVAL),
            (nbd.CACHE, EINVAL),
            (nbd.BLOCK_STATUS, EINVAL),
            (nbd.WRITE_ZEROES, ENOSPC),
        ]:
            assert client.error_of(command, offset, length) == expected
        if length <= 4096:
            assert client.error_of(nbd.WRITE, offset, data=b"z" * length) == ENOSPC
        assert client.read(0, SIZE) == model

    def test_flags_that_do_not_go_with_the_command(self, client, model):
        known = {
            nbd.READ: nbd.DF,
            nbd.WRITE: 0,
            nbd.FLUSH: 0,
            nbd.TRIM: 0,
            nbd.CACHE: 0,
            nbd.WRITE_ZEROES: nbd.NO_HOLE | nbd.FAST_ZERO,
            nbd.BLOCK_STATUS: nbd.REQ_ONE,
        }
        for command, good in known.items():
            for bit in range(1, 16):
                if not good & 1 << bit:
                    data = b"z" * 512 if command == nbd.WRITE else b""
                    length = 0 if command in (nbd.WRITE, nbd.FLUSH) else 512
                    error = client.error_of(command, 0, length, flags=1 << bit, data=data)
                    assert error == EINVAL, (command, bit)
        assert client.read(0, SIZE) == model

    def test_fua_goes_with_every_command(self, client, model):
        assert client.flags & 1 << 3
        assert client.read(0, 512, nbd.FUA) == model[:512]
        for command in (nbd.FLUSH, nbd.CACHE, nbd.TRIM):
            client.ask(command, flags=nbd.FUA)
        assert client.ask(nbd.BLOCK_STATUS, 0, 512, flags=nbd.FUA).status

    def test_unknown_commands(self, client, model):
        for command in (8, 9, 100, 0xFFFF):
            assert client.error_of(command, 0, 4096) == EINVAL
        assert client.read(0, 512) == model[:512]

    def test_flush_takes_no_range(self, client):
        assert client.error_of(nbd.FLUSH, 512, 0) == EINVAL
        assert client.error_of(nbd.FLUSH, 0, 512) == EINVAL
        client.flush()

    def test_of_nothing(self, client, model):
        for command in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE):
            client.ask(command, 4096, 0)
            client.ask(command, SIZE, 0)
        assert client.error_of(nbd.BLOCK_STATUS, 0, 0) == EINVAL
        assert client.read(0, SIZE) == model

    def test_a_wrong_magic_ends_the_session(self, served, client):
        client.send(bytes(28))
        assert client.at_end()
        with connect(served.path) as another:
            another.flush()

    def test_a_write_larger_than_any_is_refused_and_passed_over(self, tmp_path):
        length = 32 * MIB + 1
        big = make_raw(tmp_path / "big.raw", b"b" * 4096)
        os.truncate(big, 2 * length)
        with serving(big, tmp_path / "b") as served, connect(served.path) as client:
            piece = b"z" * (1 << 20)
            client.sent[1] = nbd.Sent(nbd.WRITE, 0, 0, length)
            client.send(nbd.request(nbd.WRITE, 1, 0, length))
            for sent in range(0, length, len(piece)):
                client.send(piece[: length - sent])
            cookie, reply = client.next_reply()
            assert (cookie, reply.error) == (1, EINVAL)
            assert str(length) in reply.text
            assert served.server.memory.used == 0
            client.write(4096, b"next")
            assert client.read(0, 4100) == b"b" * 4096 + b"next"


class TestChanges:
    def test_write_any_range(self, client, model):
        rng = random.Random(4)
        for offset, length in [(0, 1), (511, 2), (65535, 3), (100, 200000), (SIZE - 7, 7)]:
            data = rng.randbytes(length)
            client.write(offset, data, rng.choice((0, nbd.FUA)))
            model[offset : offset + length] = data
        assert client.read(0, SIZE) == model

    @pytest.mark.parametrize("flags", [0, nbd.FUA, nbd.NO_HOLE, nbd.NO_HOLE | nbd.FUA])
    def test_write_zeroes(self, client, model, flags):
        for offset, length in [(0, 1), (100, 130000), (MIB, MIB + 5), (3 * MIB + 1, 4096)]:
            client.ask(nbd.WRITE_ZEROES, offset, length, flags=flags)
            model[offset : offset + length] = bytes(length)
        assert client.read(0, SIZE) == model

    def test_fast_zero(self, served, client, model):
        client.ask(nbd.WRITE_ZEROES, 0, MIB, flags=nbd.FAST_ZERO)
        assert client.read(0, MIB) == bytes(MIB)
        served.engine().zeroes_fast = lambda _: False
        assert client.error_of(nbd.WRITE_ZEROES, MIB, MIB, flags=nbd.FAST_ZERO) == ENOTSUP
        assert client.read(MIB, MIB) == model[MIB : 2 * MIB]
        client.ask(nbd.WRITE_ZEROES, MIB, MIB)  # without the flag it is done
        assert client.read(MIB, MIB) == bytes(MIB)
        assert served.server.exports[""].counters.errors == 0

    def test_trim_is_zeros_or_what_was_there(self, client, model):
        client.write(MIB, b"x" * 4096)
        client.ask(nbd.TRIM, 0, SIZE, flags=nbd.FUA)
        model[MIB : MIB + 4096] = b"x" * 4096
        after = client.read(0, SIZE)
        for at in range(0, SIZE, 4096):
            assert after[at : at + 4096] in (bytes(4096), model[at : at + 4096])

    def test_cache_changes_nothing(self, client, model):
        client.ask(nbd.CACHE, 0, SIZE)
        assert client.read(0, SIZE) == model


class TestBlockStatus:
    def status(self, client, offset, length, flags=0):
        reply = client.ask(nbd.BLOCK_STATUS, offset, length, flags=flags)
        return [reply.status[number] for number in sorted(client.contexts)]

    def test_both_contexts(self, client):
        client.write(MIB, b"x" * 65536)
        base, depth = self.status(client, 0, SIZE)
        assert base == [(2 * MIB, 0), (2 * MIB, 3)]
        assert depth == [
            (MIB, 2), (65536, 1), (MIB - 65536, 2), (2 * MIB, 0),
        ]  # fmt: skip

    def test_req_one(self, client):
        assert self.status(client, MIB, 2 * MIB, nbd.REQ_ONE) == [[(MIB, 0)], [(MIB, 2)]]
        assert self.status(client, 0, 512, nbd.REQ_ONE) == [[(512, 0)], [(512, 2)]]

    def test_unaligned(self, client):
        assert self.status(client, 2 * MIB - 3, 10) == [[(3, 0), (7, 3)], [(3, 2), (7, 0)]]

    def test_one_context(self, served):
        for name in ("base:allocation", "qemu:allocation-depth"):
            with Client(served.path) as client:
                client.negotiate_structured()
                client.set_contexts("", name)
                client.go()
                assert len(client.ask(nbd.BLOCK_STATUS, 0, SIZE).status) == 1

    def test_without_contexts(self, served):
        for structured in (True, False):
            with connect(served.path, structured=structured, contexts=False) as client:
                assert client.error_of(nbd.BLOCK_STATUS, 0, 512) == EINVAL
                assert client.read(0, 1)

    def test_a_fragmented_disk_is_told_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(export, "EXTENTS_MOST", 100)
        top = make_overlay(tmp_path, make_raw(tmp_path / "b", bytes(SIZE)), cluster_size="4k")
        with mmcow.open(top, write=True) as disk:
            for at in range(0, SIZE, 8192):
                disk.write(at, b"x" * 4096)
        with serving(top, tmp_path / "fragmented") as served, connect(served.path) as client:
            at, seen = 0, []
            while at < SIZE:
                _, depth = self.status(client, at, SIZE - at)
                assert len(depth) <= 100
                at += sum(length for length, _ in depth)
                seen += depth
            assert all(length == 4096 for length, _ in seen)
            assert [flags for _, flags in seen] == [1, 2] * (SIZE // 8192)


def test_out_of_order_replies_find_their_requests(served, model):
    """Many connections, deep queues, one disk: each client writes its own part, reads everybody's
    that nobody writes, and all is as in the model at the end."""
    clients, part = 8, MIB // 8
    failures = []

    def work(number):
        try:
            rng = random.Random(number)
            start = MIB + number * part
            with connect(served.path, structured=number % 2 == 0) as client:
                pending = {}
                for _ in range(300):
                    if len(pending) >= 32 or (pending and rng.random() < 0.3):
                        cookie, reply = client.next_reply()
                        assert not reply.error
                        expected = pending.pop(cookie)
                        assert expected is None or reply.data == expected
                    if rng.random() < 0.5:
                        length = rng.choice((512, 4096, rng.randrange(1, 20000)))
                        offset = rng.randrange(MIB - length)
                        cookie = client.start(nbd.READ, offset, length)
                        pending[cookie] = model[offset : offset + length]
                    elif not any(e is None for e in pending.values()):
                        length = rng.choice((512, 4096, rng.randrange(1, part)))
                        offset = start + rng.randrange(part - length + 1)
                        data = rng.randbytes(length)
                        cookie = client.start(nbd.WRITE, offset, data=data)
                        model[offset : offset + length] = data
                        pending[cookie] = None
                while pending:
                    cookie, reply = client.next_reply()
                    assert not reply.error
                    expected = pending.pop(cookie)
                    assert expected is None or reply.data == expected
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with connect(served.path) as client:
        assert client.read(0, SIZE) == model


class TestFlush:
    def test_covers_what_other_connections_wrote(self, tmp_path, served):
        """What is flushed is in the files, bits and all, while the server has them open."""
        with connect(served.path) as one, connect(served.path) as other:
            assert one.flags & 1 << 8
            one.write(3 * MIB, b"w" * 65536)
            synced = []
            data = served.engine().top.data
            sync = data.sync
            data.sync = lambda: synced.append(1) or sync()
            other.flush()
            assert synced
            with mmcow.open(str(tmp_path / "top.acow"), share=True) as disk:
                assert disk.read(3 * MIB, 65536) == b"w" * 65536

    def test_fua_is_durable_when_answered_and_waits_for_the_write(self, served):
        engine = served.engine()
        order = []
        write, sync = engine.top.data.write, engine.top.data.sync

        def slow_write(*arguments):
            completion = write(*arguments)
            completion.on_done(lambda _: order.append("written"))
            return completion

        engine.top.data.write = slow_write
        engine.top.data.sync = lambda: order.append("sync") or sync()
        with connect(served.path) as client:
            for command in (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM):
                order.clear()
                data = b"f" * 65536 if command == nbd.WRITE else b""
                client.ask(command, MIB, 0 if data else 65536, flags=nbd.FUA, data=data)
                assert order[-1] == "sync"
                assert order.count("sync") == 1
                order.clear()
                client.ask(command, MIB, 0 if data else 65536, data=data)
                assert "sync" not in order


class TestErrorsBelow:
    @pytest.fixture
    def served(self, unhit):
        return unhit

    @pytest.mark.parametrize(
        ("number", "expected"),
        [
            (errno.EIO, EIO), (errno.ENOSPC, ENOSPC), (errno.EDQUOT, ENOSPC),
            (errno.EFBIG, ENOSPC), (errno.EROFS, EPERM), (errno.ENODEV, EIO),
            (errno.EOPNOTSUPP, EIO), (errno.ENOMEM, 12),
        ],
    )  # fmt: skip
    def test_reach_the_client_and_nothing_else_breaks(
        self, served, model, number, expected, caplog
    ):
        data = served.engine().top.data
        write = data.write

        def failing(*_):
            completion = Completion()
            served.loop.call_soon(later, completion)
            return completion

        def later(completion):
            completion.fail(StorageError(number, "write", "disk", 0, 512))
            served.engine().reactor.poll()

        with connect(served.path) as client, connect(served.path, structured=False) as plain:
            data.write = failing
            for one in (client, plain):
                for _ in range(3):
                    assert one.error_of(nbd.WRITE, 0, data=b"z" * 65536) == expected
                assert one.read(0, 65536) == model[:65536]
            with pytest.raises(nbd.NbdError) as caught:
                client.write(0, b"z" * 65536)
            # What files the host has is none of the client's business.
            assert caught.value.text == os.strerror(number)
            data.write = write
            client.write(0, b"z" * 65536)
            assert plain.read(0, 65536) == b"z" * 65536
        assert served.server.exports[""].counters.errors == 7
        lines = [record for record in caplog.records if "disk: write" in record.message]
        assert 1 <= len(lines) < 7  # a guest cannot fill the log

    def test_of_reads(self, served, model):
        data = served.engine().layers[1].data
        read = data.read

        def failing(*_):
            completion = Completion()
            completion.fail(StorageError(errno.EIO, "read", "base", 0, 512))
            return completion

        for structured in (True, False):
            with connect(served.path, structured=structured) as client:
                data.read = failing
                assert client.error_of(nbd.READ, 0, 4096) == EIO
                data.read = read
                assert client.read(0, 4096) == model[:4096]

    def test_a_failed_flush_is_told_to_every_later_one(self, tmp_path, model):
        """The image is failed for good; reads go on; closing tells it too."""
        image = make_raw(tmp_path / "disk.raw", bytes(MIB))
        with (  # noqa: PT012 - the error comes at the end of serving
            pytest.raises(mmcow.LayerFailed, match="fdatasync"),
            serving(image, tmp_path / "f") as served,
        ):
            data = served.engine().top.data
            sync = data.sync

            def failing():
                completion = Completion()
                completion.fail(SyncFailed(errno.EIO, "fdatasync", "disk"))
                return completion

            with connect(served.path) as client:
                client.write(0, b"a")
                data.sync = failing
                assert client.error_of(nbd.FLUSH) == EIO
                data.sync = sync
                assert client.error_of(nbd.FLUSH) == EIO
                assert client.error_of(nbd.WRITE, 0, data=b"b") == EIO
                assert client.read(0, 1) == b"a"
                assert served.server.exports[""].counters.errors == 3

    @pytest.mark.parametrize("structured", [True, False])
    def test_no_memory_for_a_buffer(self, way, served, model, monkeypatch, structured):
        if way == "pump":
            pytest.skip("its buffers are C's: tests/c/test_pump.c")

        def failing(size):
            raise StorageError(errno.ENOMEM, "buffer", "memory")

        with connect(served.path, structured=structured) as client:
            for command in (nbd.READ, nbd.WRITE):
                data = b"x" * 100_000 if command == nbd.WRITE else b""
                with monkeypatch.context() as patch:
                    patch.setattr(connection, "aligned", failing)
                    assert client.error_of(command, 0, 100_000 - len(data), data=data) == 12
                assert client.read(0, 100_000) == model[:100_000]

    def test_a_guest_is_told_why_its_first_sector_is_refused(self, tmp_path):
        image = make_raw(tmp_path / "disk.raw", bytes(MIB))
        with serving(image, tmp_path / "g") as served, connect(served.path) as client:
            with pytest.raises(nbd.NbdError) as caught:
                client.write(0, b"QFI\xfb\0\0\0\3" + bytes(504))
            assert caught.value.number == EINVAL
            assert "first sector" in caught.value.text

    def test_numbers(self):
        assert wire.error_of(wire.NotFast("")) == ENOTSUP
        assert wire.error_of(MemoryError()) == 12
        assert wire.error_of(RuntimeError()) == EIO
        assert wire.error_of(mmcow.UsageError("")) == EINVAL

    def test_texts_name_no_file_of_the_host(self):
        for error, told in (
            (wire.NotFast("not fast"), "not fast"),
            (StorageError(errno.EIO, "rename to /b/c", "/a/b", 0, 512), os.strerror(errno.EIO)),
            (mmcow.LayerFailed("/a/b", OSError()), "refused after an earlier failure"),
            (mmcow.UsageError("/a/b: beyond the end"), "beyond the end"),
            (mmcow.UsageError("/a/b: lies in /a/c"), "refused"),
            (mmcow.UsageError("/a/c: beyond the end"), "failed"),
            (mmcow.CorruptError("/a/b", "magic", 5, "wrong"), "failed"),
            (RuntimeError("/a/b"), "failed"),
        ):
            assert wire.reason_of(error, "/a/b") == told

    def test_strings_are_cut_to_what_the_protocol_allows(self):
        text = wire.encode_text("\0" + "\u20ac" * 5000 + "\udc80")
        assert len(text.decode()) == 4095 // 3 + 1


class TestReadOnly:
    @pytest.mark.parametrize("how", ["export", "image"])
    def test_refuses_changes(self, tmp_path, how):
        image = make_raw(tmp_path / "disk.raw", b"r" * MIB)
        options = {"read_only": True} if how == "export" else {"opening": {"write": False}}
        with serving(image, tmp_path / "s", **options) as served, connect(served.path) as client:
            assert client.flags & 2
            assert not client.flags & (1 << 3 | 1 << 5 | 1 << 6 | 1 << 11)
            assert client.error_of(nbd.WRITE, 0, data=b"z" * 512) == EPERM
            assert client.error_of(nbd.WRITE, 0, data=b"z" * 300000) == EPERM
            assert client.error_of(nbd.TRIM, 0, 512) == EPERM
            assert client.error_of(nbd.WRITE_ZEROES, 0, 512) == EPERM
            client.flush()
            assert client.read(0, MIB) == b"r" * MIB


class TestTheEnd:
    @pytest.mark.parametrize("how", ["disc", "half-close"])
    def test_waits_for_a_slow_disk(self, unhit, how):
        served = unhit
        base = served.engine().layers[1].data
        read, held = base.read, []

        def slow(offset, buffers):
            held.append((Completion(), offset, buffers))
            return held[-1][0]

        def answer():
            for completion, offset, buffers in held:
                read(offset, buffers).on_done(lambda r, c=completion: c.set(r.value))
            served.engine().reactor.poll()

        base.read = slow
        with connect(served.path) as client:
            cookies = {client.start(nbd.READ, n * 4096, 4096) for n in range(3)}
            if how == "disc":
                client.start(nbd.DISC)
            else:
                client.socket.shutdown(socket.SHUT_WR)
            time.sleep(0.2)
            served.run(answer)
            assert {client.next_reply()[0] for _ in cookies} == cookies
            assert client.at_end()

    def test_disc_finishes_what_is_in_flight(self, served, model):
        with connect(served.path) as client:
            cookies = [client.start(nbd.READ, n * 4096, 4096) for n in range(64)]
            cookies.append(client.start(nbd.WRITE, 3 * MIB, data=b"d" * 100000))
            client.start(nbd.DISC)
            for _ in cookies:
                assert not client.next_reply()[1].error
            assert client.at_end()
        with connect(served.path) as client:
            assert client.read(3 * MIB, 100000) == b"d" * 100000

    def test_requests_behind_disc_are_not_done(self, served, model):
        with connect(served.path) as client:
            disc = nbd.request(nbd.DISC, 1, 0, 0)
            client.send(disc + nbd.request(nbd.WRITE, 2, 0, 512) + b"z" * 512)
            assert client.at_end()
        with connect(served.path) as client:
            assert client.read(0, 512) == model[:512]

    def test_a_half_closed_client_gets_its_replies(self, served, model):
        with connect(served.path) as client:
            for n in range(64):
                client.start(nbd.READ, n * 4096, 4096)
            client.start(nbd.WRITE, 3 * MIB, data=b"h" * 70000)
            client.socket.shutdown(socket.SHUT_WR)
            for _ in range(65):
                assert not client.next_reply()[1].error
            assert client.at_end()

    def test_more_than_the_server_takes_at_once(self, served, model):
        """Its replies come all the same, before and after a half-close."""
        count = connection.REQUESTS_MOST * 4
        with connect(served.path) as client:
            received = []

            def receive():
                received.extend(client.next_reply()[1] for _ in range(count))

            client.sent = {n: nbd.Sent(nbd.READ, 0, n % 512 * 4096, 4096) for n in range(count)}
            thread = threading.Thread(target=receive)
            thread.start()
            client.send(
                b"".join(nbd.request(nbd.READ, n, n % 512 * 4096, 4096) for n in range(count))
            )
            client.socket.shutdown(socket.SHUT_WR)
            thread.join(30)
            assert len(received) == count
            assert client.at_end()
            assert not any(reply.error for reply in received)

    def test_leaving_without_a_word(self, served):
        for _ in range(20):
            with connect(served.path) as client:
                for n in range(20):
                    client.start(nbd.WRITE, n * 65536, data=b"v" * 65536)
