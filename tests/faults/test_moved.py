"""Nodes of a Cluster that refuse commands, scripted: peers go where they are led, or look around."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import pytest

from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.fake_server import FakeServer, fake_server

from .test_refusals import ELSEWHERE, PARTS, PASSING, Peers, lines, peers, until

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]


MOVING = [reply for reply in PASSING if reply.startswith(("ASK ", "TRYAGAIN "))]


def where(node: FakeServer) -> str:
    return urlsplit(node.url).netloc


@asynccontextmanager
async def two_nodes(
    server: RedisServer, stream: str, *, both: bool = False
) -> AsyncIterator[tuple[FakeServer, FakeServer, Peers]]:
    """Run a worker that knows the first of two nodes, or both; they have one server behind them."""
    async with fake_server(server.url) as first, fake_server(server.url) as second:
        second.refuse(f"MOVED 3999 {where(first)}")
        url = f"redis+cluster://{where(first)}"
        if both:
            url += f",{where(second)}"
        async with peers(url, server.url, stream) as p:
            assert await p.remote.add(1, 2) == 3
            yield first, second, p
            first.accept()
            second.accept()


async def test_where_moved_leads(redis_server: RedisServer, stream_name: str) -> None:
    """Whichever part of a peer is told so first, all of it goes there."""
    async with two_nodes(redis_server, stream_name) as (first, second, p):
        for part in PARTS:
            second.accept()
            first.refuse(f"MOVED 3999 {where(second)}", *PARTS[part])
            with anyio.fail_after(BOUND):
                await first.wait_refused()
            await until(lambda: p.serving.server_address[1] == urlsplit(second.url).port)
            assert await p.remote.add(1, 2) == 3
            first, second = second, first
        assert not p.worker.closed
        assert p.serving.statistics().invalid == 0


async def test_node_that_can_not_help(redis_server: RedisServer, stream_name: str) -> None:
    """Another one is asked where the stream is."""
    async with two_nodes(redis_server, stream_name, both=True) as (first, second, p):
        for reply in ELSEWHERE:
            first.refuse(reply)
            with anyio.fail_after(BOUND):
                await first.wait_refused(2)
            second.accept()
            assert await p.remote.add(1, 2) == 3
            first, second = second, first
        assert not p.worker.closed


async def test_slot_that_moves(
    redis_server: RedisServer, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While it does, all waits where it is; then it goes after it."""
    async with two_nodes(redis_server, stream_name) as (first, second, p):
        for reply in MOVING:
            results = []

            async def call(number: int) -> None:
                results.append(await p.remote.add(number, 0))

            first.refuse(reply, "XREAD", "XREADGROUP", "EVAL", "XADD", "PEXPIRE")
            async with anyio.create_task_group() as group:
                for number in range(20):
                    group.start_soon(call, number)
                with anyio.fail_after(BOUND):
                    await first.wait_refused(20)
                second.accept()
                first.refuse(f"MOVED 3999 {where(second)}")
            assert sorted(results) == list(range(20))
            first, second = second, first
        assert not p.worker.closed
        assert not lines(caplog, logging.ERROR)
