"""What kkrpc's own peers said over WebSockets is answered as kkrpc's own servers did."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec import UNSET

from anyio_kkrpc import expose
from anyio_kkrpc.typescript import superjson
from anyio_kkrpc.websocket import current_connection, endpoint

from .serving import Page, opened

pytestmark = pytest.mark.anyio
VECTORS = Path(__file__).parent / "vectors"
# Better here than there: frames that kkrpc loses, and calls that it leaves without an end.
BETTER = ("glued and lost", "not answered", "no answer to either", "waits for ever")
# Members that tell nothing, or are chosen freely: stacks, credits, in what is answered.
FREE = ("s", "stack", "n", "version", "transferSlots", "callbackIds")


class CustomError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start


class Api:
    counter = 42
    Counter = Counter

    def __init__(self) -> None:
        self.settings = {"theme": "light"}
        self.math = {"grade1": {"add": lambda a, b: a + b}}
        self._held: Any = None

    def add(self, a: int, b: int) -> int:
        return a + b

    def echo(self, value: Any = None) -> Any:
        return value

    def nothing(self) -> None:
        return None

    def throw_custom_error(self) -> None:
        raise CustomError("This is a custom error", 418)

    async def with_progress(self, n: int, step: Callable[[int], Awaitable[None]]) -> int:
        for number in range(1, n + 1):
            await step(number)
        return n

    async def count_to(self, n: int) -> AsyncIterator[int]:
        for number in range(1, n + 1):
            yield number

    async def slow_count(self, n: int, pause: int) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async def fail_stream(self, n: int) -> AsyncIterator[int]:
        for number in range(1, n + 1):
            yield number
        raise CustomError("stream broke", 7)

    async def sum_stream(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def call_peer(self, name: str, *args: Any) -> Any:
        return await current_connection().channel.get_api()[name](*args)

    async def sleep(self, milliseconds: int) -> None:
        await anyio.sleep_forever()


def cases(name: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for line in (VECTORS / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        case = row["case"]
        if not case.startswith(SKIPPED) and not any(word in case for word in BETTER):
            found.setdefault(case, []).append(row)
    return found


# References; when callbacks are released is tested with the dialect.
SKIPPED = (
    *("remote-refs", "server's connection closes while", "three calls passed", "hold(f)"),
    *("json: sumStream", "superjson: sumStream"),  # an error here, too, in other words
    "handmade by the client: op ref to a channel without",  # here every one has references
)


def plain(message: str) -> Any:
    """Return what a frame says, without what is free."""
    if message.startswith('{"json":'):
        value = superjson.loads(message.encode())
    else:
        value = json.loads(message)
    return _without_free(value)


def _without_free(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_free(item)
            for key, item in value.items()
            if key not in FREE and item is not None and item is not UNSET
        }
    return [_without_free(item) for item in value] if isinstance(value, list) else value


def match(recorded: Any, ours: Any, ids: dict[str, str]) -> None:
    """Compare two messages; note which id of ours stands for which one that was recorded."""
    assert type(recorded) is type(ours), (recorded, ours)
    if isinstance(recorded, dict):
        assert recorded.keys() == ours.keys(), (recorded, ours)
        for key, value in recorded.items():
            if key in ("id", "sid"):
                assert ids.setdefault(value, ours[key]) == ours[key]
            else:
                match(value, ours[key], ids)
    elif isinstance(recorded, list):
        assert len(recorded) == len(ours)
        for one, other in zip(recorded, ours, strict=True):
            match(one, other, ids)
    else:
        assert recorded == ours


async def replay(page: Page, rows: list[Any]) -> None:
    ids: dict[str, str] = {}
    for row in rows:
        fields = row["fields"]
        if row["kind"] == "close":
            return
        if fields["from"] == "client":
            said = fields["data"]
            for recorded, ours in ids.items():
                said = said.replace(recorded, ours)
            if fields["opcode"] == "binary":
                page.say(said.encode())
            else:
                page.say(said)
        elif row["kind"] != "destroy":
            match(plain(fields["data"]), plain(await page.hear()), ids)


@pytest.mark.parametrize(("name", "count"), [("kkrpc-0-ws", 46), ("kkrpc-2-ws", 30)])
async def test_replay(name: str, count: int) -> None:
    """Frame by frame; a frame of kkrpc 0.x ends in a newline, one of kkrpc 2 doesn't."""
    app = endpoint(expose(Api(), writable=["settings.theme"], naming="camel"))
    replayed = 0
    for case, rows in cases(name).items():
        replayed += 1
        if rows[0]["fields"].get("from") != "client":
            continue
        try:
            async with opened(app) as page:
                await replay(page, rows)
                if "the server closes" in case and any(row["kind"] == "destroy" for row in rows):
                    assert await page.hear_the_end() == 1000
        except BaseException as exc:
            raise AssertionError(case) from exc
    assert replayed == count
    assert app.statistics().failed == 0
    assert app.statistics().connections == 0
