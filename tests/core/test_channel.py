"""The channel itself: misuse, lone errors, threads, and its end."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from blockbuster import BlockingError

from anyio_kkrpc import (
    MemoryTransport,
    RemoteError,
    RPCChannel,
    TransportClosedError,
    current_call,
    in_thread,
    with_call_options,
)
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc._runtime._clock import scheduler
from anyio_kkrpc._runtime._sparing import MOST_LOGGED
from anyio_kkrpc.abc import Envelope
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking_calls")]


class Api:
    def __init__(self) -> None:
        self.threads: list[int] = []
        self.gate = anyio.Event()
        self.fields: Any = None

    def add(self, a: int, b: int) -> int:
        return a + b

    def blocks(self) -> None:
        time.sleep(0.001)

    @in_thread
    def in_a_thread(self) -> str:
        time.sleep(0.001)
        self.threads.append(threading.get_ident())
        return threading.current_thread().name

    async def wait(self) -> str:
        await self.gate.wait()
        return "open"

    def fail(self) -> None:
        raise KeyError("missing")

    def not_a_stream(self) -> int:
        return 5


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeout": 0}, ValueError, "timeout: must be positive"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"timeout": "5"}, TypeError, "timeout: seconds"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"max_concurrency": 0}, ValueError, "max_concurrency: must be at least 1"),
        ({"max_concurrency": 1.5}, TypeError, "max_concurrency"),
        ({"max_concurrency": True}, TypeError, "max_concurrency"),
        ({"expose": Api}, TypeError, "expose"),
    ],
)
async def test_wrong_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """They are refused when the channel is made, and named."""
    a, _ = MemoryTransport.pair()
    with pytest.raises(error, match=text):
        RPCChannel(a, **options)


async def test_wrong_transport() -> None:
    """Something else than a transport is refused."""
    with pytest.raises(TypeError, match="transport: needs a Transport"):
        RPCChannel("redis://localhost")  # type: ignore[arg-type]


async def test_used_outside_its_block() -> None:
    """Before and after, a call says what is wrong."""
    a, b = MemoryTransport.pair()
    channel = RPCChannel(a)
    with pytest.raises(RuntimeError, match="use 'async with'"):
        await channel.get_api().add(1, 2)
    async with a, b:
        async with channel:
            pass
        with pytest.raises(TransportClosedError, match="has been closed"):
            await channel.get_api().add(1, 2)
        with pytest.raises(RuntimeError, match="entered once"):
            async with channel:
                pass
        assert channel.statistics().calls == 0
        await channel.serve_forever()


async def test_lone_error_arrives_as_itself() -> None:
    """One error that leaves the body isn't wrapped; the link's tasks don't add to it."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with pair(Api()):
            raise error
    assert caught.value is error


async def test_group_of_the_body_arrives_as_it_is() -> None:
    """A group that the body raises stays a group."""

    async def fail(text: str) -> None:
        raise ValueError(text)

    with pytest.raises(BaseException) as caught:
        async with pair(Api()), anyio.create_task_group() as group:
            group.start_soon(fail, "one")
            group.start_soon(fail, "two")
    flat: list[BaseException] = [caught.value]
    while any(hasattr(exc, "exceptions") for exc in flat):
        flat = [inner for exc in flat for inner in getattr(exc, "exceptions", [exc])]
    assert sorted(map(str, flat)) == ["one", "two"]


async def test_blocking_handler_is_found(anyio_backend_name: str) -> None:
    """Blockbuster is at work: a handler that sleeps on the event loop fails on asyncio."""
    async with pair(Api()) as link:
        if anyio_backend_name == "asyncio":
            with pytest.raises(RemoteError, match="Blocking call to time.sleep"):
                await link.api.blocks()
            with pytest.raises(BlockingError):
                time.sleep(0.001)
        else:
            await link.api.blocks()


async def test_callback_collected_in_a_thread() -> None:
    """The last reference to a callback may go in any thread: its function is released at once."""
    kept: list[Any] = []
    async with pair({"keep": kept.append}) as link:
        for _ in range(3):
            await link.api.keep(lambda: None)
            assert link.client.statistics().callbacks == 1
            # Nothing else happens that might wake somebody.
            await anyio.to_thread.run_sync(kept.clear)
            with anyio.fail_after(BOUND):
                while link.client.statistics().callbacks:
                    await anyio.sleep(0.001)


async def test_callback_collected_after_the_end(anyio_backend_name: str) -> None:
    """A callback that outlives its channel is collected in silence, also without an event loop."""
    kept: list[Any] = []

    async def main() -> None:
        async with pair({"keep": kept.append}) as link:
            await link.api.keep(lambda: None)
            kept.append(scheduler())

    await anyio.to_thread.run_sync(lambda: anyio.run(main, backend=anyio_backend_name))
    callback, soon = kept
    kept.clear()
    del callback
    soon(lambda: pytest.fail("the loop is over"))


async def test_handler_in_a_thread() -> None:
    """One that is declared so runs in a worker thread."""
    api = Api()
    async with pair(api) as link:
        await link.api.in_a_thread()
    assert api.threads != [threading.get_ident()]


@pytest.mark.parametrize("side", [0, 1], ids=["own", "other"])
async def test_closed_transport_fails_all_at_once(side: int) -> None:
    """Whoever waits is told, whichever side closes; `serve_forever` returns at both."""
    api = Api()
    failed = 0

    async def call(link: Any) -> None:
        nonlocal failed
        with pytest.raises(TransportClosedError):
            await link.api.wait()
        failed += 1

    async with pair(api) as link:
        assert not link.client.closed
        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(call, link)
                await anyio.wait_all_tasks_blocked()
                await link.transports[side].aclose()
            await link.client.serve_forever()
            await link.server.serve_forever()
        assert link.client.closed
        assert link.server.closed
        assert failed == 50
        await anyio.wait_all_tasks_blocked()
        assert link.server.statistics().handlers == 0


async def test_calls_are_made_once() -> None:
    """A call object is for one use; one that is thrown away says so."""
    async with pair(Api()) as link:
        call = link.api.add(1, 2)
        assert await call == 3
        with pytest.raises(RuntimeError, match="made once"):
            await call
        with pytest.warns(RuntimeWarning, match=r"add\(\) was never awaited"):
            link.api.add(1, 2)
            gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            link.api.add(1, 2).close()
            gc.collect()
        with pytest.raises(TypeError, match="did not return a stream but int"):
            async with link.api.not_a_stream():
                pass


async def test_proxy_misuse() -> None:
    """Each wrong use of a proxy names the right one."""
    async with pair(Api()) as link:
        with pytest.raises(AttributeError, match="underscore"):
            link.api._private
        with pytest.raises(AttributeError, match="set_property"):
            link.api.name = 1
        with pytest.raises(TypeError, match="is a str"):
            link.api[1]
        assert repr(link.api.a["b.c"]) == "<RemoteAPI a.b.c>"
        with pytest.raises(ValueError, match="one peer only"):
            link.client.get_api(to="somebody")
        with pytest.raises(TypeError, match="with_call_options"):
            with_call_options(object())
        with pytest.raises(ValueError, match="timeout"):
            with_call_options(link.api, timeout=0)
        for name in ("", "a..b", [], ["a", ""], [1]):
            with pytest.raises(ValueError, match="name:"):
                await link.client.set_property(name, 1)  # type: ignore[arg-type]


async def test_key_error_shows_its_key() -> None:
    """The message is the key, not its repr."""
    async with pair(Api()) as link:
        with pytest.raises(RemoteError) as caught:
            await link.api.fail()
    assert (caught.value.name, caught.value.message) == ("KeyError", "missing")


async def test_failing_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It ends neither the call nor the channel."""

    class Calls:
        async def call(self, function: Any) -> str:
            await function(1)
            return "done"

    def broken(number: int) -> None:
        raise ValueError("broken callback")

    with caplog.at_level(logging.ERROR):
        async with pair(Calls()) as link:
            assert await link.api.call(broken) == "done"
            assert await link.api.call(broken) == "done"
    assert caplog.text.count("ValueError: broken callback") == 2
    caplog.clear()


async def test_end_of_the_transport_with_idle_handlers() -> None:
    """Those that wait for their turn are cancelled in the moment in which it comes."""
    api = Api()
    async with pair(api) as link:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(link.api.wait)
            await anyio.wait_all_tasks_blocked()
            api.gate.set()
        await link.transports[0].aclose()


async def test_request_from_the_future() -> None:
    """What a clock that is ahead says doesn't give a handler more time than its caller has."""
    budgets: list[float] = []

    class Timed:
        def note(self) -> None:
            deadline = current_call().deadline
            assert deadline is not None
            budgets.append(deadline - anyio.current_time())

    async with pair(Timed()) as link:
        for late in (5.0, 0.0):
            request = Request(f"a{late}", "call", ["note"], d=1_000_000)
            sent_at = anyio.current_time() + late
            link.transports[1]._inbound.deliver(Envelope(request, None, sent_at=sent_at))
        with anyio.fail_after(BOUND):
            while len(budgets) < 2:
                await anyio.sleep(0.01)
    assert all(900 < budget < 1001 for budget in budgets)


class Exits:
    def leave(self) -> None:
        sys.exit("bye")

    async def leave_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        raise SystemExit(3)

    async def stream(self) -> AsyncIterator[int]:
        yield 1
        raise SystemExit(4)

    async def call_back(self, function: Any) -> str:
        await function()
        return "done"


async def test_handlers_that_exit(caplog: pytest.LogCaptureFixture) -> None:
    """A handler can't end the process that serves it, nor a callback its own."""
    async with pair(Exits()) as link:
        for name, text in (("leave", "bye"), ("leave_later", "3")):
            with pytest.raises(RemoteError, match=text) as caught:
                await link.api[name]()
            assert caught.value.name == "SystemExit"
        got = []
        with pytest.raises(RemoteError, match="SystemExit: 4"):
            async for number in link.api.stream():
                got.append(number)
        assert got == [1]
        assert await link.api.call_back(sys.exit) == "done"
    assert "callback <built-in function exit> failed" in caplog.text


async def test_callback_that_keeps_failing(caplog: pytest.LogCaptureFixture) -> None:
    """So many failures are logged; each call of it is made all the same."""

    class Calls:
        async def call(self, function: Any) -> None:
            for number in range(MOST_LOGGED + 15):
                await function(number)

    heard = []

    def fail(number: int) -> None:
        heard.append(number)
        raise ValueError(number)

    async with pair(Calls()) as link:
        await link.api.call(fail)
        with anyio.fail_after(BOUND):
            while len(heard) < MOST_LOGGED + 15:
                await anyio.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records if "fail" in record.getMessage()]
    assert len(lines) == MOST_LOGGED
    assert "further ones are not logged" in lines[-1]


async def test_a_transport_is_for_one_channel() -> None:
    """Two at a time would take each other's answers; one after the other is fine."""
    a, b = MemoryTransport.pair()
    async with a, b, RPCChannel(b, expose=Api()):
        async with RPCChannel(a) as channel:
            with pytest.raises(RuntimeError, match="another channel uses this transport"):
                async with RPCChannel(a):
                    pass
            assert await channel.get_api().add(1, 2) == 3
        async with RPCChannel(a) as channel:
            assert await channel.get_api().add(1, 2) == 3


async def test_any_name_for_an_argument() -> None:
    """Also those that the proxy's own methods use."""
    async with pair({"f": lambda **kwargs: kwargs, "Point": Point}) as link:
        assert await link.api.f(self=1, args=2) == {"self": 1, "args": 2}
        assert await link.client.construct("Point", name="p") == {"name": "p"}


class Point:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": 1e9 + 1}, ValueError),
        ({"timeout": 10**400}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"metadata": 3}, TypeError),
    ],
)
async def test_wrong_call_options(options: dict[str, Any], error: type[Exception]) -> None:
    """They are refused before anything is sent, and named."""
    async with pair(Api()) as link:
        with pytest.raises(error, match=next(iter(options))):
            with_call_options(link.api, **options)


async def test_anext_of_a_stream_that_nobody_holds() -> None:
    """What is being read isn't collected, though its reader holds no name for it."""

    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    async with pair({"count": count}) as link:
        assert await (await link.api.count(3)).__anext__() == 0
        gc.collect()
        await until_empty(link)


async def until_empty(link: Pair) -> None:
    with anyio.fail_after(60):
        while link.server.statistics().outgoing_streams:
            await anyio.sleep(0.001)
