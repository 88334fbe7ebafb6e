"""Users of Redis with the rights that older versions of the docs gave them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, expose
from anyio_kkrpc.testing import RedisServer

from . import peer
from .peer import BOUND, EXPECTED, Api

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]
# What docs/security.md gave to a user of the stream "jobs", one rule after the other.
RULES = (
    "~jobs ~{jobs}:* -@all +@stream +@connection +eval +info +time +exists +del +pexpire",
    "~jobs ~{jobs}:* -@all +@stream +@connection +eval +info +role +time +exists +del +pexpire",
    (
        "~jobs ~{jobs}:* -@all +@stream +@connection +eval +info +role +time +exists +del +pexpire"
        " +evalsha +get +set +setrange +pttl +zadd +zrem +zcount +zrange +zrangebyscore +zscore"
    ),
)

# What a worker says that may not note who waits at the stream.
_LACKS = re.compile("refuses a turn at the stream: ")


@pytest.fixture
def anyio_backend() -> str:
    """Any one: what may be written doesn't depend on it."""
    return "asyncio"


@pytest.fixture(params=RULES, ids=["first", "with role", "with keys"])
def url(request: pytest.FixtureRequest, own_server: RedisServer) -> str:
    """The server's URL as a user with such rights."""
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command(f"ACL SETUSER shop on >secret resetkeys {request.param}")
    return f"redis://shop:secret@127.0.0.1:{own_server.port}"


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_calls(
    url: str, own_server: RedisServer, grouped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """All works, housekeeping included; no peer warns more than once of a right that it lacks."""
    common: dict[str, Any] = {"url": url, "stream": "jobs"}
    async with (
        RedisStreamsTransport(
            **common,
            session_id="served",
            use_consumer_group=grouped,
            max_len=1000,
            inbox_ttl=9,
        ) as transport,
        RPCChannel(transport, expose=expose(Api(), writable=["theme"])) as channel,
    ):
        found = await peer.exercise(codec="json", worker="served", grouped=grouped, **common)
        expected = {**EXPECTED, "invalid": 0}
        if not grouped:
            del expected["not found"]
        assert found == expected
        assert transport.statistics().invalid == 0
        with redis.Redis.from_url(own_server.url) as raw, anyio.fail_after(BOUND):
            before = left = raw.pttl("{jobs}:inbox:served")
            while left <= before:
                await anyio.sleep(0.1)
                before, left = left, raw.pttl("{jobs}:inbox:served")
        await peer.signal_destroy(**common)
        with anyio.fail_after(BOUND):
            await channel.serve_forever()
    _no_more_than_one_warning_each(caplog)


async def test_lost_requests(
    url: str, own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What a dead worker held is claimed, given up, looked at and put back."""
    common: dict[str, Any] = {"url": url, "stream": "jobs"}
    api = Api()
    with redis.Redis.from_url(own_server.url) as raw:
        async with RedisStreamsTransport(**common, use_consumer_group=True) as using:
            await _ask_one_that_dies(using, raw)
            await peer.give_up_dead(**common)
            (letter,) = await peer.retry_dead(**common)
            assert letter["attempts"] == 1
            assert raw.xreadgroup("kkrpc-group", "gone", {"jobs": ">"})
            with anyio.fail_after(BOUND):
                async with (
                    RedisStreamsTransport(
                        **common, use_consumer_group=True, claim_idle=1
                    ) as serving,
                    RPCChannel(serving, expose=api),
                ):
                    while not api.noted():
                        await anyio.sleep(0.01)
                    assert serving.statistics().claimed
    _no_more_than_one_warning_each(caplog)


async def _ask_one_that_dies(using: RedisStreamsTransport, raw: redis.Redis) -> None:
    async with RPCChannel(using) as channel:
        raw.xgroup_create("jobs", "kkrpc-group", "0", mkstream=True)
        await peer.with_call_options(channel.get_api(), reply=False).note()
        assert raw.xreadgroup("kkrpc-group", "gone", {"jobs": ">"})


def _no_more_than_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    told = Counter(
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
        and not re.search(r"became a dead letter| failed: request ", record.getMessage())
    )
    parts = Counter(_LACKS.search(text) is not None for text in told)
    assert parts[False] <= 1, told
    assert parts[True] <= 1, told
    rights = re.compile("NOPERM|ACL failure in script|The user executing the script can't")
    assert all(rights.search(text) and count <= 3 for text, count in told.items()), told
