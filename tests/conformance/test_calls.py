"""Calls, properties, constructors and errors, over every link."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any, Protocol

import anyio
import pytest

from anyio_kkrpc import (
    MethodNotFoundError,
    RemoteError,
    RPCError,
    RPCTimeoutError,
    RPCValidationError,
    with_call_options,
)
from tests.bounds import BOUND, CALL_BOUND

from .api import Color, Point, Rich, Shape
from .conftest import Open

pytestmark = pytest.mark.anyio


async def test_empty_call(open_link: Open) -> None:
    """A call without arguments and without a result."""
    async with open_link() as link:
        assert await link.api.empty() is None


async def test_arguments(open_link: Open) -> None:
    """Positional, default, keyword, variadic and mixed arguments arrive where they belong."""
    async with open_link() as link:
        assert await link.api.add(7, 8) == 15
        assert await link.api.add(7) == 8
        assert await link.api.add(b=1, a=2) == 3
        assert await link.api.keywords(1, 2, a=3, z=4) == {"args": [1, 2], "a": 3, "rest": {"z": 4}}


async def test_nested_names(open_link: Open) -> None:
    """Paths of several names reach nested objects."""
    async with open_link() as link:
        assert await link.api.level.name() == "level 5"
        assert await link.api.level.next.next.next.next.next.name() == "level 0"


@pytest.mark.parametrize("size", [271_828, 1024 * 1024])
async def test_large_payload(open_link: Open, size: int) -> None:
    """A large argument and a large result arrive whole."""
    async with open_link() as link:
        payload = "x\u00e9\U0001f600" * (size // 7)
        assert await link.api.echo(payload) == payload


async def test_plain_values(open_link: Open) -> None:
    """Values of JSON's kinds come back as they were, also those that look like the wire's own."""
    values: list[Any] = [
        None, True, 0, -1, 2**53 + 1, 2**63, 1.5, "", "\x00\n\U0001f608\u2028", [], {}, [[[1]]],
        {"a.b": {"": None}, "t": "q", "__kkrpc_next_arg__": "callback", "id": "1"},
    ]  # fmt: skip
    async with open_link() as link:
        for value in values:
            assert await link.api.echo(value) == value


async def test_rich_values(open_link: Open, carries_objects: bool) -> None:
    """Rich types arrive as annotated; results do where a Protocol says so."""

    class Typed(Protocol):
        async def rich(self, value: Rich) -> Rich: ...

    value = Rich(
        data=bytes(range(256)),
        when=datetime.datetime(2026, 11, 23, 12, 30, 1, 250, datetime.timezone.utc),
        day=datetime.date(2026, 2, 28),
        id=uuid.UUID(int=7),
        price=decimal.Decimal("1.10"),
        color=Color.RED,
        point=Point(1, 2.5),
        shape=Shape("s", [Point(3, 4.0)]),
    )
    async with open_link() as link:
        assert await link.client.get_api(Typed).rich(value) == value
        if carries_objects:
            return
        plain = await link.api.rich(value)
        assert plain["point"] == {"x": 1, "y": 2.5}
        assert plain["color"] == "red"


async def test_bytes_without_annotation(open_link: Open, is_cbor: bool) -> None:
    """CBOR carries bytes, decimals and UUIDs as themselves, without anybody saying so."""
    if not is_cbor:
        pytest.skip("only CBOR has these types")
    value = [b"\x00\xff", decimal.Decimal("0.1"), uuid.UUID(int=1)]
    async with open_link() as link:
        assert await link.api.echo(value) == value


async def test_properties(open_link: Open) -> None:
    """Properties are read, and written if they were made writable."""
    async with open_link() as link:
        assert await link.api.answer == 42
        assert await link.api.settings.theme == "light"
        await link.client.set_property("settings.theme", "dark")
        assert await link.api.settings.theme == "dark"
        assert await link.api.limits == {"a.b": 1, "plain": 2}
        assert await link.api.limits["a.b"] == 1
        await link.client.set_property(["limits", "plain"], 5)
        assert link.served.limits == {"a.b": 1, "plain": 5}


async def test_properties_that_cannot_be_written(open_link: Open, is_broadcast: bool) -> None:
    """Read-only ones are refused, and so are values that don't fit."""
    async with open_link(timeout=0.5 if is_broadcast else 20) as link:
        client = link.client
        with pytest.raises(RPCTimeoutError if is_broadcast else MethodNotFoundError):
            await client.set_property("answer", 1)
        with pytest.raises(RPCValidationError, match="Expected `int`"):
            await client.set_property("settings.size", "big")
        assert link.served.settings.size == 10


async def test_construct(open_link: Open) -> None:
    """An instance comes back by value, without its private fields."""
    async with open_link() as link:
        assert await link.client.construct("Counter", 5) == {"value": 5, "step": 1}
        assert await link.client.construct("Counter", 5, step=2) == {"value": 5, "step": 2}
        with pytest.raises(RPCValidationError):
            await link.client.construct("Counter", "x")


async def test_custom_error(open_link: Open) -> None:
    """An exception arrives with name, message and the fields that can travel."""
    async with open_link() as link:
        with pytest.raises(RemoteError) as caught:
            await link.api.fail("bad")
        error = caught.value
        assert (error.name, error.message) == ("CustomError", "bad")
        assert error.data == {"code": 418, "detail": {"nested": [1, None]}}
        assert error.traceback is None
        assert str(error) == "CustomError: bad"


@pytest.mark.parametrize(
    "message",
    ["", "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n", "x" * 10_000],
)  # fmt: skip
async def test_error_messages(open_link: Open, message: str) -> None:
    """Messages arrive to the letter."""
    async with open_link() as link:
        with pytest.raises(RemoteError) as caught:
            await link.api.fail(message)
        assert caught.value.message == message


async def test_error_cause_and_traceback(open_link: Open) -> None:
    """The cause travels; the traceback does if the serving side wants it."""
    async with open_link(server_options={"send_tracebacks": True}) as link:
        with pytest.raises(RemoteError) as caught:
            await link.api.fail_with_cause()
        cause = caught.value.__cause__
        assert isinstance(cause, RemoteError)
        assert (cause.name, cause.message) == ("KeyError", "inner")
        assert caught.value.traceback is not None
        assert "fail_with_cause" in caught.value.traceback


async def test_unknown_names(open_link: Open, is_broadcast: bool) -> None:
    """Unknown functions, parents, classes and properties; in a broadcast they are met with silence."""
    expected: type[RPCError] = RPCTimeoutError if is_broadcast else MethodNotFoundError
    async with open_link(timeout=0.3 if is_broadcast else 20) as link:
        for wrong in (
            link.api.nope,
            link.api.settings.nope,
            link.api.nope.deeper,
            link.api.answer,
            link.api.Counter,
            link.api["level.name"],
            link.api[""],
        ):
            with pytest.raises(expected):
                await wrong(1)
        with pytest.raises(expected):
            await link.api.nope
        with pytest.raises(expected):
            await link.client.construct("add", 1)
        with pytest.raises(expected):
            await link.client.set_property("nope.deeper", 1)


async def test_wrong_arguments(open_link: Open) -> None:
    """Arguments that don't fit name what is wrong, and the handler isn't run."""
    async with open_link() as link:
        for args, kwargs, text in (
            (("x",), {}, "`a`"),
            ((1, [2]), {}, "`b`"),
            ((), {}, "missing a required argument: 'a'"),
            ((1, 2, 3), {}, "too many positional arguments"),
            ((1,), {"c": 1}, "unexpected keyword argument 'c'"),
            ((), {"a": 1, "b": "x"}, "`b`"),
        ):
            with pytest.raises(RPCValidationError) as caught:
                await link.api.add(*args, **kwargs)
            assert caught.value.phase == "input"
            assert caught.value.method == "add"
            assert text in caught.value.issues[0]
        assert not link.served._log


async def test_result_that_cannot_be_sent(open_link: Open, carries_objects: bool) -> None:
    """A result that no codec can carry is an error at the caller, which doesn't wait for ever."""
    if carries_objects:
        pytest.skip("without a codec any object is a value")
    async with open_link() as link:
        with pytest.raises(RemoteError, match="object"):
            await link.api.unsendable()
        assert await link.api.add(1, 2) == 3


async def test_argument_that_cannot_be_sent(open_link: Open, carries_objects: bool) -> None:
    """It fails at the caller, and nothing stays behind."""
    if carries_objects:
        pytest.skip("without a codec any object is a value")
    async with open_link() as link:
        with pytest.raises(TypeError):
            await link.api.echo(object())
        assert link.client.statistics().calls == 0


async def test_timeout_cancels_the_handler(open_link: Open) -> None:
    """A call that is out of time fails, and its handler is cancelled."""
    async with open_link() as link:
        for timeout in (0.3, 10.0, CALL_BOUND):  # where the first is over before the handler begins
            with pytest.raises(RPCTimeoutError, match=rf"wait: no answer within {timeout} s"):
                await with_call_options(link.api, timeout=timeout).wait()
            if link.served._started.is_set():
                break
        with anyio.fail_after(BOUND):
            await link.served._cancelled.wait()
        assert link.client.statistics().calls == 0


async def test_budget_travels(open_link: Open) -> None:
    """A handler knows how long its caller waits."""
    async with open_link() as link:
        assert 500 < await with_call_options(link.api, timeout=1000.0).budget() < 1001


async def test_cancel_while_it_runs(open_link: Open) -> None:
    """Leaving the caller's scope cancels the handler."""
    async with open_link() as link:
        async with anyio.create_task_group() as group:
            group.start_soon(link.api.wait)
            with anyio.fail_after(BOUND):
                await link.served._started.wait()
            group.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            await link.served._cancelled.wait()
        assert link.client.statistics().calls == 0
        assert await link.api.add(1, 1) == 2


async def test_cancel_before_it_is_sent(open_link: Open) -> None:
    """A call in a cancelled scope doesn't run."""
    async with open_link() as link:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await link.api.add(1, 1)
        assert scope.cancelled_caught
        assert await link.api.add(2, 2) == 4
        assert link.client.statistics().calls == 0


async def test_a_handlers_own_cancellation_is_answered(
    open_link: Open, anyio_backend_name: str
) -> None:
    """A CancelledError that a handler raises by itself is an error like others."""
    async with open_link() as link:
        with pytest.raises(RemoteError, match="CancelledError" if anyio_backend_name == "asyncio" else "RuntimeError"):  # fmt: skip
            await link.api.cancel_myself()
        assert await link.api.add(1, 1) == 2


async def test_thousand_concurrent_calls(open_link: Open) -> None:
    """A thousand calls at once each get their own answer."""
    results: dict[int, int] = {}

    async with open_link(timeout=CALL_BOUND) as link:

        async def call(n: int) -> None:
            results[n] = await link.api.add(n, n)

        async with anyio.create_task_group() as group:
            for n in range(1000):
                group.start_soon(call, n)
        assert results == {n: 2 * n for n in range(1000)}
        assert link.client.statistics().calls == 0


async def test_without_reply(open_link: Open) -> None:
    """A call without reply returns at once, and runs."""
    async with open_link() as link:
        assert await with_call_options(link.api, reply=False).add(3, 4) is None
        with anyio.fail_after(BOUND):
            while not link.served._log:
                await link.api.empty()
        assert link.served._log == [(3, 4)]
        await with_call_options(link.api, reply=False).fail("nobody hears this")
        assert await link.api.add(1) == 2


async def test_metadata(open_link: Open) -> None:
    """Metadata reach the handler of their own call only."""
    async with open_link() as link:
        assert await link.api.metadata() == {}
        tagged = with_call_options(link.api, metadata={"traceparent": "00-1", "x": [1]})
        assert await tagged.metadata() == {"traceparent": "00-1", "x": [1]}


async def test_handler_in_a_thread(open_link: Open) -> None:
    """A handler declared so runs in a worker thread, with its call's context."""
    async with open_link() as link:
        assert await link.api.in_thread() == "in_thread in False"


async def test_reverse_call_nested_five_deep(open_link: Open) -> None:
    """Handlers that call back their callers, to and fro, five deep."""
    async with open_link(serve_client=True) as link:
        assert await link.api.call_back(5) == [5, 4, 3, 2, 1, 0]


async def test_closed_by_the_caller(open_link: Open) -> None:
    """When the calling side leaves, its calls fail and the handlers are cancelled."""
    from anyio_kkrpc import TransportClosedError

    async with open_link() as link:
        async with anyio.create_task_group() as group:
            raised: list[BaseException] = []

            async def call() -> None:
                try:
                    await link.api.wait()
                except TransportClosedError as exc:
                    raised.append(exc)

            group.start_soon(call)
            with anyio.fail_after(BOUND):
                await link.served._started.wait()
                await link.transports[0].aclose()
        assert len(raised) == 1
        with pytest.raises(TransportClosedError):
            await link.api.add(1)
        await link.client.serve_forever()
