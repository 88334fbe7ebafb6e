"""How many Python functions of the package one warm call runs, counted at client and worker.

The numbers may only shrink. They are of Python 3.11; other versions don't differ in what is called.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from anyio_kkrpc import MemoryTransport, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing._server import RedisServer

from .source import ROOT

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

# Functions entered or resumed per call, client and group worker together.
MOST = {"asyncio": 157, "trio": 152}
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


async def test_python_calls_per_call(
    anyio_backend: Any, redis_server: RedisServer, stream_name: str
) -> None:
    """One at a time: what many at once share isn't shared here, so this is the most."""
    options: Any = {"stream": stream_name, "use_consumer_group": True}
    url = redis_server.url
    rounds: list[Counter[str]] = []
    most = MOST[anyio_backend[0]] + _SELDOM
    async with (
        RedisStreamsTransport(url, **options) as worker,
        RPCChannel(worker, expose=Api()),
        RedisStreamsTransport(url, **options) as client,
        RPCChannel(client) as channel,
    ):
        api = channel.get_api()
        for _ in range(CALLS):
            await api.add(1, 2)
        while len(rounds) < ROUNDS:  # the keeping of the house may fall into some of them
            with counted() as counter:
                for _ in range(CALLS):
                    await api.add(1, 2)
            rounds.append(counter)
            if counter.total() <= most * CALLS:
                break
    least = min(rounds, key=Counter.total)
    found = least.total() / CALLS
    assert found > 50, "the count is wrong"
    assert found <= most, least.most_common(60)


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
