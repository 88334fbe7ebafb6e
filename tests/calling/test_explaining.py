"""Why calls have no answer, found out over a transport that tells what it is asked to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after

from anyio_kkrpc import DeliveryError
from anyio_kkrpc._calling._explaining import Explainer
from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._protocol._calls import Call
from anyio_kkrpc._protocol._state import CallState
from anyio_kkrpc.abc import Capabilities, Envelope, Explanation
from anyio_kkrpc.records import Request
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Telling:
    """A transport that tells why requests have no answer, by their ids."""

    capabilities = Capabilities()

    def __init__(self, **told: Explanation) -> None:
        self.told = told
        self.looks: list[list[str]] = []
        self.error: Exception | None = None
        self.stuck = 0

    def watch(self, *_: Any) -> None:
        pass

    async def send(self, item: Envelope) -> None:
        raise NotImplementedError

    async def explain(self, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
        ids = [one.record.id for one in requests]  # type: ignore[union-attr]
        self.looks.append(ids)
        if self.stuck:
            self.stuck -= 1
            await anyio.sleep(BOUND)
        if self.error is not None:
            raise self.error
        return [self.told.get(one) for one in ids]


class Desk:
    """An explainer, and what became of the calls."""

    def __init__(self, transport: Telling, within: float) -> None:
        self.core = Core(
            transport,  # type: ignore[arg-type]
            lambda *ids: lambda: None,
            timeout=None,
            send_tracebacks=False,
        )
        self.expired: dict[str, str | None] = {}
        self.lost: dict[str, str] = {}
        self.explainer = Explainer(self.core, self.expire, self.lose, within=within)

    def expire(self, call: Call, reason: str | None) -> None:
        assert call.state is CallState.WAITING
        call.state = CallState.EXPIRED
        self.expired[call.id] = reason

    def lose(self, call: Call, error: Exception) -> None:
        assert isinstance(error, DeliveryError)
        call.state = CallState.LOST
        self.lost[call.id] = str(error)

    def call(self, name: str) -> Call:
        call = Call(name, None)
        call.sent = Envelope(Request(name, "call", ["f"]))
        return call

    async def until(self, found: dict[str, Any], *names: str) -> None:
        with fail_after(BOUND):
            while set(found) != set(names):
                await anyio.sleep(0.005)


@asynccontextmanager
async def desk(transport: Telling, within: float = BOUND) -> AsyncIterator[Desk]:
    one = Desk(transport, within)
    async with create_task_group() as tasks:
        one.core.enter()
        one.core.open(tasks)
        tasks.start_soon(one.core.timer.run)
        yield one
        one.core.close()


async def test_one_look_for_all() -> None:
    """Those that time out together are asked for together, and each is told its own reason."""
    transport = Telling(a=Explanation("busy"), c=Explanation("answered meanwhile"))
    async with desk(transport) as at:
        deadline = at.core.now() + 0.05
        calls = [at.call(name) for name in "abc"]
        for call in calls:
            at.explainer.suspect(call, deadline)
        calls[2].state = CallState.ANSWERED
        at.explainer.suspect(calls[2], deadline)
        await at.until(at.expired, "a", "b")
    assert transport.looks == [["a", "b"]]
    assert at.expired == {"a": "busy", "b": None}


async def test_look_that_fails() -> None:
    """Calls time out as they would without."""
    transport = Telling()
    transport.error = ZeroDivisionError("oops")
    async with desk(transport) as at:
        at.explainer.suspect(at.call("a"), at.core.now() + 0.02)
        await at.until(at.expired, "a")
    assert at.expired == {"a": None}


async def test_look_that_takes_long() -> None:
    """A call waits a moment beyond its deadline for its reason, and no longer."""
    transport = Telling(a=Explanation("too late"))
    transport.stuck = 1
    async with desk(transport) as at:
        at.explainer.suspect(at.call("a"), at.core.now() + 0.02)
        await at.until(at.expired, "a")
    assert at.expired == {"a": None}


async def test_unserved() -> None:
    """A call that is to fail at once does where nobody serves it; what isn't known is asked again."""
    nobody = Explanation("nobody is there", unserved=True)
    transport = Telling(a=nobody, b=Explanation("there is somebody"))
    transport.told["c"] = Explanation("no connection", unserved=True, unknown=True)
    async with desk(transport) as at:
        calls = {name: at.call(name) for name in "abc"}
        for call in calls.values():
            at.explainer.check(call)
        await at.until(at.lost, "a")
        transport.told["c"] = nobody
        await at.until(at.lost, "a", "c")
    assert transport.looks[0] == ["a", "b", "c"]
    assert all(look == ["c"] for look in transport.looks[1:])
    assert calls["b"].state is CallState.WAITING
    assert at.lost["a"] == "nobody is there"
    assert at.expired == {}


async def test_check_that_takes_long() -> None:
    """A look that was cut is made once more."""
    transport = Telling(a=Explanation("nobody is there", unserved=True))
    transport.stuck = 1
    async with desk(transport, within=0.01) as at:
        at.explainer.check(at.call("a"))
        await at.until(at.lost, "a")
    assert transport.looks == [["a"], ["a"]]
