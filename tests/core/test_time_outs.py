"""What calls that are given up tell, and what is told before."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest
from msgspec.structs import replace

from anyio_kkrpc import (
    DeliveryError,
    MemoryTransport,
    MethodNotFoundError,
    RPCChannel,
    RPCError,
    RPCTimeoutError,
    with_call_options,
)
from anyio_kkrpc._calling._options import check_takeover
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.abc import Capabilities, Envelope, Explanation
from tests.bounds import BOUND, CALL_BOUND

pytestmark = pytest.mark.anyio


class Knowing(MemoryTransport):
    """A transport that says what it is told to."""

    takeover: float | None = None

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, takeover=self.takeover)


@pytest.mark.parametrize(
    ("timeout", "takeover", "warned"),
    [
        (0.25, 0.25, True),
        (0.25, 7.5, True),
        (7.5, 0.25, False),
        (None, 7.5, False),
        (7, None, False),
    ],
)
async def test_too_short_for_a_takeover(
    timeout: float | None,
    takeover: float | None,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A channel whose time-out is over before another worker takes over warns of it, once."""
    check_takeover.cache_clear()
    monkeypatch.setattr(Knowing, "takeover", takeover)
    for _ in range(2):
        transport, other = Knowing.pair()
        async with transport, other, RPCChannel(transport, timeout=timeout):
            pass
    told = [record.args for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ([(timeout, takeover)] if warned else [])


class Explaining(Knowing):
    """A transport that knows what it is told of, and counts how often it is asked."""

    known: Callable[[Envelope], Explanation | None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[list[Request]] = []

    async def explain(self, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
        self.asked.append([cast(Request, one.record) for one in requests])
        return [self.known(one) for one in requests]


class Api:
    def __init__(self) -> None:
        self.runs: list[int] = []
        self.ended: list[int] = []

    async def wait(self, n: int = 0) -> None:
        self.runs.append(n)
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.append(n)


@asynccontextmanager
async def asking(
    known: Callable[[Envelope], Explanation | None], **options: Any
) -> AsyncIterator[tuple[Explaining, Api, Any]]:
    """Give a transport that knows this, what is served, and a proxy of it."""
    transport, other = Explaining.pair()
    transport.known = known  # type: ignore[method-assign]
    api = Api()
    async with transport, other, RPCChannel(other, expose=api):
        async with RPCChannel(transport, **options) as channel:
            yield transport, api, channel.get_api()


async def outcome(call: Awaitable[object]) -> RPCError:
    with pytest.raises(RPCError) as caught:
        await call
    return caught.value


async def test_says_why() -> None:
    """The error tells what the transport knows of each call; many are asked for together."""

    def known(envelope: Envelope) -> Explanation | None:
        n = cast(Request, envelope.record).a[0]
        return Explanation(f"because of {n}") if n % 2 else None

    errors: dict[int, Any] = {}
    with anyio.fail_after(BOUND):
        while not any(error.reason for error in errors.values()):  # a busy machine may be too late
            async with asking(known, timeout=0.3) as (transport, api, remote):

                async def call(n: int, remote: Any = remote) -> None:
                    errors[n] = await outcome(remote.wait(n))

                async with anyio.create_task_group() as group:
                    for n in range(90):
                        group.start_soon(call, n)
                while len(api.ended) < len(api.runs):
                    await anyio.sleep(0.01)
            assert len(transport.asked) < 20
    for n, error in errors.items():
        assert isinstance(error, RPCTimeoutError)
        assert error.reason in ((f"because of {n}", None) if n % 2 else (None,))
        because = "" if error.reason is None else f": {error.reason}"
        assert str(error) == f"wait: no answer within 0.3 s{because}"


async def never(requests: object) -> list[None]:
    await anyio.sleep_forever()
    raise AssertionError


async def fails(requests: object) -> list[None]:
    raise LookupError


async def too_little(requests: object) -> list[None]:
    return []


@pytest.mark.parametrize("look", [never, fails, too_little])
async def test_look_that_finds_nothing(look: Any) -> None:
    """A call times out as it would without."""
    with anyio.fail_after(BOUND):
        async with asking(lambda envelope: None, timeout=0.1) as (transport, api, remote):
            transport.explain = look  # type: ignore[method-assign]
            for _ in range(2):
                error = await outcome(remote.wait())
                assert isinstance(error, RPCTimeoutError)
                assert error.reason is None
            while api.ended != api.runs:
                await anyio.sleep(0.01)


async def test_nothing_is_asked_for_what_is_answered() -> None:
    """Nor for what is left before."""
    async with asking(lambda envelope: None, timeout=CALL_BOUND) as (transport, _, remote):
        with anyio.move_on_after(0.05):
            await remote.wait()
        with pytest.raises(MethodNotFoundError):
            await remote.missing()
        assert transport.asked == []


@pytest.mark.parametrize("of_channel", [True, False])
async def test_fail_fast(of_channel: bool) -> None:
    """A call that nobody serves ends at once, and is cancelled, if that is wanted."""
    unserved = Explanation("nobody is there", unserved=True)
    async with asking(lambda envelope: unserved, timeout=None, fail_fast=of_channel) as (
        transport,
        api,
        remote,
    ):
        with anyio.fail_after(BOUND):
            error = await outcome(with_call_options(remote, fail_fast=True).wait(1))
            assert isinstance(error, DeliveryError)
            assert str(error) == "nobody is there"
            if of_channel:
                assert isinstance(await outcome(remote.wait(2)), DeliveryError)
            while api.ended != api.runs:
                await anyio.sleep(0.01)
        asked = len(transport.asked)
        async with anyio.create_task_group() as group:
            group.start_soon(with_call_options(remote, fail_fast=False).wait, 3)
            with anyio.fail_after(BOUND):
                while 3 not in api.runs:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.2)  # in which it would have been asked for
            group.cancel_scope.cancel()
        assert len(transport.asked) == asked
        transport.known = lambda envelope: Explanation("somebody is there")  # type: ignore[method-assign]
        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                for n in range(4, 54):
                    group.start_soon(with_call_options(remote, fail_fast=True).wait, n)
                while sum(map(len, transport.asked[asked:])) < 50 or len(api.runs) < 50:
                    await anyio.sleep(0.01)
                group.cancel_scope.cancel()
        assert len(transport.asked) - asked < 10


async def test_fail_fast_is_a_bool() -> None:
    """Anything else is refused at once, by name."""
    transport, _ = MemoryTransport.pair()
    with pytest.raises(TypeError, match="fail_fast"):
        RPCChannel(transport, fail_fast=cast(bool, 1))
    with pytest.raises(TypeError, match="fail_fast"):
        with_call_options(RPCChannel(transport).get_api(), fail_fast=cast(bool, "no"))
