"""One server: what is on the wire doesn't depend on who keeps it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from anyio_kkrpc.testing import RedisServer
from tests.servers import Servers


@pytest.fixture
def server(servers: Servers) -> RedisServer:
    """The shared Valkey: use keys of your own, and leave it as it is."""
    return servers["valkey8"]


@pytest.fixture
def raw(server: RedisServer) -> Iterator[redis.Redis]:
    """A blocking client that writes what no peer would."""
    with redis.Redis.from_url(server.url) as client:
        yield client
