"""Callbacks and streams, over every link."""

from __future__ import annotations

import gc
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import anyio
import pytest

from anyio_kkrpc import RemoteError, RPCTimeoutError, RPCValidationError, with_call_options
from tests.bounds import BOUND, CALL_BOUND

from .conftest import Link, Open

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], bool], link: Link) -> None:
    """Make calls, each of which is a round trip, until the condition holds."""
    with anyio.fail_after(BOUND):
        while not condition():
            await link.api.empty()


async def test_callback(open_link: Open) -> None:
    """All invocations that came before the result have run when the call returns, in order."""
    async with open_link() as link:
        seen: list[Any] = []
        assert (
            await link.api.progress(100, lambda step, total: seen.append((step, total))) == "done"
        )
        assert seen == [(n, 100) for n in range(100)]

        async def on_step(step: int, total: int) -> None:
            await anyio.sleep(0)
            seen.append(step)

        seen.clear()
        assert await link.api.progress(5, on_step) == "done"
        assert seen == [0, 1, 2, 3, 4]
        assert await link.api.progress(0, on_step) == "done"
        assert await link.api.progress(n=1, on_step=on_step) == "done"


async def test_callback_after_the_call(open_link: Open) -> None:
    """A callback works after the call that passed it has ended, until the other side drops it."""
    async with open_link() as link:
        seen: list[int] = []
        await link.api.keep(seen.append)
        await link.api.call_kept(1)
        await link.api.call_kept(2)
        await until(lambda: seen == [1, 2], link)
        assert link.client.statistics().callbacks == 1
        await link.api.drop_kept()
        gc.collect()
        await until(lambda: not link.client.statistics().callbacks, link)


async def test_same_function_keeps_one_id(open_link: Open) -> None:
    """Passing the same function again makes no second entry, and one release is not all."""
    async with open_link() as link:
        seen: list[int] = []
        for _ in range(3):
            await link.api.keep(seen.append)
            assert link.client.statistics().callbacks == 1
        await link.api.call_kept(5)
        await until(lambda: seen == [5], link)


async def test_failing_callback(open_link: Open, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged, and ends neither the call nor the channel."""
    async with open_link() as link:

        def broken(step: int, total: int) -> None:
            raise RuntimeError("callback broke")

        assert await link.api.progress(2, broken) == "done"
        assert caplog.text.count("RuntimeError: callback broke") == 2
        assert await link.api.add(1) == 2


async def test_stream(open_link: Open) -> None:
    """Items arrive in order and complete, over several credits; both ways to read them."""
    async with open_link() as link:
        assert [item async for item in link.api.count(100)] == list(range(100))
        async with link.api.count(33) as items:
            assert [item async for item in items] == list(range(33))
        assert [item async for item in await link.api.count(1)] == [0]
        await until(lambda: not link.server.statistics().outgoing_streams, link)
        assert link.client.statistics().incoming_streams == 0


async def test_empty_streams(open_link: Open) -> None:
    """Streams without items end, in both directions."""

    async def nothing() -> AsyncIterator[int]:
        for n in range(0):
            yield n

    async with open_link() as link:
        assert [item async for item in link.api.count(0)] == []
        assert await link.api.total(nothing()) == 0


async def test_stream_left_early(open_link: Open) -> None:
    """Leaving a stream closes its source at the other side, whichever way it is left."""
    async with open_link() as link:
        async with link.api.count(10_000) as items:
            async for item in items:
                if item == 3:
                    break
        with anyio.fail_after(BOUND):
            await link.served._closed.wait()
        link.served._closed = anyio.Event()
        async for item in link.api.count(10_000):
            if item == 3:
                break
        gc.collect()
        with anyio.fail_after(BOUND):
            await link.served._closed.wait()
        await until(lambda: not link.client.statistics().incoming_streams, link)
        await until(lambda: not link.server.statistics().outgoing_streams, link)


async def test_cancel_after_the_first_item(open_link: Open) -> None:
    """Cancelling the reader closes the source."""
    async with open_link() as link:
        async with anyio.create_task_group() as group:
            async for _ in link.api.count(10_000):
                group.cancel_scope.cancel()
                await anyio.sleep(0)
        with anyio.fail_after(BOUND):
            await link.served._closed.wait()


async def test_cancel_while_waiting_for_an_item(open_link: Open) -> None:
    """Cancelling a reader that waits closes the source, and the handler's generator ends."""
    async with open_link() as link:

        async def read() -> None:
            async with link.api.silence() as items:
                async for _ in items:
                    pytest.fail("nothing comes")

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            with anyio.fail_after(BOUND):
                await link.served._started.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            await link.served._closed.wait()


async def test_waiting_for_an_item_times_out(open_link: Open) -> None:
    """A stream whose source is silent ends in a timeout, not never."""
    for timeout in (0.3, 10.0, CALL_BOUND):  # where the first leaves no time for the call
        async with open_link(timeout=timeout) as link:
            with pytest.raises(RPCTimeoutError) as caught:
                async for _ in link.api.silence():
                    pytest.fail("nothing comes")
        if "no answer" not in str(caught.value):
            break
    assert re.search(rf"no item .* {timeout} s", str(caught.value))


async def test_failing_stream(open_link: Open) -> None:
    """The items before an error are delivered, then the error with its fields."""
    async with open_link() as link:
        got = []
        with pytest.raises(RemoteError) as caught:
            async for item in link.api.count_then_fail(40):
                got.append(item)
        assert got == list(range(40))
        assert (caught.value.name, caught.value.data["code"]) == ("CustomError", 7)


async def test_stream_argument(open_link: Open) -> None:
    """An asynchronous iterable as argument is read at the other side."""

    async def numbers() -> AsyncIterator[int]:
        for n in (27182, 8, 1828, 45904):
            yield n

    async with open_link() as link:
        assert await link.api.total(numbers()) == 74922
        await until(lambda: not link.client.statistics().outgoing_streams, link)


async def test_stream_argument_left_early(open_link: Open) -> None:
    """A handler that reads one item closes the caller's source."""
    closed = anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for n in range(10_000):
                yield n
        finally:
            closed.set()

    async with open_link() as link:
        assert await link.api.first(numbers()) == 0
        gc.collect()
        with anyio.fail_after(BOUND):
            await closed.wait()


async def test_stream_argument_of_a_call_that_fails(open_link: Open) -> None:
    """The source of a stream that came with refused arguments is closed."""
    closed = anyio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.set()

    async with open_link() as link:
        source = numbers()
        assert await source.__anext__() == 1
        with pytest.raises(RPCValidationError):
            await link.api.total(source, "too many")
        with anyio.fail_after(BOUND):
            await closed.wait()


async def test_ping_pong(open_link: Open) -> None:
    """A stream in each direction, one item each in turn."""
    async with open_link() as link:
        send, receive = anyio.create_memory_object_stream[int](0)

        async def numbers() -> AsyncIterator[int]:
            async for number in receive:
                yield number

        with anyio.fail_after(BOUND):
            async with send, receive, link.api.double(numbers()) as doubled:
                for number in range(50):
                    async with anyio.create_task_group() as group:
                        group.start_soon(send.send, number)
                        assert await doubled.__anext__() == 2 * number


async def test_pushback(open_link: Open) -> None:
    """A source isn't read further than its consumer allows."""
    produced = 0

    async def numbers() -> AsyncIterator[int]:
        nonlocal produced
        for n in range(10_000):
            produced += 1
            yield n

    async with open_link() as link:
        async with link.api.double(numbers()) as doubled:
            for _ in range(3):
                await doubled.__anext__()
            for _ in range(20):
                await link.api.empty()
            assert 3 <= produced <= 2 * 64 + 3


async def test_typed_stream(open_link: Open) -> None:
    """Items are checked against the Protocol of a typed proxy."""

    class Typed(Protocol):
        def count(self, n: int) -> AsyncIterator[str]: ...

    async with open_link() as link:
        with pytest.raises(RPCValidationError, match="Expected `str`"):
            async for _ in link.client.get_api(Typed).count(2):
                pytest.fail("an int isn't a str")


async def test_many_streams_at_once(open_link: Open) -> None:
    """Streams of one channel don't mix."""
    async with open_link() as link:
        results: dict[int, list[int]] = {}

        async def read(n: int) -> None:
            results[n] = [item async for item in link.api.count(n)]

        async with anyio.create_task_group() as group:
            for n in range(50):
                group.start_soon(read, n)
        assert results == {n: list(range(n)) for n in range(50)}


async def test_not_a_stream(open_link: Open) -> None:
    """Reading a plain result as a stream says what is wrong."""
    async with open_link() as link:
        with pytest.raises(TypeError, match=r"add\(\) did not return a stream but int"):
            async for _ in link.api.add(1):
                pytest.fail("not a stream")
        with pytest.raises(TypeError, match="did not return a stream"):
            async with link.api.add(1):
                pytest.fail("not a stream")


async def test_streams_end_with_the_transport(open_link: Open) -> None:
    """A reader that waits when the transport is closed gets an error at once."""
    from anyio_kkrpc import TransportClosedError

    async with open_link() as link:
        async with with_call_options(link.api, timeout=None).silence() as items:
            async with anyio.create_task_group() as group:

                async def close() -> None:
                    await link.served._started.wait()
                    await link.transports[0].aclose()

                group.start_soon(close)
                with anyio.fail_after(BOUND), pytest.raises(TransportClosedError):
                    await items.__anext__()
