"""Functions as arguments whose results are wanted."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio
import pytest
from msgspec import UNSET

from anyio_kkrpc import (
    DeliveryError,
    OverloadedError,
    RemoteError,
    RPCTimeoutError,
    TransportClosedError,
    expose,
    with_call_options,
)
from anyio_kkrpc._driver._asking import MAX_RUNNING
from anyio_kkrpc.records import CallbackCall, Cancel, Reply
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class Confirm(Protocol):
    async def __call__(self, what: str) -> bool: ...


class Api:
    def __init__(self) -> None:
        self.kept: Any = None
        self.release = anyio.Event()

    async def ask(self, function: Any, *args: Any) -> Any:
        return await function.ask(*args)

    async def name_of_error(self, function: Any) -> Any:
        try:
            return await function.ask()
        except Exception as exc:
            return [type(exc).__name__, str(exc)]

    async def keep(self, function: Any) -> None:
        self.kept = function

    async def told(self, confirm: Callable[[str], Awaitable[bool]]) -> bool:
        return await confirm("sure?")

    async def any_arguments(self, confirm: Callable[..., Awaitable[int]] | None) -> int:
        return 0 if confirm is None else await confirm(1, 2)

    async def by_protocol(self, confirm: Confirm) -> bool:
        return await confirm("sure?")

    async def only_told(self, say: Callable[[int], Awaitable[None]]) -> None:
        return await say(1)

    async def order(self, function: Any) -> Any:
        await function(1)
        await function(2)
        answer = await function.ask(3)
        await function(4)
        return answer

    async def at_once(self, function: Any, count: int) -> list[Any]:
        answers: list[Any] = []

        async def one() -> None:
            try:
                answers.append(await function.ask())
            except OverloadedError:
                answers.append("overloaded")

        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(one)
        return answers

    async def given_up(self, function: Any) -> str:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(function.ask)
                await self.release.wait()
                scope.cancel()
        return "given up"

    async def total(self, function: Any) -> int:
        return sum([item async for item in await function.ask()])


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_value_comes_back(codec: str) -> None:
    """Of a function, a coroutine function, and what the annotation of the handler asks for."""

    async def double(value: int) -> int:
        return 2 * value

    def add(*args: int) -> int:
        return sum(args)

    asked: list[str] = []

    def confirm(what: str) -> bool:
        asked.append(what)
        return True

    async with pair(Api(), codec=codec) as opened:
        api = opened.api
        assert await api.ask(double, 4) == 8
        assert await api.ask(add, 1, 2) == 3
        assert await api.ask(lambda: None) is None
        assert await api.ask(lambda: {"a": [1]}) == {"a": [1]}
        assert await api.told(confirm) is True
        assert await api.by_protocol(confirm) is True
        assert await api.any_arguments(add) == 3
        assert await api.any_arguments(None) == 0
        assert asked == ["sure?"] * 2
        with anyio.fail_after(BOUND):
            while opened.client.statistics().callbacks:
                gc.collect()
                await anyio.sleep(0.001)
        with pytest.raises(RemoteError, match="bool"):
            await api.told(lambda what: "yes")
        await left_behind(opened)


async def left_behind(opened: Pair) -> None:
    """Wait until neither side holds anything of what was asked.

    Functions aside: pytest keeps what was logged, and that the frames that have them.
    """
    with anyio.fail_after(BOUND):
        while any(
            (one.calls, one.handlers, one.incoming_streams, one.outgoing_streams) != (0, 0, 0, 0)
            for one in (opened.client.statistics(), opened.server.statistics())
        ):
            await anyio.sleep(0.001)
    assert not opened.server._conversation.functions.all_asked()


async def test_an_error_comes_back() -> None:
    """Whatever the function raises, and if its value can't be sent."""

    class OwnError(Exception):
        def __init__(self) -> None:
            super().__init__("of the function")
            self.code = 4

    async def fails() -> None:
        raise OwnError

    async with pair(Api()) as opened:
        with pytest.raises(RemoteError, match="of the function") as failed:
            await opened.api.ask(fails)
        assert failed.value.data == {"code": 4}
        assert (await opened.api.name_of_error(fails)) == [
            "RemoteError",
            "OwnError: of the function",
        ]
        with pytest.raises(RemoteError, match="object"):
            await opened.api.ask(lambda: object())
        await left_behind(opened)


async def test_a_stream_comes_back() -> None:
    """As of any call."""
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(300):
                yield number
        finally:
            closed.append(True)

    async with pair(Api()) as opened:
        assert await opened.api.total(lambda: numbers()) == sum(range(300))
        await left_behind(opened)
    assert closed == [True]


async def test_the_order_of_invocations() -> None:
    """One comes after those before it, and doesn't hold up those behind it."""
    seen: list[int] = []

    async def note(number: int) -> int:
        seen.append(number)
        return number

    async with pair(Api()) as opened:
        assert await opened.api.order(note) == 3
    assert seen == [1, 2, 3, 4]


async def test_many_at_once() -> None:
    """They run beside each other, no more than a limit; the others are told."""
    running: list[int] = []
    full = anyio.Event()

    async def wait() -> str:
        running.append(1)
        if len(running) == MAX_RUNNING:
            full.set()
        await full.wait()
        return "ran"

    async with pair(Api()) as opened:
        answers = await opened.api.at_once(wait, MAX_RUNNING + 20)
        assert answers.count("overloaded") >= 1
        assert answers.count("ran") + answers.count("overloaded") == MAX_RUNNING + 20
        assert answers.count("ran") >= MAX_RUNNING
        await left_behind(opened)


async def test_who_asks_gives_up() -> None:
    """The function is cancelled, whether it runs or waits."""
    api = Api()
    ended: list[str] = []

    async def wait() -> None:
        api.release.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    async with pair(api) as opened:
        assert await opened.api.given_up(wait) == "given up"
        await left_behind(opened)
    assert ended == ["cancelled"]


async def test_what_is_cancelled_before_it_runs() -> None:
    """A function that waits for its turn then doesn't run, also if it never awaits."""
    ran: list[str] = []
    async with pair(Api()) as opened:
        call, request = opened.client._conversation.call(
            "call", ["f"], args=[partial(ran.append, "1"), partial(ran.append, "2")]
        )
        assert request.a
        reactions: Any = opened.client._reactions
        for number, function in enumerate(request.a):
            event = opened.client._conversation.receive(
                CallbackCall(function["id"], [], r=str(number)), None
            )
            reactions._on_callback(event)
        cancel: Any = opened.client._conversation.receive(Cancel("0"), None)
        cancel.handling.driver.cancel(cancel.handling)
        with anyio.fail_after(BOUND):
            while opened.client.statistics().handlers:
                await anyio.sleep(0.001)
        call.driver = anyio.Event()
        opened.client._conversation.receive(Reply(call.id), None)
    assert ran == ["2"]


async def test_deadlines() -> None:
    """It has no more time than the handler has, and the function neither."""
    ended = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with pair(Api()) as opened:
        api = with_call_options(opened.api, timeout=0.2)
        with pytest.raises((RPCTimeoutError, RemoteError), match="no answer"):
            await api.ask(wait)
        with anyio.fail_after(BOUND):
            await ended.wait()
        await left_behind(opened)


async def test_the_time_of_the_channel() -> None:
    """A handler whose caller waits for ever waits as long as its own channel says."""
    async with pair(Api(), server={"timeout": 0.05}, timeout=None) as opened:
        name, text = await opened.api.name_of_error(lambda: anyio.sleep_forever())
        assert name == "RPCTimeoutError"
        assert "in time" in text
        await left_behind(opened)


async def test_a_function_that_is_gone() -> None:
    """Who holds it longer than the call is told."""
    api = Api()
    async with pair(api) as opened:
        await opened.api.keep(lambda: 5)
        assert await api.kept.ask() == 5
        (export,) = opened.client._conversation.callbacks.values()
        del opened.client._conversation.callbacks[export.id]
        with pytest.raises(DeliveryError, match="isn't there"):
            await api.kept.ask()
        opened.client._conversation.callbacks[export.id] = export
        api.kept = None


async def test_the_owner_ends() -> None:
    """Who waits is told, be the owner's channel left or the link gone."""
    api = Api()
    begun = anyio.Event()

    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    async def ask(error: type[Exception]) -> None:
        with pytest.raises(error):
            await api.kept.ask()

    for leave in (True, False):
        begun = anyio.Event()
        async with anyio.create_task_group() as group:
            async with pair(api) as opened:
                await opened.api.keep(wait)
                group.start_soon(ask, DeliveryError if leave else TransportClosedError)
                await begun.wait()
                if not leave:
                    await opened.transports[1].aclose()
        api.kept = None


@pytest.mark.parametrize("way", ["doubted", "lost", "peer_gone", "returned"])
async def test_answers_that_may_be_lost(way: str) -> None:
    """They aren't asked for again, since the function would run twice."""
    api = Api()
    begun = anyio.Event()

    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    async def ask() -> None:
        with pytest.raises(DeliveryError):
            await api.kept.ask()

    async with pair(api) as opened:
        await opened.api.keep(wait)
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await begun.wait()
            reactions: Any = opened.server._reactions
            if way == "doubted":
                reactions.doubted()
            elif way == "lost":
                reactions.lost(DeliveryError("lost"))
            elif way == "peer_gone":
                reactions.peer_gone(None, "reader", DeliveryError("gone"))
            else:
                reactions._end_callbacks(None, DeliveryError("came back"))
        api.kept = None
        await left_behind(opened)


async def test_peers_without_results() -> None:
    """kkrpc and older peers don't say that they send results: nothing is sent then."""
    async with pair(Api()) as opened:
        request = opened.client._conversation.call

        def older(*args: Any, **kwargs: Any) -> Any:
            call, record = request(*args, **kwargs)
            record.cr = False
            return call, record

        opened.client._conversation.call = older  # type: ignore[method-assign]
        assert await opened.api.name_of_error(lambda: 1) == [
            "TypeError",
            "the peer that has the function sends no results of functions",
        ]


async def test_a_repeated_invocation(caplog: pytest.LogCaptureFixture) -> None:
    """One that runs already is refused, and not run twice."""
    runs: list[int] = []

    async def wait() -> None:
        runs.append(1)
        await anyio.sleep_forever()

    async with pair(Api()) as opened:
        call, request = opened.client._conversation.call("call", ["f"], args=[wait])
        assert request.a
        assert request.cr is True
        reactions: Any = opened.client._reactions
        for _ in range(2):
            reactions._on_callback(
                opened.client._conversation.receive(
                    CallbackCall(request.a[0]["id"], [], r="1"), None
                )
            )
        with anyio.fail_after(BOUND):
            while not runs:
                await anyio.sleep(0.001)
        assert opened.client.statistics().refused == 1
        event: Any = opened.client._conversation.receive(Cancel("1"), None)
        event.handling.driver.cancel(event.handling)
        with anyio.fail_after(BOUND):
            while opened.client.statistics().handlers:
                await anyio.sleep(0.001)
        call.driver = anyio.Event()
        opened.client._conversation.receive(Reply(call.id), None)
    assert runs == [1]


async def test_without_results_nothing_is_asked() -> None:
    """What is annotated as giving nothing, or anything, is sent as before."""
    sent: list[Any] = []
    async with pair(expose(Api())) as opened:
        listener: Any = opened.client._reactions
        received = listener.received

        def note(envelope: Any) -> None:
            sent.append(envelope.record)
            received(envelope)

        listener.received = note
        assert await opened.api.only_told(lambda number: number) is None
    (record,) = [one for one in sent if isinstance(one, CallbackCall)]
    assert record.r is record.d is UNSET
