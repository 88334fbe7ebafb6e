"""Calls with keys on real servers where something comes at the wrong moment, or is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    CallCancelledError,
    CallNotFoundError,
    DeliveryError,
    KeyConflictError,
    OverloadedError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.kit._keyed import MOST_WAITS
from anyio_kkrpc.redis._group._held import HeldEntry
from anyio_kkrpc.redis._keyed._scripts import CANCEL_CALL, CLAIM, FINISH
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis.dialects._keyed import Keyed
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND
from tests.faults.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.server]

CLAIM_IDLE = 0.3
GROUP = "kkrpc-group"


class Api:
    """Each run waits until it is let go, by its attempt.

    :ivar runs: attempts that began, by key
    :ivar ended: attempts that ended by themselves
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str | None, int]] = []
        self.ended: list[int] = []
        self.gates: dict[int, anyio.Event] = {}
        self.cancelled = 0
        self.failing: set[int] = set()

    def gate(self, attempt: int) -> anyio.Event:
        return self.gates.setdefault(attempt, anyio.Event())

    async def work(self, value: Any = None) -> list[Any]:
        call = current_call()
        self.runs.append((call.key, call.attempt))
        try:
            await self.gate(call.attempt).wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        self.ended.append(call.attempt)
        if call.attempt in self.failing:
            raise ValueError(f"attempt {call.attempt}")
        return [value, call.attempt]

    async def tell(self, size: int) -> None:
        await current_call().progress("x" * size)

    async def double(self, value: str) -> str:
        return value + value

    async def echo(self, value: Any) -> Any:
        self.runs.append((current_call().key, current_call().attempt))
        return value


class Place:
    """A stream, with what makes its peers."""

    def __init__(self, url: str, stream: str) -> None:
        self.url, self.stream, self.keys = url, stream, Keys.of(stream)

    def transport(self, url: str | None = None, **options: Any) -> RedisStreamsTransport:
        options = {"claim_idle": CLAIM_IDLE, "max_deliveries": 9, **options}
        return RedisStreamsTransport(
            url or self.url, stream=self.stream, use_consumer_group=True, **options
        )

    @asynccontextmanager
    async def caller(
        self, url: str | None = None, *, fail_fast: bool = False, **options: Any
    ) -> AsyncIterator[RPCChannel]:
        async with (
            self.transport(url, **options) as transport,
            RPCChannel(transport, timeout=BOUND, fail_fast=fail_fast) as channel,
        ):
            yield channel

    @asynccontextmanager
    async def worker(
        self, api: Any, url: str | None = None, concurrency: int = 100, **options: Any
    ) -> AsyncIterator[RedisStreamsTransport]:
        async with (
            self.transport(url, **options) as transport,
            RPCChannel(transport, expose=api, max_concurrency=concurrency),
        ):
            yield transport


@pytest.fixture
def place(redis_server: RedisServer, stream_name: str) -> Place:
    return Place(redis_server.url, stream_name)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def has_told(worker: RedisStreamsTransport, api: Api, attempt: int) -> bool:
    """Return whether Redis has answered what an attempt came to, of a worker that runs no other."""
    return attempt in api.ended and not worker._lane.keyed.work._open


def script(one: Any) -> Callable[[bytes], bool]:
    """Return what finds the command that runs a script."""
    return lambda data: one.sha in data or one.source in data


async def test_overtaken_worker_changes_nothing(place: Place, middle: Proxy) -> None:
    """One that nobody hears of loses its request; its failure, or result, comes too late."""
    for failing in (True, False):
        key, api = f"k{failing}", Api()
        if failing:
            api.failing.add(1)
        async with place.caller() as caller, place.worker(api, middle.url) as first:
            call = await caller.start(caller.get_api().work(7), key=key)
            await until(lambda api=api: len(api.runs) == 1)
            middle.freeze()
            async with place.worker(api):
                await until(lambda api=api: len(api.runs) == 2)
                api.gate(2).set()
                assert await call.result() == [7, 2]
                api.gate(1).set()
                middle.thaw()
                await until(lambda first=first, api=api: has_told(first, api, 1))
                assert await with_call_options(caller.get_api(), key=key).work(7) == [7, 2]
        assert api.runs == [(key, 1), (key, 2)]


async def test_first_result_counts(place: Place, middle: Proxy) -> None:
    """A result is as good as another: that of the overtaken one counts if it is first. Its failure
    does not: who has the request now has yet to finish.
    """
    for failing, expected in ((False, 1), (True, 2)):
        key, api = f"k{failing}", Api()
        if failing:
            api.failing.add(1)
        async with place.caller() as caller, place.worker(api, middle.url) as first:
            call = await caller.start(caller.get_api().work(7), key=key)
            await until(lambda api=api: len(api.runs) == 1)
            middle.freeze()
            async with place.worker(api):
                await until(lambda api=api: len(api.runs) == 2)
                middle.thaw()
                api.gate(1).set()
                if not failing:
                    assert await call.result() == [7, 1]
                await until(lambda first=first, api=api: has_told(first, api, 1))
                api.gate(2).set()
                assert await call.result() == [7, expected]
        assert api.runs == [(key, 1), (key, 2)]


async def test_no_run_begins_after_a_result(place: Place, witness: redis.Redis) -> None:
    """What was taken over asks, before it begins, whether it came to something meanwhile, or was
    cancelled.
    """
    api = Api()
    async with place.caller() as caller, place.worker(api), place.transport() as second:
        part = second._lane.keyed.work
        for outcome in ("none", "result", "cancel"):
            call = await caller.start(caller.get_api().work(1), key=outcome)
            await until(lambda outcome=outcome: (outcome, 1) in api.runs)
            ((entry_id, _),) = witness.xrevrange(place.stream, count=1)
            witness.xclaim(place.stream, GROUP, second.consumer_name, 0, [entry_id])
            known = witness.get(place.keys.call(outcome.encode()))
            assert known is not None
            keyed = Keyed(outcome.encode(), known[1:23], 1000, 1000, 0)
            held = HeldEntry(entry_id, 2, 0.0, "somebody", keyed=keyed)
            second._lane.worker.held.entries[entry_id] = held
            if outcome == "result":
                api.gate(1).set()
                assert await call.result() == [1, 1]
                api.gates.clear()
            elif outcome == "cancel":
                assert await call.cancel()
            assert await part.may_begin(held) is (outcome == "none")
            if outcome == "cancel":
                with pytest.raises(CallCancelledError):
                    await call.result()


async def test_claim_and_result_are_written_again(place: Place, middle: Proxy) -> None:
    """After a connection was lost, by which either may have been done already."""
    api = Api()
    async with place.caller(middle.url) as caller, place.worker(api):
        middle.swallow_reply_to(script(CLAIM))
        assert await with_call_options(caller.get_api(), key="a").echo(1) == 1
        assert middle.swallowed.is_set()
        middle.swallow_reply_to(script(CLAIM))
        call = await caller.start(caller.get_api().echo(2), key="b")
        assert await call.result() == 2
        assert middle.swallowed.is_set()
    assert api.runs == [("a", 1), ("b", 1)]
    api = Api()
    async with place.caller() as caller, place.worker(api, middle.url) as transport:
        for key, gate in (("c", 1), ("d", 2)):
            middle.swallow_reply_to(script(FINISH))
            assert await with_call_options(caller.get_api(), key=key).echo(gate) == gate
            with anyio.fail_after(BOUND):
                await middle.swallowed.wait()
            await until(lambda: transport.statistics().outstanding == 0)
    assert [key for key, _ in api.runs] == ["c", "d"]


async def test_another_request_under_the_same_id(place: Place, witness: redis.Redis) -> None:
    """What one came to that another server had, which gave that id, ends nothing here."""
    keys, stream = place.keys, place.stream
    field = b"%b 1 1 0 %b" % (b"d" * 22, b"b:\n b")
    entry = {"from": "me", "call": field}
    witness.xgroup_create(stream, "g", "0", mkstream=True)
    entry_id = witness.xadd(stream, entry)
    witness.xreadgroup("g", "c", {stream: ">"})

    def finish(key: bytes, digest: bytes) -> Any:
        names = (keys.stream, keys.call(key), keys.waits(key), keys.progress(key))
        args = (b"g", entry_id, b"d", digest, b"json:1", b"1000", key, b"nobody", b"0")
        return witness.eval(FINISH.source, len(names), *names, *args)

    assert finish(b"a", b"d" * 22) == 0
    assert finish(b"b:\n b", b"e" * 22) == 0
    witness.set(keys.call(b"a"), b"s" + b"d" * 22 + b"1-1|")
    assert finish(b"a", b"d" * 22) == 0
    assert witness.xpending(stream, "g")["pending"] == 1
    assert witness.exists(keys.call(b"b:\n b")) == 0
    assert finish(b"b:\n b", b"d" * 22) == 1
    assert witness.xpending(stream, "g")["pending"] == 0
    assert witness.exists(keys.call(b"b:\n b")) == 1


async def test_lost_call_that_others_make_again(
    place: Place, witness: redis.Redis, monkeypatch: Any
) -> None:
    """Who waited for it waits for that one; where another call has its key, one learns that."""
    monkeypatch.setattr("anyio_kkrpc.redis._keyed._waits.ASK", 0.1)
    for value in (1, 2):
        api, name = Api(), b"k%d" % value
        key = name.decode()
        results: list[Any] = []
        worker = place.worker(api, claim_idle=BOUND)  # each run is a first attempt
        async with place.caller() as caller, place.caller() as other, worker:

            async def call(channel: RPCChannel, value: int = 1, key: str = key) -> None:
                try:
                    result = await with_call_options(channel.get_api(), key=key).work(value)
                    results.append(result)
                except KeyConflictError:
                    results.append("conflict")

            async with anyio.create_task_group() as group:
                group.start_soon(call, caller)
                await until(lambda api=api: api.runs)
                witness.delete(place.keys.call(name))
                for channel in (other, caller):
                    group.start_soon(call, channel, value)
                await until(lambda api=api: len(api.runs) == 2)
                if value == 2:
                    await until(lambda results=results: results)
                api.gate(1).set()
        assert sorted(results, key=str) == (
            [[1, 1]] * 3 if value == 1 else [[2, 1]] * 2 + ["conflict"]
        )


@pytest.mark.one_server
async def test_lost_hint(place: Place, witness: redis.Redis, monkeypatch: Any) -> None:
    """Who waits asks again: the worker may have died before it told anybody."""
    monkeypatch.setattr("anyio_kkrpc.redis._keyed._waits.ASK", 0.1)
    api = Api()
    async with place.caller() as caller, place.caller() as other, place.worker(api):
        async with anyio.create_task_group() as group:
            results: list[Any] = []

            async def call(channel: RPCChannel) -> None:
                results.append(await with_call_options(channel.get_api(), key="k").work(1))

            group.start_soon(call, caller)
            await until(lambda: api.runs)
            group.start_soon(call, other)
            waits = place.keys.waits(b"k")
            await until(lambda: witness.zcard(waits) == 2)
            for channel in (caller, other):
                session = channel._core.transport.session_id  # type: ignore[attr-defined]
                witness.delete(place.keys.inbox(session))
                witness.zrem(waits, session)
            api.gate(1).set()
            await until(lambda: len(results) == 2)
        assert results == [[1, 1]] * 2


@pytest.mark.one_server
async def test_dead_letter(place: Place, witness: redis.Redis) -> None:
    """Who waits is told; put back, it runs under its key."""
    api = Api()
    async with place.caller() as caller:
        call = await caller.start(caller.get_api().work(5), key="k")
        errors: list[RPCError] = []

        async def wait() -> None:
            try:
                await call.result()
            except DeliveryError as exc:
                errors.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            async with place.worker(api):  # leaves with what it has not finished
                await until(lambda: api.runs)
            async with place.worker(api, max_deliveries=1) as transport:
                await until(lambda: errors)
                assert "delivered 1 times without being finished" in str(errors[0])
                assert (await call.state()).kind == "dead"
                (letter,) = await transport.dead_letters()
                assert letter.fields["call"].endswith(b" k")
                with pytest.raises(DeliveryError):
                    await with_call_options(caller.get_api(), key="k").work(5)
                api.runs.clear()
                api.gate(1).set()
                await transport.retry_dead_letter(letter.id)
                assert await call.result() == [5, 1]
                assert api.runs == [("k", 1)]


@pytest.mark.one_server
async def test_dead_letter_of_a_key_that_has_run_again(place: Place) -> None:
    api = Api()
    async with place.caller() as caller:
        call = await caller.start(caller.get_api().work(5), key="k")
        async with place.worker(api):
            await until(lambda: api.runs)
        async with place.worker(api, max_deliveries=1) as transport:
            with pytest.raises(DeliveryError):
                await call.result()
            assert await call.forget()
            api.gate(1).set()
            await caller.start(caller.get_api().work(5), key="k")
            (letter,) = await transport.dead_letters()
            with pytest.raises(KeyConflictError):
                await transport.retry_dead_letter(letter.id)
            assert await transport.dead_letters() == [letter]


@pytest.mark.one_server
async def test_cancel_before_delivery(place: Place, witness: redis.Redis) -> None:
    """Nothing is left of the request; what a worker handed back is nobody's either."""
    api = Api()
    async with place.caller() as caller:
        call = await caller.start(caller.get_api().work(), key="a")
        assert (await call.state()).kind == "waiting"
        assert await call.cancel()
        assert witness.xlen(place.stream) == 0
        back = await caller.start(caller.get_api().work(), key="b")
        async with place.worker(api):
            await until(lambda: api.runs)
        assert (await back.state()).kind == "waiting"
        assert await back.cancel()
        assert witness.xpending(place.stream, GROUP)["pending"] == 0
        with pytest.raises(CallCancelledError):
            await back.result()
        async with place.worker(api):
            assert await with_call_options(caller.get_api(), key="c").echo(1) == 1
    assert [key for key, _ in api.runs] == ["b", "c"]


@pytest.mark.one_server
async def test_cancel_whose_hint_is_lost(place: Place, middle: Proxy) -> None:
    """The worker looks by itself; one that takes the request over doesn't run it."""
    api = Api()
    async with place.caller(middle.url) as caller, place.worker(api) as transport:
        call = await caller.start(caller.get_api().work(), key="k")
        await until(lambda: api.runs)
        middle.swallow_reply_to(script(CANCEL_CALL))
        with redis.Redis.from_url(place.url) as client:
            client.setrange(place.keys.call(b"k"), 0, b"c")
        await until(lambda: api.cancelled)
        with pytest.raises(CallCancelledError):
            await call.result()
        await until(lambda: transport.statistics().outstanding == 0)


@pytest.mark.one_server
async def test_cancelled_while_its_worker_is_gone(place: Place, middle: Proxy) -> None:
    first, second = Api(), Api()
    async with place.caller() as caller, place.worker(first, middle.url):
        call = await caller.start(caller.get_api().work(), key="k")
        await until(lambda: first.runs)
        middle.freeze()
        assert await call.cancel()
        async with place.worker(second) as transport:
            with pytest.raises(CallCancelledError):
                await call.result()
            await until(lambda: transport.statistics().outstanding == 0)
        middle.thaw()
    assert second.runs == []


@pytest.mark.one_server
async def test_what_is_kept_is_evicted(place: Place, witness: redis.Redis) -> None:
    """While it runs: a second run may begin, and each keeps what is its own."""
    api = Api()
    async with place.caller() as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(1), key="k")
        await until(lambda: len(api.runs) == 1)
        witness.delete(place.keys.call(b"k"))
        with pytest.raises(CallNotFoundError):
            await call.state()
        api.gate(1).set()
        assert await until(lambda: witness.exists(place.keys.call(b"k"))) is None
        assert await call.result() == [1, 1]
        witness.delete(place.keys.call(b"k"))
        api.gates.clear()
        await caller.start(caller.get_api().work(1), key="k")
        await until(lambda: len(api.runs) == 2)
        old = witness.get(place.keys.call(b"k"))
        assert old is not None
        witness.delete(place.keys.call(b"k"))
        await caller.start(caller.get_api().work(2), key="k")
        await until(lambda: len(api.runs) == 3)
        api.gate(1).set()
        assert await call.result() == [2, 1]


@pytest.mark.one_server
async def test_server_forgets(place: Place, own_server: RedisServer, monkeypatch: Any) -> None:
    """All data, or all scripts: who calls gets a result all the same, who attached is told."""
    monkeypatch.setattr("anyio_kkrpc.redis._keyed._waits.ASK", 0.1)
    place, api = Place(own_server.url, "s"), Api()
    async with (
        place.caller(inbox_ttl=1.0, health_check_interval=0.2) as caller,
        place.worker(api, inbox_ttl=1.0, health_check_interval=0.2),
    ):
        assert await with_call_options(caller.get_api(), key="a").echo(1) == 1
        with redis.Redis.from_url(place.url) as client:
            client.script_flush()
            assert await with_call_options(caller.get_api(), key="b").echo(2) == 2
            async with anyio.create_task_group() as group:
                results: list[Any] = []

                async def call() -> None:
                    api = with_call_options(caller.get_api(), key="c")
                    results.append(await api.work(3))

                group.start_soon(call)
                await until(lambda: ("c", 1) in api.runs)
                client.flushall()
                await until(lambda: api.runs.count(("c", 1)) == 2)
                api.gate(1).set()
            assert results == [[3, 1]]
            with pytest.raises(CallNotFoundError):
                await caller.attach("a").result()


@pytest.mark.one_server
async def test_request_that_is_gone(place: Place, witness: redis.Redis, monkeypatch: Any) -> None:
    """Removed by hand, or acknowledged by who knows nothing of keys: who waits is told."""
    monkeypatch.setattr("anyio_kkrpc.redis._keyed._waits.ASK", 0.05)
    async with place.caller() as caller:
        for acknowledge in (False, True):
            call = await caller.start(caller.get_api().echo(1), key="k")
            if acknowledge:
                witness.xgroup_create(place.stream, GROUP, "0")
                ((_, ((entry_id, _),)),) = witness.xreadgroup(GROUP, "x", {place.stream: ">"})
                witness.xack(place.stream, GROUP, entry_id)
            else:
                witness.xtrim(place.stream, 0)
            with pytest.raises(DeliveryError, match="is gone from the stream"):
                await call.result()
            with pytest.raises(CallNotFoundError):
                await call.state()


async def test_nothing_is_left(place: Place, witness: redis.Redis) -> None:
    """After `keep`: no key of any call, however it has ended."""
    api = Api()
    api.gate(1).set()
    async with place.caller() as caller, place.worker(api):
        calls = with_call_options(caller.get_api(), key="a", keep=0.2)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(calls.echo, 1)
        call = await caller.start(caller.get_api().work(), key="b", keep=3.0, delay=0.05)
        await call.result()
        api.failing.add(1)
        with pytest.raises(RemoteError):
            await with_call_options(caller.get_api(), key="c", keep=0.2).work()
        await until(lambda: not witness.keys(place.keys.call(b"*")))
        kinds = ("call:", "progress:", "due")
        assert [key for kind in kinds for key in witness.keys(f"{{{place.stream}}}:{kind}*")] == []
        # Who waited is forgotten by itself.
        for key in witness.keys(place.keys.waits(b"*")):
            assert 0 < witness.pttl(key) <= 60_000
        assert await calls.echo(1) == 1
    assert [key for key, _ in api.runs].count("a") >= 2


@pytest.mark.one_server
async def test_signed(place: Place, witness: redis.Redis) -> None:
    """What is kept is signed for its place: nobody without the key changes it."""
    api, secret = Api(), {"signing_key": b"0123456789abcdef"}
    api.gate(1).set()
    async with place.caller(**secret) as caller, place.worker(api, **secret):
        calls = {key: with_call_options(caller.get_api(), key=key) for key in "ab"}
        assert await calls["a"].echo(1) == 1
        assert await calls["b"].echo(1) == 1
        late = await caller.start(caller.get_api().work(3), key="late", delay=0.1)
        assert await late.result() == [3, 1]
        value = witness.get(place.keys.call(b"b"))
        witness.set(place.keys.call(b"a"), value, ex=100)
        with pytest.raises(RPCError, match="isn't signed as it must be"):
            await calls["a"].echo(1)
        # A hint with a value that nobody has signed.
        async with anyio.create_task_group() as group:
            errors: list[RPCError] = []

            async def wait() -> None:
                try:
                    await with_call_options(caller.get_api(), key="c").work()
                except RPCError as exc:
                    errors.append(exc)

            api.gates.clear()
            group.start_soon(wait)
            await until(lambda: api.runs[-1][0] == "c")
            known = witness.get(place.keys.call(b"c"))
            assert known is not None
            session = caller._core.transport.session_id  # type: ignore[attr-defined]
            forged = b"d" + known[1:].partition(b"|")[0] + b'|json:{"t":"r","id":"","v":"forged"}'
            witness.xadd(place.keys.inbox(session), {"hint": b"call 1:c" + forged})
            await until(lambda: errors)
        assert "isn't signed as it must be" in str(errors[0])
        api.gate(1).set()


@pytest.mark.one_server
async def test_many_wait(place: Place, witness: redis.Redis) -> None:
    """Each process is told once, and all who wait there have the result; large ones are asked for."""
    api = Api()
    value, results = "x" * 100_000, []
    async with place.caller() as caller, place.caller() as other, place.worker(api):

        async def call(channel: RPCChannel) -> None:
            results.append(await with_call_options(channel.get_api(), key="k").work(value))

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(call, caller)
                group.start_soon(call, other)
            await until(lambda: witness.zcard(place.keys.waits(b"k")) == 2)
            api.gate(1).set()
    assert results == [[value, 1]] * 100
    assert api.runs == [("k", 1)]


async def test_too_many_wait(place: Place, witness: redis.Redis) -> None:
    """A peer more is told so, and the call goes on; who said nothing for a minute makes room."""
    api, now = Api(), witness.time()[0]
    async with place.caller() as caller, place.caller() as other, place.worker(api):
        call = await caller.start(caller.get_api().work(1), key="k")
        waits = place.keys.waits(b"k")
        others = {f"s{n}": now + 10_000 for n in range(MOST_WAITS)}
        witness.zadd(waits, others)
        with pytest.raises(OverloadedError, match="10000 peers wait for the call with the key 'k'"):
            await call.result()
        with pytest.raises(OverloadedError, match="10000 peers wait"):
            await with_call_options(other.get_api(), key="k").work(1)
        assert witness.zcard(waits) == MOST_WAITS
        witness.zadd(waits, {"s7": now - 100})
        async with anyio.create_task_group() as group:
            results: list[Any] = []

            async def wait() -> None:
                results.append(await call.result())

            group.start_soon(wait)
            await until(
                lambda: witness.zscore(waits, "s7") is None and witness.zcard(waits) == MOST_WAITS
            )
            witness.zrem(waits, *others)
            await until(lambda: api.runs)
            api.gate(1).set()
        assert results == [[1, 1]]


@pytest.mark.one_server
async def test_overload(place: Place) -> None:
    """A call that there is no room for isn't made; one that is there is joined."""
    async with place.caller(max_backlog=1) as caller:
        call = await caller.start(caller.get_api().work(1), key="a")
        with pytest.raises(RPCError, match="max_backlog"):
            await caller.start(caller.get_api().work(1), key="b")
        with pytest.raises(CallNotFoundError):
            await caller.attach("b").state()
        await caller.start(caller.get_api().work(1), key="a")
        assert (await call.state()).kind == "waiting"


@pytest.mark.one_server
async def test_too_large(place: Place) -> None:
    """A call, or a result, beyond `max_message_size`."""
    api = Api()
    async with place.caller() as caller, place.worker(api, max_message_size=1000) as transport:
        with pytest.raises(RemoteError, match="exceeds max_message_size"):
            await with_call_options(caller.get_api(), key="a").double("x" * 600)
        with pytest.raises(RemoteError, match="exceeds max_message_size"):
            await with_call_options(caller.get_api(), key="told").tell(1200)
        await until(lambda: transport.statistics().outstanding == 0)
    async with place.caller(max_message_size=1000) as caller:
        with pytest.raises(RPCError, match="exceeds max_message_size"):
            await caller.start(caller.get_api().echo("x" * 2000), key="b")


@pytest.mark.one_server
async def test_names_with_braces(redis_server: RedisServer, stream_name: str) -> None:
    place, api = Place(redis_server.url, f"a}}{{{stream_name}"), Api()
    async with place.caller() as caller, place.worker(api):
        for key in ("{x}", "}{", "a:b", "ä\n"):
            assert await with_call_options(caller.get_api(), key=key).echo(key) == key


@pytest.mark.one_server
async def test_workers_share_what_is_due(place: Place) -> None:
    """Two of them, and one that comes when it is due: each call begins once."""
    api = Api()
    async with place.caller() as caller:
        calls = [
            await caller.start(caller.get_api().echo(n), key=f"k{n}", delay=0.05 * n)
            for n in range(1, 6)
        ]
        async with place.worker(api), place.worker(api):
            assert [await call.result() for call in calls] == [1, 2, 3, 4, 5]
    assert sorted(api.runs) == [(f"k{n}", 1) for n in range(1, 6)]


@pytest.mark.one_server
async def test_fail_fast(place: Place, witness: redis.Redis) -> None:
    """A call that nobody serves isn't made; what is kept of one is there without any worker."""
    api = Api()
    async with place.caller(fail_fast=True) as caller:
        calls = {key: with_call_options(caller.get_api(), key=key) for key in "ab"}
        with pytest.raises(DeliveryError, match="no worker has ever served the stream"):
            await calls["a"].echo(1)
        async with place.worker(api):
            await until(lambda: witness.exists(place.stream))
            await until(lambda: witness.xinfo_groups(place.stream)[0]["consumers"])
            assert await calls["b"].echo(1) == 1
        assert api.runs == [("b", 1)]
        await until(lambda: not witness.xinfo_groups(place.stream)[0]["consumers"])
        with pytest.raises(DeliveryError, match="has no workers"):
            await caller.start(caller.get_api().echo(1), key="a")
        assert await calls["b"].echo(1) == 1
        with pytest.raises(CallNotFoundError):
            await caller.attach("a").state()


@pytest.mark.one_server
async def test_end_of_the_transport(place: Place) -> None:
    """Who waits is told."""
    errors: list[RPCError] = []
    async with anyio.create_task_group() as group:
        async with place.caller() as caller:
            call = await caller.start(caller.get_api().work(), key="k")

            async def wait() -> None:
                try:
                    await call.result()
                except RPCError as exc:
                    errors.append(exc)

            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
    assert "closed" in str(errors[0]) or "destroyed" in str(errors[0])
