"""Callbacks that are called faster than they run: their callers wait, and nothing is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, wait_all_tasks_blocked
from msgspec import UNSET

from anyio_kkrpc import (
    DeliveryError,
    MemoryTransport,
    OverloadedError,
    RPCChannel,
    TransportClosedError,
    with_call_options,
)
from anyio_kkrpc._protocol._ahead import WINDOW
from anyio_kkrpc._protocol._budget import BUDGET
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc.abc import Envelope, Transport
from tests.bounds import BOUND, CALL_BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio

Function = Callable[..., Awaitable[None]]


class Gate:
    """A callback that runs when it is let."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._limiter = anyio.Semaphore(0)

    async def call(self, value: Any) -> None:
        await self._limiter.acquire()
        self.seen.append(value)

    def let(self, count: int) -> None:
        for _ in range(count):
            self._limiter.release()


class Api:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.errors: list[BaseException] = []
        self.kept: list[Function] = []
        self.begun = anyio.Event()

    async def send(self, function: Function, values: list[Any]) -> int:
        try:
            for value in values:
                await function(value)
                self.sent.append(value)
        except BaseException as exc:
            self.errors.append(exc)
            raise
        return len(values)

    async def send_from_tasks(self, function: Function, count: int) -> None:
        async def send(value: int) -> None:
            await function(value)
            self.sent.append(value)

        async with create_task_group() as group:
            for value in range(count):
                group.start_soon(send, value)
                await wait_all_tasks_blocked()
            self.begun.set()

    async def send_some(self, function: Function, other: Function) -> None:
        """Give one invocation up while it waits."""
        for value in range(WINDOW):
            await function(value)
        with CancelScope() as scope:
            async with create_task_group() as group:
                group.start_soon(function, "given up")
                group.start_soon(function, "given up as well")
                await wait_all_tasks_blocked()
                scope.cancel()
        await other("given up")
        await function("last")

    def keep(self, function: Function) -> None:
        self.kept.append(function)

    def ping(self) -> str:
        return "pong"


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.001)


async def test_callers_wait() -> None:
    """No more than so many are ahead; each runs once, in its order."""
    api, gate = Api(), Gate()
    count = 5 * WINDOW + 3
    async with pair(api) as link, create_task_group() as group:
        results: list[int] = []

        async def call() -> None:
            results.append(await link.api.send(gate.call, list(range(count))))

        group.start_soon(call)
        for let in (0, 1, WINDOW // 2, 1, WINDOW, 0):
            gate.let(let)
            await wait_all_tasks_blocked()
            # Answers come for each half of what may be ahead.
            assert WINDOW // 2 <= len(api.sent) - len(gate.seen) <= WINDOW
        gate.let(count)
        await until(lambda: results)
        assert results == [count]
        assert gate.seen == list(range(count))
        assert link.client.statistics().dropped_callbacks == 0


async def test_large_values() -> None:
    """Of what is large so much less is ahead; one always may."""
    api, gate = Api(), Gate()
    values = ["x" * (BUDGET // 4)] * 7 + ["x" * (2 * BUDGET)] * 2
    async with pair(api) as link, create_task_group() as group:
        group.start_soon(link.api.send, gate.call, values)
        for ran in range(len(values) + 1):
            await wait_all_tasks_blocked()
            ahead = api.sent[len(gate.seen) :]
            assert len(gate.seen) == ran
            assert sum(map(len, ahead[:-1])) < BUDGET + BUDGET // 4
            gate.let(1)
    assert len(gate.seen) == len(values)


async def test_in_turn() -> None:
    """Tasks that call the same function send in the order in which they came."""
    api, gate = Api(), Gate()
    count = 2 * WINDOW + 5
    async with pair(api) as link, create_task_group() as group:
        group.start_soon(link.api.send_from_tasks, gate.call, count)
        await api.begun.wait()
        assert len(api.sent) == WINDOW
        gate.let(count)
        await until(lambda: len(gate.seen) == count)
    assert gate.seen == list(range(count))


async def test_cancelled_while_it_waits() -> None:
    """Then it wasn't sent, others go on, and another function isn't concerned."""
    api, gate, other = Api(), Gate(), Gate()
    other.let(1)
    async with pair(api) as link, create_task_group() as group:
        group.start_soon(link.api.send_some, gate.call, other.call)
        await until(lambda: other.seen)
        gate.let(WINDOW + 1)
        await until(lambda: len(gate.seen) == WINDOW + 1)
    assert gate.seen == [*range(WINDOW), "last"]


async def test_values_that_can_not_be_sent() -> None:
    """They take no room: however many there are, what follows is sent."""

    class Bad(Api):
        async def send(self, function: Function, values: list[Any]) -> int:
            for _ in range(2 * WINDOW):
                with pytest.raises(TypeError):
                    await function(object())
            return await super().send(function, values)

    api, gate = Bad(), Gate()
    gate.let(3 * WINDOW)
    async with pair(api) as link:
        await link.api.send(gate.call, list(range(3 * WINDOW)))
    assert gate.seen == list(range(3 * WINDOW))


@pytest.mark.parametrize("reply", [True, False], ids=["call", "one_way"])
async def test_kept_after_the_call(reply: bool) -> None:
    """A function that a handler keeps may be called for as long as it does."""
    api, gate = Api(), Gate()
    async with pair(api) as link:
        await with_call_options(link.api, reply=reply).keep(gate.call)
        await link.api.ping()
        (function,) = api.kept
        async with create_task_group() as group:
            group.start_soon(api.send, function, list(range(3 * WINDOW)))
            await wait_all_tasks_blocked()
            assert len(api.sent) == WINDOW
            gate.let(3 * WINDOW)
        await until(lambda: len(gate.seen) == 3 * WINDOW)
    assert gate.seen == list(range(3 * WINDOW))


async def test_caller_has_given_up() -> None:
    """A function that its owner has dropped is an error for who goes on calling it."""
    api = Api()

    class Deaf(Api):
        """Keeps the function and doesn't mind that nobody waits for it."""

        async def wait(self, function: Function) -> None:
            self.keep(function)
            await anyio.sleep_forever()

    api = Deaf()
    async with pair(api) as link:
        async with create_task_group() as group:
            group.start_soon(link.api.wait, print)
            await wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert link.client.statistics().callbacks == 0
        (function,) = api.kept
        with pytest.raises(DeliveryError, match="isn't there any more"), anyio.fail_after(BOUND):
            await api.send(function, list(range(10 * WINDOW)))
        assert len(api.sent) <= WINDOW


async def test_channel_of_the_owner_ends() -> None:
    """Whoever waits, even for a one-way call's function, is told."""
    a, b = MemoryTransport.pair(codec=None)
    api, gate = Api(), Gate()
    async with a, b, RPCChannel(b, expose=api):
        async with RPCChannel(a) as client:
            call = with_call_options(client.get_api(), reply=False)
            await call.send(gate.call, list(range(2 * WINDOW)))
            await wait_all_tasks_blocked()
            assert len(api.sent) == WINDOW
            assert not api.errors
        await until(lambda: api.errors)
    (error,) = api.errors
    assert isinstance(error, DeliveryError)


async def test_channel_that_calls_ends() -> None:
    """Whoever waits outside of a handler is told."""
    a, b = MemoryTransport.pair(codec=None)
    api, gate = Api(), Gate()
    async with a, b, RPCChannel(a) as client, create_task_group() as group:
        async with RPCChannel(b, expose=api):
            await client.get_api().keep(gate.call)

            async def send() -> None:
                with pytest.raises(TransportClosedError):
                    await api.send(api.kept[0], list(range(2 * WINDOW)))

            group.start_soon(send)
            await wait_all_tasks_blocked()
            assert len(api.sent) == WINDOW


async def test_handlers_that_wait_make_room_for_others() -> None:
    """What a callback calls is served, though each handler that may run waits for a callback."""
    api = Api()
    seen: list[str] = []
    async with pair(api, server={"max_concurrency": 1}) as link:

        async def ask(value: int) -> None:
            seen.append(await link.api.ping())

        with anyio.fail_after(BOUND):
            await link.api.send(ask, list(range(2 * WINDOW)))
    assert seen == ["pong"] * (2 * WINDOW)


def speak_as_before(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a channel make requests as the version before did, whose callbacks nobody counts."""
    send = transport.send

    async def stripped(item: Envelope) -> None:
        if isinstance(item.record, Request):
            item.record.cw = UNSET
        await send(item)

    monkeypatch.setattr(transport, "send", stripped)


@pytest.mark.parametrize("weight", [1, BUDGET], ids=["many", "large"])
async def test_callers_that_do_not_wait(
    weight: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What finds no room is counted, logged, and an error at who has passed the function."""
    monkeypatch.setattr("anyio_kkrpc._driver._callbacks.MAX_WAITING", 3 * WINDOW)
    monkeypatch.setattr("anyio_kkrpc._driver._callbacks.MAX_WEIGHT", 3 * WINDOW * BUDGET)
    count = 4 * WINDOW
    values = [f"{number}".ljust(weight) for number in range(count)]
    a, b = MemoryTransport.pair(codec=None)
    speak_as_before(a, monkeypatch)
    api, gate = Api(), Gate()
    errors: list[OverloadedError] = []
    async with a, b, RPCChannel(b, expose=api), RPCChannel(a, timeout=BOUND) as client:

        async def call() -> None:
            with pytest.raises(OverloadedError) as caught:
                await client.get_api().send(gate.call, values)
            errors.append(caught.value)

        async with create_task_group() as group:
            group.start_soon(call)
            await wait_all_tasks_blocked()
            assert len(api.sent) == count
            dropped = client.statistics().dropped_callbacks
            assert dropped == count - 1 - 3 * WINDOW
            gate.let(count)
        assert f"{dropped} invocations of a callback were dropped" in str(errors[0])
        assert gate.seen == [values[0], *values[dropped + 1 :]]  # the oldest went
        assert "slower than its caller" in caplog.text
        # Another call isn't concerned.
        gate.let(1)
        assert await client.get_api().send(gate.call, ["x"]) == 1


async def test_callback_in_the_grace_of_a_cancelled_channel() -> None:
    """A handler goes on for so long, and what it has passed is called."""
    heard: list[int] = []
    entered, leaving = anyio.Event(), anyio.Event()

    class Back:
        async def work(self, progress: Any) -> str:
            entered.set()
            await leaving.wait()
            for number in (50, 100):
                await progress(number)
            return "worked"

    a, b = MemoryTransport.pair()
    async with a, b, RPCChannel(b, expose=Back(), timeout=CALL_BOUND) as other:

        class Front:
            async def go(self) -> Any:
                async def progress(number: int) -> None:
                    await anyio.lowlevel.checkpoint()
                    heard.append(number)

                return await channel.get_api().work(progress)

        results: list[Any] = []

        async def call() -> None:
            results.append(await other.get_api().go())

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with RPCChannel(
                    a, expose=Front(), timeout=CALL_BOUND, grace_period=BOUND
                ) as channel:
                    group.start_soon(call)
                    await entered.wait()
                    scope.cancel()
                    try:
                        await anyio.sleep_forever()
                    finally:
                        leaving.set()
    assert results == ["worked"]
    assert heard == [50, 100]
