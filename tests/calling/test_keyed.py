"""The options of calls with keys, and what tells one call from another."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from anyio_kkrpc import (
    ByteStreamTransport,
    CallCancelledError,
    CallNotFoundError,
    ItemBounds,
    MemoryTransport,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCError,
    RPCTimeoutError,
    TransportClosedError,
    current_call,
    with_call_options,
)
from anyio_kkrpc._calling._keyed import (
    KeyOptions,
    digest_of,
    is_kept_stream,
    key_options,
    keyed_request,
    value_of,
)
from anyio_kkrpc.abc import Transport
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.middleware import Invocation
from anyio_kkrpc.records import Reply, Request
from anyio_kkrpc.transports._keyed import MemoryKeys
from tests.bounds import BOUND

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": 5}, TypeError, "key: needs a str"),
    ({"key": ""}, ValueError, "key: from 1 to 512 bytes, not 0"),
    ({"key": "ä" * 257}, ValueError, "key: from 1 to 512 bytes, not 514"),
    ({"key": "\ud800"}, ValueError, "key: must be text that UTF-8 has"),
    ({"key": "k", "keep": 0}, ValueError, "keep: from 0.001 to"),
    ({"key": "k", "keep": float("nan")}, ValueError, "keep: from"),
    ({"key": "k", "keep": True}, TypeError, "keep: needs seconds, not True"),
    ({"key": "k", "keep_errors": -1}, ValueError, "keep_errors: from 0 to"),
    ({"key": "k", "run_within": 0}, ValueError, "run_within: from 0.001 to"),
    ({"key": "k", "cancel_when_left": 1}, TypeError, "cancel_when_left: needs a bool"),
    ({"keep": 5}, ValueError, "keep: only a call with a key has it"),
    ({"keep_errors": 5}, ValueError, "keep_errors: only a call with a key has it"),
    ({"run_within": 5}, ValueError, "run_within: only a call with a key has it"),
    ({"cancel_when_left": True}, ValueError, "cancel_when_left: only a call with a key has it"),
    ({"bounds": ItemBounds()}, ValueError, "bounds: only a call with a key has it"),
    ({"key": "k", "bounds": {}}, TypeError, "bounds: needs ItemBounds"),
    *(
        ({"key": "k", "bounds": ItemBounds(**wrong)}, error, next(iter(wrong)))
        for wrong, error in (
            ({"keep_items": 0}, ValueError),
            ({"keep_items": 1.5}, TypeError),
            ({"keep_bytes": None}, TypeError),
            ({"keep_bytes": 2**40}, ValueError),
            ({"when_unread": "stop"}, ValueError),
            ({"unread_timeout": 0}, ValueError),
            ({"unread_timeout": None}, TypeError),
        )
    ),
]
LATER: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, "delay: from 0 to"),
    ({"at": 0}, "at: from 0.001 to"),
    ({"delay": 1, "at": 5.0}, "at: either this or delay"),
]


def options(**given: Any) -> KeyOptions | None:
    return key_options(given.pop("key", None), **given)


def request(*args: Any, **kwargs: Any) -> Request:
    return Request("1", "call", ["f"], [*args], k=kwargs)


@pytest.mark.parametrize(("given", "error", "text"), WRONG)
def test_options(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        options(**given)


def test_defaults() -> None:
    assert options() is None
    assert options(key="k") == KeyOptions("k", 3600.0, 3600.0)
    assert options(key="k", keep=5) == KeyOptions("k", 5, 5)
    assert options(key="k", keep_errors=0) == KeyOptions("k", 3600.0, 0)


@given(st.dictionaries(st.text(max_size=5), st.integers()), st.lists(st.text()))
def test_one_digest_for_one_call(named: dict[str, int], rest: list[str]) -> None:
    """In whatever order names stand, and in whatever codec it travels."""
    turned = dict(reversed(named.items()))
    digest = digest_of(request(*rest, **named))
    assert digest == digest_of(request(*rest, **turned))
    assert digest == digest_of(request(*map(str, rest), **named))
    assert len(digest) == 22
    for codec in ("json", "cbor"):
        known = get_codec(codec)
        there = known.decode(known.encode(request(*rest, **named)))
        assert isinstance(there, Request)
        assert digest_of(there) == digest


def test_each_call_has_a_digest_of_its_own() -> None:
    calls = [
        request(),
        request(1),
        request(1.0),
        request("1"),
        request(True),
        request([1]),
        request(1, 2),
        request(a=1),
        request(a=2),
        request({"a": 1}),
        request(b"x"),
        request(Decimal("1.0")),
        request(UUID(int=1)),
        request(datetime(2026, 1, 1, tzinfo=timezone.utc)),
        Request("1", "call", ["g"]),
        Request("1", "get", ["f"]),
        Request("1", "call", ["f", "g"]),
    ]
    assert len({digest_of(call) for call in calls}) == len(calls)
    assert digest_of(request((1, 2))) == digest_of(request([1, 2]))  # they travel alike


def test_what_has_no_digest() -> None:
    for value in (object(), "\ud800", 10**5000):
        with pytest.raises(TypeError):
            keyed_request(KeyOptions("k"), "1", "call", ["f"], [value], None, None)


def test_results() -> None:
    assert value_of(Reply("", 5)) == 5
    assert value_of(Reply("")) is None
    with pytest.raises(RemoteError, match="no tea"):
        value_of(Reply("", e={"n": "LookupError", "m": "no tea"}))
    stream = Reply("", {"__kkrpc_next_stream__": "async-iterable", "id": "items"})
    assert is_kept_stream(stream)
    assert value_of(stream) is None
    for value in (5, None, {}, {"id": "items"}):
        assert not is_kept_stream(Reply("", value))
    assert not is_kept_stream(Reply(""))


class Nowhere(anyio.abc.ByteStream):
    """Nobody is there."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.sleep_forever()
        return b""

    async def send(self, item: bytes) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


def test_transports_without_keys() -> None:
    """They say so before anything is sent, and name the option."""
    redis: dict[str, Any] = {"url": "redis://nowhere", "stream": "s"}
    transports: list[Transport] = [
        ByteStreamTransport(Nowhere()),
        RedisStreamsTransport(**redis),
        RedisStreamsTransport(**redis, use_consumer_group=True, dialect="kkrpc-2"),
    ]
    for transport in transports:
        channel = RPCChannel(transport)
        with pytest.raises(ValueError, match="^key: this transport keeps no calls"):
            with_call_options(channel.get_api(), key="k")
        with pytest.raises(ValueError, match="^key: this transport keeps no calls"):
            channel.attach("k")
    channel = RPCChannel(RedisStreamsTransport(**redis, use_consumer_group=True))
    with pytest.raises(ValueError, match="^key: a call to one peer"):
        with_call_options(channel.get_api(to="x"), key="k")
    assert repr(channel.attach("k")) == "<CallHandle 'k'>"


@pytest.mark.anyio
async def test_start() -> None:
    """Its options are checked first, and middleware sees that it is sent."""
    seen: list[tuple[str, str, list[Any]]] = []

    async def look(call: Invocation, call_next: Any) -> Any:
        seen.append((call.operation, call.method, call.args))
        call.metadata["trace"] = "1"
        return await call_next(call)

    a, b = MemoryTransport.pair(codec="json")
    expose = {"meta": lambda x: current_call().metadata}
    channel = RPCChannel(a, middleware=[look])
    with pytest.raises(RuntimeError, match="async with"):
        await channel.attach("k").state()
    async with a, b, channel, RPCChannel(b, expose=expose):
        api = channel.get_api()
        for given, text in LATER:
            call = api.meta(1)
            with pytest.raises(ValueError, match=f"^{text}"):
                await channel.start(call, key="k", **given)
            call.close()
        with pytest.raises(TypeError, match="question"):
            await channel.start(None, key="k")  # type: ignore[arg-type]
        call = await channel.start(api.meta(1), key="k")
        assert await call.result() == {"trace": "1"}
        assert await with_call_options(api, key="l").meta(2) == {"trace": "1"}
    assert seen == [("start", "meta", [1]), ("call", "meta", [2])]
    with pytest.raises(RPCError, match="closed"):
        await call.result()


@pytest.mark.anyio
async def test_keys_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over goes, though nobody asks for it again."""
    monkeypatch.setattr("anyio_kkrpc.transports._keyed._MANY", 10)
    keys = MemoryKeys()
    monkeypatch.setattr(keys, "_sweep_at", 10)
    options = KeyOptions("k", keep=-1.0)
    for number in range(1000):
        wanted = keyed_request(options, "1", "call", ["f"], [], None, None)
        wanted.key = f"k{number}"
        call, is_new = keys.claim(wanted)
        assert is_new
        keys.end(call, "done", Reply(""))
    assert len(keys._calls) <= 20


class Slow:
    """Waits until `gate` is set."""

    def __init__(self) -> None:
        self.gate = anyio.Event()

    async def wait(self) -> str:
        await self.gate.wait()
        return "done"


def test_middleware_has_the_time_of_the_call() -> None:
    """All its attempts together, as for a call without a key. Time is virtual."""

    async def again(call: Invocation, call_next: Any) -> Any:
        with suppress(RPCTimeoutError):
            return await call_next(call)
        return await call_next(call)

    async def check() -> None:
        a, b = MemoryTransport.pair(codec="json")
        channel = RPCChannel(a, middleware=[again])
        async with a, b, channel, RPCChannel(b, expose=Slow()):
            for key in (None, "k"):
                begun = anyio.current_time()
                api = with_call_options(channel.get_api(), key=key, timeout=5)
                with pytest.raises(RPCTimeoutError, match="no answer within 5 s"):
                    await api.wait()
                assert 5 <= anyio.current_time() - begun < 5.1

    trio.run(check, clock=MockClock(autojump_threshold=0))


@pytest.mark.anyio
async def test_whose_time_was_over() -> None:
    """The text names the one that ended it."""
    texts: list[str] = []
    a, b = MemoryTransport.pair(codec="json")

    class Middle:
        async def ask(self, timeout: float) -> None:
            api = with_call_options(back.get_api(), key=f"k{timeout}", timeout=timeout)
            with pytest.raises(RPCTimeoutError) as caught:
                await api.wait()
            texts.append(str(caught.value))
            if timeout == BOUND:  # else its answer might be as fast as the end of that time
                await anyio.sleep_forever()

    back = RPCChannel(b, expose=Middle())
    async with a, b, back, RPCChannel(a, expose=Slow(), timeout=None) as front:
        await front.get_api().ask(0.01)
        with pytest.raises(RPCTimeoutError):
            await with_call_options(front.get_api(), timeout=0.05).ask(BOUND)
    assert texts[0] == "wait: no answer within 0.01 s"


@pytest.mark.anyio
async def test_who_waits_is_told_whoever_has_left() -> None:
    """Of the end of the transport, also if another one who waited has left before."""
    a, b = MemoryTransport.pair(codec="json")
    told: list[Exception] = []
    async with a, b, RPCChannel(b, expose=Slow()), RPCChannel(a, timeout=None) as channel:
        call = await channel.start(channel.get_api().wait(), key="k")
        leaving = anyio.CancelScope()

        async def leaves() -> None:
            with leaving:
                await call.result()

        async def waits() -> None:
            try:
                await call.result()
            except TransportClosedError as exc:
                told.append(exc)

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                group.start_soon(leaves)
                group.start_soon(waits)
                await anyio.wait_all_tasks_blocked()
                leaving.cancel()
                await anyio.wait_all_tasks_blocked()
                await a.aclose()
    assert len(told) == 1


@pytest.mark.anyio
async def test_a_claim_that_is_given_up() -> None:
    """Who has joined a call that never was sent, since there was no room, is told."""
    a, b = MemoryTransport.pair(codec="json", max_queue_size=1, overflow="block")
    async with a, b, RPCChannel(a, timeout=None) as channel:
        api = channel.get_api()
        await channel.start(api.wait(), key="fills the queue")
        scope = anyio.CancelScope()

        async def leaves() -> None:
            with scope:
                await with_call_options(api, key="k").wait()

        async def joins() -> None:
            with pytest.raises(CallCancelledError):
                await with_call_options(api, key="k").wait()

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                group.start_soon(leaves)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(joins)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(CallNotFoundError):
            await channel.attach("k").state()
