"""Peers of other versions of the wire: how they are recognized, what is ignored, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import cbor2
import pytest
import redis

from anyio_kkrpc import DeliveryError, ProtocolError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc._protocol._records import Bye, Cancel, Reply, Request
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis.dialects import LargeEntry, Several, native
from anyio_kkrpc.redis.dialects.native import (
    AGAIN,
    MARK,
    MARK_OF_SEVERAL,
    VERSION,
    NativeDialect,
    NewerWireError,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = pytest.mark.server
REPLY = (b"json", b'{"t":"r","id":"1","v":2}')
CALL = (b"json", b'{"t":"q","id":"1","op":"call","p":["ask"],"a":[7]}')
NEXT = b"%d" % (VERSION + 1)


def dialect() -> NativeDialect:
    return NativeDialect("reader", get_codec("json"))


def entry(record: Sequence[bytes], *more: bytes, sender: bytes = b"peer") -> list[bytes]:
    return [b"from", sender, *record, *more]


class TestWhoIsWho:
    """A peer's version is what its last entry told."""

    @pytest.mark.parametrize("number", [(), (b"n", b"e.1")], ids=["request", "addressed"])
    def test_marks(self, number: tuple[bytes, ...]) -> None:
        reader = dialect()
        assert reader.version_of("peer") == 0
        for mark, version in [
            ((), 0),
            ((b"v", b"1"), 1),
            ((), 0),
            ((b"v", b"7"), 7),
            ((b"v", b"7 1"), 7),
            ((b"v", b"7 1 whatever"), 7),
            ((b"v", b"12", b"more", b"3"), 12),
            ((b"more", b"3"), 0),
        ]:
            found = reader.decode(entry(REPLY, *number, *mark))
            assert found.record == Reply("1", v=2)
            assert found.number == (number[1] if number else None)
            assert reader.version_of("peer") == version
        assert reader.version_of("another") == 0

    def test_all_that_is_written_has_one(self) -> None:
        reader = dialect()
        writer = NativeDialect("writer", get_codec("json"))
        assert MARK == (b"v", b"%d" % VERSION)
        for record, number in [(Request("1", "get", ["a"]), None), (Cancel("1"), b"e.1")]:
            fields = writer.encode(record, None, number)
            assert fields[-2:] == MARK
            assert reader.decode(list(fields)).number == number
            assert reader.version_of("writer") == VERSION

    def test_as_the_version_before_read_it(self) -> None:
        """By position: sender, codec, number. All else is behind, or a request isn't one there."""
        writer = NativeDialect("writer", get_codec("json"))
        assert writer.encode(Bye(), None, b"e.1")[::2] == (b"from", b"json", b"n", b"v")
        assert writer.encode(Request("1", "get", ["a"]), None)[::2] == (b"from", b"json", b"v")

    @pytest.mark.parametrize("number", [(), (b"n", b"e.1")], ids=["to the stream", "addressed"])
    @pytest.mark.parametrize("size", [1, 5000])
    def test_what_is_written_once_more(self, number: tuple[bytes, ...], size: int) -> None:
        """It says how often it was before, if that is a number; a signature may stand behind."""
        record = get_codec("json").encode(Request("1", "call", ["f"], ["x" * size]))
        for again, count in [
            ((), 0),
            ((AGAIN, b"1"), 1),
            ((AGAIN, b"9999"), 9999),
            ((AGAIN, b"10000"), 0),
            ((AGAIN, b"-1"), 0),
            ((AGAIN, b""), 0),
            ((b"later", b"1"), 0),
        ]:
            for signature in [(), (b"sig", b"1.n.d")]:
                fields = entry((b"json", record), *number, *MARK, *again, *signature)
                found = dialect().decode(fields)
                assert found.again == count
                assert found.number == (number[1] if number else None)

    def test_forgotten_peers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """So many are remembered; one that isn't is spoken to as the version before."""
        monkeypatch.setattr(native, "_PEERS", 3)
        reader = dialect()
        for number in range(5):
            reader.decode(entry(REPLY, b"v", b"1", sender=b"%d" % number))
        assert [reader.version_of(str(number)) for number in range(5)] == [0, 0, 1, 1, 1]

    @pytest.mark.parametrize(
        "mark",
        [b"", b" ", b"x", b"-1", b"1.0", b" 1", b"1 x", b"1 -1", b"9" * 40, b"1 " + b"9" * 40],
    )
    def test_marks_that_are_none(self, mark: bytes) -> None:
        """What such an entry needs can't be told, so it is refused, each time."""
        reader = dialect()
        for _ in range(2):
            with pytest.raises(ProtocolError, match="a version that isn't one") as caught:
                reader.decode(entry(CALL, b"v", mark))
            assert not isinstance(caught.value, NewerWireError)

    @pytest.mark.parametrize(("record", "request_"), [(CALL, True), (REPLY, False)])
    def test_what_needs_more(self, record: tuple[bytes, bytes], request_: bool) -> None:
        """It is refused each time; what the same peer writes for everybody is read."""
        reader = dialect()
        for _ in range(2):
            with pytest.raises(NewerWireError, match=f"needs version {VERSION + 1}") as caught:
                reader.decode(entry(record, b"v", b"9 " + NEXT))
            assert (caught.value.request is not None) is request_
            assert reader.version_of("peer") == 9
        assert reader.decode(entry(record, b"v", b"9")).sender == "peer"
        assert reader.decode(entry(record, b"v", b"9 %d" % VERSION)).sender == "peer"
        with pytest.raises(NewerWireError):
            reader.decode(entry(record, b"v", b"9 " + NEXT))
        assert reader.decode(entry(record)).sender == "peer"
        assert reader.version_of("peer") == 0

    def test_needs_more_and_is_unreadable(self) -> None:
        with pytest.raises(NewerWireError) as caught:
            dialect().decode(entry((b"json", b'{"t":"batch"}'), b"v", b"9 9"))
        assert caught.value.request is None


def several(*records: tuple[bytes, bytes], needs: bytes = b"3", more: Any = ()) -> list[bytes]:
    first, *others = records
    mark = (b"v", b"%d %s" % (VERSION, needs))
    return entry(first, b"n", b"e+1.1", *mark, *(part for one in others for part in one), *more)


def replies(codec: str, *ids: str) -> list[tuple[bytes, bytes]]:
    return [(codec.encode(), get_codec(codec).encode(Reply(one, v=1))) for one in ids]


class TestSeveral:
    """An entry of several records: each as if it stood alone, with a number of its own."""

    @pytest.mark.parametrize("more", [(), (b"sig", b"1.n.d"), (b"later", b"1", *CALL)])
    def test_read(self, more: tuple[bytes, ...]) -> None:
        for codecs in [("json", "json"), ("cbor", "cbor"), ("json", "cbor")]:
            reader = dialect()
            records = [*replies(codecs[0], "1", "2"), *replies(codecs[1], "3")]
            found = reader.decode(several(*records, more=more))
            assert isinstance(found, Several)
            assert (found.record, found.number) == (Reply("1", v=1), b"e+1.1")
            assert found.size == sum(len(data) for _, data in records)
            assert [one.record for one in found.entries] == [Reply(id, v=1) for id in "123"]
            assert [one.size for one in found.entries] == [len(data) for _, data in records]
            assert found.number_each() == []
            assert [one.number for one in found.entries] == [b"e+1.1", b"e+1.2", b"e+1.3"]
            assert {one.sender for one in found.entries} == {"peer"}
            assert not found.refused
            assert reader.version_of("peer") == VERSION
            assert reader.codec_for("peer").name == codecs[0]

    def test_as_the_version_before_read_it(self) -> None:
        """It refuses the entry, and doesn't take the first record for all."""
        fields = several(*replies("json", "1", "2"))
        assert MARK_OF_SEVERAL == (b"v", b"%d 3" % VERSION)
        assert fields[:8:2] == [b"from", b"json", b"n", b"v"]
        assert fields[6:8] == [*MARK_OF_SEVERAL]
        assert [fields[8], fields[10:]] == [b"json", []]

    def test_one_that_cannot_be_read(self) -> None:
        """It spoils no other, wherever it stands."""
        good = replies("json", "1", "2")
        for at in range(3):
            for bad in [(b"json", b"{"), (b"json", b'{"t":"later"}'), (b"cbor", b"\xff")]:
                found = dialect().decode(several(*good[:at], bad, *good[at:]))
                assert isinstance(found, Several)
                assert [one.record for one in found.entries] == [Reply("1", v=1), Reply("2", v=1)]
                ((exc, place),) = found.refused
                assert isinstance(exc, ProtocolError)
                assert place == at
                assert found.number_each() == [b"e+1.%d" % (at + 1)]
                others = [b"e+1.%d" % (place + 1) for place in range(3) if place != at]
                assert [one.number for one in found.entries] == others
        with pytest.raises(ProtocolError):
            dialect().decode(several((b"json", b"{"), (b"json", b"[")))

    def test_too_many(self) -> None:
        many = replies("json", "1") * 1024
        found = dialect().decode(several(*many))
        assert isinstance(found, Several)
        assert len(found.entries) == 1024
        with pytest.raises(ProtocolError, match="more than 1,024 records"):
            dialect().decode(several(*many, *many[:1]))

    def test_what_needs_more(self) -> None:
        reader = dialect()
        for _ in range(2):
            with pytest.raises(NewerWireError):
                reader.decode(several(*replies("json", "1", "2"), needs=NEXT))
        assert isinstance(reader.decode(several(*replies("json", "1", "2"))), Several)

    def test_large_ones(self) -> None:
        """What is left out of a large request until it begins is found in its own record."""
        codec = get_codec("json")
        large = codec.encode(Request("2", "call", ["f"], ["x" * 100_000]))
        reader = dialect()
        found = reader.decode(several(*replies("json", "1"), (b"json", large)))
        assert isinstance(found, Several)
        _, entry = found.entries
        assert isinstance(entry, LargeEntry)
        assert reader.decode_whole(entry.left_out) == codec.decode(large)


class Api:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, number: int) -> int:
        self.asked.append(number)
        return number


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def fields_of(record: dict[str, Any], codec: str, *more: str) -> dict[str, Any]:
    data = json.dumps(record) if codec == "json" else cbor2.dumps(record)
    pairs = ("from", "newer", codec, data, *more)
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def answers(raw: redis.Redis, inbox: str, codec: str) -> list[dict[str, Any]]:
    decode = json.loads if codec == "json" else cbor2.loads
    # As a list, since an entry may have several fields of that name.
    entries = raw.eval("return redis.call('XRANGE', KEYS[1], '-', '+')", 1, inbox)
    return [
        decode(value)
        for _, fields in entries
        for name, value in zip(fields[::2], fields[1::2], strict=True)
        if name == codec.encode()
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("codec", ["json", "cbor"])
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_a_newer_peer_calls(
    server: RedisServer,
    raw: redis.Redis,
    stream_name: str,
    grouped: bool,
    codec: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it adds is ignored; what it says to need is refused, counted, logged and answered."""
    caplog.set_level(logging.WARNING)
    base = f"{{{stream_name}}}"
    inbox = f"{base}:inbox:newer"
    raw.xadd(inbox, {"hint": "hello"})
    raw.xtrim(inbox, maxlen=0)
    call = {"t": "q", "op": "call", "p": ["ask"], "a": [7]}
    api = Api()
    async with (
        RedisStreamsTransport(
            server.url, stream=stream_name, use_consumer_group=grouped
        ) as transport,
        RPCChannel(transport, expose=api),
    ):
        own = f"{base}:inbox:{transport.session_id}"
        await until(lambda: not grouped or raw.exists(stream_name))

        def invalid() -> int:
            return transport.statistics().invalid

        # Fields, members and hints that it doesn't know; and a needs that it does.
        more = ("v", f"9 {VERSION}", "trace", "abc")
        known = {**call, "id": "1", "priority": 3, "d": 60_000}
        raw.xadd(stream_name, fields_of(known, codec, *more))
        await until(lambda: raw.xlen(inbox) == 1)
        raw.xadd(own, {"hint": "whatever this is"})
        raw.xadd(f"{base}:control", {"hint": "whatever this is"})
        raw.xadd(own, fields_of({"t": "r", "id": "5", "v": 1, "w": 2}, codec, "n", "e.1", *more))
        assert (api.asked, invalid()) == ([7], 0)

        # What needs more, as a record that can be read, one that can't, and one without an answer.
        needs = ("v", f"9 {VERSION + 1}")
        raw.xadd(stream_name, fields_of({**call, "id": "2"}, codec, *needs))
        raw.xadd(stream_name, fields_of({"t": "qs", "many": []}, codec, *needs))
        raw.xadd(stream_name, fields_of({**call, "id": "3", "o": True}, codec, *needs))
        await until(lambda: invalid() == 3)
        raw.xadd(own, fields_of({**call, "id": "4"}, codec, "n", "e.2", *needs))
        raw.xadd(own, fields_of({"t": "r", "id": "5", "v": 1}, codec, "n", "e.3", *needs))
        raw.xadd(f"{base}:control", fields_of({"t": "bye"}, codec, "n", "e.4", *needs))
        await until(lambda: invalid() == 6)
        assert f"needs version {VERSION + 1} of the wire; this peer knows {VERSION}" in caplog.text

        # It goes on. In a broadcast a newer peer may be there and answer, so this one is silent.
        raw.xadd(stream_name, fields_of({**call, "id": "6"}, codec))
        refused = ["2", "4"] if grouped else ["4"]
        await until(lambda: len(answers(raw, inbox, codec)) == 2 + len(refused))
        replies = {reply["id"]: reply for reply in answers(raw, inbox, codec)}
        assert sorted(replies) == sorted(["1", "6", *refused])
        assert replies["6"]["v"] == 7
        for call_id in refused:
            assert replies[call_id]["e"]["rpc_error"] == "delivery"
            assert "did not run" in replies[call_id]["e"]["m"]
        assert api.asked == [7, 7]
        if grouped:
            await until(lambda: raw.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    raw.delete(inbox)


@pytest.mark.anyio
async def test_callers_get_the_refusal(
    server: RedisServer, raw: redis.Redis, stream_name: str
) -> None:
    """A call that the worker who took it isn't new enough for ends in one precise error."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    failed: list[Exception] = []
    async with (
        RedisStreamsTransport(server.url, **options) as serving,
        RedisStreamsTransport(server.url, **options) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):

        async def call() -> None:
            with pytest.raises(
                DeliveryError,
                match=f"needs version {VERSION + 1} of the wire; .*; it did not run",
            ) as caught:
                await channel.get_api().ask(1)
            failed.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until(lambda: raw.xlen(stream_name))
            ((entry_id, fields),) = raw.xrange(stream_name)
            raw.xdel(stream_name, entry_id)
            raw.xadd(stream_name, {**fields, b"v": b"%d %d" % (VERSION + 1, VERSION + 1)})
            async with RPCChannel(serving, expose=Api()):
                await until(lambda: failed)
                assert await channel.get_api().ask(1) == 1
        # Each knows what the other speaks.
        for one, other in [(serving, using), (using, serving)]:
            assert one._dialects.native.version_of(other.session_id) == VERSION
