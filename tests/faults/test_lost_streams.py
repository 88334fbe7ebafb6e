"""Streams whose other peer is killed: readers hear of it, sources are closed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
import redis
from anyio import to_thread

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RemoteError, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

# Long enough for a busy machine to say in time that it is there.
CLAIM_IDLE = 3.0


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


class Endless:
    """Sources that wait for credit, or for what they wait for, until they are closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    async def endless(self) -> AsyncIterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            self.closed.append("endless")

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])


class Process:
    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.session_id = ""

    async def start(self, backend: str, reads: str, **options: Any) -> None:
        arguments = {"backend": backend, "reads": reads, "options": options}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.streaming", json.dumps(arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = await to_thread.run_sync(self.process.stdout.readline)
        ready, self.session_id = line.split()
        assert ready == "ready"

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.kill()


async def test_killed_peer(
    redis_server: RedisServer,
    stream_name: str,
    anyio_backend_name: str,
    witness: redis.Redis,
    process: Process,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker that reads, too. Nobody has a time-out: it is presence that tells."""
    closed: list[str] = []
    errors: dict[str, Exception] = {}
    results: dict[str, int] = {}
    found: list[int] = []
    go_on = anyio.Event()

    async def read() -> None:
        try:
            async for number in channel.get_api(to=process.session_id).count():
                found.append(number)
        except DeliveryError as exc:
            errors["read"] = exc

    async def numbers(name: str) -> AsyncIterator[int]:
        try:
            if name == "new":
                await go_on.wait()
            for number in range(5):
                yield number
            if name == "used":
                await anyio.sleep_forever()
        finally:
            closed.append(name)

    async def total(name: str) -> None:
        try:
            results[name] = await channel.get_api().total(numbers(name))
        except RemoteError as exc:
            errors[name] = exc

    options: Any = {
        "url": redis_server.url,
        "stream": stream_name,
        "use_consumer_group": True,
        "claim_idle": CLAIM_IDLE,
    }
    endless = Endless()
    async with (
        # In broadcast, and without `total`, so that others run that.
        RedisStreamsTransport(**{**options, "use_consumer_group": False}) as serving,
        RedisStreamsTransport(**options) as using,
        RedisStreamsTransport(**options) as next_worker,
        RPCChannel(serving, expose={"endless": endless.endless}) as served,
        RPCChannel(using, timeout=None) as channel,
    ):
        await process.start(anyio_backend_name, serving.session_id, **options)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            producers = channel._core.conversation.producers
            for number, name in enumerate(("used", "new"), 1):
                tasks.start_soon(total, name)
                await until(lambda number=number: len(producers) == number)
            used, new = producers.values()
            await until(lambda: found)
            await until(lambda: used.sent == 5 and new.consumer == process.session_id)
            # Both ends are silent for long, and are there.
            await anyio.sleep(1.5 * CLAIM_IDLE)
            assert (errors, closed, endless.closed) == ({}, [], [])
            process.kill()
            await until(lambda: "read" in errors)
            assert not endless.closed
            assert witness.delete(
                f"{{{stream_name}}}:inbox:{process.session_id}"
            )  # its time is over
            assert found == [1]
            assert process.session_id in str(errors["read"])
            go_on.set()
            async with RPCChannel(next_worker, expose={"total": endless.total}):
                await until(lambda: results and "used" in errors)
        assert results == {"new": 10}
        assert "has had 5 items" in str(errors["used"])
        await until(lambda: len(closed) == 2 and endless.closed)
        for one in (served, channel):
            await until(lambda one=one: not one.statistics().outgoing_streams)
            assert one.statistics().incoming_streams == 0
            assert one.statistics().lost_streams
        assert any("streams that end with it: 1" in text for text in caplog.messages)
        await until(lambda: not witness.exists(f"{{{stream_name}}}:alive:{process.session_id}"))
    left = {key.decode() for key in witness.keys(f"*{stream_name}*")}
    # Who waited for requests when it was killed is forgotten by itself.
    assert left - {f"{{{stream_name}}}:turns:kkrpc-group"} == {stream_name}


@pytest.mark.one_server
async def test_stalled_worker(
    redis_server: RedisServer,
    stream_name: str,
    anyio_backend_name: str,
    witness: redis.Redis,
    process: Process,
) -> None:
    """Its readers take it for gone, as callers do; once it goes on, its sources are closed."""
    options: Any = {"url": redis_server.url, "stream": stream_name, "claim_idle": CLAIM_IDLE}
    endless = Endless()
    async with (
        RedisStreamsTransport(**options) as serving,
        RedisStreamsTransport(**options) as using,
        RPCChannel(serving, expose={"endless": endless.endless}),
        RPCChannel(using, timeout=None) as channel,
    ):
        await process.start(anyio_backend_name, serving.session_id, **options)
        alive = f"{{{stream_name}}}:alive:{process.session_id}"
        items = await channel.get_api(to=process.session_id).count()
        with anyio.fail_after(BOUND):
            assert await items.__anext__() == 1
            source = using._lane.presence._sources[process.session_id]
            await until(lambda: source.ttl)  # it was seen
            process.send(signal.SIGSTOP)
            with pytest.raises(DeliveryError, match=process.session_id):
                await items.__anext__()
            process.send(signal.SIGCONT)
            # It is there again, but says so only while it has the source of a stream.
            assert await channel.get_api(to=process.session_id).total(_two()) == 3
            await until(lambda: not witness.exists(alive))
        assert channel.statistics().lost_streams == 1
        assert not endless.closed


async def _two() -> AsyncIterator[int]:
    yield 1
    yield 2
