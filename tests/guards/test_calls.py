"""How many Python functions of the package one warm call runs, counted at client and worker.

The numbers may only shrink. They are of Python 3.11; other versions don't differ in what is called.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, cast

import pytest
import redis

from anyio_kkrpc import (
    MemoryTransport,
    RedisStreamsTransport,
    RPCChannel,
    with_call_options,
)
from anyio_kkrpc._references._marking import USE
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND

from .source import ROOT

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

# Functions entered or resumed per call, client and group worker together.
MOST = {"asyncio": 151, "trio": 143}
# The same of a call with a key, and what a slow machine does in between: two more parts look around.
MOST_WITH_KEY = {"asyncio": 219, "trio": 214}
_SELDOM_WITH_KEY = 20
# Per invocation of a function that was passed, at both sides.
MOST_PER_CALLBACK = 43
# Small shares of what is done once in many calls: trimming the inbox, a look at the clock.
_SELDOM = 1
CALLS = 50
# On a slow machine what is done in between takes place in nearly each.
ROUNDS = 10


class Api:
    async def add(self, a: int, b: int) -> int:
        return a + b


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the package's functions that are entered or resumed."""
    counter: Counter[str] = Counter()
    root = str(ROOT) + os.sep

    def count(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            counter[f"{frame.f_code.co_filename[len(root) :]}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield counter
    finally:
        sys.setprofile(before)


@pytest.fixture(autouse=True)
def no_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has passed nothing by reference yet: from then on all is looked through."""
    monkeypatch.setattr(USE, "begun", False)


@asynccontextmanager
async def calling(server: RedisServer, stream: str) -> AsyncIterator[Any]:
    """What calls a worker of a group, which is on the same event loop."""
    # What is done at times beside calls would count for more, the slower the machine is.
    seldom = ("health_check_interval", "watch_interval", "block_timeout", "claim_idle")
    options: Any = {"stream": stream, "use_consumer_group": True, "inbox_ttl": 10 * BOUND}
    options.update(dict.fromkeys(seldom, BOUND))
    async with (
        RedisStreamsTransport(server.url, **options) as worker,
        RPCChannel(worker, expose=Api()),
        RedisStreamsTransport(server.url, **options) as client,
        RPCChannel(client) as channel,
    ):
        yield channel.get_api()


async def least_of(call: Callable[[], Awaitable[object]], most: float) -> Counter[str]:
    """Return what is entered in `CALLS` of these, the least of some rounds.

    :param most: per call; a round with no more is enough
    """
    for _ in range(CALLS):
        await call()
    rounds: list[Counter[str]] = []
    while len(rounds) < ROUNDS:  # the keeping of the house may fall into some of them
        with counted() as counter:
            for _ in range(CALLS):
                await call()
        rounds.append(counter)
        if counter.total() <= most * CALLS:
            break
    return min(rounds, key=Counter.total)


async def test_python_calls_per_call(
    anyio_backend: Any, redis_server: RedisServer, stream_name: str
) -> None:
    """One at a time: what many at once share isn't shared here, so this is the most."""
    most = MOST[anyio_backend[0]] + _SELDOM
    async with calling(redis_server, stream_name) as api:
        least = await least_of(lambda: api.add(1, 2), most)
    found = least.total() / CALLS
    assert found > 50, "the count is wrong"
    assert found <= most, least.most_common(60)


async def test_python_calls_per_call_with_a_key(
    anyio_backend: Any, redis_server: RedisServer, stream_name: str
) -> None:
    """The same for one that is claimed, kept and told, each under a key of its own."""
    most = MOST_WITH_KEY[anyio_backend[0]] + _SELDOM_WITH_KEY
    numbers = itertools.count()
    async with calling(redis_server, stream_name) as api:

        def call() -> Awaitable[object]:
            keyed = with_call_options(api, key=f"{stream_name}-{next(numbers)}", keep=5)
            return cast(Awaitable[object], keyed.add(1, 2))

        least = await least_of(call, most)
    found = least.total() / CALLS
    assert found > 50, "the count is wrong"
    assert found <= most, least.most_common(60)


async def test_commands_per_call_with_a_key(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Two scripts, in which nothing is looked up but what says whose the call is."""
    names = ("evalsha", "get", "set", "xadd", "xpending", "xack", "exists", "zadd", "zrange")

    def commands() -> Counter[str]:
        known: Any = witness.info("commandstats")
        return Counter({name: known.get(f"cmdstat_{name}", {}).get("calls", 0) for name in names})

    async with calling(redis_server, stream_name) as api:
        await with_call_options(api, key=f"{stream_name}-warm", keep=5).add(1, 2)
        before = commands()
        for number in range(CALLS):
            await with_call_options(api, key=f"{stream_name}-{number}", keep=5).add(1, 2)
        more = commands() - before
    found = {name: round(more[name] / CALLS) for name in names}
    expected = {"evalsha": 2, "get": 1, "set": 2, "xadd": 2, "xpending": 1, "xack": 1, "exists": 1}
    assert found == {"zadd": 0, "zrange": 0, **expected}


class Calling:
    async def run(self, function: Any, times: int) -> None:
        for number in range(times):
            await function(number)


async def test_python_calls_per_callback(anyio_backend: Any) -> None:
    """One without a result, in memory: that others have results costs it nothing."""
    times = 640
    rounds = []
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose=Calling()), RPCChannel(a) as channel:
        api, seen = channel.get_api(), list[int]()
        for _ in range(3):
            await api.run(seen.append, times)
            with counted() as counter:
                await api.run(seen.append, times)
            rounds.append(counter)
    least = min(rounds, key=Counter.total)
    assert 20 < least.total() / times <= MOST_PER_CALLBACK, least.most_common(60)
