"""Large requests: they wait encoded, and run as far as there is room for what they weigh."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import anyio
import cbor2
import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc import OverloadedError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc._protocol._records import CallbackCall, Record, Reply, Request
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.codecs._weight import LARGE, Scales, weight_of_json
from anyio_kkrpc.redis._reading._large import LargeRequest, LargeRequests
from anyio_kkrpc.redis.dialects import Dialects, Entry, LargeEntry
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

RECORD = Request("1", "call", ["f"], a=[1], k={"x": 2})


def large(weight: int, size: int = 1) -> LargeRequest:
    request = LargeRequest(Request("1", "call", ["f"]))
    request.fields, request.weight = [b"x" * size], weight
    return request


def requests(limit: int = 100) -> LargeRequests:
    return LargeRequests(limit, lambda fields: msgspec.structs.replace(RECORD))


# Weights


SHAPES: dict[str, Any] = {
    "empty dicts": [{} for _ in range(20_000)],
    "empty lists": [[] for _ in range(20_000)],
    "dicts": [{"a": n} for n in range(10_000)],
    "texts": [f"text {n}" for n in range(10_000)],
    "floats": [n / 7 for n in range(20_000)],
    "one text": "x" * 200_000,
    "names": {f"name {n}": n for n in range(10_000)},
    "nested": [[[[n, n]], {"x": {"y": n}}] for n in range(5_000)],
}


@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES)
def test_weights(value: Any) -> None:
    """What is guessed is within a factor of three of the memory that Python takes, or four in CBOR."""
    data, small = msgspec.json.encode(value), cbor2.dumps(value)
    memory = _memory(msgspec.json.decode(data))
    assert memory / 3 < weight_of_json(data) < memory * 3
    with Scales() as scales:
        assert not gc.isenabled()  # what that frees was others'
        decoded = cbor2.loads(small)
    assert gc.isenabled()
    assert memory / 4 < scales.weight(len(small)) < memory * 4
    assert decoded == value


def _memory(value: Any) -> int:
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(_memory(key) + _memory(item) for key, item in value.items())
    return size + sum(map(_memory, value)) if isinstance(value, list) else size


# Dialects


def dialects(name: str, codec: str = "json") -> Dialects:
    return Dialects(
        name, "me" * 13, get_codec(codec), superjson=True, remote_peer_id=None, skips_own=False,
        max_queue_size=1, max_queue_bytes=1, deliver=lambda record, sender: None, now=lambda: 0.0, time_of_day=lambda: 0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", [("native", "json"), ("native", "cbor"), ("kkrpc-2", "json"), ("kkrpc-0", "json")]
)
@given(
    value=st.recursive(
        st.none() | st.integers(-1000, 1000) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=5) | st.dictionaries(st.text("ab"), inner, max_size=3)
        ),
    ),
    op=st.sampled_from(["call", "new", "set", "get"]),
)
def test_left_out_and_decoded_again(kind: tuple[str, str], value: Any, op: Any) -> None:
    """Of a large request, all but its arguments is known before, and all of it when it begins."""
    peer = dialects(*kind)
    record = Request("1", op, ["f"])
    if op in ("call", "new"):
        record.a = [value, "x" * LARGE]
    elif op == "set":
        record.v = [value, "x" * LARGE]
    else:
        record.p = ["f", "x" * LARGE]
    fields = peer.own.encode(record, None)
    assert fields is not None
    entry = peer.decode(list(fields))
    assert isinstance(entry, LargeEntry)
    head = entry.record
    assert isinstance(head, Request)
    assert (head.op, head.p, head.d, head.o) == (op, record.p, UNSET, UNSET)
    assert head.a is UNSET
    assert head.v is UNSET
    assert head.k is UNSET
    assert entry.left_out == list(fields)
    assert entry.weight >= entry.size > LARGE
    whole = peer.decode_whole(entry.left_out)
    assert isinstance(whole, Request)
    assert whole.id == head.id
    assert (whole.a, whole.v) == (peer_sees(kind[0], record.a), peer_sees(kind[0], record.v))


@pytest.mark.parametrize(
    "record", [Reply("1", ["x" * 1000] * 1000), msgspec.structs.replace(RECORD, a=["x" * 10**6])]
)
def test_large_values_are_copied_once_at_most(record: Record) -> None:
    """It is weighed without a copy, or not at all; of a request it waits as it came."""
    peer = dialects("native")
    fields = peer.own.encode(record, None)
    assert fields is not None
    whole = [*fields]
    peer.decode(whole)
    tracemalloc.start()
    try:
        entry = peer.decode(whole)
        peak = tracemalloc.get_traced_memory()[1] / 10**6
    finally:
        tracemalloc.stop()
    if isinstance(record, Reply):
        assert entry.record == record
        assert 1 <= peak < 1.2
    else:
        assert isinstance(entry, LargeEntry)
        assert 10**6 < entry.weight < 1.1 * 10**6
        assert peak < 0.1


def peer_sees(dialect: str, value: Any) -> Any:
    """What comes of an argument list or value: each in its envelope in kkrpc 2."""
    if dialect == "kkrpc-2" and isinstance(value, list) and value[-1:] == ["x" * LARGE]:
        return ANY
    return value if dialect == "native" else ANY


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY = _Any()


@pytest.mark.parametrize("codec", ["json", "cbor"])
@pytest.mark.parametrize(
    "record", [Reply("1", "x" * 5000), CallbackCall("1", ["x" * 5000]), Request("1", "get", ["f"])]
)
def test_others_are_whole(codec: str, record: Record) -> None:
    """Nothing is left out of what isn't a request, nor of a small one."""
    peer = dialects("native", codec)
    entry = peer.decode(list(peer.own.encode(record, None) or ()))
    assert entry is not None
    assert entry.__class__ is Entry
    assert entry.record == record


def test_requests_that_begin_otherwise() -> None:
    """The order of the members is the writer's own affair."""
    data = b'{"a":["%s"],"t":"q","p":["f"],"op":"call","id":"1","d":5}' % (b"x" * LARGE)
    entry = dialects("native").decode([b"from", b"x", b"json", data])
    assert isinstance(entry, LargeEntry)
    assert entry.record == Request("1", "call", ["f"], d=5)


@pytest.mark.parametrize(
    "member",
    [
        b'"op":"zap"',
        b'"d":1e300',
        b'"d":1' + b"0" * 400,
        b'"p":[1]',
        b'"p":{}',
        b'"o":1',
        b'"id":"%s"' % (b"x" * 300),
    ],
)
def test_heads_that_are_invalid(member: bytes) -> None:
    """What is known before is checked before, as strictly as of a small request."""
    data = b'{"t":"q","a":["%s"],"id":"1","op":"call","p":["f"],%s}' % (b"x" * LARGE, member)
    small = b'{"t":"q","id":"1","op":"call","p":["f"],%s}' % member
    for one in (data, small):
        with pytest.raises(Exception, match="not a valid record"):
            dialects("native").decode([b"from", b"x", b"json", one])


# What runs, and what is aside


def test_one_always_has_room() -> None:
    held = requests()
    first, second = large(1000), large(1)
    assert held.begin(first)
    assert first.record == RECORD
    assert not held.begin(second)
    assert held.next() is None
    held.end(first)
    assert first.record == Request("1", "call", ["f"])  # its arguments are gone
    assert held.next() is second
    assert held.begin(second)


def test_as_many_as_weigh_no_more() -> None:
    held = requests()
    assert all(held.begin(large(25)) for _ in range(4))
    assert not held.begin(large(1))


def test_handlers_that_wait_for_each_other() -> None:
    """For each that waits for a call of its own there is room for one more, whatever it weighs."""
    held = requests()
    assert held.begin(large(1000))
    held.lend(1)
    assert held.begin(large(1000))
    assert not held.begin(large(1000))
    held.lend(-1)
    assert held.next() is None


def test_what_does_not_begin_has_no_weight() -> None:
    """One that can't be decoded leaves the room to others."""

    def fail(fields: list[bytes]) -> Record:
        raise ValueError("no")

    held = LargeRequests(100, fail)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            held.begin(large(90))
    held.end(large(90))  # settled by somebody who doesn't know that it never began


@pytest.mark.anyio
async def test_waiting_for_room() -> None:
    """Whoever waits since much is aside is woken by an end, and by all being forgotten."""
    held = requests()
    first = large(1000)
    held.begin(first)
    held.begin(large(1, size=100))
    assert held.crowded
    woken = []

    async def wait() -> None:
        await held.wait()
        woken.append(held.crowded)

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        held.end(first)
        await anyio.wait_all_tasks_blocked()
        assert woken == [True, True]
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert len(held.forget(lambda request: True)) == 1
    assert woken == [True, True, False]


# On a server


def body(n: int, text: bytes = b"", size: int = 2000) -> bytes:
    return b'{"t":"q","id":"%d","op":"call","p":["work"],"a":[%s]}' % (
        n,
        text or b"[%s]" % b",".join([b"{}"] * size),
    )


class Works:
    """Says how many run at once, and how much Python holds when one runs."""

    def __init__(self) -> None:
        self.gate = anyio.Event()
        self.running = self.most = self.done = 0
        self.blocks: list[int] = []

    async def work(self, value: Any) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        self.blocks.append(sys.getallocatedblocks())
        await self.gate.wait()
        self.running -= 1
        self.done += 1
        return len(value)

    def small(self, n: int) -> int:
        return n


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.parametrize("codec", ["json", "cbor"])
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_as_many_run_as_there_is_room_for(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool, codec: str
) -> None:
    """Small ones pass those that wait; all of them run; what isn't decoded costs its bytes."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api, size = Works(), 20_000
    async with (
        RedisStreamsTransport(redis_server.url, max_queue_bytes=2_000_000, **options) as serving,
        RedisStreamsTransport(redis_server.url, **options) as using,
        RPCChannel(serving, expose=api) as server,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        before = sys.getallocatedblocks()
        for n in range(6):
            data = body(n, size=size)
            if codec == "cbor":
                data = cbor2.dumps(msgspec.json.decode(data))
            witness.xadd(stream_name, {"from": "x", codec: data})
        await until(lambda: serving.statistics().received == 6)
        assert await client.get_api().small(1) == 1
        assert api.running == 1
        # Half as much as two of them.
        assert sys.getallocatedblocks() - before < 1.5 * size
        api.gate.set()
        await until(lambda: server.statistics().served == 7)
        assert (api.done, api.most) == (6, 1)
        assert max(api.blocks) - before < 1.7 * size
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_arguments_that_turn_out_invalid(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    grouped: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are counted, logged and acknowledged, late as it is; the next one runs."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api = Works()
    api.gate.set()
    async with (
        RedisStreamsTransport(redis_server.url, **options) as serving,
        RPCChannel(serving, expose=api),
    ):
        number = b"1" + b"0" * 5000
        witness.xadd(stream_name, {"from": "x", "json": body(0, number)})
        witness.xadd(
            stream_name,
            {"from": "x", "json": body(1).replace(b'"a":[[', b'"a":{"":[').replace(b"]}", b"}}")},
        )
        witness.xadd(stream_name, {"from": "x", "json": body(2)})
        await until(lambda: api.done == 1)
        assert serving.statistics().invalid == 2
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    assert "skipped" in caplog.text


class Nested:
    """Calls its own stream with as much as it got."""

    def __init__(self) -> None:
        self.channel: RPCChannel | None = None

    async def down(self, depth: int, value: Any) -> int:
        assert self.channel is not None
        return 0 if depth == 0 else 1 + await self.channel.get_api().down(depth - 1, value)


@pytest.mark.anyio
@pytest.mark.server
async def test_large_requests_of_handlers(redis_server: RedisServer, stream_name: str) -> None:
    """A worker whose handlers ask it for as much as they got doesn't wait for itself."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    api = Nested()
    async with (
        RedisStreamsTransport(redis_server.url, max_queue_bytes=10_000, **options) as serving,
        RedisStreamsTransport(redis_server.url, **options) as using,
        RPCChannel(serving, expose=api, timeout=CALL_BOUND) as api.channel,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        results: list[int] = []

        async def call() -> None:
            results.append(await client.get_api().down(5, [{}] * 2000))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
        assert results == [5, 5, 5]


@pytest.mark.anyio
@pytest.mark.server
async def test_leaving_with_large_requests(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What was put aside goes back to the group, unbegun, like the rest of what waits."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    leaving, staying = Works(), Works()
    async with RedisStreamsTransport(
        redis_server.url, max_queue_bytes=100_000, **options
    ) as transport:
        async with RPCChannel(transport, expose=leaving):
            for n in range(4):
                witness.xadd(stream_name, {"from": "x", "json": body(n)})
            await until(lambda: transport.statistics().received == 4 and leaving.running == 1)
            await anyio.sleep(0)
    staying.gate.set()
    async with (
        RedisStreamsTransport(redis_server.url, max_queue_bytes=100_000, **options) as transport,
        RPCChannel(transport, expose=staying),
    ):
        await until(lambda: staying.done == 4)
        assert staying.most == 1


# What is for one peer


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "block"])
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_strangers_take_no_room_of_what_is_addressed(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool, overflow: Any
) -> None:
    """A call of this peer alone is served, however many others ask anybody; both go on in turn."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api, order = Works(), []
    async with (
        RedisStreamsTransport(
            redis_server.url, max_queue_size=3, overflow=overflow, **options
        ) as serving,
        RedisStreamsTransport(redis_server.url, **options) as using,
        RPCChannel(serving, expose=api, max_concurrency=1),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        addressed = client.get_api(to=serving.session_id)

        async def call(n: int) -> None:
            try:
                order.append(await addressed.small(n))
            except OverloadedError:
                order.append(-1)

        async with anyio.create_task_group() as group:
            group.start_soon(client.get_api().work, [1])
            await until(lambda: api.running == 1)
            group.start_soon(call, 0)
            await until(lambda: serving.statistics().received == 2)
            for n in range(20):
                request = b'{"t":"q","id":"s%d","op":"call","p":["small"],"a":[1],"o":true}' % n
                witness.xadd(stream_name, {"from": "x", "json": request})
            if not grouped and overflow != "block":
                await until(lambda: serving.statistics().received == 22)
            for n in range(1, 6):
                group.start_soon(call, n)
            # There is room for three; the first may have come before the strangers.
            await until(lambda: order.count(-1) >= 2 and serving.statistics().queue.dropped >= 2)
            api.gate.set()
        assert order.count(-1) in (2, 3)
        assert len({n for n in order if n >= 0}) == len(order) - order.count(-1)


@pytest.mark.anyio
@pytest.mark.server
async def test_floods_in_the_inbox(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What was written at once is read in portions."""
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as transport,
        RPCChannel(transport) as channel,
    ):
        key = f"{{{stream_name}}}:inbox:{transport.session_id}"
        script = (
            "for i = 1, 40 do redis.call('XADD', KEYS[1], '*', 'from', 'x', 'json', ARGV[1]) end"
        )
        reads = _reads(witness)
        witness.eval(script, 1, key, b'{"t":"r","id":"x","v":"%s"}' % (b"x" * 1_000_000))
        await until(lambda: channel.statistics().ignored == 40)
        assert _reads(witness) - reads >= 7


def _reads(witness: redis.Redis) -> int:
    # A server that has answered none yet doesn't name them.
    return int(witness.info("commandstats").get("cmdstat_xread", {"calls": 0})["calls"])
