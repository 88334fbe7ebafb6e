"""Objects by reference where they cross something else: errors, streams, one-way calls, names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from msgspec import UNSET

from anyio_kkrpc import RemoteError, RPCError, by_reference, expose, with_call_options
from anyio_kkrpc._driver._losing import end_lost
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.records import Reply, Request
from tests.bounds import BOUND
from tests.driver.test_references import Deep, counts, nothing_left, until
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class Broken:
    @property
    def broken(self) -> int:
        raise KeyError("boom")


class Api:
    """Gives objects of its own beside what can't be read of those that it got."""

    def __init__(self) -> None:
        self.kept: Any = None

    def keep(self, things: list[Any]) -> None:
        self.kept = things[0]

    def mixed(self) -> list[Any]:
        return [by_reference(Deep()), self.kept.broken, by_reference(Deep())]

    async def items(self) -> AsyncIterator[Any]:
        yield 1
        yield self.mixed()
        yield 3

    async def catching(self) -> AsyncIterator[Any]:
        while True:
            try:
                yield 1
            except RemoteError:
                yield self.mixed()


async def ended(opened: Pair) -> None:
    """Wait until no stream is open."""
    known = [one._core.conversation for one in (opened.client, opened.server)]
    await until(lambda: not any(one.consumers or one.producers for one in known))


@pytest.fixture
def unlogged(caplog: pytest.LogCaptureFixture) -> None:
    """Log nothing: an error that is logged keeps what its handler was called with."""
    caplog.set_level("CRITICAL", "anyio_kkrpc")


@pytest.mark.usefixtures("unlogged")
async def test_why_an_answer_is_wrong_is_told_once() -> None:
    """The stream that is still held keeps neither the error nor what that had to do with."""
    api = Api()
    async with pair(api) as opened:
        await opened.api.keep([by_reference(Broken())])
        items = await opened.api.catching()
        assert await items.__anext__() == 1
        with pytest.raises(RemoteError, match="boom"):
            await items.athrow(ValueError("of the reader"))
        # What came before is there still; then it ends.
        assert {item async for item in items} <= {1}


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("where", ["result", "item", "answer"])
async def test_one_that_is_wrong_among_others(where: str) -> None:
    """Who waits is told why; the others are released, and nothing waits for what isn't read."""
    api, mine = Api(), Broken()
    async with pair(api) as opened:
        await opened.api.keep([by_reference(mine)])
        with pytest.raises(RemoteError, match="boom"):
            if where == "result":
                await opened.api.mixed()
            elif where == "item":
                items = await opened.api.items()
                assert await items.__anext__() == 1
                await items.__anext__()
            else:
                items = await opened.api.catching()
                assert await items.__anext__() == 1
                await items.athrow(ValueError("of the reader"))
        await ended(opened)
        await until(lambda: counts(opened) == [(1, 0), (0, 1)])
        api.kept = None
        await nothing_left(opened)


async def test_results_of_calls_that_want_none() -> None:
    """They give nothing, since they aren't sent; a source isn't kept for a reader either."""

    class Given:
        def at_once(self) -> list[Any]:
            return [by_reference(Deep())]

        async def later(self) -> Any:
            await anyio.lowlevel.checkpoint()
            return by_reference(Deep())

        async def source(self) -> AsyncIterator[int]:
            yield 1

    async with pair(Given()) as opened:
        quiet = with_call_options(opened.api, reply=False)
        for name in ("at_once", "later", "source"):
            await getattr(quiet, name)()
        assert len(await opened.api.at_once()) == 1  # those before it have begun
        await until(lambda: opened.server.statistics().handlers == 0)
        await ended(opened)
        await nothing_left(opened)


async def test_names_of_arguments_are_those_of_the_method() -> None:
    """None of them is taken by what carries it there."""

    class Named:
        def named(
            self, path: int, what: int, sender: int, reference_id: int, function: int, root: int
        ) -> list[int]:
            return [path, what, sender, reference_id, function, root]

    async with pair({"get": lambda: by_reference(Named())}) as opened:
        named = await opened.api.get()
        names = {"path": 1, "what": 2, "sender": 3, "reference_id": 4, "function": 5, "root": 6}
        assert await named.named(**names) == [1, 2, 3, 4, 5, 6]


async def test_a_source_that_goes_on_when_it_is_stopped() -> None:
    """What it yields then isn't sent, and gives nothing."""
    stopped = anyio.Event()

    class Stubborn:
        async def items(self) -> AsyncIterator[Any]:
            yield 1
            try:
                await anyio.sleep_forever()
            except BaseException:
                stopped.set()
                yield [by_reference(Deep())]
                raise

    async with pair(Stubborn()) as opened:
        items = await opened.api.items()
        assert await items.__anext__() == 1
        await items.aclose()
        with anyio.fail_after(BOUND):
            await stopped.wait()
        await ended(opened)
        await nothing_left(opened)


async def test_a_value_to_end_with_that_looks_like_one() -> None:
    """It comes back as the data that it is."""
    looks = {"__kkrpc_next_refs__": [{"__kkrpc_ref__": True, "id": "x", "kind": "object"}]}

    async def items() -> AsyncIterator[int]:
        while True:
            yield 1

    async with pair({"items": items}) as opened:
        stream = await opened.api.items()
        assert await stream.__anext__() == 1
        assert await stream.areturn(looks) == looks
        await ended(opened)


class Refused(Exception):
    def __init__(self, *, looks: Any = None, function: Any = None) -> None:
        super().__init__("refused")
        self.code = 3
        self.retry = by_reference(Deep())
        self.looks = looks
        if function is not None:
            self.function = function


class Refusing:
    """Raises errors that have references."""

    def __init__(self) -> None:
        self.asked = anyio.Event()

    def refuse(self, looks: Any) -> None:
        raise Refused(looks=looks, function=lambda: None)

    def get(self) -> Any:
        return by_reference(self)

    async def late(self) -> None:
        self.asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            raise Refused

    async def use(self, function: Any) -> Any:
        try:
            await function()
        except RemoteError as exc:
            return await exc.data["retry"].add(1)


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("codec", ["json", "cbor", None])
async def test_errors_have_references(codec: str | None) -> None:
    """In their fields, of calls and of what is got by reference; data that looks like one is data."""

    def fails() -> None:
        raise Refused

    async with pair(Refusing(), codec=codec) as opened:
        looks = {"__kkrpc_next_refs__": {"__kkrpc_ref__": True, "id": "x", "kind": "object"}}
        held = await opened.api.get()
        for refuse in (opened.api.refuse, held.refuse):
            with pytest.raises(RemoteError, match="refused") as caught:
                await refuse(looks)
            data = caught.value.data
            assert await data.pop("retry").add(2) == 7
            assert data == {"code": 3, "looks": looks}
            del caught
        assert await opened.api.use(by_reference(fails)) == 6
        del held, refuse
        await nothing_left(opened)


@pytest.mark.usefixtures("unlogged")
async def test_errors_that_nobody_gets() -> None:
    """What they have given is released, or was never given."""
    api = Refusing()
    async with pair(api) as opened:
        held = await opened.api.get()
        for late in (opened.api.late, held.late):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(late)
                with anyio.fail_after(BOUND):
                    await api.asked.wait()
                api.asked = anyio.Event()
                tasks.cancel_scope.cancel()
        server = opened.server._core
        error = server.references.error(Refused(), None)
        await server.send(Reply("nobody waits", e=error), None)
        del held, late, error
        await nothing_left(opened)


class Stuck:
    """Runs until it is cancelled."""

    def __init__(self) -> None:
        self.begun, self.stopped = anyio.Event(), anyio.Event()

    async def stuck(self) -> int:
        self.begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.stopped.set()
        return 1

    async def items(self) -> AsyncIterator[int]:
        yield 1
        await self.stuck()

    def get(self) -> Any:
        return by_reference(self)

    async def use(self, function: Callable[[], Awaitable[int]]) -> int:
        return await function()


@pytest.mark.parametrize("closing", [0, 1])
@pytest.mark.parametrize("what", ["reference", "function", "callback", "items"])
async def test_the_link_goes_while_something_runs(what: str, closing: int) -> None:
    """Whoever closes it: who waits is told so, and what runs for the other side is cancelled."""
    api, mine = Stuck(), Stuck()
    running = api if what in ("reference", "items") else mine
    errors: list[BaseException] = []
    async with pair(api, timeout=None, server={"timeout": None}) as opened:
        held = await opened.api.get()

        async def wait() -> None:
            try:
                if what == "reference":
                    await held.stuck()
                elif what == "items":
                    async for _ in await held.items():
                        pass
                else:
                    function = by_reference(mine.stuck) if what == "function" else mine.stuck
                    await opened.api.use(function)
            except RPCError as exc:
                errors.append(exc)

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await running.begun.wait()
                await opened.transports[closing].aclose()
            await running.stopped.wait()
        assert len(errors) == 1
        core = opened.server._core
        end_lost(core, core.conversation.lose())  # nothing is left to end


class Holder:
    """One of whom something is set."""

    thing: Any = None


@pytest.mark.parametrize("codec", ["json", "cbor", None])
async def test_a_property_that_is_set_to_one(codec: str | None) -> None:
    """It is the object for its owner and a reference here; the request has no arguments."""
    holder, mine, sent = Holder(), Deep(), list[Request]()
    async with pair(expose(holder, writable=["thing"]), codec=codec) as opened:
        core = opened.client._core
        send = core.send_envelope

        async def note(envelope: Envelope) -> None:
            if isinstance(envelope.record, Request):
                sent.append(envelope.record)
            await send(envelope)

        core.send_envelope = note
        for value in (by_reference(mine), [1, by_reference(mine)]):
            await opened.client.set_property("thing", value)
            thing = holder.thing if holder.thing.__class__ is not list else holder.thing[1]
            assert await thing.add(1) == 6
        assert [request.a for request in sent] == [UNSET, UNSET]
        holder.thing = thing = None
        await nothing_left(opened)


async def test_a_reply_that_comes_twice() -> None:
    """What it gives is released once it isn't used, and not before."""
    with_it: list[Reply] = []

    async with pair({"get": lambda: by_reference(deep)}) as opened:
        deep = Deep()
        receive = opened.client._core.conversation.receivers[Reply]

        def note(record: Any, sender: str | None) -> Any:
            with_it.append(Reply(record.id, record.v))
            return receive(record, sender)

        opened.client._core.conversation.receivers[Reply] = note
        held = await opened.api.get()
        await opened.server._core.send(with_it[0], None)
        await until(lambda: opened.client.statistics().ignored == 1)
        assert await held.add(1) == 6
        assert counts(opened) == [(0, 1), (1, 0)]
        del held
        await nothing_left(opened)
        await opened.server._core.send(with_it[0], None)
        await until(lambda: opened.client.statistics().ignored == 2)
        await nothing_left(opened)
