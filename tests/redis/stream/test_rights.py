"""Rights are asked for all at once, and what is lacking is told all at once; without a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis._stream._rights import check_rights

pytestmark = pytest.mark.anyio
KEYS = Keys.of("s")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Nothing is awaited here that an event loop does."""
    return request.param


class Server:
    """Refuses commands by their names, and notes all of them."""

    def __init__(self, **refused: Exception) -> None:
        self.refused = refused
        self.asked: list[tuple[Any, ...]] = []

    async def execute_many(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        self.asked += commands
        return [self.refused.get(command[0].decode(), 0) for command in self.asked]


async def check(server: Server) -> None:
    await check_rights(server.execute_many, KEYS, b"group", b"me")


async def test_nothing_is_done() -> None:
    """Each is about an id that no entry has, or adds an entry under one that Redis refuses."""
    server = Server(XADD=ResponseError("ERR The ID specified in XADD must be greater than 0-0"))
    await check(server)
    assert {command[0] for command in server.asked} == {
        *(b"EVAL", b"XPENDING", b"XCLAIM", b"XRANGE", b"XACK", b"XADD"),
    }
    for name, *rest in server.asked:
        assert b"0-0" in rest or name == b"EVAL"


async def test_all_that_is_lacking() -> None:
    denied = ResponseError("NOPERM no permissions to access a key")
    with pytest.raises(ResponseError, match="NOPERM") as caught:
        await check(Server(XADD=denied, XCLAIM=denied, XACK=ResponseError("ERR no such key")))
    text = str(caught.value)
    assert text.count("XCLAIM") == 1
    assert text.count("XADD") == 3
    assert "XACK" not in text
    for key in (KEYS.control, KEYS.dead):
        assert key.decode() in text
