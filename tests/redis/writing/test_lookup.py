"""Looking for what was written, where the server can't send all that is there at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import anyio
import pytest
import redis

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._login import open_connection
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._writing._ledger import Post
from anyio_kkrpc.redis._writing._lookup import Lookup
from anyio_kkrpc.redis.dialects.native import NativeDialect
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

OUTPUT_LIMIT = 1_000_000


@pytest.fixture(scope="module")
def tight_server(server_executable: str) -> Iterator[RedisServer]:
    """A server that gives ordinary clients no more than `OUTPUT_LIMIT` bytes at once."""
    with RedisServer(server_executable) as server:
        with redis.Redis.from_url(server.url) as witness:
            witness.config_set("client-output-buffer-limit", f"normal {OUTPUT_LIMIT} 0 0")
        yield server


@pytest.mark.parametrize(
    ("sizes", "connections"),
    [([0] * 1200, 1), ([100_000] * 60, 7), ([900_000] * 8, 10), ([10, 2 * OUTPUT_LIMIT, 10], 15)],
    ids=["small", "several fit", "one fits", "one does not"],
)
async def test_more_than_the_server_sends(
    tight_server: RedisServer, stream_name: str, sizes: list[int], connections: int
) -> None:
    """Less is asked for on the next connection, and what can't be sent is left out."""
    native = NativeDialect("me", get_codec("json"))

    def post(name: str) -> Post:
        return Post(b"", Envelope(Request(name, "call", ["f"])), to_stream=True)

    posts = [post(name) for name in ("first", "middle", "last", "not there")]
    ids: dict[str, bytes] = {}
    lookup, used = Lookup(stream_name.encode(), native), 0
    with redis.Redis.from_url(tight_server.url) as witness:

        def add(name: str) -> None:
            fields: Any = native.encode(Request(name, "call", ["f"]), None)
            entry = dict(zip(fields[::2], fields[1::2], strict=True))
            ids[name] = witness.xadd(stream_name, entry)

        add("first")
        for number, size in enumerate(sizes):
            witness.xadd(stream_name, {"from": "another", "json": "x" * size})
            if number == len(sizes) // 2:
                add("middle")
        add("last")
    with anyio.fail_after(BOUND):
        while True:
            used += 1
            address = Address.parse(tight_server.url)
            async with await open_connection(address, timeout=BOUND) as connection:
                try:
                    found = await lookup.find(connection, posts, b"0", b"")
                except TransportConnectionError:
                    continue
                break
    assert [(one.envelope.record.id, entry) for one, entry in found] == list(ids.items())  # type: ignore[union-attr]
    assert used <= connections
    if max(sizes):
        assert used > 1


class Pages:
    """A connection to a server whose stream has these entries, lost after so many pages."""

    def __init__(self, entries: list[Any], pages: int) -> None:
        self.entries = entries
        self.pages = pages
        self.starts: list[bytes] = []

    async def execute(self, *command: bytes) -> list[Any]:
        if not self.pages:
            raise TransportConnectionError("lost")
        self.pages -= 1
        self.starts.append(command[2])
        page = self.entries[: int(command[-1])]
        del self.entries[: len(page)]
        return page


@pytest.mark.parametrize("another", [False, True])
async def test_server_that_is_lost_meanwhile(another: bool) -> None:
    """It goes on where it was, but on another server, which may lack what this one had."""
    native = NativeDialect("me", get_codec("json"))
    asked = Request("1", "call", ["f"])
    posts = [
        Post(b"", Envelope(asked), to_stream=True),
        Post(b"", Envelope(Request("2", "call", ["f"])), to_stream=True),
    ]
    entries: list[Any] = [[b"5-%d" % n, [b"from", b"other", b"x", b"y"]] for n in range(600)]
    entries[0] = [b"5-0", [*native.encode(asked, None)]]
    lookup, first, second = Lookup(b"s", native), Pages(entries, 1), Pages([], 1)
    with pytest.raises(TransportConnectionError):
        await lookup.find(cast(Connection, first), posts, b"4", b"")
    if another:
        lookup.begin_anew()
    found = await lookup.find(cast(Connection, second), posts, b"3" if another else b"4", b"")
    assert found == ([] if another else [(posts[0], b"5-0")])
    assert second.starts == [b"3" if another else b"(5-499"]
