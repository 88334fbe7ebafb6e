"""Every transport keeps the contract that the public suite checks."""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager

import pytest

from anyio_kkrpc.abc import Transport
from anyio_kkrpc.testing import check_transport

from .conftest import Connect

pytestmark = pytest.mark.anyio


async def test_contract(connect: Connect, request: pytest.FixtureRequest) -> None:
    """Order, priority of responses, cancellation, closing: the same for all."""
    on_redis = "redis" in request.node.name or "valkey" in request.node.name

    def make() -> AbstractAsyncContextManager[tuple[Transport, Transport]]:
        options = {"stream": f"contract-{uuid.uuid4().hex}"} if on_redis else {}
        return connect(**options)

    await check_transport(make, close_is_seen=not on_redis)
