"""Connections are made to wherever the server is at that moment."""

from __future__ import annotations

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._dials import Dials
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._resolver import Fixed, Resolver
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

NOWHERE = Address.parse("redis://127.0.0.1:1")


class Moved:
    """Knows of a server that is there when it is asked again."""

    def __init__(self, *addresses: Address) -> None:
        self.addresses = [*addresses]

    async def resolve(self) -> Address:
        await anyio.lowlevel.checkpoint()
        return self.addresses.pop(0)


def dials(resolver: Resolver) -> Dials:
    return Dials(
        resolver,
        "me",
        Outages(NOWHERE),
        connect_timeout=BOUND,
        silence=7.0,
        shortest_silence=5.0,
        limit=None,
        patient=False,
    )


async def test_asked_before_each_connection(redis_server: RedisServer) -> None:
    there = Address.parse(redis_server.url)
    resolver = Moved(NOWHERE, there, there)
    dialer = dials(resolver).dialer("tests")
    with pytest.raises(TransportConnectionError):
        await dialer.first()
    for _ in range(2):
        async with await dialer.again() as connection:
            assert connection.silence == 7.0
            name = await connection.execute(b"CLIENT", b"GETNAME")
            assert name == b"anyio_kkrpc:tests:me"
    assert resolver.addresses == []


async def test_fixed() -> None:
    resolver = Fixed(NOWHERE)
    assert await resolver.resolve() is await resolver.resolve() is NOWHERE
