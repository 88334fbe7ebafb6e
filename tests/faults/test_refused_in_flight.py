"""Servers that refuse commands for a while, and calls that are in flight through all of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    OverloadedError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

# Calls that are being handled when the server begins to refuse.
HELD = 20


class Api:
    def __init__(self) -> None:
        self.ran: list[int] = []
        self.called_back: list[int] = []
        self.gate = anyio.Event()

    async def work(self, number: int) -> int:
        self.ran.append(number)
        if number < HELD:
            await self.gate.wait()
        return number

    async def items(self) -> AsyncIterator[int]:
        for number in range(2 * HELD):
            if number == HELD:
                await self.gate.wait()
            yield number

    async def call_back(self, function: Callable[[int], Any]) -> None:
        async def call(number: int) -> None:
            self.called_back.append(number)
            await function(number)

        await call(0)
        await self.gate.wait()
        async with anyio.create_task_group() as group:
            for number in range(1, HELD):
                group.start_soon(call, number)


class State:
    """What makes a server refuse commands, and what ends it."""

    def __init__(self, name: str, server: RedisServer, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.admin = redis.Redis.from_url(server.url)
        self._script: threading.Thread | None = None

    def begin(self) -> None:
        admin = self.admin
        if self.name == "oom":
            admin.config_set("maxmemory", "1mb")
        elif self.name == "noreplicas":
            admin.config_set("min-replicas-to-write", 1)
        elif self.name == "readonly":
            admin.replicaof("127.0.0.1", 1)
        elif self.name == "misconf":
            admin.config_set("save", "3600 1")
            shutil.rmtree(self.directory)
            admin.bgsave()
        else:
            admin.config_set("busy-reply-threshold", 1)
            self._script = threading.Thread(target=self._spin)
            self._script.start()

    def refuses(self) -> bool:
        """Whether it has begun."""
        if self.name == "misconf":
            return bool(self.admin.info("persistence")["rdb_last_bgsave_status"] == "err")
        if self.name == "busy":
            try:
                self.admin.ping()
            except redis.ResponseError:
                return True
            return False
        return True

    def end(self) -> None:
        admin = self.admin
        if self.name == "oom":
            admin.config_set("maxmemory", 0)
        elif self.name == "noreplicas":
            admin.config_set("min-replicas-to-write", 0)
        elif self.name == "readonly":
            admin.replicaof("NO", "ONE")
        elif self.name == "misconf":
            admin.config_set("stop-writes-on-bgsave-error", "no")
            admin.config_set("save", "")  # else it won't end without having saved
        elif self._script is not None and self._script.is_alive():
            admin.script_kill()
            self._script.join(BOUND)

    def _spin(self) -> None:
        with pytest.raises(redis.ResponseError, match=r"killed|SCRIPT KILL"):
            self.admin.eval("while true do end", 0)


@pytest.fixture(params=["oom", "noreplicas", "readonly", "misconf", "busy"])
def state(
    request: pytest.FixtureRequest, server_executable: str, tmp_path: Path
) -> Iterator[tuple[State, str]]:
    """A server of the test's own, and what makes it refuse."""
    directory = tmp_path / "data"
    directory.mkdir()
    with RedisServer(server_executable, directory=directory) as server:
        state = State(request.param, server, directory)
        yield state, server.url
        state.end()
        state.admin.close()


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def refusals(transport: RedisStreamsTransport) -> int:
    return transport._outages.refused + transport._lane.link.reconnects


async def test_calls_live_through_refusals(
    state: tuple[State, str], stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All that was asked is answered once and in order, and nothing is acknowledged unanswered."""
    server, url = state
    api, results, items, called_back = Api(), [], [], []
    options: Any = {
        "stream": stream_name,
        "use_consumer_group": True,
        "block_timeout": 0.2,
        "health_check_interval": 0.3,
    }

    async def call(remote: Any, number: int) -> None:
        results.append(await remote.work(number))

    async def read(remote: Any) -> None:
        async for item in remote.items():
            items.append(item)

    async def call_back(remote: Any) -> None:
        await remote.call_back(called_back.append)
        results.append(-1)

    def pending() -> int:
        return int(server.admin.xpending(stream_name, "kkrpc-group")["pending"])

    async with (
        RedisStreamsTransport(url, **options) as serving,
        RedisStreamsTransport(url, **options) as using,
        RPCChannel(serving, expose=api, max_concurrency=2 * HELD),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        remote = channel.get_api()
        async with anyio.create_task_group() as group:
            for number in range(HELD):
                group.start_soon(call, remote, number)
            group.start_soon(read, remote)
            group.start_soon(call_back, remote)
            await until(lambda: len(api.ran) == len(items) == HELD and called_back == [0])
            server.begin()
            await until(server.refuses)
            api.gate.set()
            short = with_call_options(remote, timeout=0.3)
            expected = OverloadedError if server.name == "oom" else RPCTimeoutError
            with anyio.fail_after(BOUND), pytest.raises(expected):
                await short.work(HELD)
            # By then replies, acknowledgements, housekeeping and looks have been refused. Without
            # memory a client is refused its requests only.
            await until(lambda: refusals(serving) > 2)
            if server.name != "oom":
                await until(lambda: refusals(using) > 2)
            if server.name != "busy":
                await until(lambda: pending() == HELD + 1)  # and not more, nor less
            assert results == []
            if server.name != "oom":
                group.start_soon(call, remote, HELD + 1)
            server.end()
        assert sorted(results) == sorted(
            [-1, *range(HELD), *([] if server.name == "oom" else [HELD + 1])]
        )
        assert items == list(range(2 * HELD))
        assert called_back == api.called_back
        assert len(called_back) == HELD
        assert await remote.work(HELD + 2) == HELD + 2
        await until(lambda: pending() == 0)
        assert sorted(api.ran) == sorted({*api.ran} - {HELD})
        assert serving.statistics().undeliverable == 0
        assert using.statistics().undeliverable <= 1  # the one that was refused, or not in time
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
