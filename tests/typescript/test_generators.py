"""``throw`` and ``return`` of JavaScript's iterators, as recorded peers have them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RemoteError
from anyio_kkrpc.records import StreamReply, StreamRequest
from anyio_kkrpc.typescript import UNDEFINED
from anyio_kkrpc.typescript._plain import thrown_error
from tests.bounds import BOUND

from .replaying import Recorded, cases_in, recorded_peer

pytestmark = pytest.mark.anyio

CASES = cases_in("kkrpc-2-streams-more")


class CustomError(Exception):
    pass


class Once:
    """An iterator that is no generator, and goes on for ever."""

    def __aiter__(self) -> Once:
        return self

    async def __anext__(self) -> int:
        return 0


class Api:
    def __init__(self) -> None:
        self.log: list[Any] = []

    async def slow(self, n: int, _: int) -> AsyncIterator[int]:
        try:
            for number in range(1, n + 1):
                yield number
        finally:
            self.log.append("slow")

    async def catching(self) -> AsyncIterator[Any]:
        number = 0
        while True:
            number += 1
            try:
                yield number
            except RemoteError as exc:
                self.log.append(exc.data)
                yield "caught"  # only one error is raised in it

    async def finallyThrows(self) -> AsyncIterator[int]:  # as it was recorded
        try:
            yield 0
            yield 1
        finally:
            raise CustomError("cleanup failed")

    def noReturn(self) -> Once:
        return Once()

    async def undefs(self) -> AsyncIterator[Any]:
        yield UNDEFINED
        yield None

    async def failFirst(self) -> AsyncIterator[int]:
        raise CustomError("at once")
        yield 1

    async def withReturn(self) -> AsyncIterator[int]:
        yield 1


def lines_of(beginning: str) -> list[tuple[str, Any]]:
    """Return what was written in a case."""
    found = [case for name, case in CASES.items() if name.startswith(beginning)]
    return found[0]


async def replay(peer: Recorded, case: list[tuple[str, Any]]) -> list[Any]:
    """Say what the client said, each once what was said before it was answered.

    :return: the items that came beside what was recorded, since Python's source is quicker
    """
    more: list[Any] = []
    answers = [message for sender, message in case if sender == "server"]
    for sender, message in case:
        if sender == "client":
            await peer.say(message)
            continue
        if message not in answers:
            continue
        answers.remove(message)
        if is_item(message) and not is_answer(message, case):
            if not more:
                more.append((await peer.hear()).get("v", UNDEFINED))
            continue
        while True:
            heard = await peer.hear()
            if is_item(heard) and not is_answer(heard, case):
                more.append(heard.get("v", UNDEFINED))
                continue
            peer.learn(message, heard)
            assert heard == peer.translated(message)
            break
    return more


def is_item(message: Any) -> bool:
    return message["t"] == "sr" and message.get("d") is False


def is_answer(message: Any, case: list[tuple[str, Any]]) -> bool:
    return message["id"] in [said["id"] for sender, said in case if sender == "client"]


@pytest.mark.parametrize(
    ("beginning", "log", "items"),
    [
        ("iterator.throw('stop') on a generator that does not catch", ["slow"], 32),
        ("iterator.throw({code: 5}) on a generator that catches", [{"code": 5}], 32),
        ("iterator.return('my value')", ["slow"], 32),
        ("iterator.return() on a generator whose finally throws", [], 2),
        ("iterator.return(5) on an iterator without return()", [], 32),
        ("iterator.throw(5) on an iterator without throw()", [], 32),
        ("iterator.return() before the first next()", [], 0),
        ("undefs()", [], 2),
        ("failFirst()", [], 0),
        ("handmade: throw of an unknown stream", [], 0),
    ],
)
async def test_a_source_in_python(beginning: str, log: list[Any], items: int) -> None:
    """A Python source is thrown into and returned from as a generator in JavaScript is."""
    api = Api()
    async with recorded_peer(api, dialect="kkrpc-2") as (channel, peer):
        case = lines_of(beginning)
        if "catches" in beginning:
            case = case[:7]
        more = await replay(peer, case)
        assert len(more) <= items
        if beginning == "undefs()":
            assert more == [UNDEFINED, None]
        if "catches" in beginning:
            # It goes on as far as its reader had allowed: 32 items, beside what it was caught with.
            while len(more) < 32:
                heard = await peer.hear()
                more.append(heard["v"])
            assert more == list(range(1, 33))
            assert channel.statistics().outgoing_streams == 1
        else:
            with anyio.fail_after(BOUND):
                while channel.statistics().outgoing_streams:
                    await anyio.sleep(0.005)
        assert api.log == log


async def test_a_reader_that_has_thrown_and_is_gone() -> None:
    """kkrpc's reader has ended once its throw was answered, and doesn't say so: its source is closed
    when nobody has pulled for a while."""
    api = Api()
    async with recorded_peer(api, dialect="kkrpc-2") as (channel, peer):
        await replay(peer, lines_of("iterator.throw({code: 5})")[:7])
        (producer,) = channel._conversation.producers.values()
        assert producer.driver._unread is not None
        producer.driver._give_up()
        with anyio.fail_after(BOUND):
            while channel.statistics().outgoing_streams:
                await anyio.sleep(0.005)


def stream(case: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return a case up to and without the first thing that the reader says."""
    return case[: next(n for n, (_, message) in enumerate(case) if message["t"] == "sq")]


@pytest.mark.parametrize(
    ("beginning", "value", "result"),
    [
        ("iterator.return('my value')", "my value", "my value"),
        ("iterator.return() on a generator whose finally returns", "mine", "from finally"),
        ("iterator.return() before the first next()", "early", "early"),
        ("iterator.return() on a generator whose finally throws", UNDEFINED, RemoteError),
    ],
)
async def test_a_reader_in_python_returns(beginning: str, value: Any, result: Any) -> None:
    """A Python reader says what a reader in JavaScript says, and gets what that one gets."""
    case = lines_of(beginning)
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        api = channel.get_api()
        async with anyio.create_task_group() as group:
            group.start_soon(serve, peer, case)
            _, call = case[0]
            args = [item["v"] for item in call["a"]]
            items = await api[call["p"][0]](*args)
            if "before the first" not in beginning:
                assert await items.__anext__() in (0, 1)
            if result is RemoteError:
                with pytest.raises(RemoteError, match="cleanup failed"):
                    await items.areturn(value)
            else:
                assert await items.areturn(value) == result
            assert await items.areturn("after") == "after"
            with pytest.raises(StopAsyncIteration):
                await items.__anext__()
        assert channel.statistics().incoming_streams == 0


async def serve(peer: Recorded, case: list[tuple[str, Any]]) -> None:
    """Say what the recorded server said, and expect of Python what the client said."""
    for sender, message in case:
        if sender == "server":
            await peer.say(message)
            continue
        heard = await peer.hear()
        peer.learn(message, heard)
        if heard.get("op") == "throw" and isinstance(message.get("v"), dict):
            heard["v"] = message[
                "v"
            ]  # an error of Python's is text, where JavaScript has any value
        assert {**heard, "n": None} == {**peer.translated(message), "n": None}


@pytest.mark.parametrize("caught", [False, True])
async def test_a_reader_in_python_throws(caught: bool) -> None:
    """An error is the text that kkrpc makes of errors, and comes back if the source doesn't catch it."""
    beginning = "iterator.throw({code: 5})" if caught else "iterator.throw('stop')"
    case = lines_of(beginning)
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        async with anyio.create_task_group() as group:
            group.start_soon(serve, peer, case)
            _, call = case[0]
            items = await channel.get_api()[call["p"][0]](*[item["v"] for item in call["a"]])
            assert await items.__anext__() == 1
            error = RemoteError("", "stop")
            if caught:
                assert await items.athrow(error) == "caught"
                assert [await items.__anext__() for _ in range(5)] == [2, 3, 4, 5, 6]
                group.cancel_scope.cancel()
                return
            with pytest.raises(RemoteError) as failed:
                await items.athrow(error)
            assert failed.value.message == "stop"
            assert await items.__anext__() == 2
            with pytest.raises(StopAsyncIteration):
                await items.__anext__()
        assert channel.statistics().incoming_streams == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (UNDEFINED, "undefined"),
        (None, "null"),
        (True, "true"),
        (5, "5"),
        (5.0, "5"),
        (1.5, "1.5"),
        ([1, None, [2]], "1,,2"),
        ({}, "[object Object]"),
        ({"name": "A", "message": "m", "n": 1}, "m"),
    ],
)
def test_thrown_values(value: Any, text: str) -> None:
    """What was raised is an error with the text that JavaScript makes of the value."""
    error = thrown_error(value)
    assert error["m"] == text
    assert error["n"] == ("A" if text == "m" else "Error")


def test_records_of_kkrpc_0() -> None:
    """kkrpc 0.x has one word only, which ends a source: what is thrown comes back at once."""
    from anyio_kkrpc.records import Reply, Request
    from anyio_kkrpc.typescript._streams import ClassicStreams

    told: list[Any] = []
    streams = ClassicStreams(
        lambda record, peer: told.append(record), items_per_tick=1, max_items=1, max_bytes=100
    )
    envelope = {"__kkrpc_next_stream__": "async-iterable", "id": "q"}
    for members in ({"op": "return", "v": 5}, {"op": "throw", "e": {"n": "A", "m": "b"}}):
        streams.outgoing(Request("q", "call", ["f"]), None)
        streams.incoming(Reply("q", envelope), None, 1)
        asked = StreamRequest("p", "q", **members)  # type: ignore[arg-type]
        assert streams.outgoing(asked, None) is asked
    returned, thrown = told
    assert returned == StreamReply("p", "q", d=True, v=5)
    assert thrown == StreamReply("p", "q", e={"n": "A", "m": "b"})
