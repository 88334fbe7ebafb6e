"""Objects by reference over a WebSocket, in the native dialect and in that of kkrpc 2."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from anyio_kkrpc import RemoteError, RemoteObject, RPCChannel, RPCError, by_reference, release
from anyio_kkrpc.typescript import _releases
from tests.bounds import BOUND
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


@pytest.mark.parametrize("options", WAYS, ids=["json", "cbor", "kkrpc-2"])
@pytest.mark.parametrize("closing", [0, 1])
async def test_closed_while_a_method_runs(options: dict[str, Any], closing: int) -> None:
    """Who waits for it is told so, it is cancelled, and neither side keeps anything."""
    api = Api()
    async with transports(**options) as ends:
        async with RPCChannel(ends[0]) as client, RPCChannel(ends[1], expose=api) as server:
            held = [await client.get_api().open_session()]

            async def wait() -> None:
                with pytest.raises(RPCError):
                    await held[0].stuck()

            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    while api.session.asked != ["stuck"]:
                        await anyio.lowlevel.checkpoint()
                    await ends[closing].aclose()
                await api.session.stopped.wait()
            with pytest.raises(RPCError):
                await held.pop().ask("again")
            await none_left(client, server)
