"""Streams as items of streams, in both directions: read, left, bounded, and closed at the end."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, Protocol

import anyio
import pytest

from anyio_kkrpc import RemoteError, RPCTimeoutError, RPCValidationError, expose
from anyio_kkrpc._driver import _families, _pump
from anyio_kkrpc._driver._families import Family
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class Api:
    """Sources of streams, which record what becomes of them."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.kept: Any = None

    async def row(self, name: str, length: int) -> AsyncIterator[str]:
        self.opened.append(name)
        try:
            for number in range(length):
                yield f"{name}.{number}"
        finally:
            self.closed.append(name)

    async def table(self, rows: int, length: int = 3) -> AsyncIterator[AsyncIterator[str]]:
        try:
            for number in range(rows):
                yield self.row(str(number), length)
        finally:
            self.closed.append("table")

    async def deep(self, depth: int) -> AsyncIterator[Any]:
        yield self.deep(depth - 1) if depth else "bottom"

    async def mixed(self):  # type: ignore[no-untyped-def]
        yield 1
        yield self.row("a", 2)
        yield {"b": 2}
        yield self.row("c", 2)

    async def fails_inside(self) -> AsyncIterator[Any]:
        async def broken() -> AsyncIterator[int]:
            yield 1
            raise ValueError("inner")

        yield broken()
        yield "goes on"

    async def wrong_inside(self) -> AsyncIterator[AsyncIterator[int]]:
        async def texts() -> AsyncIterator[Any]:
            yield 1
            yield "two"

        yield texts()

    async def caught(self) -> AsyncIterator[Any]:
        try:
            for number in range(1000):
                yield number
        except RemoteError:
            yield self.row("caught", 2)

    async def read(self, table: AsyncIterable[AsyncIterable[int]]) -> list[list[int]]:
        return [[item async for item in row] async for row in table]

    async def some(self, table: AsyncIterable[Any]) -> int:
        async for row in table:
            return await row.__anext__()
        return -1

    async def back(self, table: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for row in table:
            yield row


class Typed(Protocol):
    def table(self, rows: int) -> AsyncIterator[AsyncIterator[int]]: ...


class Holder:
    rows: AsyncIterator[int] | None = None
    left: Any = None


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            gc.collect()
            await anyio.sleep(0.001)


async def nothing_is_left(link: Pair) -> None:
    for channel in (link.client, link.server):
        await until(lambda channel=channel: not channel.statistics().incoming_streams)
        await until(lambda channel=channel: not channel.statistics().outgoing_streams)


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_items_that_are_streams(codec: str) -> None:
    """Each is read as any stream, and its source is opened when its turn comes, not ahead."""
    api = Api()
    async with pair(api, codec=codec) as link:
        ahead = 0
        async for row in link.api.table(50):
            name = str(len(api.closed))
            assert [item async for item in row] == [f"{name}.{number}" for number in range(3)]
            ahead = max(ahead, len(api.opened) - len(api.closed))
        assert len(api.closed) == 51
        assert ahead == 0
        await nothing_is_left(link)


async def test_other_items_beside_them() -> None:
    async with pair(Api()) as link:
        found: list[Any] = []
        async for item in link.api.mixed():
            found.append([one async for one in item] if hasattr(item, "__aiter__") else item)
        assert found == [1, ["a.0", "a.1"], {"b": 2}, ["c.0", "c.1"]]
        await nothing_is_left(link)


async def test_streams_in_streams_in_streams() -> None:
    async with pair(Api()) as link:
        item: Any = await link.api.deep(20)
        depth = 0
        while hasattr(item, "__aiter__"):
            item, depth = await item.__anext__(), depth + 1
        assert (item, depth) == ("bottom", 21)
        await nothing_is_left(link)


async def test_arguments() -> None:
    """A caller's streams may hold streams, too; they are converted as annotated, and closed."""
    closed: list[int] = []

    async def row(number: int) -> AsyncIterator[int]:
        try:
            for item in range(number, number + 2):
                yield item
        finally:
            closed.append(number)

    async def table() -> AsyncIterator[AsyncIterator[int]]:
        for number in range(3):
            yield row(number)

    async def wrong() -> AsyncIterator[Any]:
        yield row(1)
        yield 2

    async with pair(Api()) as link:
        assert await link.api.read(table()) == [[0, 1], [1, 2], [2, 3]]
        assert closed == [0, 1, 2]
        assert await link.api.some(table()) == 0
        with pytest.raises(RemoteError, match="Expected a stream"):
            await link.api.read(wrong())
        await nothing_is_left(link)
        there_and_back = [[item async for item in row] async for row in link.api.back(table())]
        assert there_and_back == [[0, 1], [1, 2], [2, 3]]
        await nothing_is_left(link)


async def test_a_value_that_is_set() -> None:
    """A property may be set to a stream, which its owner reads as long as it likes."""

    async def rows() -> AsyncIterator[int]:
        yield 1
        yield 2

    holder = Holder()
    async with pair(expose(holder, writable=["rows", "left"])) as link:
        await link.client.set_property("rows", rows())
        assert holder.rows is not None
        assert [item async for item in holder.rows] == [1, 2]
        await link.client.set_property("left", rows())
        holder.left = None
        with pytest.raises(RPCValidationError):
            await link.client.set_property("rows", 5)
        await link.client.set_property("rows", None)
        await nothing_is_left(link)


async def test_left_early() -> None:
    """Whoever leaves one of them leaves no other; those that were never read are closed."""
    api = Api()
    async with pair(api) as link:
        async with link.api.table(10, 1000) as rows:
            first = await rows.__anext__()
            assert await first.__anext__() == "0.0"
            second = await rows.__anext__()
        await until(lambda: "table" in api.closed)
        assert [await first.__anext__() for _ in range(999)][-1] == "0.999"
        await second.aclose()
        del first, second, rows
        await nothing_is_left(link)
        assert api.opened == ["0"]


async def test_errors() -> None:
    """One that fails ends alone. What doesn't fit its annotation is told to who reads it."""
    async with pair(Api()) as link:
        rows = await link.api.fails_inside()
        inner = await rows.__anext__()
        assert await inner.__anext__() == 1
        with pytest.raises(RemoteError, match="inner"):
            await inner.__anext__()
        assert await rows.__anext__() == "goes on"
        async for row in link.api.wrong_inside():
            assert await row.__anext__() == 1
            with pytest.raises(RPCValidationError, match="output"):
                await row.__anext__()
        typed = link.client.get_api(Typed)
        async for texts in typed.table(1):
            with pytest.raises(RPCValidationError, match="output"):
                await texts.__anext__()
        await nothing_is_left(link)


async def test_an_answer_that_is_one() -> None:
    """What a source makes of an error that is raised in it may be a stream."""
    async with pair(Api()) as link:
        rows = await link.api.caught()
        assert await rows.__anext__() == 0
        row = await rows.athrow(ValueError("next"))
        assert [item async for item in row] == ["caught.0", "caught.1"]
        await rows.aclose()
        await nothing_is_left(link)


async def test_one_that_is_not_read_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits as long as one of its family is read, however slowly, and is closed afterwards."""
    monkeypatch.setattr(_pump, "FIRST_PULL", 0.02)
    api = Api()
    async with pair(api) as link:
        rows = await link.api.table(3)
        first = await rows.__anext__()
        assert await first.__anext__() == "0.0"
        second = await rows.__anext__()
        await anyio.sleep(0.1)
        assert [item async for item in second] == ["1.0", "1.1", "1.2"]
        third = await rows.__anext__()
        assert [item async for item in rows] == []
        await until(lambda: not link.server.statistics().outgoing_streams)
        assert api.opened == ["0", "1"]
        with pytest.raises(RPCTimeoutError, match="began to read"):
            await third.__anext__()


async def test_many_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets the source run ahead doesn't make it open streams without end."""
    assert _families.MOST_UNREAD >= 256
    monkeypatch.setattr(_families, "MOST_UNREAD", 5)
    async with pair(Api()) as link:
        rows = await link.api.table(100)
        held = [await rows.__anext__() for _ in range(5)]
        with pytest.raises(RemoteError, match="wait to be read"):
            await rows.__anext__()
        for row in held:
            assert await row.__anext__()
            await row.aclose()
        await nothing_is_left(link)


def test_patience() -> None:
    """It begins anew when one of them ends, and isn't needed as long as one is read."""
    family = Family()
    assert family.patience(1000.0, 60.0) == 60.0
    family.add()
    family.begin()
    family.end(1000.0)
    assert family.patience(1001.0, 60.0) == 60.0
    family.end(1002.0)
    assert family.patience(1012.0, 60.0) == 50.0
    assert family.patience(1062.0, 60.0) == 0.0
