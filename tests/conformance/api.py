"""What the conformance cases call."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec

from anyio_kkrpc import RPCChannel, current_call, in_thread


class Color(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: float


class Shape(msgspec.Struct):
    name: str
    points: list[Point] = []


class Rich(msgspec.Struct):
    """One of each rich type."""

    data: bytes
    when: datetime.datetime
    day: datetime.date
    id: uuid.UUID
    price: decimal.Decimal
    color: Color
    point: Point
    shape: Shape


class CustomError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
        self.detail = {"nested": [1, None]}
        self._secret = "stays here"
        self.unsendable = object()


class Level:
    def __init__(self, depth: int) -> None:
        self.depth = depth
        if depth:
            self.next = Level(depth - 1)

    def name(self) -> str:
        return f"level {self.depth}"


class Counter:
    def __init__(self, start: int, *, step: int = 1) -> None:
        self.value = start
        self.step = step
        self._hidden = 1


class Settings:
    theme: str = "light"
    size: int = 10

    def __init__(self) -> None:
        self.theme = "light"
        self.size = 10


class Api:
    """Served in the conformance cases. Events tell what happened at the serving side."""

    Counter = Counter

    def __init__(self) -> None:
        self.settings = Settings()
        self.level = Level(5)
        self.limits = {"a.b": 1, "plain": 2}
        self._channel: RPCChannel | None = None
        self._started = anyio.Event()
        self._cancelled = anyio.Event()
        self._closed = anyio.Event()
        self._late: Callable[..., Awaitable[None]] | None = None
        self._log: list[Any] = []

    @property
    def answer(self) -> int:
        return 42

    def empty(self) -> None:
        return None

    def add(self, a: int, b: int = 1) -> int:
        self._log.append((a, b))
        return a + b

    def keywords(self, *args: int, a: int, **rest: int) -> dict[str, Any]:
        return {"args": list(args), "a": a, "rest": rest}

    async def echo(self, value: Any) -> Any:
        return value

    def rich(self, value: Rich) -> Rich:
        assert isinstance(value.data, bytes)
        assert isinstance(value.when, datetime.datetime)
        assert isinstance(value.price, decimal.Decimal)
        assert isinstance(value.point, Point)
        return value

    @in_thread
    def in_thread(self) -> str:
        import threading

        return f"{current_call().method} in {threading.current_thread() is threading.main_thread()}"

    def fail(self, message: str) -> None:
        raise CustomError(message, 418)

    def fail_with_cause(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise ValueError("outer") from exc

    async def cancel_myself(self) -> None:
        import asyncio

        import sniffio

        if sniffio.current_async_library() == "asyncio":
            raise asyncio.CancelledError("from the handler")
        raise RuntimeError("trio's Cancelled can't be made by users")

    def unsendable(self) -> Any:
        return {"x": object()}

    async def wait(self) -> str:
        self._started.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            self._cancelled.set()
            raise
        return "never"

    async def budget(self) -> float:
        deadline = current_call().deadline
        assert deadline is not None
        return deadline - anyio.current_time()

    async def progress(self, n: int, on_step: Callable[..., Awaitable[None]]) -> str:
        for step in range(n):
            await on_step(step, total=n)
        return "done"

    async def keep(self, callback: Callable[..., Awaitable[None]]) -> None:
        self._late = callback

    async def call_kept(self, value: int) -> None:
        assert self._late is not None
        await self._late(value)

    def drop_kept(self) -> None:
        self._late = None

    async def count(self, n: int) -> AsyncIterator[int]:
        try:
            for number in range(n):
                yield number
        finally:
            self._closed.set()

    async def count_then_fail(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number
        raise CustomError("the stream broke", 7)

    async def silence(self) -> AsyncIterator[int]:
        self._started.set()
        try:
            await anyio.sleep_forever()
            yield 1
        finally:
            self._closed.set()

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def first(self, numbers: AsyncIterator[int]) -> int:
        async for number in numbers:
            return number
        raise LookupError("no number")

    async def double(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    async def call_back(self, depth: int) -> list[int]:
        """Call the caller's own API, which calls this one again, ``depth`` times in all."""
        if not depth:
            return [0]
        assert self._channel is not None
        peer = current_call().sender
        inner = await self._channel.get_api(to=peer).call_back(depth - 1)
        return [depth, *inner]

    def sender(self) -> str | None:
        return current_call().sender

    def metadata(self) -> dict[str, Any]:
        return current_call().metadata
