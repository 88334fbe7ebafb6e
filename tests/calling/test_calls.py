"""Calls alone: over a transport that keeps what is sent, answered by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after
from anyio.lowlevel import checkpoint

from anyio_kkrpc import (
    DeliveryError,
    OverloadedError,
    RemoteError,
    RPCTimeoutError,
    TransportConnectionError,
)
from anyio_kkrpc._calling._calls import Calls
from anyio_kkrpc._calling._options import CallOptions
from anyio_kkrpc._driver._context import CallInfo, running
from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._protocol._conversation import Operation
from anyio_kkrpc._protocol._events import CallFinished
from anyio_kkrpc._protocol._records import Cancel, Record, Reply, Request
from anyio_kkrpc.abc import Capabilities, Envelope
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

PATH = ["math", "add"]
CALL: Operation = "call"


class Keeping:
    """A transport that keeps what is sent."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.sent: list[Envelope] = []
        self.error: Exception | None = None
        self.stuck = False

    def watch(self, *_: Any) -> None:
        pass

    async def send(self, item: Envelope) -> None:
        await checkpoint()
        if self.error is not None:
            raise self.error
        if self.stuck:
            await anyio.sleep(BOUND)
        self.sent.append(item)

    def records(self, kind: type[Record]) -> list[Any]:
        return [one.record for one in self.sent if isinstance(one.record, kind)]

    async def until(self, kind: type[Record]) -> Any:
        with fail_after(BOUND):
            while not self.records(kind):
                await checkpoint()
        return self.records(kind)[-1]


class Lender:
    """Counts the handlers that wait."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def lend(self) -> None:
        self.steps.append(1)

    def take_back(self) -> None:
        self.steps.append(-1)


@asynccontextmanager
async def calling(timeout: float | None = BOUND) -> AsyncIterator[Any]:
    transport: Any = Keeping()
    core = Core(transport, lambda *ids: lambda: None, timeout=timeout, send_tracebacks=False)
    calls = Calls(core, ())
    async with create_task_group() as group:
        core.enter()
        core.open(group)
        group.start_soon(core.outbox.run)
        group.start_soon(core.timer.run)
        yield SimpleNamespace(core=core, transport=transport, calls=calls, group=group)
        group.cancel_scope.cancel()


def answer(at: Any, reply: Reply) -> None:
    """Take a reply as the channel does."""
    event = at.core.conversation.receive(reply, None)
    assert isinstance(event, CallFinished)
    event.call.driver.set()


async def test_result_and_error() -> None:
    async with calling() as at:
        for reply in ({"v": 3}, {"e": {"n": "ValueError", "m": "wrong"}}):

            async def reply_soon(reply: dict[str, Any] = reply) -> None:
                request = await at.transport.until(Request)
                at.transport.sent.clear()
                answer(at, Reply(request.id, **reply))

            at.group.start_soon(reply_soon)
            if "v" in reply:
                assert await at.calls.request(CALL, PATH, args=[1, 2]) == 3
            else:
                with pytest.raises(RemoteError, match="wrong"):
                    await at.calls.request(CALL, PATH, args=[1, 2])
        assert not at.core.conversation.calls


async def test_deadline() -> None:
    """The other side is told how much time there is, and that nobody waits any more."""
    async with calling() as at:
        with pytest.raises(RPCTimeoutError, match=r"math\.add: no answer within 0\.05 s"):
            await at.calls.request(CALL, PATH, CallOptions(timeout=0.05))
        (request,) = at.transport.records(Request)
        assert 0 < request.d <= 50
        assert await at.transport.until(Cancel) == Cancel(request.id)
        assert not at.core.conversation.calls


async def test_no_time_left() -> None:
    """A handler's calls have no more time than it has itself: nothing is sent."""
    async with calling() as at:
        info: Any = SimpleNamespace(deadline=at.core.now() - 1)
        token = running.set(info)
        try:
            with pytest.raises(RPCTimeoutError, match="within its caller.s deadline"):
                await at.calls.request(CALL, PATH)
            with pytest.raises(RPCTimeoutError, match="within its caller's deadline"):
                await at.calls.request(CALL, PATH, CallOptions(timeout=None))
        finally:
            running.reset(token)
        assert at.transport.sent == []
        assert not at.core.conversation.calls


async def test_the_shorter_time_counts() -> None:
    async with calling(timeout=None) as at:
        for left, timeout in ((BOUND * 2, BOUND), (BOUND, None), (BOUND, BOUND * 2)):
            info: Any = SimpleNamespace(deadline=at.core.now() + left)
            token = running.set(info)
            at.group.start_soon(at.calls.request, CALL, PATH, CallOptions(timeout=timeout))
            running.reset(token)
            request = await at.transport.until(Request)
            at.transport.sent.clear()
            assert BOUND * 500 < request.d <= BOUND * 1000
        at.group.cancel_scope.cancel()


async def test_cancelled() -> None:
    """Whoever stops waiting says so; what comes then is nobody's."""
    async with calling() as at:
        with anyio.CancelScope() as scope:
            async with create_task_group() as group:
                group.start_soon(at.calls.request, CALL, PATH)
                request = await at.transport.until(Request)
                scope.cancel()
        assert await at.transport.until(Cancel) == Cancel(request.id)
        assert not at.core.conversation.calls
        assert at.core.conversation.receive(Reply(request.id, 1), None) is None


async def test_what_can_not_be_sent() -> None:
    """It is nothing that could be cancelled."""
    async with calling() as at:
        at.transport.error = OverloadedError("too large")
        with pytest.raises(OverloadedError, match="too large"):
            await at.calls.request(CALL, PATH)
        at.transport.error = None
        assert not at.core.conversation.calls
        await at.core.send(Reply("last"), None)
        assert at.transport.records(Cancel) == []


async def test_what_is_lost() -> None:
    """A request that comes back fails with the reason."""
    async with calling() as at:

        async def lose() -> None:
            request = await at.transport.until(Request)
            at.calls.lose(at.core.conversation.calls[request.id], DeliveryError("nobody there"))

        at.group.start_soon(lose)
        with pytest.raises(DeliveryError, match="nobody there"):
            await at.calls.request(CALL, PATH)
        assert at.transport.records(Cancel) == []


async def test_without_reply() -> None:
    """It is over once it is sent, and has its time for that."""
    async with calling() as at:
        assert await at.calls.request(CALL, PATH, CallOptions(reply=False)) is None
        assert at.transport.records(Request)[0].o is True
        at.transport.stuck = True
        options = CallOptions(reply=False, timeout=0.05)
        with pytest.raises(RPCTimeoutError, match="no answer within 0.05 s"):
            await at.calls.request(CALL, PATH, options)
        assert not at.core.conversation.calls


@pytest.mark.parametrize("how", ["answered", "cancelled", "not sent"])
async def test_a_handler_that_waits_lends_its_place(how: str) -> None:
    """It has it back, whatever becomes of its call; who is no handler has none to lend."""
    async with calling() as at:
        lender = Lender()
        at.core.serve_with(lender)
        info: Any = SimpleNamespace(deadline=None)
        if how == "not sent":
            at.transport.error = TransportConnectionError("broken")

        async def call(serving: CallInfo | None) -> None:
            running.set(serving)
            try:
                await at.calls.request(CALL, PATH)
            except TransportConnectionError:
                assert how == "not sent"

        for serving, steps in ((None, []), (info, [1])):
            async with create_task_group() as group:
                group.start_soon(call, serving)
                if how == "not sent":
                    steps = [*steps, *([-1] if steps else [])]
                else:
                    request = await at.transport.until(Request)
                    at.transport.sent.clear()
                    assert lender.steps == steps
                if how == "answered":
                    answer(at, Reply(request.id, 1))
                elif how == "cancelled":
                    group.cancel_scope.cancel()
            assert sum(lender.steps) == 0
        assert lender.steps == [1, -1]
