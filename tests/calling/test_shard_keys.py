"""Which shard a call is for, as its caller says: checked before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc._calling._options import CallOptions
from anyio_kkrpc.testing import connected
from tests.bounds import CALL_BOUND


def options(api: Any) -> CallOptions:
    found = api._rpc_options
    assert isinstance(found, CallOptions)
    return found


def test_options() -> None:
    """It stays with a proxy; a call with a key goes to the shard of that in its place."""
    channel = RPCChannel(RedisStreamsTransport("redis://nowhere", use_consumer_group=True))
    api = with_call_options(channel.get_api(), shard_key="user-7")
    assert options(api).shard_key == "user-7"
    assert options(with_call_options(api, timeout=1).math).shard_key == "user-7"
    assert options(with_call_options(api, shard_key="")).shard_key == ""
    assert options(with_call_options(api, key="k")).shard_key is None
    with pytest.raises(TypeError, match="^shard_key: needs a str, not 7"):
        with_call_options(api, shard_key=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^shard_key: a call with a key"):
        with_call_options(api, shard_key="a", key="k")
    with pytest.raises(ValueError, match="^shard_key: a call with a key"):
        with_call_options(with_call_options(api, key="k"), shard_key="a")
    with pytest.raises(ValueError, match="^shard_key: a call to one peer"):
        with_call_options(channel.get_api(to="x"), shard_key="a")


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


@pytest.mark.anyio
async def test_where_there_is_one_shard() -> None:
    """It means nothing there, and the call is as any other."""
    async with connected(Api(), timeout=CALL_BOUND) as api:
        assert await with_call_options(api, shard_key="a").add(1, 2) == 3
