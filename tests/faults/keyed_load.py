"""Calls with keys, and a stream that is kept, while something happens to their server."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread

from anyio_kkrpc import (
    ItemsLostError,
    RedisStreamsTransport,
    RPCChannel,
    StreamRestartedError,
    current_call,
    with_call_options,
)
from benchmarks.failover import STREAM
from tests.bounds import BOUND, CALL_BOUND

# Callers of each key, calls with different keys at a time, and items and calls from one event to the next.
ASKERS, AT_ONCE, SOME = 2, 4, 10
OPTIONS: dict[str, Any] = {"stream": STREAM, "use_consumer_group": True}


class KeyedLoad:
    """Has calls made while something happens, and looks at what became of them.

    :ivar runs: how often each was run
    :ivar numbers: of the items that were read, in this order
    :ivar lost: what a server has lost, as who asked it has learnt
    """

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.numbers: list[int] = []
        self.lost: list[str] = []
        self._answered = 0
        self._mine = uuid.uuid4().hex
        self._enough = False

    # Served

    def charge(self, order: int) -> list[int]:
        self.runs[order] += 1
        return [order, self.runs[order]]

    async def count(self) -> AsyncIterator[int]:
        last = await current_call().resume()
        number = 0 if last is None else last.number
        while not self._enough:
            number += 1
            yield number
            await anyio.sleep(0.02)

    # Asked

    async def see(self, url: str, *events: Callable[[], object]) -> None:
        """Have all that happen one after the other, with calls before, meanwhile and after."""
        with anyio.fail_after(CALL_BOUND):
            async with (
                RedisStreamsTransport(url, **OPTIONS) as serving,
                RedisStreamsTransport(url, **OPTIONS) as using,
                RedisStreamsTransport(url, **OPTIONS) as reading,
                RPCChannel(serving, expose={"charge": self.charge, "count": self.count}),
                RPCChannel(using, timeout=CALL_BOUND) as channel,
                RPCChannel(reading, timeout=CALL_BOUND) as reader,
            ):
                call = await channel.start(channel.get_api().count(), key=self._mine)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._read, reader)
                    for lane in range(AT_ONCE):
                        group.start_soon(self._ask, (channel, reader), lane)
                    await self._some()
                    for event in events:
                        await anyio.to_thread.run_sync(event)
                        await self._some()
                    self._enough = True
                assert (await call.state()).kind == "done"

    async def _some(self) -> None:
        """Wait until calls and items go on."""
        calls, items = self._answered + SOME, len(self.numbers) + SOME
        with anyio.fail_after(BOUND):
            while self._answered < calls or len(self.numbers) < items:
                await anyio.sleep(0.02)

    async def _read(self, reader: RPCChannel) -> None:
        call, after, begins = reader.attach(self._mine), None, True
        while True:
            try:
                async for item in call.items(after=after):
                    assert item.value == item.number
                    # Nothing is left out without an error.
                    assert begins or item.number == self.numbers[-1] + 1
                    self.numbers.append(item.number)
                    begins = False
                return
            except StreamRestartedError:
                after = None
            except ItemsLostError as exc:
                after = exc.position
            self.lost.append("items")
            begins = True

    async def _ask(self, channels: tuple[RPCChannel, ...], lane: int) -> None:
        order = lane
        while not self._enough:
            results: list[list[int]] = []
            async with anyio.create_task_group() as group:
                for channel in channels:
                    group.start_soon(self._charge, channel, order, results)
            assert len(results) == ASKERS
            if results[0] != results[1]:  # one result for all who asked
                self.lost.append("a result")
            self._answered += 1
            order += AT_ONCE

    async def _charge(self, channel: RPCChannel, order: int, results: list[list[int]]) -> None:
        api = with_call_options(channel.get_api(), key=f"{self._mine}-{order}", keep=600)
        results.append(await api.charge(order))
        await anyio.sleep(0.01)
