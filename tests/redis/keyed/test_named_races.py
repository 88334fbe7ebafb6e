"""Races of calls with keys that are known from elsewhere, each by its name, on a real server.

| race | test |
| --- | --- |
| the caller is killed in the write of its claim | `test_caller_is_killed_while_it_claims` |
| the worker is killed between what keeps a result and the words to who waits | `test_races.test_lost_hint` |
| a worker stands still before the handler for longer than ``claim_idle`` | `test_worker_stands_still_before_the_handler`; a process: `tests/faults/test_workers.py::test_stopped_worker` |
| two processes with one consumer name | `test_two_workers_of_one_name` |
| the last of three leaves, one of whom was killed | `test_last_of_three_leaves` |
| 10,000 wait for one key | `test_races.test_too_many_wait` |
| a cancel before delivery, while it runs, after it, with its worker gone | `test_races.test_cancel_before_delivery`, `test_cancel_whose_hint_is_lost`, `test_cancelled_while_its_worker_is_gone` |
| what is kept is evicted, or the server forgets all | `test_races.test_what_is_kept_is_evicted`, `test_server_forgets` |
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest
import redis

from anyio_kkrpc import CallCancelledError, RPCChannel, with_call_options
from anyio_kkrpc.redis._keyed._scripts import CLAIM
from anyio_kkrpc.testing._server import RedisServer
from tests.faults.proxy import Proxy

from .test_races import Api, Place, script, until

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]


@pytest.fixture
def place(redis_server: RedisServer, stream_name: str) -> Place:
    return Place(redis_server.url, stream_name)


def going() -> Api:
    """Return what doesn't wait."""
    api = Api()
    for attempt in (1, 2):
        api.gate(attempt).set()
    return api


@pytest.mark.parametrize("part", [0.3, 0.9, 1])
async def test_caller_is_killed_while_it_claims(
    place: Place, middle: Proxy, witness: redis.Redis, part: float
) -> None:
    """Redis has the call or hasn't; who makes it again has its result, and it runs once."""
    api, written = going(), []
    call_key = place.keys.call(b"k")

    def is_claim(data: bytes) -> bool:
        found = script(CLAIM)(data)
        if found:
            written.append(data)
        return found

    async with place.caller() as caller, place.caller(middle.url) as killed, place.worker(api):
        warm = await caller.start(caller.get_api().work(0), key="warm")  # it knows the script now
        assert await warm.result() == [0, 1]
        api.gates[1] = anyio.Event()
        middle.silence(is_claim)
        async with anyio.create_task_group() as group:
            group.start_soon(with_call_options(killed.get_api(), key="k").work, 7)
            await until(lambda: written)
            where = urlsplit(place.url)
            async with await anyio.connect_tcp(str(where.hostname), where.port or 0) as socket:
                await socket.send(written[0][: int(len(written[0]) * part)])
            if part == 1:
                await until(lambda: witness.exists(call_key))
            group.start_soon(middle.cut)
            middle.refuse()
            api.gate(1).set()
            assert await with_call_options(caller.get_api(), key="k").work(7) == [7, 1]
            group.cancel_scope.cancel()
        middle.refuse(False)
    assert api.runs == [("warm", 1), ("k", 1)]


async def test_worker_stands_still_before_the_handler(
    place: Place, middle: Proxy, witness: redis.Redis
) -> None:
    """It doesn't begin what another one has got, and brought to its end, meanwhile."""
    api = going()
    async with place.caller() as caller, place.worker(api, middle.url):
        names = caller.get_api()
        assert await (await caller.start(names.work(0), key="warm")).result() == [0, 1]
        middle.freeze(up=False)
        call = await caller.start(names.work(7), key="k")
        await until(lambda: witness.xpending(place.stream, "kkrpc-group")["pending"])
        async with place.worker(api):
            assert await call.result() == [7, 2]
        middle.thaw()
        last = await caller.start(names.work(1), key="last")
        assert await last.result() == [1, 1]
    assert api.runs == [("warm", 1), ("k", 2), ("last", 1)]


@pytest.mark.parametrize("failing", [True, False])
async def test_two_workers_of_one_name(place: Place, witness: redis.Redis, failing: bool) -> None:
    """Both run it, as the one takes what the other has for its own: one result is kept, and it is
    that of an attempt that Redis knows; the failure of the other one is none.
    """
    api, names = Api(), {"consumer_name": "me"}
    if failing:
        api.failing.add(1)
    async with place.caller() as caller, place.worker(api, **names) as first:
        call = await caller.start(caller.get_api().work(7), key="k")
        await until(lambda: api.runs == [("k", 1)])
        async with place.worker(api, **names):
            await until(lambda: api.runs == [("k", 1), ("k", 2)])
            api.gate(1).set()
            await until(lambda: 1 in api.ended and not first._lane.keyed.work._open)
            if failing:
                assert (await call.state()).kind == "running"
            api.gate(2).set()
            expected = [7, 2 if failing else 1]
            assert await call.result() == expected
            await until(lambda: 2 in api.ended)
            assert await with_call_options(caller.get_api(), key="k").work(7) == expected
    assert len(api.runs) == 2


@pytest.mark.parametrize("long_ago", [True, False])
async def test_last_of_three_leaves(
    place: Place, middle: Proxy, witness: redis.Redis, long_ago: bool
) -> None:
    """With `cancel_when_left` that cancels the call, once the one that was killed has said nothing
    for 15 seconds: until then it may be there.
    """
    api, waits = Api(), place.keys.waits(b"k")
    options: dict[str, Any] = {"key": "k", "cancel_when_left": True}

    async def call(channel: RPCChannel, scope: anyio.CancelScope) -> None:
        with scope:
            await with_call_options(channel.get_api(), **options).work(7)

    async with (
        place.caller() as one,
        place.caller() as two,
        place.caller(middle.url) as killed,
        place.worker(api),
        anyio.create_task_group() as group,
    ):
        scopes = [anyio.CancelScope() for _ in range(3)]
        group.start_soon(call, killed, scopes[2])
        await until(lambda: api.runs)
        group.start_soon(call, one, scopes[0])
        group.start_soon(call, two, scopes[1])
        await until(lambda: witness.zcard(waits) == 3)
        middle.freeze()
        session: str = killed._core.transport.session_id  # type: ignore[attr-defined]
        if long_ago:
            witness.zadd(waits, {session: witness.time()[0] - 16})
        for left, scope in ((2, scopes[0]), (1, scopes[1])):
            assert (await one.attach("k").state()).kind == "running"
            scope.cancel()
            if left == 2 or not long_ago:
                await until(lambda left=left: witness.zcard(waits) == left)
        if long_ago:
            await until(lambda: api.cancelled)  # nobody may wait again before that
            with pytest.raises(CallCancelledError):
                await one.attach("k").result()
        else:
            assert (await one.attach("k").state()).kind == "running"
            api.gate(1).set()
        scopes[2].cancel()
        middle.thaw()
