"""`anyio_kkrpc.testing.connected`, and the fixtures of its pytest plugin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest

from anyio_kkrpc import (
    MethodNotFoundError,
    RemoteStream,
    RPCValidationError,
    with_call_options,
)
from anyio_kkrpc.middleware import CallNext, Invocation
from anyio_kkrpc.testing import connected, find_server

pytest_plugins = ["pytester"]


class Sums(Protocol):
    async def add(self, a: int, b: int) -> int: ...


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


@pytest.mark.anyio
@pytest.mark.parametrize("codec", ["json", "cbor", None])
async def test_connected(codec: str | None) -> None:
    """It behaves as over a wire."""
    async with connected(Api(), Sums, codec=codec) as api:
        assert await api.add(1, 2) == 3
        with pytest.raises(RPCValidationError):
            await api.add("x", 2)  # type: ignore[arg-type]
    async with connected(Api()) as untyped:
        with pytest.raises(MethodNotFoundError):
            await untyped.nothing()


@pytest.mark.anyio
async def test_fakes() -> None:
    """A dict of functions will do, if it has all that the Protocol has."""
    async with connected({"add": lambda a, b: 5}, Sums) as api:
        assert await api.add(1, 1) == 5
    with pytest.raises(TypeError, match=r"fit Sums: it lacks add\(\)"):
        async with connected({"sub": lambda a, b: 0}, Sums):
            pass


class Nested(Protocol):
    sums: Sums
    version: Awaitable[int]

    @property
    def name(self) -> Awaitable[str]: ...

    async def log(self, text: str, *, level: int = 0) -> None: ...


@pytest.mark.anyio
async def test_fakes_of_all_that_is_described() -> None:
    """Nested objects, properties and arguments, too."""
    fake = {"sums": Api(), "version": 1, "name": "fake", "log": lambda text, *, level=0: None}
    async with connected(fake, Nested) as api:
        assert await api.sums.add(1, 2) == 3
        assert await api.version == 1
        assert await api.name == "fake"
        await api.log("x", level=2)
    wrong = {"sums": {}, "log": lambda text: None}
    with pytest.raises(TypeError) as caught:
        async with connected(wrong, Nested):
            pass
    assert str(caught.value) == (
        "api: doesn't fit Nested: it lacks sums.add(); it lacks version; "
        "log() takes other arguments; it lacks name"
    )
    with pytest.raises(TypeError, match="protocol: needs a Protocol class"):
        async with connected(fake, 3):  # type: ignore[call-overload]
            pass


class Counted(Nested, Protocol):
    def count(self, to: int) -> RemoteStream[int]: ...


@pytest.mark.anyio
async def test_partial_fakes() -> None:
    """What a test doesn't use may be left out; who uses it learns what, and can't take it for an
    error of the call. What is there has to fit.
    """
    fake = {"log": lambda text, *, level=0: None}
    async with connected(fake, Counted, partial=True) as api:
        await api.log("x", level=2)

        async def read() -> None:
            async for _ in api.count(3):
                pass

        for use, lacking in (
            (lambda: api.sums.add(1, 2), r"sums\.add\(\)"),
            (lambda: with_call_options(api, reply=False).sums.add(1, 2), r"sums\.add\(\)"),
            (lambda: api.version, "version"),
            (lambda: api.name, "name"),
            (read, r"count\(\)"),
        ):
            with pytest.raises(
                NotImplementedError, match=f"^the fake for Counted lacks {lacking}$"
            ):
                await use()
        with pytest.raises(MethodNotFoundError):
            await api.other()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"fit Counted: log\(\) takes other arguments$"):
        async with connected({"log": lambda text: None}, Counted, partial=True):
            pass
    with pytest.raises(TypeError, match="^partial: needs a protocol"):
        async with connected(fake, partial=True):  # type: ignore[call-overload]
            pass
    async with connected({**fake, "add": lambda a, b: 5}, Sums, partial=True) as whole:
        assert await whole.add(1, 2) == 5


@pytest.mark.anyio
async def test_lifespan_and_protocol() -> None:
    """What is entered is what has to fit."""
    events: list[str] = []

    class Shop:
        def price(self, name: str) -> int:
            return len(name)

    class ShopApi(Protocol):
        async def price(self, name: str) -> int: ...

    class Other(Protocol):
        async def cost(self, name: str) -> int: ...

    @asynccontextmanager
    async def shop() -> AsyncIterator[Shop]:
        events.append("entered")
        yield Shop()
        events.append("left")

    async with connected(shop, ShopApi) as api:
        assert await api.price("tea") == 3
        assert events == ["entered"]
    assert events == ["entered", "left"]
    with pytest.raises(TypeError, match=r"doesn't fit Other: it lacks cost\(\)"):
        async with connected(shop, Other):
            pass


@pytest.mark.anyio
async def test_middleware_of_the_server() -> None:
    """It can be tested without Redis."""

    async def twice(call: Invocation, call_next: CallNext) -> Any:
        return await call_next(call) * 2

    async with connected(Api(), middleware=[twice]) as api:
        assert await api.add(1, 2) == 6


@pytest.mark.parametrize("there", [True, False])
def test_fixtures(pytester: pytest.Pytester, there: bool) -> None:
    """A server for the session, and a name for each test; without a server, tests are skipped."""
    if find_server() is None:
        pytest.skip("no server")
    pytester.makeconftest('pytest_plugins = ["anyio_kkrpc.testing.pytest_plugin"]')
    if not there:
        pytester.makeconftest(
            'pytest_plugins = ["anyio_kkrpc.testing.pytest_plugin"]\n'
            "def pytest_configure():\n"
            "    from anyio_kkrpc.testing import pytest_plugin\n"
            "    pytest_plugin.find_server = lambda: None\n"
        )
    pytester.makepyfile(
        """
        import redis

        def test_one(kkrpc_server, kkrpc_stream):
            assert redis.Redis.from_url(kkrpc_server.url).xlen(kkrpc_stream) == 0

        def test_two(kkrpc_server, kkrpc_stream):
            redis.Redis.from_url(kkrpc_server.url).xadd(kkrpc_stream, {"a": "b"})
        """
    )
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2) if there else result.assert_outcomes(skipped=2)
