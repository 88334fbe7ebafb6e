"""Every transport keeps the contract that the public suite checks."""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager

import pytest

from anyio_kkrpc.abc import Transport
from anyio_kkrpc.records import Record, Reply
from anyio_kkrpc.testing import check_transport
from anyio_kkrpc.testing._contract import RecordingListener
from anyio_kkrpc.testing._contract import _address as address

from .conftest import Connect

pytestmark = pytest.mark.anyio


async def test_contract(connect: Connect, request: pytest.FixtureRequest) -> None:
    """Order, priority of responses, cancellation, closing: the same for all."""
    on_redis = "redis" in request.node.name or "valkey" in request.node.name

    def make() -> AbstractAsyncContextManager[tuple[Transport, Transport]]:
        options = {"stream": f"contract-{uuid.uuid4().hex}"} if on_redis else {}
        return connect(**options)

    await check_transport(make, close_is_seen=not on_redis)


async def test_what_was_sent_before_the_end_arrives(connect: Connect) -> None:
    """Also what would have left only with the next write."""
    heard, known = RecordingListener(), RecordingListener()
    async with connect() as (one, two):
        one.listen(known)
        two.listen(heard)
        await two.send(address(Reply("hello"), one))
        await known.until(lambda: bool(known.records))
        sent: list[Record] = [Reply(f"{number}", number) for number in range(20)]
        for record in sent:
            await one.send(address(record, two))
        await one.aclose()
        await heard.until(lambda: len(heard.records) == len(sent))
        assert heard.records == sent
