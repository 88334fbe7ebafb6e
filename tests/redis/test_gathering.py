"""One question to all peers, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import anyio
import pytest
import redis

from anyio_kkrpc import (
    MemoryTransport,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCValidationError,
    TransportClosedError,
    current_call,
)
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]


class Api:
    def __init__(self, name: str) -> None:
        self._name = name
        self.started = anyio.Event()
        self.cancelled = anyio.Event()
        self._after: Api | None = None

    async def health(self) -> str:
        if self._name == "ill":
            raise RuntimeError("ill")
        return self._name

    async def slow(self, quick: str) -> str:
        self.started.set()
        if self._name == quick:
            if self._after is not None:
                await self._after.started.wait()
        else:
            try:
                await anyio.sleep_forever()
            finally:
                self.cancelled.set()
        return self._name

    async def letters(self) -> AsyncIterator[str]:
        for letter in self._name:
            yield letter

    def metadata(self) -> Any:
        return current_call().metadata


class Other:
    def unrelated(self) -> None: ...


class Health(Protocol):
    async def health(self) -> int: ...


@asynccontextmanager
async def peers(
    server: RedisServer, stream: str, *apis: object, group: bool = False
) -> AsyncIterator[RPCChannel]:
    """Open a peer for each api, and one that asks."""
    async with AsyncExitStack() as stack:
        for api in (*apis, None):
            transport = await stack.enter_async_context(
                RedisStreamsTransport(
                    server.url, stream=stream, use_consumer_group=group and api is not None
                )
            )
            channel = await stack.enter_async_context(RPCChannel(transport, expose=api))
        yield channel


async def test_all_peers_answer(redis_server: RedisServer, stream_name: str) -> None:
    """Each answers once, with its id; an error is one of the answers, silence is none."""
    apis = [Api("a"), Api("b"), Api("ill"), Other()]
    async with peers(redis_server, stream_name, *apis) as channel:
        api = channel.get_api()
        replies = [
            reply async for reply in channel.broadcast(api.health(), timeout=CALL_BOUND, limit=3)
        ]
        assert len({reply.sender for reply in replies}) == 3
        values = {reply.value for reply in replies if reply.error is None}
        assert values == {"a", "b"}
        (ill,) = [reply for reply in replies if reply.error is not None]
        with pytest.raises(RemoteError, match="ill"):
            ill.result()
        assert channel.statistics().calls == 0
        # Without a limit it goes on until the time is over.
        with anyio.fail_after(BOUND):
            for timeout in (0.5, 10):  # where the first is over before the answer has come
                replies = channel.broadcast(api.slow("a"), timeout=timeout)
                if names := [reply.result() async for reply in replies]:
                    break
        assert names == ["a"]
        assert channel.statistics().calls == 0


async def test_who_still_runs_is_cancelled(redis_server: RedisServer, stream_name: str) -> None:
    """Leaving early, or having enough answers, cancels the rest."""
    one, two = Api("one"), Api("two")
    one._after, two._after = two, one  # the quick one waits until the other has begun
    async with peers(redis_server, stream_name, one, two) as channel:
        api = channel.get_api()
        async with channel.broadcast(api.slow("one"), timeout=CALL_BOUND) as replies:
            async for reply in replies:
                assert reply.result() == "one"
                break
        with anyio.fail_after(BOUND):
            await two.cancelled.wait()
        one.started = anyio.Event()
        async for reply in channel.broadcast(api.slow("two"), timeout=CALL_BOUND, limit=1):
            assert reply.result() == "two"
        with anyio.fail_after(BOUND):
            await one.cancelled.wait()
        again = channel.broadcast(api.slow("none"), timeout=CALL_BOUND)
        with anyio.move_on_after(0.2):
            await again.__anext__()
        await again.aclose()
        with pytest.raises(StopAsyncIteration):
            await again.__anext__()
        assert channel.statistics().calls == 0


async def test_one_of_a_group_answers(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A group is one peer to a question."""
    async with peers(redis_server, stream_name, Api("a"), Api("b"), group=True) as channel:
        api = channel.get_api()
        for timeout in (0.5, 10):  # where the first is over before the answer has come
            if replies := [
                reply async for reply in channel.broadcast(api.health(), timeout=timeout)
            ]:
                break
        assert len(replies) == 1
        assert replies[0].value in ("a", "b")
    assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 0


async def test_streams_and_types(redis_server: RedisServer, stream_name: str) -> None:
    """An answer can be a stream; a typed proxy checks each answer."""
    async with peers(redis_server, stream_name, Api("ab"), Api("cd")) as channel:
        texts = set()
        async for reply in channel.broadcast(
            channel.get_api().letters(), timeout=CALL_BOUND, limit=2
        ):
            texts.add("".join([letter async for letter in reply.result()]))
        assert texts == {"ab", "cd"}
        typed = channel.get_api(Health)
        async for wrong in channel.broadcast(typed.health(), timeout=CALL_BOUND, limit=2):
            with pytest.raises(RPCValidationError):
                wrong.result()


async def test_end_while_it_waits(redis_server: RedisServer, stream_name: str) -> None:
    """A transport that is closed ends the question with an error, and so does one before it."""
    async with peers(redis_server, stream_name, Api("a")) as channel:
        api = channel.get_api()
        replies = channel.broadcast(api.slow("none"), timeout=CALL_BOUND)
        later = channel.broadcast(api.slow("none"), timeout=CALL_BOUND)
        errors: list[Exception] = []

        async def ask() -> None:
            try:
                await replies.__anext__()
            except TransportClosedError as exc:
                errors.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await replies.__anext__()
            await channel._transport.destroy()  # type: ignore[attr-defined]
        assert len(errors) == 1
        with pytest.raises(TransportClosedError):
            await later.__anext__()
        with pytest.raises(StopAsyncIteration):
            await replies.__anext__()


async def test_used_wrongly() -> None:
    """What isn't a call of the channel, a call that was made, and odd numbers are refused."""
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose=Api("x")), RPCChannel(a) as channel:
        api = channel.get_api()
        for wrong in (api.health, 5, None):
            with pytest.raises(TypeError, match="^question:"):
                channel.broadcast(wrong)  # type: ignore[arg-type]
        call = api.health()
        for name, options in (
            ("timeout", {"timeout": None}),
            ("timeout", {"timeout": 0}),
            ("limit", {"limit": 0}),
            ("limit", {"limit": True}),
        ):
            with pytest.raises(ValueError, match=f"^{name}:"):
                channel.broadcast(call, **options)  # type: ignore[arg-type]
        assert await call == "x"
        with pytest.raises(RuntimeError, match="once"):
            channel.broadcast(call)
        (reply,) = [reply async for reply in channel.broadcast(api.health(), limit=1)]
        assert (reply.sender, reply.result()) == (None, "x")


async def test_one_reader_at_a_time() -> None:
    """A second one is told so, also while the question is being sent."""
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose=Api("one")), RPCChannel(a) as channel:
        replies = channel.broadcast(channel.get_api().health(), timeout=CALL_BOUND, limit=1)
        outcomes: list[Any] = []

        async def read() -> None:
            try:
                outcomes.append((await replies.__anext__()).result())
            except anyio.BusyResourceError as exc:
                outcomes.append(type(exc))

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as group:
                for _ in range(2):
                    group.start_soon(read)
        assert sorted(map(str, outcomes)) == [str(anyio.BusyResourceError), "one"]
