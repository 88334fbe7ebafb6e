"""Entries written by hand, as any peer might, and what Python answers to them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    ByteStreamTransport,
    DeliveryError,
    MethodNotFoundError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.faults.proxy import proxy

from .api import Api, serve

pytestmark = [pytest.mark.anyio, pytest.mark.one_server]


class Peer:
    """Writes entries, and reads the whole stream."""

    def __init__(self, client: redis.Redis, stream: str) -> None:
        self.client = client
        self.stream = stream

    def compact(self, message: dict[str, Any], sender: str = "handmade", **bus: Any) -> None:
        envelope = {
            "protocol": "kkrpc.bus.v1",
            "transportId": "redis-streams",
            "from": sender,
            **bus,
            "message": message,
        }
        self.client.xadd(self.stream, {"data": json.dumps(envelope)})

    def classic(self, message: dict[str, Any], sender: str | None = "handmade") -> None:
        fields = {"data": json.dumps(message) + "\n"}
        if sender is not None:
            fields["sessionId"] = sender
        self.client.xadd(self.stream, fields)  # type: ignore[arg-type]

    def written(self, sender: str) -> list[Any]:
        """Return what a peer wrote in either dialect, without envelopes."""
        messages = []
        for _, fields in self.client.xrange(self.stream):
            data = fields.get(b"data")
            if data is None:
                continue
            if data == b"__DESTROY__":
                continue
            plain = json.loads(data)
            if plain.get("protocol") and plain["from"] == sender:
                messages.append({**plain["message"], "to": plain.get("to")})
            elif fields.get(b"sessionId") == sender.encode():
                messages.append(plain.get("json", plain))
        return messages

    async def wait(self, sender: str, wanted: Callable[[Any], bool]) -> Any:
        """Return the first message of a peer that is wanted, once it is there."""
        with anyio.fail_after(BOUND):
            while True:
                for message in self.written(sender):
                    if wanted(message):
                        return message
                await anyio.sleep(0.005)


def answers(identifier: Any) -> Callable[[Any], bool]:
    return lambda message: (
        message.get("id") == identifier
        and (message.get("t") in ("r", "sr") or message.get("type") == "response")
    )


@pytest.fixture
def peer(witness: redis.Redis, stream_name: str) -> Peer:
    return Peer(witness, stream_name)


@asynccontextmanager
async def server(
    url: str, stream: str, session_id: str = "server", **options: Any
) -> AsyncIterator[Api]:
    """Serve an API."""
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(url, stream=stream, session_id=session_id, **options)
        )
        yield await serve(stack, transport)


def call(identifier: str, *path: str, **members: Any) -> dict[str, Any]:
    return {"t": "q", "id": identifier, "op": "call", "p": list(path), **members}


@pytest.mark.parametrize("group", [False, True])
async def test_entries_of_kkrpc_2(
    redis_server: RedisServer, stream_name: str, peer: Peer, group: bool
) -> None:
    """What the recorded entries by hand showed, with answers as recorded."""
    async with server(redis_server.url, stream_name, use_consumer_group=group) as api:
        peer.compact(call("h4", "add", a=[1, 2]), to="server")
        peer.compact({"t": "sq", "id": "h2", "sid": "none", "op": "pull", "n": 32}, to="server")
        peer.compact({"t": "sq", "id": "h3", "sid": "none", "op": "return", "v": 5}, to="server")
        peer.compact(call("h5", "closed"), to="server")
        peer.compact({"t": "q", "id": "h6", "op": "zap", "p": ["x"]}, to="server")
        peer.compact(call("h7", "closed"), to="elsewhere")
        peer.compact(call("h8", "closed"), to="server", transportId=None)
        peer.compact(call("h9", "closed"), to="server", transportId="python")
        peer.compact(call("h10", "closed", a=[]), sequence=None)
        peer.compact(call("h11", "closed"), sender="server")
        peer.compact(call("last", "hello", a=["you"]), to="", more={"x": 1})
        last = await peer.wait("server", answers("last"))
        assert last == {"t": "r", "id": "last", "v": "hi you", "to": "handmade"}
        # A reference can be used once a call has given it: from then on the stream is read for it.
        peer.compact({"t": "q", "id": "h1", "op": "ref", "p": ["x"]}, to="server")
        reference = "Unknown remote reference x"
        for expected in (
            {"t": "r", "id": "h1", "e": {"n": "Error", "m": reference}},
            {"t": "r", "id": "h4", "v": 3},
            {"t": "r", "id": "h5", "v": 0},
            {"t": "r", "id": "h9", "v": 0},
        ):
            got = await peer.wait("server", answers(expected["id"]))
            assert got == {**expected, "to": "handmade"}
        written = {message["id"] for message in peer.written("server")}
        # In a group nobody else might run this worker's own request.
        assert written >= {"h1", "h4", "h5", "h9", "last"}
        assert not written & {"h6", "h7", "h8", "h10"}
        assert any(map(answers("h11"), peer.written("server"))) is group
        # These two may come a little later: they aren't read with the requests.
        unknown = await peer.wait("server", answers("h2"))
        assert unknown["e"] == {"n": "Error", "m": "Unknown RPC stream none"}
        left = await peer.wait("server", answers("h3"))
        assert (left["d"], left["v"]) == (True, 5)
        assert api._channel is not None
        assert api._channel.statistics().refused == 0


async def test_streams_of_others_stay_alone(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """Two servers read every pull; only the one whose stream it is answers."""
    async with (
        server(redis_server.url, stream_name, "one"),
        server(redis_server.url, stream_name, "two"),
    ):
        peer.compact(call("c", "countTo", a=[3]), to="one")
        reply = await peer.wait("one", answers("c"))
        sid = reply["v"]["id"]
        peer.compact(call("d", "closed"))  # so that both listen to the stream
        await peer.wait("two", answers("d"))
        peer.compact({"t": "sq", "id": "p", "sid": sid, "op": "pull", "n": 32})
        await peer.wait("one", lambda message: message.get("d") is True)
        peer.compact(call("e", "closed"))
        await peer.wait("two", answers("e"))
        assert [message["id"] for message in peer.written("two")] == ["d", "e"]
        items = [message for message in peer.written("one") if message["t"] == "sr"]
        assert [item.get("v") for item in items] == [1, 2, 3, None]


async def test_streams_of_a_server_that_leaves(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """Readers of either version of kkrpc get an error, each in its own words."""
    many = 1_000_000
    async with server(redis_server.url, stream_name):
        peer.compact(call("c", "countTo", a=[many]), to="server")
        sid = (await peer.wait("server", answers("c")))["v"]["id"]
        peer.compact({"t": "sq", "id": "p", "sid": sid, "op": "pull", "n": 2}, to="server")
        await peer.wait("server", lambda message: message.get("t") == "sr")
        request = {"method": "countTo", "args": [many], "type": "request", "version": "json"}
        peer.classic({"id": "old", **request})
        await peer.wait("server", lambda message: message.get("type") == "stream-chunk")
    error = await peer.wait("server", lambda message: message.get("t") == "sr" and "e" in message)
    assert "DeliveryError: the peer that has its source ended while" in error["e"]["m"]
    await peer.wait("server", lambda message: message.get("type") == "stream-error")


@pytest.mark.parametrize("group", [False, True])
async def test_one_id_in_several_dialects(
    redis_server: RedisServer, stream_name: str, peer: Peer, group: bool
) -> None:
    """Each entry is answered as it came, even if all of them say that they are of one peer."""
    async with server(redis_server.url, stream_name, use_consumer_group=group):
        request = {"method": "echo", "args": [5], "type": "request"}
        peer.classic({"id": "json", **request})
        peer.client.xadd(
            stream_name,
            {"data": json.dumps({"json": {"id": "rich", **request}}, separators=(",", ":")) + "\n"},
        )
        peer.classic({"id": 7, **request}, sender=None)
        peer.compact(call("compact", "echo", a=[5]))
        json_reply = await peer.wait("server", answers("json"))
        assert json_reply["version"] == "json"
        rich_reply = await peer.wait("server", answers("rich"))
        assert rich_reply["version"] == "superjson"
        integer_reply = await peer.wait("server", answers(7))
        assert integer_reply["args"] == {"result": 5}
        compact_reply = await peer.wait("server", answers("compact"))
        assert compact_reply["to"] == "handmade"


async def test_a_group_acknowledges_what_is_no_request(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """Replies, entries for others and nonsense don't stay pending, nor are they run."""
    async with server(redis_server.url, stream_name, use_consumer_group=True):
        peer.compact({"t": "r", "id": "x", "v": 1})
        peer.compact(call("other", "closed"), to="other")
        peer.classic({"id": "x", "method": "", "args": {"result": 1}, "type": "response"})
        peer.client.xadd(stream_name, {"something": "else"})
        peer.compact(call("last", "closed"), to="kkrpc-group")
        await peer.wait("server", answers("last"))
        with anyio.fail_after(BOUND):
            while peer.client.xpending(stream_name, "kkrpc-group")["pending"]:
                await anyio.sleep(0.005)
        assert [message["id"] for message in peer.written("server")] == ["last"]


async def test_a_group_passes_on_what_is_for_one_worker(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """Whoever takes it from the group: the worker that it is for answers, and once."""
    async with (
        server(redis_server.url, stream_name, "one", use_consumer_group=True),
        server(redis_server.url, stream_name, "two", use_consumer_group=True),
        server(redis_server.url, stream_name, "three"),
    ):
        for number in range(30):
            peer.compact(call(f"c{number}", "add", a=[number, 1]), to="two")
        peer.compact(call("three", "closed"), to="three")
        peer.compact(call("nobody", "closed"), to="nobody")
        for number in range(30):
            assert (await peer.wait("two", answers(f"c{number}")))["v"] == number + 1
        await peer.wait("three", answers("three"))
        peer.compact(call("last", "closed"))
        await peer.wait("three", answers("last"))
        with anyio.fail_after(BOUND):
            while peer.client.xpending(stream_name, "kkrpc-group")["pending"]:
                await anyio.sleep(0.005)
        assert len(peer.written("two")) <= 31
        assert [message["id"] for message in peer.written("three")] == ["three", "last"]
        assert {message["id"] for message in peer.written("one")} <= {"last"}


async def test_a_new_group_does_not_run_history(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """What kkrpc 2 asked long ago isn't run; what kkrpc 0.x asked is, since it waits for ever."""
    envelope = {"protocol": "kkrpc.bus.v1", "transportId": "x", "from": "handmade"}
    old = json.dumps({**envelope, "message": call("old", "closed")})
    peer.client.xadd(stream_name, {"data": old}, id="1000-1")
    waiting = {"id": "waiting", "method": "closed", "args": [], "type": "request"}
    fields = {"data": json.dumps(waiting) + "\n", "sessionId": "handmade"}
    peer.client.xadd(stream_name, fields, id="1000-2")
    peer.compact(call("new", "closed"))
    async with server(redis_server.url, stream_name, use_consumer_group=True):
        assert (await peer.wait("server", answers("new")))["v"] == 0
        assert (await peer.wait("server", answers("waiting")))["args"] == {"result": 0}
        assert (await peer.wait("server", answers("old")))["e"]["n"] == "DeliveryError"
        with anyio.fail_after(BOUND):
            while peer.client.xpending(stream_name, "kkrpc-group")["pending"]:
                await anyio.sleep(0.005)


async def test_an_old_destroy_signal_is_none(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """A worker of a new group reads the whole history, and isn't ended by it."""
    peer.client.xadd(stream_name, {"data": "__DESTROY__", "sessionId": "handmade"})
    async with (
        server(redis_server.url, stream_name, use_consumer_group=True) as worker,
        server(redis_server.url, stream_name, "other", use_consumer_group=True) as other,
        server(redis_server.url, stream_name, "third") as third,
    ):
        peer.compact(call("c", "closed"))
        await peer.wait("third", answers("c"))
        peer.client.xadd(stream_name, {"data": "__DESTROY__", "sessionId": "handmade"})
        with anyio.fail_after(BOUND):
            for api in (worker, other, third):
                assert api._channel is not None
                await api._channel.serve_forever()


@pytest.mark.parametrize("group", [False, True])
async def test_destroy_signals_can_be_refused(
    redis_server: RedisServer, stream_name: str, peer: Peer, group: bool
) -> None:
    """Also those of kkrpc 0.x."""
    options = {"use_consumer_group": group, "honor_destroy_signal": False}
    async with server(redis_server.url, stream_name, **options):
        peer.client.xadd(stream_name, {"data": "__DESTROY__", "sessionId": "handmade"})
        peer.compact(call("c", "closed"))
        await peer.wait("server", answers("c"))


async def test_requests_to_a_peer_of_another_dialect(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """A server calls a kkrpc 2 peer whose id it knows, also as plain text."""
    async with server(redis_server.url, stream_name) as api:
        peer.compact(call("c", "closed"))
        await peer.wait("server", answers("c"))
        assert api._channel is not None
        results = []

        async def reverse() -> None:
            assert api._channel is not None
            results.append(await api._channel.get_api(to="handmade").hello("you"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reverse)
            request = await peer.wait("server", lambda message: message.get("t") == "q")
            assert request["to"] == "handmade"
            assert set(request) == {"t", "id", "op", "p", "a", "to"}  # no deadline, for instance
            peer.compact({"t": "r", "id": request["id"], "v": "hi"}, sender="other")
            peer.compact({"t": "r", "id": request["id"], "v": "hello"}, to="server")
        assert results == ["hello"]  # of the peer that was asked
        with pytest.raises(DeliveryError):
            await api._channel.get_api(to="unknown").hello("you")


async def test_a_server_of_another_dialect_answers_natives(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """The dialect is that of what a peer begins; natives are answered natively."""
    async with server(redis_server.url, stream_name, dialect="kkrpc-2"):
        async with (
            RedisStreamsTransport(redis_server.url, stream=stream_name) as transport,
            RPCChannel(transport, timeout=CALL_BOUND) as channel,
        ):
            assert await channel.get_api().add(1, 2) == 3
            assert [x async for x in channel.get_api().count_to(50)] == list(range(1, 51))
        assert peer.written("server") == []


async def test_python_clients_keep_deadlines_to_themselves(
    redis_server: RedisServer, stream_name: str, peer: Peer
) -> None:
    """A kkrpc peer is told neither of deadlines nor of cancels; the call ends here."""
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, dialect="kkrpc-2", session_id="client"
        ) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        api = with_call_options(channel.get_api(), timeout=0.05)
        with pytest.raises(RPCTimeoutError):
            await api.slow(1)
        with anyio.move_on_after(0.05):
            await with_call_options(api, timeout=5).slow(2)
        peer.compact(call("q", "f"), to="client")  # nothing is exposed: nothing is answered
        peer.compact({"t": "r", "id": "0", "v": None}, to="client")
        assert await _same(channel, peer)
        first, second, _ = peer.written("client")
        for message in (first, second):
            assert set(message) == {"t", "id", "op", "p", "a", "to"}
            assert message["to"] is None


async def _same(channel: RPCChannel, peer: Peer) -> bool:
    """Make a call that is answered by hand."""
    results = []

    async def ask() -> None:
        results.append(await channel.get_api().same())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        asked = await peer.wait("client", lambda message: message.get("p") == ["same"])
        peer.compact({"t": "r", "id": asked["id"], "e": {"n": "Error", "m": "No API exposed"}})
        peer.compact({"t": "r", "id": asked["id"], "v": True})
    return results == [True]


@pytest.mark.parametrize("dialect", ["kkrpc-2", "kkrpc-0"])
async def test_nothing_is_written_twice_after_a_reconnect(
    redis_server: RedisServer, stream_name: str, peer: Peer, dialect: Any
) -> None:
    """What was written and not confirmed is looked up: items of a stream come once, in order."""
    async with (
        proxy(redis_server.url) as middle,
        server(middle.url, stream_name, health_check_interval=0.2),
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, dialect=dialect, max_queue_size=100_000
        ) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        received = []
        async with channel.get_api().repeat(400) as items:
            async for item in items:
                received.append(item)
                if len(received) % 100 == 50:
                    await middle.cut()
        assert received == ["again"] * 400


async def test_callbacks_are_released_in_time(
    redis_server: RedisServer, stream_name: str, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kkrpc 2 peer is told once, of the last use, that a callback is gone."""
    monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 0.0)
    async with server(redis_server.url, stream_name, health_check_interval=0.05):
        argument = {"__kkrpc_next_arg__": "callback", "id": "f"}
        for number in range(2):
            peer.compact(call(f"c{number}", "withProgress", a=[1, argument]))
            await peer.wait("server", answers(f"c{number}"))
        release = await peer.wait("server", lambda message: message.get("t") == "cbr")
        assert release["ids"] == ["f"]
        assert sum(message["t"] == "cb" for message in peer.written("server")) == 2


# Byte streams


@asynccontextmanager
async def raw_pair(**options: Any) -> AsyncIterator[tuple[Any, ByteStreamTransport]]:
    """Return a socket, and a transport at its other end."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        raw = await anyio.connect_tcp("127.0.0.1", port)
        accepted = await listener.listeners[0].accept()  # type: ignore[attr-defined]
        async with raw, ByteStreamTransport(accepted, **options) as transport:
            yield raw, transport


async def read_line(raw: Any, buffer: bytearray) -> Any:
    with anyio.fail_after(BOUND):
        while b"\n" not in buffer:
            buffer += await raw.receive()
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return json.loads(line)


async def test_a_line_of_kkrpc_0_is_answered_in_kind() -> None:
    """Whatever was set: the first request tells. Records are native until then."""
    async with AsyncExitStack() as stack:
        raw, transport = await stack.enter_async_context(raw_pair())
        await serve(stack, transport)
        buffer = bytearray()
        await raw.send(b'{"t":"q","id":"1","op":"call","p":["add"],"a":[1,2]}\n')
        assert await read_line(raw, buffer) == {"t": "r", "id": "1", "v": 3}
        await raw.send(b'{"id":"2","method":"add","args":[1,2],"type":"request"}\n')
        assert (await read_line(raw, buffer))["version"] == "json"
        await raw.send(b'{"json":{"id":"3","method":"nope","args":[],"type":"request"}}\n')
        answer = (await read_line(raw, buffer))["json"]
        assert answer["args"] == {"error": "Method nope is not a function"}
        await raw.send(b'{"type":"zap"}\n')
        await raw.send(b'{"id":"4","method":"add","args":[1,2],"type":"request"}\n')
        assert (await read_line(raw, buffer))["args"] == {"result": 3}
        assert transport.statistics().invalid == 1
        assert not transport.capabilities.cancellation


async def test_flood_over_a_byte_stream_is_cancelled() -> None:
    """A kkrpc 0.x source can't be slowed down, so it is told to stop."""
    async with AsyncExitStack() as stack:
        raw, transport = await stack.enter_async_context(
            raw_pair(dialect="kkrpc-0", superjson=False, max_queue_size=5)
        )
        channel = await stack.enter_async_context(RPCChannel(transport, timeout=CALL_BOUND))
        buffer = bytearray()
        errors: list[Exception] = []

        async def read() -> None:
            try:
                async for _ in channel.get_api().flood():
                    pass
            except Exception as exc:
                errors.append(exc)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            request = await read_line(raw, buffer)
            base = {"id": request["id"], "method": ""}
            lines = [{**base, "args": {"result": {"__stream": True}}, "type": "response"}]
            lines += [{**base, "args": {"value": n}, "type": "stream-chunk"} for n in range(500)]
            await raw.send(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            assert (await read_line(raw, buffer))["type"] == "stream-cancel"
        assert len(errors) == 1
        assert "cancelled" in str(errors[0])


async def test_callbacks_over_a_byte_stream_are_released_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To kkrpc 2 not at once, but after the last use."""
    monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 0.01)
    async with AsyncExitStack() as stack:
        raw, transport = await stack.enter_async_context(raw_pair(dialect="kkrpc-2"))
        await serve(stack, transport)
        buffer = bytearray()
        await raw.send(
            b'{"t":"q","id":"1","op":"call","p":["withProgress"],"a":[1,'
            b'{"__kkrpc_next_arg__":"callback","id":"f"}]}\n'
        )
        assert (await read_line(raw, buffer))["t"] == "cb"
        assert (await read_line(raw, buffer))["t"] == "r"
        assert await read_line(raw, buffer) == {"t": "cbr", "ids": ["f"]}


async def test_unknown_names_over_a_byte_stream() -> None:
    """A Python client knows kkrpc's words for a name that isn't there."""
    for dialect in ("kkrpc-2", "kkrpc-0"):
        async with AsyncExitStack() as stack:
            raw, transport = await stack.enter_async_context(raw_pair(dialect=dialect))
            peer = await stack.enter_async_context(ByteStreamTransport(raw, dialect=dialect))
            await serve(stack, transport)
            channel = await stack.enter_async_context(RPCChannel(peer, timeout=CALL_BOUND))
            with pytest.raises(MethodNotFoundError, match="nope"):
                await channel.get_api().nope()
            with pytest.raises(RemoteError, match="outer"):
                await channel.get_api().throw_with_cause()
            numbers = [item async for item in channel.get_api().count_to(3000)]
            assert numbers == list(range(1, 3001))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"dialect": "kkrpc-9"}, "dialect"),
        ({"dialect": "kkrpc-2", "codec": "cbor"}, "codec"),
        ({"superjson": 1}, "superjson"),
    ],
)
async def test_wrong_options_of_byte_streams(options: dict[str, Any], option: str) -> None:
    """They are refused in the constructor, by name."""
    with pytest.raises((TypeError, ValueError), match=option):
        ByteStreamTransport(None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", ["native", "kkrpc-0"])
async def test_a_handler_calls_its_caller_of_kkrpc_0(
    redis_server: RedisServer, stream_name: str, peer: Peer, dialect: str
) -> None:
    """Whichever way the one that serves begins; what another peer answers doesn't count."""
    options = {"use_consumer_group": False, "dialect": dialect}
    async with server(redis_server.url, stream_name, **options):
        asked = {"id": "1", "method": "callPeer", "args": ["hello", "ada"], "type": "request"}
        peer.classic({**asked, "version": "json"}, "one")
        back = await peer.wait("server", lambda message: message.get("method") == "hello")
        for sender in ("two", "one"):
            args = {"result": f"hi of {sender}"}
            answer = {"id": back["id"], "method": "", "args": args, "type": "response"}
            peer.classic({**answer, "version": "json"}, sender)
        reply = await peer.wait("server", answers("1"))
        assert reply["args"] == {"result": "hi of one"}
