"""The picture of tasks shows those that there are."""

from __future__ import annotations

import re

import anyio
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

from .pages import ROOT

PREFIX = "anyio_kkrpc "
# Parts of every connection, and of the channel where the picture has a word for several.
OTHERS = {"redis read", "redis write", "server", "handler"}


def names() -> set[str]:
    """Return the names of this library's tasks."""
    found = (task.name or "" for task in anyio.get_running_tasks())
    return {name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)}


def drawn() -> set[str]:
    """Return the headings of the boxes, those of the transport with ``redis`` before them."""
    text = (ROOT / "docs" / "images" / "tasks.svg").read_text()
    above, below = text.split("async with RedisStreamsTransport", 1)
    headings = [
        re.findall(r'font-size="1[23]"[^>]*font-weight="600">([^<]+)<', part)
        for part in (above, below)
    ]
    return {*headings[0], *(f"redis {name}" for name in headings[1])}


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.one_server
async def test_tasks(redis_server: RedisServer, stream_name: str) -> None:
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, max_len=1000
        ) as transport,
        RPCChannel(transport, expose={"f": print}, timeout=BOUND),
    ):
        expected = {name for name in drawn() if name not in {"crew", "pumps", "callbacks"}}
        with anyio.fail_after(BOUND):
            while names() - OTHERS != expected:
                await anyio.sleep(0.01)
