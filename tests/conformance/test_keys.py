"""Calls with keys are the same over each transport that keeps them: in memory, and in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import anyio
import pytest
import redis as redis_client

from anyio_kkrpc import (
    CallCancelledError,
    CallHandle,
    CallInfo,
    CallNotFoundError,
    CallState,
    KeyConflictError,
    MemoryTransport,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND
from tests.servers import marks_of

pytestmark = pytest.mark.anyio


class Api:
    """What is called: it counts its runs, and waits where it is told to.

    :ivar runs: what began
    :ivar cancelled: how many runs were cancelled
    """

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.calls: list[CallInfo] = []
        self.cancelled = 0
        self.go = anyio.Event()
        self.began = anyio.Event()

    async def charge(self, amount: int, currency: str = "EUR") -> dict[str, Any]:
        """Return at once."""
        self.runs.append(amount)
        self.calls.append(current_call())
        return {"amount": amount, "currency": currency}

    async def fail(self, text: str) -> None:
        """Fail at once."""
        self.runs.append(text)
        raise LookupError(text)

    async def wait(self, value: Any = None) -> Any:
        """Return once `go` is set."""
        self.runs.append(value)
        self.began.set()
        try:
            await self.go.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        return value

    async def step(self, steps: int) -> int:
        """Tell how far it has come, and return once `go` is set."""
        for step in range(steps):
            await current_call().progress({"step": step})
        self.began.set()
        await self.go.wait()
        return steps

    async def numbers(self) -> AsyncIterator[int]:
        """A stream."""
        yield 1


class Link(NamedTuple):
    """A caller, another one of the same calls where there can be one, and what is called.

    :ivar waiting: tells how many peers, or calls in memory, wait for the key ``k``
    """

    caller: RPCChannel
    other: RPCChannel
    api: Any
    served: Api
    waiting: Callable[[], int]


Open = Callable[..., AbstractAsyncContextManager[Link]]


@pytest.fixture(params=["memory", pytest.param("valkey8", marks=marks_of("valkey8"))])
def open_keyed(request: pytest.FixtureRequest, stream_name: str) -> Open:
    """Return what opens a link."""

    @asynccontextmanager
    async def memory() -> AsyncIterator[Link]:
        a, b = MemoryTransport.pair(codec="json")
        served = Api()
        async with a, b, RPCChannel(a, timeout=BOUND) as caller, RPCChannel(b, expose=served):
            yield Link(caller, caller, caller.get_api(), served, lambda: a._keys.get("k").waiting)

    @asynccontextmanager
    async def redis() -> AsyncIterator[Link]:
        server: RedisServer = request.getfixturevalue("servers")[request.param]
        served = Api()

        def transport(codec: str = "json") -> RedisStreamsTransport:
            return RedisStreamsTransport(
                server.url, stream=stream_name, use_consumer_group=True, codec=codec
            )

        async with (
            transport() as a,
            transport("cbor") as b,
            transport() as c,
            RPCChannel(a, timeout=BOUND) as caller,
            RPCChannel(b, timeout=BOUND) as other,
            RPCChannel(c, expose=served, timeout=BOUND),
        ):
            with redis_client.Redis.from_url(server.url) as client:
                waits = Keys.of(stream_name).waits(b"k")
                yield Link(caller, other, caller.get_api(), served, lambda: client.zcard(waits))

    return memory if request.param == "memory" else redis


async def until(handle: CallHandle[Any], kind: str) -> CallState:
    """Wait until a call has come so far."""
    with anyio.fail_after(BOUND):
        while (state := await handle.state()).kind != kind:
            await anyio.sleep(0.01)
    return state


async def test_once(open_keyed: Open) -> None:
    """While its result is kept, a call runs once, whoever makes it, in whatever codec."""
    async with open_keyed() as link:
        for channel in (link.caller, link.other):
            api = with_call_options(channel.get_api(), key="pay:17")
            for _ in range(2):
                assert await api.charge(5, currency="USD") == {"amount": 5, "currency": "USD"}
        assert link.served.runs == [5]
        info = link.served.calls[0]
        assert (info.key, info.attempt, info.deadline) == ("pay:17", 1, None)
        assert await with_call_options(link.api, key="pay:18").charge(5)
        assert link.served.runs == [5, 5]


async def test_who_calls_meanwhile_waits_for_the_first(open_keyed: Open) -> None:
    results: list[Any] = []
    async with open_keyed() as link:

        async def call(channel: RPCChannel) -> None:
            results.append(await with_call_options(channel.get_api(), key="k").wait([1, "x"]))

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(call, link.caller)
                await link.served.began.wait()
                for _ in range(3):
                    group.start_soon(call, link.other)
                all_wait = 6 if link.other is link.caller else 2
                while link.waiting() < all_wait:
                    await anyio.sleep(0.01)
                link.served.go.set()
        assert results == [[1, "x"]] * 6
        assert link.served.runs == [[1, "x"]]


async def test_another_call_with_the_key(open_keyed: Open) -> None:
    """Another method, or other arguments: names of arguments may stand in any order."""
    async with open_keyed() as link:
        api = with_call_options(link.api, key="k")
        await api.charge(amount=5, currency="USD")
        await api.charge(currency="USD", amount=5)
        for other in (api.charge(5), api.charge(5.0), api.fail("x"), api.charge(5, "USD")):
            with pytest.raises(KeyConflictError, match="the key k belongs to"):
                await other
        with pytest.raises(KeyConflictError):
            await link.other.start(link.other.get_api().charge(6), key="k")
        assert link.served.runs == [5]


async def test_failures_are_kept(open_keyed: Open) -> None:
    """As long as `keep_errors` says; what did not run isn't kept at all."""
    async with open_keyed() as link:
        for options, runs in (({}, 1), ({"keep_errors": 0}, 2)):
            link.served.runs.clear()
            api = with_call_options(link.api, key=f"k{runs}", **options)  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises(RemoteError, match="no tea") as caught:
                    await api.fail("no tea")
                assert caught.value.name == "LookupError"
            assert link.served.runs == ["no tea"] * runs
            assert (await link.other.attach(f"k{runs}").state()).kind == "failed"
        api = with_call_options(link.api, key="k")
        for _ in range(2):
            with pytest.raises(RPCValidationError):
                await api.charge("five")
        assert (await link.caller.attach("k").state()).kind == "refused"
        assert await api.charge(5)  # the key is free


async def test_what_has_no_key(open_keyed: Open) -> None:
    async with open_keyed() as link:
        api = with_call_options(link.api, key="k")
        with pytest.raises(ValueError, match="^key: .* no functions and no streams"):
            await api.wait(lambda: None)
        with pytest.raises(ValueError, match="^key: .* no functions and no streams"):
            await api.wait(link.served.numbers())


async def test_start_and_attach(open_keyed: Open) -> None:
    async with open_keyed() as link:
        call = await link.caller.start(link.api.wait(3), key="k", keep=60)
        await link.served.began.wait()
        same = await link.other.start(link.other.get_api().wait(3), key="k")
        handle = link.other.attach("k", returns=float)
        assert (call.key, same.key, handle.key) == ("k", "k", "k")
        state = await until(handle, "running")
        assert (state.attempt, state.expires) == (1, None)
        assert state.since is not None
        with pytest.raises(RPCTimeoutError, match="'k' did not end within 0.01 s"):
            await handle.result(timeout=0.01)
        with pytest.raises(ValueError, match="^forget: "):
            await handle.forget()
        link.served.go.set()
        for one in (call, same, handle):
            assert await one.result() == 3
        assert isinstance(await handle.result(), float)
        with pytest.raises(RPCValidationError):
            await link.caller.attach("k", returns=list[int]).result()
        state = await handle.state()
        assert state.kind == "done"
        assert state.expires is not None
        assert 0 < state.expires <= 60
        assert not await handle.cancel()
        assert await handle.forget()
        assert not await handle.forget()
        assert link.served.runs == [3]


async def test_no_such_call(open_keyed: Open) -> None:
    async with open_keyed() as link:
        handle = link.caller.attach("nothing")
        for ask in (handle.result, handle.state):
            with pytest.raises(CallNotFoundError, match="nothing") as caught:
                await ask()
            assert isinstance(caught.value, LookupError)
        with pytest.raises(CallNotFoundError):
            async for _ in handle.progress():
                pass
        assert not await handle.cancel()
        assert not await handle.forget()


async def test_cancel_while_it_runs(open_keyed: Open) -> None:
    """From anywhere; who waits is told, and the key is free."""
    errors: list[Exception] = []
    async with open_keyed() as link:

        async def call() -> None:
            try:
                await with_call_options(link.api, key="k").wait()
            except CallCancelledError as exc:
                errors.append(exc)

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                group.start_soon(call)
                await link.served.began.wait()
                assert await link.other.attach("k").cancel()
        assert len(errors) == 2
        await until(link.caller.attach("k"), "cancelled")
        with anyio.fail_after(BOUND):
            while not link.served.cancelled:
                await anyio.sleep(0.01)
        with pytest.raises(CallCancelledError):
            await link.caller.attach("k").result()
        link.served.go.set()
        assert await with_call_options(link.api, key="k").wait(1) == 1


async def test_leaving_leaves_the_call(open_keyed: Open) -> None:
    """Who leaves, by a time-out or a cancel, leaves it running."""
    async with open_keyed() as link:
        api = with_call_options(link.api, key="k", timeout=0.05)
        with pytest.raises(RPCTimeoutError, match="wait: no answer within 0.05 s"):
            await api.wait(2)
        with anyio.move_on_after(0.01):
            await with_call_options(link.api, key="k").wait(2)
        link.served.go.set()
        assert await link.caller.attach("k").result() == 2
        assert (link.served.cancelled, link.served.runs) == (0, [2])


async def test_who_leaves_last_cancels_it(open_keyed: Open) -> None:
    """If it says so: not while somebody else waits."""
    async with open_keyed() as link:
        scopes = [anyio.CancelScope() for _ in range(2)]
        channels = (link.caller, link.other)

        async def call(channel: RPCChannel, scope: anyio.CancelScope) -> None:
            api = with_call_options(channel.get_api(), key="k", cancel_when_left=True)
            with scope:
                await api.wait()

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                for channel, scope in zip(channels, scopes, strict=True):
                    group.start_soon(call, channel, scope)
                    await link.served.began.wait()
                while link.waiting() < 2:
                    await anyio.sleep(0.01)
                scopes[0].cancel()
                while link.waiting() > 1:
                    await anyio.sleep(0.01)
                assert (await link.other.attach("k").state()).kind == "running"
                scopes[1].cancel()
            await until(link.caller.attach("k"), "cancelled")
            while not link.served.cancelled:
                await anyio.sleep(0.01)


async def test_run_within(open_keyed: Open) -> None:
    """Bounds the run, and not the wait; it is a failure, and kept."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.wait(), key="k", run_within=0.05)
        for _ in range(2):
            with pytest.raises(RPCTimeoutError, match=r"within 0.05 s \(run_within\)"):
                await call.result()
        assert (await call.state()).kind == "failed"
        assert link.served.cancelled == 1


async def test_progress(open_keyed: Open) -> None:
    """The latest is told; what comes too quickly is left out."""
    async with open_keyed() as link:
        call = await link.caller.start(link.api.step(3), key="k")
        seen = []
        with anyio.fail_after(BOUND):
            await link.served.began.wait()
            async for told in link.other.attach("k").progress():
                seen.append(told)
                link.served.go.set()
        steps = [{"step": step} for step in range(3)]
        assert seen
        assert all(told in steps for told in seen)
        assert await call.result() == 3
        (last,) = [told async for told in call.progress()]
        assert last == seen[-1]
        async with open_keyed() as link:
            await link.caller.start(link.api.charge(1), key="quiet")
            assert [told async for told in link.caller.attach("quiet").progress()] == []


async def test_progress_without_a_key(open_keyed: Open) -> None:
    """Nobody is told."""
    async with open_keyed() as link:
        link.served.go.set()
        assert await link.api.step(2) == 2


async def test_later(open_keyed: Open) -> None:
    """A call that is to begin later is there at once: it can be joined, and cancelled."""
    async with open_keyed() as link:
        link.served.go.set()
        call = await link.caller.start(link.api.wait(1), key="k", delay=1)
        assert await call.state() == CallState("delayed")
        assert link.served.runs == []
        await link.other.start(link.other.get_api().wait(1), key="k", delay=100)
        assert await link.other.attach("k").result() == 1
        gone = await link.caller.start(link.api.wait(2), key="gone", delay=100)
        assert await gone.cancel()
        with pytest.raises(CallCancelledError):
            await gone.result()
        late = await link.caller.start(link.api.wait(3), key="late", at=1.0)  # long ago
        assert await late.result() == 3
        assert link.served.runs == [1, 3]


async def test_without_reply(open_keyed: Open) -> None:
    """One that wants no reply is started."""
    async with open_keyed() as link:
        api: Any = with_call_options(link.api, key="k", reply=False)
        assert await api.charge(4) is None
        assert await link.caller.attach("k").result() == {"amount": 4, "currency": "EUR"}
