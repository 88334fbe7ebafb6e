"""A relay in front of Redis: from pages, and from one stream to another."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    DeliveryError,
    MethodNotFoundError,
    RedisStreamsTransport,
    RPCChannel,
    current_call,
    with_call_options,
)
from anyio_kkrpc.relay import forward, relay
from anyio_kkrpc.testing import RedisServer
from anyio_kkrpc.websocket import endpoint
from tests.bounds import BOUND, CALL_BOUND
from tests.websocket.serving import opened
from tests.websocket.test_endpoint import ask, call

from .test_relay import Chat

pytestmark = [pytest.mark.anyio, pytest.mark.one_server]


async def test_pages_to_workers(redis_server: RedisServer, stream_name: str) -> None:
    """All pages share one channel; a page that goes cancels what it asked for, at the worker."""
    chat = Chat()
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    options["connect_timeout"] = BOUND
    async with (
        RedisStreamsTransport(redis_server.url, **options) as work,
        RPCChannel(work, expose={"chat": chat, "secret": chat}),
        RedisStreamsTransport(redis_server.url, **options, honor_destroy_signal=False) as inner,
        RPCChannel(inner, timeout=CALL_BOUND) as shared,
    ):
        app = endpoint(forward(shared, allow=["chat.*"]))
        async with opened(app) as one, opened(app) as two:
            assert await ask(one, 1, "chat", "add", args=(1, 2)) == 3
            assert await ask(two, 1, "chat", "add", args=(3, 4)) == 7
            refused = await ask(two, 2, "secret", "add", args=(1, 2))
            assert refused["m"] == "Cannot access add on undefined"
            one.say("__DESTROY__")
            two.say(call(3, "chat", "wait"))
            with anyio.fail_after(BOUND):
                await chat.waiting.wait()
                two.tell(type="websocket.disconnect", code=1006)
                await chat.cancelled.wait()
        assert not shared.closed


async def test_keys_and_addresses(redis_server: RedisServer, stream_name: str) -> None:
    """A key is of the stream where a call was made: what is behind a relay knows nothing of it, nor
    can anybody be addressed there.
    """
    keys: list[Any] = []

    class Work:
        async def key(self) -> int:
            keys.append(current_call().key)
            return len(keys)

    outer, inner = f"{stream_name}-outer", f"{stream_name}-inner"
    url, group = redis_server.url, {"use_consumer_group": True, "connect_timeout": BOUND}
    async with (
        RedisStreamsTransport(url, stream=inner, **group) as work,
        RPCChannel(work, expose={"work": Work()}),
        RedisStreamsTransport(url, stream=outer, **group) as a,
        RedisStreamsTransport(url, stream=inner, **group, honor_destroy_signal=False) as b,
        relay(a, b, allow=["work.*"], timeout=CALL_BOUND),
        RedisStreamsTransport(url, stream=outer, **group) as client,
        RPCChannel(client, timeout=CALL_BOUND) as channel,
    ):
        api = with_call_options(channel.get_api(), key="job-1")
        assert [await api.work.key() for _ in range(3)] == [1, 1, 1]
        assert keys == [None]
        with pytest.raises(DeliveryError):
            await channel.get_api(to=work.session_id).work.key()
        assert keys == [None]


async def test_stream_to_stream(redis_server: RedisServer, stream_name: str) -> None:
    """Calls, callbacks and streams from a group to another one. The destroy signal of the outer
    stream ends the relay, and no worker behind it.
    """
    chat, outer, inner = Chat(), f"{stream_name}-outer", f"{stream_name}-inner"
    url, group = redis_server.url, {"use_consumer_group": True, "connect_timeout": BOUND}
    async with (
        RedisStreamsTransport(url, stream=inner, **group) as work,
        RPCChannel(work, expose={"chat": chat, "secret": chat}) as worker,
        RedisStreamsTransport(url, stream=outer, **group) as a,
        RedisStreamsTransport(url, stream=inner, **group, honor_destroy_signal=False) as b,
        relay(a, b, allow=["chat.*"], timeout=CALL_BOUND) as joined,
        RedisStreamsTransport(url, stream=outer, **group, honor_destroy_signal=False) as client,
        RPCChannel(client, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        assert await api.chat.add(1, b=2) == 3
        steps: list[int] = []
        assert await api.chat.steps(5, steps.append) == "done"
        assert [item async for item in api.chat.count(100)] == list(range(100))
        with pytest.raises(MethodNotFoundError):
            await api.secret.add(1, 2)
        await client.signal_destroy()
        with anyio.fail_after(BOUND):
            await joined.serve_forever()
        assert not worker.closed
        assert worker.statistics().served == 3
