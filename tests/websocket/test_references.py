"""Objects by reference over a WebSocket, in the native dialect and in that of kkrpc 2."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc import RemoteError, RemoteObject, RPCChannel, by_reference, release
from anyio_kkrpc.typescript import _releases
from tests.driver.test_references import Session
from tests.pairs import none_left

from .test_parts import transports

pytestmark = pytest.mark.anyio

WAYS = [{}, {"codec": "cbor"}, {"dialect": "kkrpc-2"}]


class Api:
    def __init__(self) -> None:
        self.session = Session("ada")

    def open_session(self) -> Any:
        return self.session

    def is_same(self, thing: Any) -> bool:
        return thing is self.session

    async def each(self, function: Any) -> list[Any]:
        return [await function(number) for number in range(3)]


@pytest.fixture(autouse=True)
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """Log nothing: an error that is logged keeps what its handler was called with."""
    caplog.set_level("CRITICAL", "anyio_kkrpc")


@pytest.mark.parametrize("options", WAYS, ids=["json", "cbor", "kkrpc-2"])
async def test_all_of_it(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, members, streams, errors, the way back, functions with results; then nothing is left."""
    monkeypatch.setattr(_releases, "DELAY", 0.05)
    api = Api()
    async with transports(**options) as (one, two):
        async with RPCChannel(one) as client, RPCChannel(two, expose=api) as server:
            remote = client.get_api()
            session = await remote.open_session()
            assert isinstance(session, RemoteObject)
            assert await session.ask("why") == "ada: why"
            assert await session.deep.add(2) == 7
            assert await session.title == "a session"
            assert [number async for number in await session.count(3)] == [0, 1, 2]
            with pytest.raises(RemoteError, match="of the session"):
                await session.fails()
            assert await remote.is_same(session) is True

            async def twice(number: int) -> int:
                if number == 2:
                    raise ValueError("enough")
                return 2 * number

            with pytest.raises(RemoteError, match="enough"):
                await remote.each(by_reference(twice))
            release(session)
            del session
            await none_left(client, server)
