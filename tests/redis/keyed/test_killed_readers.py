"""Processes that read a stream of a call with a key are killed in its middle: 20 of them, or with
``KKRPC_KILLED_READERS=20,50`` a thousand, 20 at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import anyio
import pytest

from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND

from .test_races import Place

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

# How many at a time, and how often.
AT_A_TIME, ROUNDS = map(int, os.environ.get("KKRPC_KILLED_READERS", "4,5").split(","))


class Api:
    """Yields for as long as readers are killed."""

    async def count(self, items: int) -> AsyncIterator[int]:
        for number in range(1, items + 1):
            yield number
            if number % 20 == 0:
                await anyio.sleep(0.001)


async def test_killed_readers(
    redis_server: RedisServer, stream_name: str, anyio_backend_name: str, anyio_backend: object
) -> None:
    """Others read on where they were: every item comes once and in order."""
    place, items = Place(redis_server.url, stream_name), 60 * ROUNDS
    backend = "uvloop" if "uvloop" in str(anyio_backend) else anyio_backend_name
    command = [sys.executable, "-m", "tests.redis.keyed.readers", backend, place.url, stream_name]
    async with place.caller() as caller, place.worker(Api(), claim_idle=BOUND):
        await caller.start(caller.get_api().count(items), key="k")
        with anyio.fail_after(BOUND * max(1, AT_A_TIME * ROUNDS // 50)):
            done = await anyio.run_process([*command, *map(str, (items, ROUNDS, AT_A_TIME))])
    assert int(done.stdout) == AT_A_TIME * ROUNDS
