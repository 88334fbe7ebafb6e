"""Objects by reference, natively: what holds them, and what is left behind."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RemoteError,
    RemoteMember,
    RemoteObject,
    RPCValidationError,
    TransportClosedError,
    by_reference,
    expose,
    release,
    set_member,
    with_call_options,
)
from anyio_kkrpc._driver._endings import close_unopened
from anyio_kkrpc._driver._holding import Holding
from anyio_kkrpc._driver._references import References
from anyio_kkrpc._driver._remote_object import Root
from anyio_kkrpc._protocol._values import Packed
from anyio_kkrpc.records import CallbackCall, CallbackRelease, Reply
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class Deep:
    def __init__(self) -> None:
        self.value = 5

    def add(self, more: int) -> int:
        return self.value + more


@by_reference
class Session:
    """An object that is passed by reference because its class says so."""

    title: str = "a session"

    def __init__(self, name: str) -> None:
        self.name = name
        self.deep = Deep()
        self.asked: list[Any] = []
        self._secret = "secret"
        self.stopped = anyio.Event()

    async def ask(self, question: str) -> str:
        self.asked.append(question)
        return f"{self.name}: {question}"

    def fails(self) -> None:
        raise ValueError("of the session")

    async def count(self, last: int) -> AsyncIterator[int]:
        for number in range(last):
            yield number

    async def stuck(self) -> None:
        self.asked.append("stuck")
        try:
            await anyio.sleep_forever()
        finally:
            self.stopped.set()

    def itself(self) -> Session:
        return self

    def wrong(self) -> int:
        return "text"  # type: ignore[return-value]

    def _hidden(self) -> int:
        return 1


class Api:
    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.kept: Any = None

    def open_session(self, name: str) -> Session:
        self.sessions.append(Session(name))
        return self.sessions[-1]

    def is_last(self, session: Any) -> bool:
        return session is self.sessions[-1]

    def is_deep(self, deep: Any) -> bool:
        return deep is self.sessions[-1].deep

    def nested(self) -> Any:
        return {"list": [1, self.sessions[-1]], "data": {"__kkrpc_ref__": True, "id": "x"}}

    def echo(self, value: Any) -> Any:
        return value

    async def echo_later(self, value: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        return value

    async def each(self) -> AsyncIterator[Any]:
        for name in ("a", "b"):
            yield self.open_session(name)

    async def endless(self) -> AsyncIterator[Any]:
        while True:
            try:
                yield self.open_session("a")
            except RemoteError:
                yield [self.open_session("raised")]

    async def use(self, thing: Any, *args: Any) -> Any:
        return await thing(*args)

    async def use_member(self, things: dict[str, Any]) -> Any:
        return await things["list"][0].ask("nested")

    def keep(self, thing: Any, *, fail: bool = False) -> None:
        self.kept = thing
        if fail:
            raise ValueError("kept, and failed")

    async def read(self, things: AsyncIterator[Any]) -> list[Any]:
        return [await thing.ask("item") async for thing in things]

    async def open_many(self, count: int) -> list[Any]:
        return [by_reference(Deep()) for _ in range(count)]

    def unfit(self) -> Any:
        return [by_reference(Deep()), object()]


def counts(opened: Pair) -> list[tuple[int, int]]:
    """Return what each side has given, and holds."""
    told = [one.statistics() for one in (opened.client, opened.server)]
    return [(one.references_given, one.references_held) for one in told]


async def until(done: Any) -> None:
    """Wait until something is true that records on their way bring about."""
    gc.collect()
    with anyio.fail_after(BOUND):
        while not done():
            await anyio.lowlevel.checkpoint()


async def nothing_left(opened: Pair) -> None:
    """Wait until neither side has anything of the other."""
    await until(lambda: counts(opened) == [(0, 0), (0, 0)])


async def do(reference: RemoteObject, what: str, path: tuple[str, ...], *args: Any) -> Any:
    """Do to an object what its methods wouldn't."""
    root: Root = reference._rpc_root
    return await root.holder.ask(root, what, path, args, {})


@pytest.fixture
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """Log nothing: an error that is logged keeps what its handler was called with."""
    caplog.set_level("CRITICAL", "anyio_kkrpc")


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_an_object(codec: str) -> None:
    """It is called, read, written within its table; streams and errors come as of any call."""
    api = Api()
    async with pair(api, codec=codec) as opened:
        async with opened.api.open_session("ada") as session:
            assert isinstance(session, RemoteObject)
            assert await session.ask("who?") == "ada: who?"
            assert await session.name == "ada"
            assert await session.title == "a session"
            assert await session.deep.add(2) == 7
            assert await session["deep"].value == 5
            assert [item async for item in await session.count(100)] == list(range(100))
            with pytest.raises(RemoteError, match="of the session"):
                await session.fails()
            with pytest.raises(RPCValidationError):
                await session.ask(5)
            with pytest.raises(RPCValidationError):
                await session.wrong()
            with pytest.raises(MethodNotFoundError):
                await session.nothing()
            with pytest.raises(MethodNotFoundError):
                await set_member(session.name, "bob")
            assert await opened.api.is_last(session) is True
            assert await opened.api.is_deep(session.deep) is True
            assert await session.itself() == session
        with pytest.raises(DeliveryError, match="released"):
            await session.ask("again")
        with pytest.raises(DeliveryError, match="released"):
            await opened.api.is_last(session)
        assert api.sessions[0].asked == ["who?"]
        del session
        await nothing_left(opened)


async def test_attack_paths() -> None:
    """Underscored names don't exist, nor does what isn't in the table."""
    async with pair(Api()) as opened:
        session = await opened.api.open_session("ada")
        for path in (
            ("_hidden",),
            ("_secret",),
            ("__class__",),
            ("ask", "__globals__"),
            ("__init__",),
            ("deep", "__dict__"),
            ("deep", "__class__", "__mro__"),
            ("asked", "append"),
            (),
            ("ask", "__func__", "__code__"),
            ("",),
            ("name", "upper"),
        ):
            for what in ("call", "get", "set", "apply", "member", "__call__", ""):
                if (what, path) == ("get", ()):
                    continue  # that is the object once more
                with pytest.raises((MethodNotFoundError, RemoteError)):
                    await do(session, what, path, *((1,) if what == "set" else ()))
        with pytest.raises(AttributeError):
            session._hidden()
        assert await session.ask("still") == "ada: still"


async def test_members_passed_back_are_those_of_the_table() -> None:
    """A path of what is passed back reaches no further than one that is called."""
    async with pair(Api()) as opened:
        session = await opened.api.open_session("ada")
        for member in (session["_secret"], session["ask"]["__globals__"], session["__class__"]):
            with pytest.raises(MethodNotFoundError):
                await opened.api.echo(member)
        assert await opened.api.echo([session.name]) == ["ada"]


async def test_what_is_writable_is_written() -> None:
    """A table by `expose` says what is; a value that doesn't fit is refused."""
    mine, api = Session("mine"), Api()
    async with pair(api) as opened:
        table = by_reference(expose(mine, writable=["title"]))
        await opened.api.keep(table)
        assert await api.kept.ask("a table") == "mine: a table"
        await set_member(api.kept.title, "written")
        assert mine.title == "written"
        with pytest.raises(RPCValidationError):
            await set_member(api.kept.title, 5)
        with pytest.raises(MethodNotFoundError):
            await set_member(api.kept.name, "ada")


async def test_in_values_and_items() -> None:
    """Nested in plain data, as items of a stream; data that looks like one is data."""
    api = Api()
    async with pair(api) as opened:
        first = await opened.api.open_session("ada")
        value = await opened.api.nested()
        assert value["data"] == {"__kkrpc_ref__": True, "id": "x"}
        assert value["list"][1] == first
        assert await opened.api.echo({"x": [first]}) == {"x": [first]}
        assert await opened.api.echo(first) == first
        assert await opened.api.echo_later(first) == first
        names = []
        async for item in opened.api.each():
            names.append(await item.name)
        assert names == ["a", "b"]
        del first, value, item
        await nothing_left(opened)


@by_reference
class Log(Session):
    """One whose lines can be read, too."""

    async def __aiter__(self) -> AsyncIterator[str]:
        yield "a line"


async def test_what_is_a_stream_as_well() -> None:
    """It is an object, as a result as well as an item, and in the answer to an error."""

    class Source:
        def result(self) -> Any:
            return Log("result")

        async def items(self) -> AsyncIterator[Any]:
            try:
                yield Log("item")
            except RemoteError:
                yield Log("answer")

    async with pair(Source()) as opened:
        logs = [await opened.api.result()]
        async with opened.api.items() as items:
            logs.append(await items.__anext__())
            logs.append(await items.athrow(ValueError("of the reader")))
        assert [await log.name for log in logs] == ["result", "item", "answer"]
        logs.clear()
        await nothing_left(opened)


LOOKS_LIKE: list[Any] = [
    {"__kkrpc_next_refs__": [{"__kkrpc_ref__": True, "id": "x", "kind": "object"}]},
    {"__kkrpc_next_refs__": {"__kkrpc_ref__": "data", "v": {"a": 1}}},
    {"__kkrpc_next_refs__": {"__kkrpc_next_refs__": 1}},
    {"__kkrpc_ref__": True, "id": "x", "kind": "function"},
    {"__kkrpc_next_arg__": "references", "v": {}},
    {"__kkrpc_ref__": "data", "v": {"__kkrpc_ref__": True, "id": "x", "kind": "object"}},
]


@pytest.mark.parametrize("looks", LOOKS_LIKE)
async def test_what_looks_like_one(looks: Any) -> None:
    """It is data, alone, in other data, beside references, and as an item."""

    class Source:
        def echo(self, value: Any) -> Any:
            return value

        async def items(self, value: Any) -> AsyncIterator[Any]:
            yield value

    mine = Session("mine")
    async with pair(Source()) as opened:
        assert await opened.api.echo(looks) == looks
        assert await opened.api.echo([looks]) == [looks]
        assert await opened.api.echo([looks, mine]) == [looks, mine]
        assert [item async for item in opened.api.items(looks)] == [looks]
        assert [item async for item in opened.api.items([looks, mine])] == [[looks, mine]]
        await nothing_left(opened)


@pytest.mark.usefixtures("unlogged")
async def test_functions_and_objects_of_the_caller() -> None:
    """What the caller has is used by the handler, its result and its error awaited."""

    async def double(value: int) -> int:
        return 2 * value

    def fails() -> None:
        raise KeyError("missing")

    async def items() -> AsyncIterator[Any]:
        yield mine
        yield mine

    api = Api()
    mine = Session("mine")
    async with pair(api) as opened:
        assert await opened.api.use(by_reference(double), 4) == 8
        with pytest.raises(RemoteError, match="RPCValidationError"):
            await opened.api.use(by_reference(double), "text")
        with pytest.raises(RemoteError, match="missing"):
            await opened.api.use(by_reference(fails))
        assert await opened.api.use_member({"list": [mine]}) == "mine: nested"
        assert (await opened.api.echo([mine, mine]))[0] is mine
        assert await opened.api.read(items()) == ["mine: item", "mine: item"]
        await nothing_left(opened)


@pytest.mark.usefixtures("unlogged")
async def test_what_a_call_passes_lasts_if_it_succeeds() -> None:
    """Its handler may keep it. If the call fails, only what was used in it lasts."""
    api, mine = Api(), Session("mine")
    async with pair(api) as opened:
        await opened.api.keep([mine, mine])
        assert await api.kept[0].ask("kept") == "mine: kept"
        assert counts(opened) == [(1, 0), (0, 1)]
        api.kept = None
        await nothing_left(opened)
        with pytest.raises(RemoteError, match="kept, and failed"):
            await opened.api.keep(mine, fail=True)
        with pytest.raises(DeliveryError, match="Unknown remote reference"):
            await api.kept.ask("failed")
        api.kept = None
        await nothing_left(opened)


async def test_calls_that_are_not_run() -> None:
    """What they would have passed is nobody's, though nobody says so."""
    api, mine = Api(), Session("mine")
    async with pair(api) as opened:
        with pytest.raises(MethodNotFoundError):
            await opened.api.nothing(mine)
        with pytest.raises(RPCValidationError):
            await opened.api.open_session(mine)
        with pytest.raises(TypeError):
            await opened.api.echo([mine, object()])
        with pytest.raises(TypeError, match="no reply"):
            await with_call_options(opened.api, reply=False).keep(mine)
        with pytest.raises(ValueError, match="references"):
            await with_call_options(opened.api, key="k").keep([mine])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await opened.api.echo(mine)
        await nothing_left(opened)


async def test_results_that_are_not_sent() -> None:
    """They give nothing: one that can't be encoded, and one whose caller has given up."""
    async with pair(Api()) as opened:
        with pytest.raises(RemoteError):
            await opened.api.unfit()
        session = await opened.api.open_session("ada")
        with pytest.raises(TypeError):
            await session.ask(object())
        core = opened.server._core
        reply = Reply("x", core.references.give([Session("lost")], None))
        assert reply.v.__class__ is Packed
        assert counts(opened)[1][0] == 2
        close_unopened(core, reply, None)
        assert counts(opened)[1][0] == 1
        release(session)
        release(session)
        await nothing_left(opened)


async def test_late_results_are_released() -> None:
    """Those of calls and streams that nobody waits for any more."""
    async with pair(Api()) as opened:
        async with opened.api.endless() as items:
            await items.__anext__()
            caught = await items.athrow(ValueError("of the reader"))
            assert await caught[0].name == "raised"
        del caught
        server, client = opened.server._core, opened.client._core
        given = server.references.give([Session("late")], None)
        await server.send(Reply("nobody waits", given), None)
        await nothing_left(opened)
        assert client.refused == 0


async def test_wrong_results() -> None:
    """A result or an item that means what isn't there is an error for who waits for it."""
    own = "nothing"

    class Liar:
        def lies(self) -> Any:
            return lie

        async def items(self) -> AsyncIterator[Any]:
            yield lie

    async with pair(Liar()) as opened:
        references: References = opened.client._core.references
        holding: Holding = references.holding
        assert not holding.held
        prefix = references.given._new_id()[:17]
        envelope = {"__kkrpc_ref__": True, "id": f"{prefix}{own}", "kind": "object"}
        lie = Packed({"__kkrpc_next_refs__": [envelope]})
        with pytest.raises(DeliveryError, match="Unknown remote reference"):
            await opened.api.lies()
        with pytest.raises(DeliveryError, match="Unknown remote reference"):
            async for _ in opened.api.items():
                pass
        deep: Any = envelope
        for _ in range(257):
            deep = [deep]
        lie = Packed({"__kkrpc_next_refs__": deep})
        with pytest.raises(RemoteError, match="nested too deep"):
            await opened.api.lies()
        await nothing_left(opened)


async def test_ten_thousand() -> None:
    """They leave nothing behind; more than that one peer doesn't get."""
    async with pair(Api()) as opened:
        things = await opened.api.open_many(10_000)
        with pytest.raises(RemoteError, match="10000 references"):
            await opened.api.open_many(1)
        assert await things[77].add(1) == 6
        del things
        await nothing_left(opened)
        mine = [by_reference(Deep()) for _ in range(10_000)]
        assert len(await opened.api.echo(mine)) == 10_000
        await nothing_left(opened)


async def test_time_and_cancellation() -> None:
    """A call of a reference has a call's deadline and cancel."""
    api = Api()
    async with pair(api) as opened:
        session = await opened.api.open_session("ada")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.stuck)
            await until(lambda: api.sessions[0].asked == ["stuck"])
            tasks.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            await api.sessions[0].stopped.wait()


async def test_hostile_records() -> None:
    """What isn't legal is counted, and hurts nobody."""
    async with pair(Api()) as opened:
        session = await opened.api.open_session("ada")
        reference_id = session._rpc_root.handle.id
        client, server = opened.client._core, opened.server._core
        for record in (
            CallbackCall(reference_id, [], p=["call", "ask"]),
            CallbackCall("f", [{"__kkrpc_next_arg__": "references", "v": []}]),
        ):
            await client.send(record, None)
        await client.send(CallbackRelease([reference_id, "x"], times=[0, 5]), None)
        await client.send(CallbackRelease([reference_id], times=[]), None)
        assert await session.ask("still") == "ada: still"
        assert server.refused == 1
        assert await do(session, "call", ("ask",), "still") == "ada: still"


async def test_no_more_than_so_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses of references beyond a number are refused, and not queued without end."""
    monkeypatch.setattr("anyio_kkrpc._driver._references.MAX_RUNNING", 10)
    api = Api()
    async with pair(api) as opened:
        session = await opened.api.open_session("ada")
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(session.stuck)
            await until(lambda: len(api.sessions[0].asked) == 10)
            with pytest.raises(OverloadedError, match="10 uses"):
                await session.ask("one more")
            tasks.cancel_scope.cancel()


async def test_the_end() -> None:
    """After the link is gone, neither side has anything."""
    async with pair(Api()) as opened:
        session = await opened.api.open_session("ada")
        await opened.transports[1].aclose()
        with pytest.raises((TransportClosedError, DeliveryError)):
            await session.ask("gone?")
        await nothing_left(opened)


async def test_equal_objects_are_two() -> None:
    """An object is told from others by what it is, and not by what it is equal to."""

    @by_reference
    @dataclass(frozen=True)
    class Point:
        x: int

        def itself(self) -> bool:
            return self is second

    first, second = Point(1), Point(1)

    class Points:
        def both(self) -> list[Point]:
            return [first, second]

    async with pair(Points()) as opened:
        one, two = await opened.api.both()
        assert await one.itself() is False
        assert await two.itself() is True
        assert one != two
        assert isinstance(one.itself, RemoteMember)


async def test_what_has_no_reference() -> None:
    """Plain data can't be passed so; a reference of another channel can't be passed on."""
    with pytest.raises(TypeError, match="by_reference"):
        by_reference([1])
    async with pair(Api()) as opened, pair(Api()) as other:
        session = await opened.api.open_session("ada")
        assert by_reference(session) is session
        with pytest.raises(TypeError, match="another channel"):
            await other.api.echo([session])
        with pytest.raises(AttributeError, match="set_member"):
            session.name = "bob"
        with pytest.raises(TypeError, match="a str"):
            session[5]
        assert repr(session.deep.add) == "<RemoteMember deep.add>"
