"""What is exposed is entered before the first request is taken, and left after the last handler."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, create_task_group, fail_after
from msgspec import UNSET

from anyio_kkrpc import (
    MemoryTransport,
    MethodNotFoundError,
    RedisStreamsTransport,
    RPCChannel,
    expose,
)
from anyio_kkrpc._serving._lifespan import find_lifespan, gives_api
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Api:
    """Notes what happens to it, in order."""

    def __init__(self) -> None:
        self._log: list[str] = []
        self._began = anyio.Event()

    def use(self) -> str:
        self._log.append("used")
        return tenant.get()

    async def wait(self) -> None:
        self._began.set()
        try:
            await anyio.sleep_forever()
        finally:
            with CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self._log.append("ended")

    async def source(self) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            with CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self._log.append("closed")

    @asynccontextmanager
    async def _life(self) -> AsyncGenerator[None, None]:
        await anyio.lowlevel.checkpoint()
        tenant.set("ada")
        self._log.append("entered")
        try:
            async with create_task_group():  # holds a scope for as long as it is served
                yield
        finally:
            self._log.append("left")


class Entered(Api):
    """An API that is entered itself."""

    async def __aenter__(self) -> None:
        self._own = self._life()
        await self._own.__aenter__()
        self.pool = {"secret": 1}

    async def __aexit__(self, *exc: Any) -> bool | None:
        return await self._own.__aexit__(*exc)


def itself(api: Api) -> Any:
    api.__class__ = Entered
    return api


def by_function(api: Api) -> Any:
    @asynccontextmanager
    async def make() -> AsyncGenerator[Api, None]:
        async with api._life():
            yield api

    return make


def by_option(api: Api) -> Any:
    @asynccontextmanager
    async def lifespan(served: Api) -> AsyncGenerator[None, None]:
        assert served is api
        async with served._life():
            yield

    return expose(api, lifespan=lifespan)


WAYS: list[Callable[[Api], Any]] = [
    itself,
    by_function,
    lambda api: expose(by_function(api)),
    lambda api: by_function(api)(),
    by_option,
]


@pytest.mark.parametrize("way", WAYS)
async def test_around_all_handlers(way: Callable[[Api], Any]) -> None:
    """In the owner's task, so that it may hold scopes; what runs to the end is ended before."""
    api = Api()
    exposed = way(api)
    assert api._log == []
    async with pair(exposed) as link, create_task_group() as group:
        assert api._log == ["entered"]
        assert await link.api.use() == "ada"
        group.start_soon(link.api.wait)
        numbers = await link.api.source()
        assert await anext(numbers) == 1
        await api._began.wait()
        with pytest.raises(MethodNotFoundError):
            await link.api.pool.secret  # what entering has added isn't exposed
        group.cancel_scope.cancel()
    assert api._log[:2] == ["entered", "used"]
    assert sorted(api._log[2:-1]) == ["closed", "ended"]
    assert api._log[-1] == "left"


async def test_what_entering_gives_is_exposed() -> None:
    """With the options of the table, which can be served again, each time anew."""
    made: list[dict[str, Any]] = []

    class Maker:
        async def __aenter__(self) -> dict[str, Any]:
            made.append({"set_up": lambda: len(made)})
            return made[-1]

        async def __aexit__(self, *exc: Any) -> None:
            made[-1].clear()

        def hidden(self) -> None: ...

    table = expose(Maker(), naming="camel")
    for number in (1, 2):
        async with pair(table) as link:
            assert await link.api.setUp() == number
            with pytest.raises(MethodNotFoundError):
                await link.api.hidden()
    assert made == [{}, {}]


async def test_writable_of_what_a_function_yields() -> None:
    @asynccontextmanager
    async def make() -> AsyncGenerator[dict[str, str], None]:
        yield {"colour": "red"}

    table = expose(make, writable=["colour"])
    assert list(table) == []
    for _ in range(2):
        async with pair(table) as link:
            assert await link.api.colour == "red"
            await link.client.set_property("colour", "blue")
            assert await link.api.colour == "blue"
    with pytest.raises(ValueError, match="^writable: 'size'"):
        async with pair(expose(make, writable=["size"])):
            pytest.fail("must not be served")


async def test_without() -> None:
    """Who has entered it already says so."""
    api = Entered()
    async with api._life(), pair(expose(api, lifespan=None)) as link:
        assert await link.api.use() == "ada"
    assert api._log == ["entered", "used", "left"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: expose(Api(), lifespan=1), "^lifespan: needs a function"),  # type: ignore[arg-type]
        (lambda: expose(Api(), lifespan=_undecorated), "^lifespan: needs @asynccontextmanager"),
        (lambda: expose(_undecorated), "^expose: needs @asynccontextmanager above _undecorated"),
        (lambda: expose(asynccontextmanager(_undecorated)), "is to take no arguments"),
        (lambda: expose(by_function(Api()), lifespan=None), "^lifespan: what is exposed is one"),
        (lambda: expose(_plain), "^expose: needs an object"),
    ],
)
def test_what_is_none(make: Callable[[], object], text: str) -> None:
    """Mistakes are told when it is exposed, before anything is entered."""
    with pytest.raises(TypeError, match=text):
        make()


async def _undecorated(api: Any) -> AsyncGenerator[None, None]:
    yield


def _plain() -> Api:
    return Api()


async def test_yields_nothing() -> None:
    @asynccontextmanager
    async def nothing() -> AsyncGenerator[None, None]:
        yield

    with pytest.raises(TypeError, match="not None$"):
        async with pair(nothing):
            pytest.fail("must not be served")


async def test_errors_arrive_as_themselves() -> None:
    """Of entering and of leaving; what leaves the body goes through, and is seen."""
    seen: list[BaseException] = []

    @asynccontextmanager
    async def lifespan(where: str, api: Any) -> AsyncGenerator[None, None]:
        if where == "entering":
            raise OSError(where)
        try:
            yield
        except Exception as exc:
            seen.append(exc)
            raise
        if where == "leaving":
            raise OSError(where)

    for where in ("entering", "leaving", "body"):
        a, b = MemoryTransport.pair()
        channel = RPCChannel(b, expose=expose({}, lifespan=partial(lifespan, where)))
        async with a, b:
            with pytest.raises(OSError, match=f"^{where}$"):
                async with channel:
                    if where == "body":
                        raise OSError(where)
            assert channel.closed
            async with RPCChannel(b, expose={"n": 1}), RPCChannel(a) as client:
                assert await client.get_api().n == 1  # the transport is free again
    assert [str(exc) for exc in seen] == ["body"]


async def test_cancelled_while_entering() -> None:
    """Nothing was begun, so nothing is left; what was asked meanwhile is not lost."""
    log: list[str] = []

    @asynccontextmanager
    async def slow(api: Any) -> AsyncGenerator[None, None]:
        try:
            await anyio.sleep_forever()
        finally:
            log.append("given up")
        yield

    a, b = MemoryTransport.pair()
    async with a, b, RPCChannel(a, timeout=CALL_BOUND) as client, create_task_group() as group:
        results: list[Any] = []

        async def ask() -> None:
            results.append(await client.get_api().n)

        with CancelScope() as scope:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(_cancel, scope)
            async with RPCChannel(b, expose=expose({"n": 1}, lifespan=slow)):
                pytest.fail("must not be served")
        assert scope.cancelled_caught
        assert log == ["given up"]
        assert results == []
        async with RPCChannel(b, expose={"n": 1}):
            with fail_after(BOUND):
                while not results:
                    await anyio.sleep(0.01)


async def _cancel(scope: CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


@pytest.mark.server
async def test_two_workers_of_a_group(redis_server: RedisServer, stream_name: str) -> None:
    """Each enters for itself. Until it has, and when it can't, requests stay for others."""
    opened = anyio.Event()
    entered: list[str] = []

    @asynccontextmanager
    async def lifespan(api: dict[str, Any]) -> AsyncGenerator[None, None]:
        name = api["name"]
        entered.append(name)
        if name == "broken":
            raise OSError("no pool")
        if name == "slow":
            await opened.wait()
        try:
            yield
        finally:
            entered.remove(name)

    def transport() -> RedisStreamsTransport:
        return RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, claim_idle=600
        )

    async def work(name: str) -> None:
        table = expose({"name": name, "tell": lambda: name}, lifespan=lifespan)
        async with transport() as served, RPCChannel(served, expose=table) as channel:
            await channel.serve_forever()

    results: list[str] = []
    async with (
        transport() as used,
        RPCChannel(used, timeout=CALL_BOUND) as client,
        create_task_group() as workers,
    ):
        workers.start_soon(work, "slow")
        with fail_after(BOUND):
            while entered != ["slow"]:
                await anyio.sleep(0.01)

        async def ask() -> None:
            results.append(await client.get_api().tell())

        async with create_task_group() as calls:
            for _ in range(20):
                calls.start_soon(ask)
            with pytest.raises(OSError, match="^no pool$"), fail_after(BOUND):
                await work("broken")
            assert results == []
            opened.set()
        assert results == ["slow"] * 20
        workers.start_soon(work, "quick")
        with fail_after(BOUND):
            while {*results} != {"slow", "quick"}:
                await ask()
        workers.cancel_scope.cancel()
    assert entered == ["broken"]


class Managed:
    async def __aenter__(self) -> None:
        raise NotImplementedError

    async def __aexit__(self, *_: object) -> None:
        raise NotImplementedError


@asynccontextmanager
async def made() -> AsyncIterator[str]:
    yield "api"


async def generator() -> AsyncIterator[str]:
    yield "api"


def plain() -> None:
    raise NotImplementedError


@asynccontextmanager
async def of(api: object) -> AsyncIterator[str]:
    yield f"of {api}"


def test_what_gives_an_api() -> None:
    """A function with `asynccontextmanager`, or what it returns; nothing else that can be entered."""
    assert gives_api(made)
    assert gives_api(made())
    assert not any(map(gives_api, (plain, Managed(), Managed, object())))
    with pytest.raises(TypeError, match="needs @asynccontextmanager above generator"):
        gives_api(generator)
    with pytest.raises(TypeError, match="of\\(\\) is to take no arguments"):
        gives_api(of)


async def test_which_lifespan() -> None:
    """What is exposed is entered by itself, unless another one is given; None is for nothing."""
    assert find_lifespan(object(), UNSET) is None
    one = Managed()
    entering = find_lifespan(one, UNSET)
    assert entering is not None
    assert entering() is one  # type: ignore[comparison-overlap]
    assert find_lifespan(one, None) is None
    assert find_lifespan(made, UNSET) is made
    entering = find_lifespan(one, of)
    assert entering is not None
    async with entering() as result:
        assert result is None  # what it gives is not what is exposed


@pytest.mark.parametrize(
    ("api", "given", "text"),
    [
        (made, of, "what is exposed is one itself"),
        (made, None, "what is exposed is one itself"),
        (object(), generator, "needs @asynccontextmanager above generator"),
        (object(), "x", "needs a function, not 'x'"),
    ],
)
def test_no_lifespan(api: object, given: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        find_lifespan(api, given)
