"""What kind of server it is, as it tells; without one."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._stream._server import Identity, check_server, look_at_server

pytestmark = pytest.mark.anyio
NOWHERE = Target.parse("redis://nowhere")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Nothing is awaited here that an event loop does."""
    return request.param


def telling(version: str, policy: str = "noeviction") -> Any:
    async def execute(*command: bytes) -> bytes:
        assert command == (b"INFO",)
        text = f"# Server\r\nredis_version:{version}\r\nmaxmemory_policy:{policy}\r\n\xff\r\n"
        return text.encode("latin-1")

    return execute


@pytest.mark.parametrize(
    ("text", "version"),
    [("7.2.4", (7, 2)), ("6.2.0", (6, 2)), ("255.255.255", (255, 255)), ("unstable", (6, 2))],
)
async def test_version(text: str, version: tuple[int, ...]) -> None:
    """One that can't be read is taken for a modern one."""
    assert await look_at_server(telling(text)) == (version, "noeviction")


async def test_one_that_hides_itself() -> None:
    async def execute(*command: bytes) -> bytes:
        raise ResponseError("NOPERM no permissions to run the 'info' command")

    assert await look_at_server(execute) == ((6, 2), "")
    assert await check_server(execute, NOWHERE, groups=True)


async def test_too_old() -> None:
    """It is refused where there are to be groups; if not, it is known to be old."""
    assert not await check_server(telling("6.0.20"), NOWHERE, groups=False)
    with pytest.raises(TransportConnectionError, match=r"Redis 6\.2 or later.*6\.0"):
        await check_server(telling("6.0.20"), NOWHERE, groups=True)


@pytest.mark.parametrize(("policy", "warned"), [("noeviction", False), ("allkeys-lru", True)])
async def test_eviction(policy: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A server that may evict streams is warned of."""
    with caplog.at_level(logging.WARNING):
        await check_server(telling("7.0.0", policy), NOWHERE, groups=True)
    assert (policy in caplog.text) is warned


class Told:
    """A connection to a server that says who it is."""

    def __init__(self, run_id: str, replication: str, *errors: Exception) -> None:
        facts = (
            ("redis_version:7", f"run_id:{run_id}"),
            ("role:master", f"master_replid:{replication}"),
        )
        self.replies: list[Any] = ["\r\n".join(("# One", *lines, "")).encode() for lines in facts]
        self.replies[: len(errors)] = errors
        self.asked: list[Any] = []

    async def execute_many(self, commands: Any) -> list[Any]:
        self.asked += commands
        return ["first", *self.replies]


async def test_another_one() -> None:
    """Another process, another history of the same one, or one that doesn't tell; not the first."""
    identity, refusal = Identity(), ResponseError("NOPERM no permissions to run 'info'")
    found, sure = [], []

    async def along(execute: Any) -> None:
        assert await execute(b"TIME") == "first"

    for told in [
        Told("a", "x"),
        Told("a", "x"),
        Told("b", "x"),
        Told("b", "y"),
        Told("b", "y", refusal),
        Told("b", "y", refusal, refusal),
        Told("b", "y", refusal, refusal),
        Told("b", "y"),
        Told("b", "y"),
    ]:
        connection: Any = told
        found.append(await identity.ask(connection, along))
        sure.append(identity.is_sure)
        assert told.asked == [(b"TIME",), (b"INFO", b"server"), (b"INFO", b"replication")]
    assert found == [False, False, True, True, True, True, True, True, False]
    # The fifth tells its run_id, and no more.
    assert sure == [False, False, True, True, True, False, False, False, False]


async def test_what_is_asked_along_is_refused() -> None:
    class Refusing(Told):
        async def execute_many(self, commands: Any) -> list[Any]:
            return [ResponseError("NOPERM no"), *self.replies]

    connection: Any = Refusing("a", "x")
    with pytest.raises(ResponseError, match="TIME"):
        await Identity().ask(connection, lambda execute: execute(b"TIME"))
