"""What recorded peers of kkrpc 2 say about streams, said once more, with Python at either side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RemoteError, expose

from . import test_generators
from .replaying import Recorded, cases_in, recorded_peer

pytestmark = pytest.mark.anyio

CASES = cases_in("kkrpc-2-streams-more")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Leave uvloop out: all of it is in memory."""
    return str(request.param)


def lines_of(*beginnings: str) -> list[tuple[str, Any]]:
    """Return what was written in cases, one after the other."""
    found: list[tuple[str, Any]] = []
    for beginning in beginnings:
        (case,) = (case for name, case in CASES.items() if name.startswith(beginning))
        found += case
    return found


class CustomError(Exception):
    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Swap:
    s: Any = None


async def gen(n: int) -> AsyncIterator[int]:
    for number in range(1, n + 1):
        yield number


class Api(test_generators.Api):
    """What the recorded server has, under the names that it has there."""

    def __init__(self) -> None:
        super().__init__()
        self.swap = Swap()
        self.kept: Any = None

    def cleaned(self) -> list[Any]:
        return [f'caught {{"code":{one["code"]}}}' if one != "slow" else one for one in self.log]

    async def sum(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def take(self, numbers: AsyncIterator[int], n: int) -> list[int]:
        async with numbers:  # type: ignore[attr-defined]
            return [await numbers.__anext__() for _ in range(n)]

    async def two(self, first: AsyncIterator[int], second: AsyncIterator[int]) -> list[int]:
        return [n async for n in first] + [n async for n in second]

    def never(self, numbers: AsyncIterator[int]) -> str:
        self.kept = numbers
        return "not read"

    def throwBefore(self, numbers: AsyncIterator[int]) -> None:
        raise CustomError("before reading", 1)

    async def catchErr(self, numbers: AsyncIterator[int]) -> list[Any]:
        try:
            async for _ in numbers:
                pass
        except RemoteError as exc:
            return [exc.name, exc.message, exc.data.get("code")]
        return []

    async def double(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    def echo(self, value: Any) -> Any:
        return value

    def nestedArg(self, value: Any) -> str:
        return str(value).replace("'", '"').replace(" ", "")

    def holdIt(self, numbers: AsyncIterator[int]) -> bool:
        self.kept = numbers
        return True

    async def nextIt(self) -> dict[str, Any]:
        return {"done": False, "value": await self.kept.__anext__()}

    async def throwIt(self, text: str) -> None:
        await self.kept.athrow(RemoteError("", text))

    async def yieldStream(self) -> AsyncIterator[AsyncIterator[str]]:
        async def inner() -> AsyncIterator[str]:
            yield "inner"

        yield inner()


class Replay:
    """Says what one side said, each line once the other side said what it had said before.

    What Python says may come in another order than it was recorded in, but for what belongs to one
    stream; how much it pulls is its own affair, and so are stack traces.
    """

    def __init__(self, peer: Recorded) -> None:
        self._peer = peer
        self._heard: list[tuple[int, Any]] = []
        self._count = 0
        self._last: dict[Any, int] = {}
        self._pulls: set[str] = set()

    async def run(self, case: list[tuple[str, Any]], ours: str) -> list[Any]:
        """Replay it; return what Python said beside what was recorded."""
        others = (message for sender, message in case if sender != ours)
        self._pulls = {message["id"] for message in others if message.get("op") == "pull"}
        for sender, message in case:
            if sender != ours:
                await anyio.wait_all_tasks_blocked()
                await self._peer.say(message)
                continue
            while not self._matches(message):
                self._heard.append((self._count, await self._peer.hear()))
                self._count += 1
        return [message for _, message in self._heard]

    def _matches(self, recorded: Any) -> bool:
        for index, (place, heard) in enumerate(self._heard):
            if self._is_same(recorded, heard):
                key = (heard["t"], heard.get("sid"))
                assert self._last.get(key, -1) < place, "out of order"
                self._last[key] = place
                del self._heard[index]
                return True
        return False

    def _is_same(self, recorded: Any, heard: Any) -> bool:
        if any(recorded.get(key) != heard.get(key) for key in ("t", "op", "d")):
            return False
        if heard.get("sid") != self._peer.translated(recorded.get("sid")):
            return False
        value = recorded.get("v")
        if recorded.get("d") is False and value != heard.get("v") and not isinstance(value, dict):
            return False
        if recorded["id"] in self._pulls:  # it came late, and nobody heeds the answer
            return bool(recorded["id"] == heard["id"] and "e" in heard)
        self._peer.learn(recorded, heard)
        return self._free(self._peer.translated(recorded)) == self._free(heard)

    def _free(self, message: Any) -> Any:
        rest = {key: value for key, value in message.items() if key != "n"}
        if "e" in rest:
            rest["e"] = {key: value for key, value in rest["e"].items() if key != "s"}
            text, _, last = rest["e"]["m"].rpartition(" ")  # it may be an id
            rest["e"]["m"] = f"{text} {self._peer.translated(last)}"
        return rest


SERVED: dict[tuple[str, ...], int] = {
    ("yieldStream()",): 0,
    ("sum(gen(40))",): 0,
    ("take(gen(100), 2)",): 0,
    ("two(gen(2), gen(1))",): 0,
    ("never(gen(3))",): 0,
    ("throwBefore(gen(3))",): 0,
    ("catchErr(",): 0,
    ("double(gen(3))",): 0,
    ("echo(gen(2))",): 0,
    ("nestedArg(",): 0,
    ("set swap.s",): 0,
    ("holdIt(", "throwIt("): 0,
    ("handmade: pulls", "handmade: return of that", "handmade: pull after return"): 0,
}


@pytest.mark.parametrize("names", SERVED, ids=lambda names: names[0][:30])
async def test_python_serves(names: tuple[str, ...]) -> None:
    """A Python server says what the recorded one said."""
    case = lines_of(*names)
    table = expose(Api(), writable=["swap.s"])
    async with recorded_peer(table, dialect="kkrpc-2") as (_, peer):
        replay = Replay(peer)
        more = await replay.run(case, "server")
        await anyio.wait_all_tasks_blocked()
        assert len(more) <= SERVED[names], more


async def collect(items: Any) -> list[Any]:
    return [item async for item in items]


async def with_return(api: Any) -> None:
    assert await collect(api.withReturn()) == [1]


async def failing(api: Any, name: str, text: str) -> None:
    with pytest.raises(RemoteError) as failed:
        await collect(api[name]())
    assert failed.value.message == text


async def no_stream(api: Any) -> None:
    with pytest.raises(TypeError):
        await collect(api.echo(1))


async def streams_inside(api: Any) -> None:
    assert [await collect(item) async for item in api.yieldStream()] == [["inner"]]


async def throwing() -> AsyncIterator[int]:
    yield 1
    raise CustomError("arg broke", 7)


async def equal(api: Any, name: str, expected: Any, *args: Any) -> None:
    assert await api[name](*args) == expected


async def raising(api: Any) -> None:
    with pytest.raises(RemoteError, match="before reading") as failed:
        await api.throwBefore(gen(3))
    assert failed.value.data == {"code": 1}


async def streaming(api: Any, name: str, expected: list[int], n: int) -> None:
    assert await collect(api[name](gen(n))) == expected


async def holding(api: Any) -> None:
    assert await api.holdIt(gen(100)) is True
    assert [await api.nextIt() for _ in range(2)] == [
        {"done": False, "value": number} for number in (1, 2)
    ]
    with pytest.raises(RemoteError, match="no"):
        await api.throwIt("no")


Program = Callable[[Any], Awaitable[None]]
CALLED: dict[tuple[str, ...], Program] = {
    ("withReturn()",): with_return,
    ("failFirst()",): lambda api: failing(api, "failFirst", "CustomError: at once"),
    ("failString()",): lambda api: failing(api, "failString", "just a string"),
    ("failObject()",): lambda api: failing(api, "failObject", "[object Object]"),
    ("yieldStream()",): streams_inside,
    ("the call's result is not a stream",): no_stream,
    ("sum(gen(40))",): lambda api: equal(api, "sum", 820, gen(40)),
    ("take(gen(100), 2)",): lambda api: equal(api, "take", [1, 2], gen(100), 2),
    ("two(gen(2), gen(1))",): lambda api: equal(api, "two", [1, 2, 1], gen(2), gen(1)),
    ("never(gen(3))",): lambda api: equal(api, "never", "not read", gen(3)),
    ("throwBefore(gen(3))",): raising,
    ("catchErr(",): lambda api: equal(
        api, "catchErr", ["Error", "CustomError: arg broke", None], throwing()
    ),
    ("double(gen(3))",): lambda api: streaming(api, "double", [2, 4, 6], 3),
    ("echo(gen(2))",): lambda api: streaming(api, "echo", [1, 2], 2),
    ("holdIt(", "throwIt("): holding,
}


@pytest.mark.parametrize("names", CALLED, ids=lambda names: names[0][:30])
async def test_python_calls(names: tuple[str, ...]) -> None:
    """A Python client says what the recorded one said, and sees what that one saw."""
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(CALLED[names], channel.get_api())
            more = await Replay(peer).run(lines_of(*names), "client")
        # A source of Python's may be as far ahead as its reader allows.
        assert all(message["t"] == "sr" and message.get("d") is False for message in more)


async def test_python_sets() -> None:
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.set_property, "swap.s", gen(2))
            assert await Replay(peer).run(lines_of("set swap.s"), "client") == []


# What isn't replayed as it is, and why.
OTHERWISE = {
    "iterator.throw(": "test_generators, since a source of Python's is quicker",
    "cleaned()": "what the recorded sources had noted; test_generators looks at Python's",
    "iterator.return(": "test_generators",
    "iterator.return() after the end": "test_a_stream_that_has_ended",
    "undefs()": "test_generators",
    "failFirst()": "test_generators",
    "yieldBigint()": "test_an_item_that_cannot_be_sent: Python's source fails, and says so",
    "retVal(": "`async for` in Python has no value at its end",
    "handmade: throw of an unknown": "test_generators",
}


def test_all_cases_are_replayed() -> None:
    beginnings = [name for names in (*SERVED, *CALLED) for name in names] + [*OTHERWISE]
    assert [case for case in CASES if not case.startswith(tuple(beginnings))] == []
    assert [one for one in beginnings if not any(case.startswith(one) for case in CASES)] == []


async def test_a_stream_that_has_ended() -> None:
    """Nothing is sent when it is returned from."""
    case = lines_of("iterator.return() after the end")
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                _, call = case[0]
                items = await channel.get_api()[call["p"][0]](*[one["v"] for one in call["a"]])
                await collect(items)
                assert await items.areturn("x") == "x"

            tasks.start_soon(read)
            assert await Replay(peer).run(case, "client") == []


async def test_an_item_that_cannot_be_sent() -> None:
    """kkrpc sends nothing, and its reader waits for ever; Python ends the stream with an error."""

    class Source:
        async def yieldBigint(self) -> AsyncIterator[int]:
            yield 1
            yield 2**70

    case = lines_of("yieldBigint()")
    async with recorded_peer(Source(), dialect="kkrpc-2") as (_, peer):
        assert await Replay(peer).run(case, "server") == []
        heard = await peer.hear()
        assert "2**53" in heard["e"]["m"]
