"""A worker's stream as Server-Sent Events, as Starlette sends them; a browser is played here."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any, Protocol

import anyio
import pytest
from pydantic import BaseModel, Field

from anyio_kkrpc import RemoteStream
from anyio_kkrpc.sse import Events
from anyio_kkrpc.testing import connected
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio
SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


@dataclass
class Token:
    text: str


async def tokens() -> AsyncIterator[Token | str]:
    yield Token("a\nb\u2028\r\n\n")
    yield "event: done"
    raise ValueError("two\n\nlines")


async def numbers() -> AsyncIterator[int]:
    yield 1


async def sent_by(response: Events) -> tuple[dict[bytes, bytes], bytes]:
    """Return headers and body."""
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Any) -> None:
        messages.append(message)

    with anyio.fail_after(BOUND):
        await response(SCOPE, receive, send)
    body = b"".join(message["body"] for message in messages[1:])
    return dict(messages[0]["headers"]), body


async def test_events() -> None:
    """Each item is one, whatever is in it, and so is the end."""
    async with connected({"tokens": tokens, "numbers": numbers}) as api:
        headers, body = await sent_by(Events(await api.tokens(), headers={"X-Own": "1"}))
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert (headers[b"cache-control"], headers[b"x-own"]) == (b"no-cache", b"1")
        *events, rest = body.split(b"\n\n")
        assert rest == b""
        assert [json.loads(event.removeprefix(b"data: ")) for event in events[:2]] == [
            {"text": "a\nb\u2028\r\n\n"},
            "event: done",
        ]
        assert events[2].startswith(b"event: failed\ndata: ")
        assert "two\n\nlines" in json.loads(events[2].partition(b"data: ")[2])
        assert len(events) == 3
        _, body = await sent_by(Events(await api.numbers()))
        assert body == b"data: 1\n\nevent: done\ndata:\n\n"


class Tick(BaseModel):
    price: Decimal = Field(alias="p")


class Feed(Protocol):
    async def ticks(self) -> RemoteStream[Tick]: ...
    async def pages(self) -> RemoteStream[dict[str, list[Tick]]]: ...
    async def things(self) -> RemoteStream[Any]: ...


async def prices() -> AsyncIterator[Any]:
    yield Tick(p=Decimal("1.50"))


async def test_what_a_protocol_makes_of_items() -> None:
    """A model is an event as it travels, not as Python shows it; what JSON lacks is its text."""

    async def pages() -> AsyncIterator[Any]:
        yield {"first": [Tick(p=Decimal("2"))]}

    async def things() -> AsyncIterator[Any]:
        yield IPv4Address("127.0.0.1")
        yield object()

    made = {"ticks": prices, "pages": pages, "things": things}
    async with connected(made, Feed, codec=None) as api:
        end = b"event: done\ndata:\n\n"
        _, body = await sent_by(Events(await api.ticks()))
        assert body == b'data: {"p":"1.50"}\n\n' + end
        _, body = await sent_by(Events(await api.pages()))
        assert body == b'data: {"first":[{"p":"2"}]}\n\n' + end
        _, body = await sent_by(Events(await api.things()))
        address, failed, rest = body.split(b"\n\n")
        assert address == b'data: "127.0.0.1"'
        assert failed.startswith(b"event: failed\ndata: ")
        assert b"object is unsupported" in failed
        assert rest == b""


async def test_what_is_no_stream() -> None:
    """It is refused at once, most of all a call that wasn't awaited."""
    async with connected({"numbers": numbers}) as api:
        call = api.numbers()
        with pytest.raises(TypeError, match="awaited"):
            Events(call)
        async with await call:
            pass


@contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_browser_that_stalls() -> None:
    """One that goes away while a chunk waits to be sent ends the stream too, and at once."""
    closed, stalled = anyio.Event(), anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(1_000_000):
                yield number
        finally:
            closed.set()

    async def receive() -> dict[str, Any]:
        await stalled.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body", b"").startswith(b"data: 3"):
            stalled.set()
            await anyio.sleep_forever()

    with no_collector(), anyio.fail_after(BOUND):
        async with connected({"numbers": numbers}) as api:
            await Events(await api.numbers())(SCOPE, receive, send)
            await closed.wait()
