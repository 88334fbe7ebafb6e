"""Who waits for replicas, and what is asked for them; without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from anyio import Event

from anyio_kkrpc._protocol._records import Bye, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._writing._confirmations import Confirmations
from anyio_kkrpc.redis._writing._ledger import Post

from .pure import parsed

pytestmark = pytest.mark.anyio


class Line:
    """A connection that notes what is written."""

    error = None
    before_write: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Callable[[Any], None]]] = []

    def post(self, packed: bytes, replies: int, on_reply: Callable[[Any], None]) -> None:
        self.asked.append((packed, on_reply))

    def flush_nowait(self) -> bool:
        return True


def post(record: Any) -> Post:
    return Post(b"", Envelope(record), to_stream=True, event=Event())


@pytest.mark.parametrize("wanted", [0, 2])
async def test_who_waits(wanted: int) -> None:
    """Requests do, where replicas are wanted; the destroy signal doesn't."""
    also: list[bool] = []
    confirmations, line = Confirmations(wanted, lambda: 0.0, lambda: None), Line()
    connection: Any = line
    confirmations.attach(connection)
    confirmations.take_along(lambda: also.append(True))
    request, bye = post(Request("1", "call", ["f"])), post(Bye())
    confirmations.expect()
    assert line.before_write is not None
    line.before_write()
    assert also == [True]
    for one in (request, bye):
        confirmations.take(one, b"1-0")
        assert one.result == b"1-0"
    assert bye.event is not None
    assert bye.event.is_set()
    assert request.event is not None
    assert request.event.is_set() is (wanted == 0)
    assert len(line.asked) == (wanted > 0)
    for packed, on_reply in line.asked:
        assert parsed(packed) == [[b"WAIT", b"2", b"100"]]
        on_reply(1)
        assert not request.event.is_set()
        assert "1 of 2 replicas" in str(confirmations.error(request))
        on_reply(2)
        assert request.event.is_set()
        assert confirmations.error(request) is None
