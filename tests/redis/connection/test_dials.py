"""Connections are made to wherever the server is at that moment."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis
from anyio.abc import SocketStream

from anyio_kkrpc import RedisStreamsTransport, TransportConnectionError
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._dials import Dials
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._resolver import Fixed, Probe, Told, Topology
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

from ..conftest import fake_peer

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

NOWHERE = Address.parse("redis://127.0.0.1:1")


class Moved:
    """Knows of a server that is there when it is asked again."""

    moves, follows = True, False

    def __init__(self, *addresses: Address) -> None:
        self.addresses = [*addresses]

    async def find(self) -> Address:
        await anyio.lowlevel.checkpoint()
        return self.addresses.pop(0)

    def hint(self, address: Address, exc: Exception) -> Address | None:
        return None

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        await anyio.sleep_forever()


def dials(topology: Topology, timeout: float = BOUND) -> Dials:
    return Dials(
        lambda: topology,
        "me",
        Outages(Target.parse("redis://127.0.0.1:1")),
        connect_timeout=timeout,
        silence=7.0,
        limit=None,
        patient=False,
    )


@asynccontextmanager
async def running(dials: Dials) -> AsyncIterator[Dials]:
    async with anyio.create_task_group() as group:
        group.start_soon(dials.run)
        yield dials
        group.cancel_scope.cancel()


async def test_asked_again_until_it_is_there(redis_server: RedisServer) -> None:
    """Where nothing answers isn't tried again, but asked for."""
    there = Address.parse(redis_server.url)
    finder = Moved(NOWHERE, NOWHERE, there)
    dialer = dials(Topology(finder)).dialer("tests")
    for _ in range(2):
        async with await dialer.first() as connection:
            assert connection.silence == 7.0
            name = await connection.execute(b"CLIENT", b"GETNAME")
            assert name == b"anyio_kkrpc:tests:me"
    assert finder.addresses == []


async def test_fixed(redis_server: RedisServer) -> None:
    """What stays where it is is tried once."""
    fixed = Fixed(NOWHERE)
    assert await fixed.find() is await fixed.find() is NOWHERE
    with pytest.raises(TransportConnectionError, match="127.0.0.1:1"):
        await dials(Topology(fixed)).dial("tests")


async def test_nobody_tells_in_time() -> None:
    """The search has an end; who shares it and has more time is told once it is known."""
    told, found = anyio.Event(), list[Address]()

    class Slow(Moved):
        async def find(self) -> Address:
            await told.wait()
            return await super().find()

    topology = Topology(Slow(NOWHERE))

    async def wait() -> None:
        await anyio.wait_all_tasks_blocked()
        found.append(await topology.resolve())

    async with anyio.create_task_group() as group:
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError, match="0.1 seconds"):
            group.start_soon(wait)
            await dials(topology, 0.1).dial("tests")
        assert found == []
        told.set()
    assert found == [NOWHERE]


async def test_change(redis_server: RedisServer) -> None:
    """When the server is somewhere else, connections in use are left, blocked ones too."""
    topology = Topology(Moved(Address.parse(redis_server.url)))
    async with running(dials(topology)) as one:
        await anyio.wait_all_tasks_blocked()
        blocked, idle = await one.dial("reads"), await one.dial("writer")
        async with anyio.create_task_group() as group:

            async def move() -> None:
                await anyio.wait_all_tasks_blocked()
                topology.found(NOWHERE)

            group.start_soon(move)
            with (
                anyio.fail_after(BOUND),
                pytest.raises(TransportConnectionError, match="somewhere else"),
            ):
                await blocked.execute(b"BLPOP", b"nothing-is-there", 60)
        await anyio.wait_all_tasks_blocked()
        assert idle.closed


async def test_change_while_connecting(redis_server: RedisServer) -> None:
    """An attempt at a server that doesn't answer is left when the server is somewhere else."""
    there = Address.parse(redis_server.url)
    accepted = anyio.Event()

    async def stay_silent(stream: SocketStream) -> None:
        accepted.set()
        await anyio.sleep_forever()

    async with fake_peer(stay_silent) as frozen:
        topology = Topology(Moved(frozen))
        async with running(dials(topology, 1000.0)) as one, anyio.create_task_group() as group:

            async def promote() -> None:
                await accepted.wait()
                topology.found(there)

            group.start_soon(promote)
            with anyio.fail_after(BOUND):
                async with await one.dial("tests") as connection:
                    assert connection.address == there


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Names that lead to ports of this machine."""
    names: dict[str, int] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        known = names.get(host.decode()) if isinstance(host, bytes) else None
        if known is None:
            return look_up(host, port, *args, **options)
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return look_up("127.0.0.1", known, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


async def test_a_name_that_leads_elsewhere(
    own_server: RedisServer, server_executable: str, stream_name: str, renamed: dict[str, int]
) -> None:
    """A server that becomes a replica is left, though nobody writes, or looks whether it answers;
    and as long as its name leads to a replica, it is looked up again.
    """
    idle: dict[str, Any] = {"health_check_interval": 300, "block_timeout": 300}
    with (
        RedisServer(server_executable) as other,
        redis.Redis.from_url(own_server.url) as old,
        redis.Redis.from_url(other.url) as new,
    ):
        old.config_set("repl-diskless-sync-delay", 0)
        new.replicaof("127.0.0.1", own_server.port)
        with anyio.fail_after(BOUND):
            while new.info("replication")["master_link_status"] != "up":
                await anyio.sleep(0.02)
            renamed["db.test"] = own_server.port
            async with RedisStreamsTransport("redis://db.test", stream=stream_name, **idle):
                new.replicaof("NO", "ONE")
                old.replicaof("127.0.0.1", other.port)
                before = _ids(old)
                while before & _ids(old):
                    await anyio.sleep(0.02)
                renamed["db.test"] = other.port
                while {"anyio_kkrpc:writer", "anyio_kkrpc:inbox"} - _names(new):
                    await anyio.sleep(0.02)
                while _names(old):
                    await anyio.sleep(0.02)


def _names(server: redis.Redis) -> set[str]:
    """Return the connections of peers."""
    names = [client["name"].rpartition(":")[0] for client in server.client_list()]
    return {name for name in names if name.startswith("anyio_kkrpc")}


def _ids(server: redis.Redis) -> set[str]:
    return {client["id"] for client in server.client_list() if client["name"]}
