"""All that belongs to one stream, without a transport: what begins and what ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._enter import enter
from anyio_kkrpc.redis._lane import Lane
from anyio_kkrpc.redis._making import make_dialects, make_reception
from anyio_kkrpc.redis._options import GivenOptions, check_options
from anyio_kkrpc.redis._reading._requests import Reading
from anyio_kkrpc.redis._statistics import statistics_of
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.redis.parts import id_of, request, written

pytestmark = pytest.mark.anyio


class Owner:
    """What has a lane: its reception, and whom it tells."""

    def __init__(self, url: str = "redis://nowhere", **options: Any) -> None:
        self.options = check_options(
            GivenOptions(url, session_id="me", connect_timeout=BOUND, **options)
        )
        self.failures: list[Exception] = []
        self.outages = Outages(self.options.target)
        dialects = make_dialects(self.options, lambda envelope: None)
        self.reception = make_reception(
            self.options,
            decode=dialects.decode_whole,
            dropped=lambda token: self.lane.worker.held.drop(token),
            finished=lambda token: self.lane.worker.finish(token),
        )
        self.lane = Lane(
            self.options,
            dialects,
            self.reception,
            self.outages,
            failed=self.failures.append,
            destroyed=self.failures.append,
        )

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Lane]:
        async with anyio.create_task_group() as tasks:
            assert await enter(self.lane, self.options, tasks) is None
            try:
                yield self.lane
            finally:
                self.end()
                with anyio.move_on_after(BOUND, shield=True):
                    await self.lane.farewell()
                self.lane.close(TransportClosedError("over"))
                tasks.cancel_scope.cancel()

    def end(self) -> None:
        self.reception.end(TransportClosedError("over"))
        self.lane.stop(TransportClosedError("over"))


@pytest.mark.parametrize("grouped", [False, True])
async def test_nothing_begins_by_itself(grouped: bool) -> None:
    """Whatever is wanted before it has started is done then; and it can end all the same."""
    owner = Owner(use_consumer_group=grouped)
    lane = owner.lane
    lane.serve(3, listening=True)
    assert lane.requests.reading is Reading.NOT
    assert lane.worker.keeper.room.limit == 3
    statistics = statistics_of(owner.reception, [lane])
    assert statistics.queue.current_items == statistics.sent == statistics.received == 0
    owner.end()
    await lane.farewell()
    lane.close(TransportClosedError("over"))
    with pytest.raises(TransportClosedError, match="over"):
        await lane.writer.flush()
    assert owner.failures == []


@pytest.mark.server
@pytest.mark.one_server
@pytest.mark.parametrize("grouped", [False, True])
async def test_life(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """It reads while requests are wanted, and leaves no key but the stream behind."""
    owner = Owner(redis_server.url, stream=stream_name, use_consumer_group=grouped)
    keys = [f"{{{stream_name}}}:inbox:me"]
    async with owner.started() as lane:
        assert witness.exists(*keys) == 1
        assert lane.requests.reading is (Reading.NOT if grouped else Reading.ON)
        lane.serve(1, listening=True)
        assert lane.requests.reading is Reading.ON
        add(witness, stream_name, request("a"))
        with anyio.fail_after(BOUND):
            assert id_of(await owner.reception.inbound.receive()) == "a"
        assert len(lane.worker.held.entries) == grouped
        lane.serve(0, listening=True)
        with anyio.fail_after(BOUND):
            await lane.requests.wait_stopped()
    assert witness.exists(*keys) == 0
    assert owner.failures == []
    assert statistics_of(owner.reception, [lane]).received == 1
    if grouped:
        pending = witness.xpending(stream_name, "kkrpc-group")
        assert pending["pending"] == 1  # handed back, for others to take at once
        assert pending["consumers"][0]["name"] == b"kkrpc-handed-back"


@pytest.mark.server
@pytest.mark.one_server
async def test_two_lanes(redis_server: RedisServer, witness: redis.Redis, stream_name: str) -> None:
    """Each has its stream; what one does is not the other's affair."""
    names = [f"{stream_name}:{number}" for number in range(2)]
    owners = [Owner(redis_server.url, stream=name) for name in names]
    async with owners[0].started(), owners[1].started():
        for name in names:
            add(witness, name, written(Request(name, "call", ["f"])))
        owners[0].end()
        add(witness, names[1], request("late"))
        with anyio.fail_after(BOUND):
            received = [id_of(await owners[1].reception.inbound.receive()) for _ in range(2)]
    assert received == [names[1], "late"]
    assert [owner.failures for owner in owners] == [[], []]


def add(witness: redis.Redis, stream: str, fields: list[bytes]) -> None:
    witness.xadd(stream, dict(zip(fields[::2], fields[1::2], strict=True)))
