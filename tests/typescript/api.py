"""What Python serves to TypeScript peers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import anyio

from anyio_kkrpc import Exposed, RPCChannel, current_call, expose
from anyio_kkrpc.abc import Transport
from tests.bounds import CALL_BOUND


class CustomError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start


class Grade1:
    def add(self, a: int, b: int) -> int:
        return a + b


class Api:
    Counter = Counter

    def __init__(self) -> None:
        self.settings = {"theme": "light"}
        self.math = SimpleNamespace()
        self._closed = 0
        self._channel: RPCChannel | None = None

    def add(self, a: int, b: int) -> int:
        return a + b

    def echo(self, value: Any = None) -> Any:
        return value

    def greet(self, name: str = "you", greeting: str = "hello") -> str:
        return f"{greeting} {name}"

    def same(self, value: Any) -> Any:
        return value

    def nothing(self) -> None:
        return None

    def hello(self, name: str) -> str:
        return f"hi {name}"

    def type_name(self, value: Any) -> str:
        return type(value).__name__

    async def with_progress(self, n: int, on_step: Callable[..., Awaitable[None]]) -> int:
        for step in range(1, n + 1):
            await on_step(step)
        return n

    async def count_to(self, n: int) -> AsyncIterator[int]:
        try:
            for number in range(1, n + 1):
                yield number
        finally:
            self._closed += 1

    async def slow_count(self, n: int, ms: float) -> AsyncIterator[int]:
        for number in range(1, n + 1):
            yield number
            await anyio.sleep(ms / 1000)

    async def repeat(self, n: int) -> AsyncIterator[str]:
        for _ in range(n):
            yield "again"

    def closed(self) -> int:
        return self._closed

    async def fail_stream(self, n: int) -> AsyncIterator[int]:
        for number in range(1, n + 1):
            yield number
        raise CustomError("stream broke", 7)

    async def sum(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    def throw_custom(self) -> None:
        raise CustomError("This is a custom error\nof two lines 🚀", 418)

    def throw_with_cause(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise ValueError("outer") from exc

    def metadata(self) -> dict[str, Any]:
        return current_call().metadata

    async def call_peer(self, name: str, *args: Any) -> Any:
        assert self._channel is not None
        return await self._channel.get_api(to=current_call().sender)[name](*args)


def exposed(api: Api) -> Exposed:
    """Return the table of an API, with names as TypeScript has them."""
    tree = {name: getattr(api, name) for name in dir(api) if not name.startswith("_")}
    tree["math"] = {"grade1": Grade1()}
    tree["settings"] = api.settings
    return expose(tree, writable=["settings.theme"], naming="camel")


async def serve(stack: AsyncExitStack, transport: Transport) -> Api:
    """Serve a new API on an entered transport."""
    api = Api()
    api._channel = await stack.enter_async_context(
        RPCChannel(transport, expose=exposed(api), timeout=CALL_BOUND)
    )
    return api
