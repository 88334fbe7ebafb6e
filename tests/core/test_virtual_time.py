"""Deadlines in virtual time: hours pass in no time, on trio's clock that jumps when all wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import trio
from trio.testing import MockClock

from anyio_kkrpc import (
    OverloadedError,
    RPCChannel,
    RPCTimeoutError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.middleware import CallNext, Invocation, retry
from tests.pairs import pair

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class Api:
    def __init__(self) -> None:
        self.ended: list[float] = []
        self.budgets: list[float | None] = []
        self.channel: RPCChannel | None = None

    async def sleep(self, seconds: float) -> float:
        try:
            await anyio.sleep(seconds)
        finally:
            self.ended.append(anyio.current_time())
        return seconds

    async def items(self, pause: float, count: int) -> AsyncIterator[int]:
        for number in range(count):
            await anyio.sleep(pause)
            yield number

    async def budget(self) -> float | None:
        deadline = current_call().deadline
        return None if deadline is None else deadline - anyio.current_time()

    async def relay(self, seconds: float) -> None:
        assert self.channel is not None
        api = with_call_options(self.channel.get_api(), timeout=None, idempotent=True)
        await api.sleep(seconds)


async def test_an_hour() -> None:
    """A call fails when its hour is over, and its handler ends then."""
    api = Api()
    async with pair(api, timeout=3600) as link:
        started = trio.current_time()
        with pytest.raises(RPCTimeoutError, match="3600"):
            await link.api.sleep(10_000)
        assert trio.current_time() - started == pytest.approx(3600, abs=0.01)
        await anyio.wait_all_tasks_blocked()
        assert api.ended == [pytest.approx(started + 3600, abs=0.01)]
        assert link.server.statistics().handlers == 0
        assert await link.api.sleep(3599) == 3599


async def test_default_is_thirty_seconds() -> None:
    """As the docs say."""
    from anyio_kkrpc import MemoryTransport

    a, b = MemoryTransport.pair()
    async with a, b, RPCChannel(b, expose=Api()), RPCChannel(a) as client:
        started = trio.current_time()
        with pytest.raises(RPCTimeoutError):
            await client.get_api().sleep(31)
        assert trio.current_time() - started == pytest.approx(30, abs=0.01)


async def test_no_timeout() -> None:
    """None waits for a year if need be."""
    async with pair(Api(), timeout=1) as link:
        year = 365 * 24 * 3600
        assert await with_call_options(link.api, timeout=None).sleep(year) == year


async def test_many_deadlines() -> None:
    """Each of a thousand calls ends at its own deadline, whatever the order they began in."""
    api = Api()
    ended: dict[int, float] = {}
    async with pair(api, server={"max_concurrency": 2000}) as link:
        start = trio.current_time()

        async def call(seconds: int) -> None:
            with pytest.raises(RPCTimeoutError):
                await with_call_options(link.api, timeout=seconds).sleep(1e6)
            ended[seconds] = trio.current_time() - start

        async with anyio.create_task_group() as group:
            for number in range(1000):
                group.start_soon(call, (number * 617) % 1000 + 1)
        assert len(ended) == 1000
        for seconds, when in ended.items():
            assert when == pytest.approx(seconds, abs=0.01)
        assert link.client.statistics().calls == 0


async def test_stream_that_pauses() -> None:
    """The timeout is for each item, not for the stream."""
    async with pair(Api(), timeout=10) as link:
        started = trio.current_time()
        assert [n async for n in link.api.items(9, 20)] == list(range(20))
        assert trio.current_time() - started == pytest.approx(180, abs=1)
        got = []
        with pytest.raises(RPCTimeoutError, match="no item"):
            async for n in link.api.items(11, 3):
                got.append(n)
        assert got == []
        await anyio.wait_all_tasks_blocked()
        assert link.server.statistics().outgoing_streams == 0


async def test_budget_travels() -> None:
    """A handler knows what is left."""
    async with pair(Api(), timeout=60) as link:
        assert await link.api.budget() == pytest.approx(60, abs=0.01)
        assert await with_call_options(link.api, timeout=None).budget() is None


async def test_nested_call_inherits_the_deadline() -> None:
    """A call that a handler makes ends with the handler's own caller, though it has no timeout."""
    front, back = Api(), Api()
    async with pair(back, timeout=None) as behind:
        front.channel = behind.client
        async with pair(front, timeout=100) as link:
            started = trio.current_time()
            with pytest.raises(RPCTimeoutError):
                await link.api.relay(5000)
            assert trio.current_time() - started == pytest.approx(100, abs=0.01)
            await anyio.wait_all_tasks_blocked()
            assert back.ended == [pytest.approx(started + 100, abs=0.1)]


async def test_request_that_waited_too_long_is_not_started() -> None:
    """A request whose time ran out in the queue never runs."""
    api = Api()
    async with pair(api, server={"max_concurrency": 1}) as link:

        async def busy() -> None:
            await with_call_options(link.api, timeout=None).sleep(100)

        async with anyio.create_task_group() as group:
            group.start_soon(busy)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(RPCTimeoutError):
                await with_call_options(link.api, timeout=5).sleep(0)
        await anyio.wait_all_tasks_blocked()
        assert len(api.ended) == 1
        statistics = link.server.statistics()
        assert statistics.served == 1


@pytest.mark.parametrize(
    ("attempt_timeout", "ends", "whose"),
    [
        (4, [4, 8, 10], " (attempt 3 of 9: the timeout of all together)"),
        (None, [10], ""),
        (20, [10], ""),
    ],
)
async def test_retry_stays_within_the_deadline(
    attempt_timeout: float | None, ends: list[float], whose: str
) -> None:
    """All attempts together; without a bound of its own, the first one may use all of it."""
    api = Api()
    again = retry(9, initial=0, attempt_timeout=attempt_timeout)
    async with pair(api, timeout=10, middleware=[again]) as link:
        started = trio.current_time()
        with pytest.raises(RPCTimeoutError) as caught:
            await with_call_options(link.api, idempotent=True).sleep(100)
        assert str(caught.value) == f"sleep: no answer within 10 s{whose}"
        assert trio.current_time() - started == pytest.approx(10, abs=0.01)
        await anyio.wait_all_tasks_blocked()
        assert api.ended == [pytest.approx(started + end, abs=0.01) for end in ends]
        assert await with_call_options(link.api, timeout=None, idempotent=True).sleep(3) == 3


async def test_time_outs_say_whose_time_it_was() -> None:
    """That of an attempt, of a middleware, of a caller, or the call's own, whatever was left."""

    async def slow(call: Invocation, call_next: CallNext) -> Any:
        await anyio.sleep(1)
        return await call_next(call)

    async def hasty(call: Invocation, call_next: CallNext) -> Any:
        assert call.deadline is not None
        call.deadline -= 7
        return await call_next(call)

    async def text(timeout: float, *middleware: Any, idempotent: bool = True) -> str:
        async with pair(Api(), timeout=timeout, middleware=middleware) as link:
            with pytest.raises(RPCTimeoutError) as caught:
                await with_call_options(link.api, idempotent=idempotent).sleep(100)
            return str(caught.value)

    attempts = retry(2, initial=0, attempt_timeout=3)
    first = "sleep: no answer within 3 s (attempt 1 of 2: its attempt_timeout)"
    assert await text(10, attempts, idempotent=False) == first
    assert await text(10, attempts) == first.replace("1 of 2", "2 of 2")
    assert await text(10, slow) == "sleep: no answer within 10 s"
    assert await text(10, slow, hasty) == "sleep: no answer within 2 s"
    failed: list[str] = []
    over = anyio.Event()

    class Caller:
        async def call(self) -> None:
            with anyio.CancelScope(shield=True):
                for middleware in ((), (slow,)):  # the second one has no time left
                    failed.append(await text(10, *middleware))
            over.set()

    async with pair(Caller(), timeout=5) as link:
        with pytest.raises(RPCTimeoutError, match="^call: no answer within 5 s$"):
            await link.api.call()
        await over.wait()
    assert failed == ["sleep: no answer within its caller's deadline"] * 2


async def test_retry_does_not_pause_for_longer() -> None:
    """Where there is no time for another attempt, the error is that of the last one, at once."""
    made = 0

    async def busy(call: Invocation, call_next: CallNext) -> Any:
        nonlocal made
        made += 1
        raise OverloadedError("busy")

    options = {"middleware": [retry(1000, initial=8, maximum=8), busy]}
    async with pair(Api(), timeout=10, **options) as link:
        for _ in range(20):
            started = trio.current_time()
            with pytest.raises(OverloadedError):
                await link.api.sleep(0)
            assert trio.current_time() - started < 10
    assert 20 < made < 20_000


async def test_retry_in_a_handler() -> None:
    """The deadline of who has called it counts, though its own calls have none."""
    front, back = Api(), Api()
    again = retry(9, initial=0, attempt_timeout=40)
    async with pair(back, timeout=None, middleware=[again]) as behind:
        front.channel = behind.client
        async with pair(front, timeout=100) as link:
            started = trio.current_time()
            with pytest.raises(RPCTimeoutError):
                await link.api.relay(5000)
            assert trio.current_time() - started == pytest.approx(100, abs=0.01)
            await anyio.wait_all_tasks_blocked()
    ends = [pytest.approx(started + end, abs=0.1) for end in (40, 80, 100)]
    assert back.ended == ends
