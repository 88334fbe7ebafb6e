"""Streams of calls with keys on real servers where something comes at the wrong moment, or is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    CallCancelledError,
    CallHandle,
    DeliveryError,
    Item,
    ItemBounds,
    ItemsLostError,
    ProtocolError,
    RedisStreamsTransport,
    RemoteError,
    StreamRestartedError,
    current_call,
)
from anyio_kkrpc.redis._keyed import _items_in, _items_out, _tails
from anyio_kkrpc.redis._keyed._item_scripts import APPEND, FINISH_ITEMS, OPEN, READ
from anyio_kkrpc.redis._keyed._items_out import READ_WORD
from anyio_kkrpc.redis._keyed._scripts import FINISH
from anyio_kkrpc.redis._stream._keys import HANDED_BACK
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND
from tests.fake_server import fake_server
from tests.faults.proxy import Proxy, proxy

from .test_races import GROUP, Place, script, until

pytestmark = [pytest.mark.anyio, pytest.mark.server]


class Api:
    """Each attempt yields so many items, waits until it is let go, and yields the rest.

    :ivar before: how many items each attempt yields before it waits
    :ivar resumes: whether a further attempt goes on behind what is there
    :ivar found: what each attempt found there
    :ivar began: attempts that wait now, or did
    :ivar over: those that have ended, in whatever way
    """

    def __init__(self, *, resumes: bool = False, before: tuple[int, ...] = (3, 2, 2)) -> None:
        self.resumes, self.before = resumes, before
        self.gates = [anyio.Event() for _ in before]
        self.began: list[int] = []
        self.found: list[Item[Any] | None] = []
        self.over: list[int] = []

    async def work(self, items: int = 8) -> AsyncIterator[list[int]]:
        attempt = current_call().attempt
        number = 0
        if self.resumes:
            last = await current_call().resume()
            self.found.append(last)
            number = 0 if last is None else last.number
        try:
            for _ in range(self.before[attempt - 1]):
                number += 1
                yield [number, attempt]
            self.began.append(attempt)
            await self.gates[attempt - 1].wait()
            while number < items:
                number += 1
                yield [number, attempt]
        finally:
            self.over.append(attempt)


class Calm(Place):
    """A stream whose workers are given all the time that they may need on a slow machine: another
    attempt begins where a test has it begin.
    """

    def transport(self, url: str | None = None, **options: Any) -> RedisStreamsTransport:
        return super().transport(url, **{"claim_idle": BOUND, **options})

    def take_away(self, client: redis.Redis) -> None:
        """Have what a worker holds be there for another one."""
        ((entry_id, _),) = client.xrevrange(self.stream, count=1)
        client.xclaim(self.stream, GROUP, HANDED_BACK, 0, [entry_id], justid=True)

    async def tell(self, client: redis.Redis) -> None:
        """Tell workers, again and again, that there is something to take."""
        while True:
            client.xadd(self.keys.control, {"hint": "claim"})
            await anyio.sleep(0.02)


def runs(one: Any) -> Any:
    """Return what finds the command that runs a script, as a list of words."""
    return lambda command: one.sha in command or one.source in command


@pytest.fixture
def place(redis_server: RedisServer, stream_name: str) -> Calm:
    return Calm(redis_server.url, stream_name)


async def read(call: CallHandle[Any], after: str | None = None) -> list[Item[Any]]:
    with anyio.fail_after(BOUND):
        return [item async for item in call.items(after=after)]


async def follow(call: CallHandle[Any], live: list[Any]) -> None:
    """Add what comes, and that it begins anew, where that is so."""
    try:
        async for item in call.items():
            live.append(item.value)
    except StreamRestartedError as exc:
        live.append(type(exc))


async def some(call: CallHandle[Any], count: int) -> list[Item[Any]]:
    """Return the first items."""
    found: list[Item[Any]] = []
    with anyio.fail_after(BOUND):
        async with aclosing(call.items()) as items:
            async for item in items:
                found.append(item)
                if len(found) == count:
                    break
    return found


@pytest.mark.parametrize("resumes", [True, False])
async def test_second_attempt(
    place: Calm, middle: Proxy, witness: redis.Redis, resumes: bool
) -> None:
    """It goes on behind what is there, if its handler says so, and readers see one stream; or who
    has read what was there is told. What the overtaken one yields afterwards is nowhere.
    """
    api = Api(resumes=resumes)
    async with place.caller() as caller, place.worker(api, middle.url) as worker:
        call = await caller.start(caller.get_api().work(), key="k")
        first = await some(call, 3)
        live: list[Any] = []

        async with anyio.create_task_group() as group:
            group.start_soon(follow, call, live)
            await until(lambda: len(live) == 3 and api.began == [1])
            middle.freeze()
            place.take_away(witness)
            async with place.worker(api):
                async with anyio.create_task_group() as telling:
                    telling.start_soon(place.tell, witness)
                    await until(lambda: api.began == [1, 2])
                    telling.cancel_scope.cancel()
                api.gates[0].set()
                middle.thaw()
                await until(lambda: api.over and not worker.statistics().outstanding)
                api.gates[1].set()
                whole = await read(call)
    if resumes:
        values = [[n, 1] for n in (1, 2, 3)] + [[n, 2] for n in range(4, 9)]
        assert live == values
        assert api.found[1] == first[-1]
    else:
        values = [[n, 2] for n in range(1, 9)]
        assert live == [[n, 1] for n in (1, 2, 3)] + [StreamRestartedError]
    assert [item.value for item in whole] == values
    assert [item.number for item in whole] == list(range(1, 9))
    async with place.caller() as caller:
        again = caller.attach("k")
        if resumes:
            assert await read(again, first[1].position) == whole[2:]
        else:
            with pytest.raises(StreamRestartedError):
                await read(again, first[1].position)
        assert await read(again, whole[6].position) == whole[7:]


async def test_written_again(place: Place, middle: Proxy) -> None:
    """After a connection was lost by which it may have been written: each item is there once."""
    for number, lost in enumerate((OPEN, APPEND, FINISH_ITEMS)):
        api = Api()
        api.gates[0].set()
        async with place.caller() as caller, place.worker(api, middle.url):
            middle.swallow_reply_to(script(lost))
            call = await caller.start(caller.get_api().work(500), key=f"k{number}")
            assert [item.number for item in await read(call)] == list(range(1, 501))
            assert await call.result() is None
            with anyio.fail_after(BOUND):
                await middle.swallowed.wait()
        assert api.began == [1]


REFUSALS = (
    "NOREPLICAS Not enough good replicas to write.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "READONLY You can't write against a read only replica.",
    "LOADING Redis is loading the dataset in memory",
)


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda text: text.split()[0])
async def test_refused_for_now(place: Place, refused: str) -> None:
    """What Redis takes later is written again, in its order, and read then: no stream ends by it."""
    api = Api()
    async with (
        fake_server(place.url) as fake,
        fake_server(place.url) as reading,
        place.worker(api, fake.url),
        place.caller(reading.url) as caller,
    ):
        fake.refuse(refused, matches=runs(OPEN))
        call = await caller.start(caller.get_api().work(400), key="k")
        await fake.wait_refused(1)
        fake.accept()
        await some(call, 3)
        fake.refuse(refused, matches=runs(APPEND))
        if not refused.startswith("OOM"):  # reading needs no memory
            reading.refuse(refused, matches=runs(READ))
        api.gates[0].set()
        await fake.wait_refused(2)
        fake.accept()
        numbers: list[int] = []

        async def follow() -> None:
            numbers.extend([item.number for item in await read(call)])

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            if not refused.startswith("OOM"):
                await reading.wait_refused(1)
            reading.accept()
        assert numbers == list(range(1, 401))
        assert await call.result() is None
    assert api.began == [1]


class Resuming:
    """Another attempt that leaves `resume`, and then yields all the same, or asks again."""

    def __init__(self, *, again: bool) -> None:
        self.again = again
        self.scope = anyio.CancelScope()
        self.over = anyio.Event()

    async def work(self) -> AsyncIterator[list[int]]:
        attempt = current_call().attempt
        number = 0
        if attempt == 2:
            with self.scope:
                await current_call().resume()
            if self.again:
                last = await current_call().resume()
                assert last is not None
                number = last.number
        for _ in range(3):
            number += 1
            yield [number, attempt]
        if attempt == 1:
            await self.over.wait()


@pytest.mark.parametrize("again", [True, False])
async def test_resume_is_left(
    place: Calm,
    middle: Proxy,
    witness: redis.Redis,
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a cancel, when Redis has noted that the attempt goes on: items of two attempts are never
    taken for those of one.
    """
    api = Resuming(again=again)
    live: list[Any] = []
    run = _items_out.run_script

    async def left(link: Any, one: Any, keys: Any, *args: Any) -> Any:
        monkeypatch.setattr(_items_out, "run_script", run)
        reply = await run(link, one, keys, *args)
        api.scope.cancel()
        await anyio.sleep_forever()
        return reply

    async with place.caller() as caller, place.worker(api, middle.url):
        call = await caller.start(caller.get_api().work(), key="k")
        begun = await some(call, 3)

        async with anyio.create_task_group() as group:
            group.start_soon(follow, call, live)
            await until(lambda: len(live) == 3)
            middle.freeze()
            monkeypatch.setattr(_items_out, "run_script", left)
            place.take_away(witness)
            async with place.worker(api), anyio.create_task_group() as telling:
                telling.start_soon(place.tell, witness)
                await until(lambda: api.scope.cancel_called)
                await call.result()
                telling.cancel_scope.cancel()
            middle.thaw()
            api.over.set()
        whole = await read(call)
        old = [[n, 1] for n in (1, 2, 3)]
        if again:
            assert [item.value for item in whole] == live == old + [[n, 2] for n in (4, 5, 6)]
        else:
            assert [item.value for item in whole] == [[n, 2] for n in (1, 2, 3)]
            assert live == [*old, StreamRestartedError]
            with pytest.raises(StreamRestartedError):
                await read(call, begun[0].position)


async def test_nobody_has_told_what_was_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who writes nor who reads waits for ever for a word that was lost, with whoever has
    read as far or not.
    """
    monkeypatch.setattr(_items_in, "LOOKS_AFTER", 0.05)
    api = Api(before=(0,))
    api.gates[0].set()
    bounds = ItemBounds(keep_items=10)
    async with fake_server(place.url) as deaf, place.worker(api):
        deaf.refuse("ERR no", matches=lambda command: command[-1].startswith(READ_WORD))
        async with place.caller(deaf.url) as caller:
            call = await caller.start(caller.get_api().work(30), key="k", bounds=bounds)
            lost = await some(call, 10)
            seen: list[int] = []

            async def follow() -> None:
                async with place.caller() as other:
                    items = other.attach("k").items(after=lost[-1].position)
                    seen.extend([item.number async for item in items])

            async with anyio.create_task_group() as group:
                group.start_soon(follow)
                await until(lambda: seen)
            assert seen == list(range(11, 31))
            call = await caller.start(caller.get_api().work(31), key="l", bounds=bounds)
            numbers: list[int] = []

            async def live() -> None:
                numbers.extend([item.number for item in await read(call)])

            async with anyio.create_task_group() as group:
                group.start_soon(live)
                await deaf.wait_refused(3)
                deaf.accept()
            assert numbers == list(range(1, 32))


async def test_what_was_read_is_told_late(place: Calm, middle: Proxy, witness: redis.Redis) -> None:
    """A call isn't cancelled as unread while Redis has the word that it is read, and its worker has
    yet to hear of that.
    """
    api, worker = Api(before=(10,)), place.worker
    bounds = ItemBounds(keep_items=10, when_unread="cancel", unread_timeout=0.05)
    async with place.caller() as caller, worker(api, middle.url) as transport:
        inbox = place.keys.inbox(transport.session_id)

        def words() -> list[bytes]:
            found = [fields.get(b"hint", b"") for _, fields in witness.xrange(inbox)]
            return [word for word in found if word.startswith(READ_WORD)]

        call = await caller.start(caller.get_api().work(12), key="k", bounds=bounds)
        items = place.keys.items(b"k")
        await until(lambda: witness.exists(items))
        await until(lambda: witness.xrevrange(items, count=1)[0][0].endswith(b"-10"))
        middle.freeze(up=False)
        numbers: list[int] = []

        async def follow() -> None:
            numbers.extend([item.number for item in await read(call)])

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            await until(lambda: any(word.endswith(b"-10") for word in words()))
            api.gates[0].set()
            await until(lambda: api.over or words()[-1].endswith(b"-0"))
            middle.thaw()
        assert numbers == list(range(1, 13))


@pytest.mark.one_server
async def test_a_word_that_redis_refuses_is_told_again(place: Place) -> None:
    """Soon, and not when one looks the next time: who writes may cancel the call by then."""
    api = Api(before=(0,))
    api.gates[0].set()
    bounds = ItemBounds(keep_items=10, when_unread="cancel", unread_timeout=4)
    async with (
        fake_server(place.url) as deaf,
        place.worker(api),
        place.caller(deaf.url) as caller,
        anyio.create_task_group() as group,
    ):
        deaf.refuse("ERR no", matches=lambda command: command[-1].startswith(READ_WORD))
        call = await caller.start(caller.get_api().work(12), key="k", bounds=bounds)
        numbers: list[int] = []

        async def follow() -> None:
            numbers.extend([item.number for item in await read(call)])

        group.start_soon(follow)
        await deaf.wait_refused(6)  # at 3, 6, 9 and 10, at once where nothing follows, and soon
        deaf.accept()
        assert await call.result() is None
    assert numbers == list(range(1, 13))


async def test_who_reads_is_cut_off(place: Place, middle: Proxy) -> None:
    """While it waits for more: it reads on where it was."""
    api = Api()
    async with place.caller(middle.url) as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(), key="k")
        async with anyio.create_task_group() as group:
            seen: list[int] = []

            async def follow() -> None:
                async for item in call.items():
                    seen.append(item.number)

            group.start_soon(follow)
            await until(lambda: len(seen) == 3)
            await middle.cut()
            api.gates[0].set()
    assert seen == list(range(1, 9))


async def test_nothing_is_left(place: Place, witness: redis.Redis) -> None:
    """After `keep`, however it has ended."""
    api = Api()
    keep: dict[str, Any] = {"keep": 0.4, "keep_errors": 0.4}
    async with place.caller() as caller:
        never = await caller.start(caller.get_api().work(0), key="never", **keep)
        assert await never.cancel()
        async with place.worker(api):
            done = await caller.start(caller.get_api().work(), key="done", **keep)
            await some(done, 3)
            api.gates[0].set()
            await until(lambda: api.over)
            api.gates[0] = anyio.Event()
            cancelled = await caller.start(caller.get_api().work(9), key="cancelled", **keep)
            await some(cancelled, 3)
            assert await cancelled.cancel()
            with pytest.raises(CallCancelledError):
                await cancelled.result()
            api.gates[0].set()
            forgotten = await caller.start(caller.get_api().work(10), key="forgotten", keep=3600)
            await read(forgotten)
            assert await forgotten.forget()
    mine = [place.keys.call(b""), place.keys.items(b""), place.keys.progress(b"")]

    def left() -> list[bytes]:
        names: list[bytes] = witness.keys(f"*{place.stream}*")
        return [name for name in names if name.startswith(tuple(mine))]

    assert place.keys.items(b"forgotten") not in left()
    times = [witness.pttl(name) for name in left()]
    assert all(time <= 10_000 for time in times)  # what was cancelled is known for ten seconds
    assert -1 not in times  # for ever
    await until(lambda: not [name for name in left() if name.endswith((b"done", b"forgotten"))])


async def test_dead_letter(
    place: Calm, witness: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads is told, and the items go when the letter's call is known no more."""
    monkeypatch.setattr(_items_in, "LOOKS_AFTER", 0.1)
    api = Api()
    async with place.caller() as caller:
        call = await caller.start(caller.get_api().work(), key="k", keep=60)
        async with proxy(place.url) as middle, place.worker(api, middle.url, max_deliveries=1):
            await some(call, 3)
            middle.freeze()
            place.take_away(witness)
            async with place.worker(api, max_deliveries=1), anyio.create_task_group() as telling:
                telling.start_soon(place.tell, witness)
                with pytest.raises(DeliveryError, match="deliver"):
                    await read(call)
                telling.cancel_scope.cancel()
            middle.thaw()
    assert 0 < witness.pttl(place.keys.items(b"k")) <= 60_000


class Fickle:
    """The first attempt yields, a later one doesn't."""

    def __init__(self) -> None:
        self.ended = 0
        self.waits = False

    async def work(self, how: str) -> Any:
        call = current_call()
        if call.attempt == 1:
            return self.items()
        if how.startswith("left"):
            with anyio.move_on_after(0):
                await call.resume()
        self.ended += 1
        if how.endswith("fails"):
            raise ValueError("no tea")
        if how.endswith("empty"):
            return self.nothing()
        return 5

    async def items(self) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async def nothing(self) -> AsyncIterator[int]:
        for number in ():
            yield number


@pytest.mark.parametrize("how", ["fails", "is none", "empty", "left, fails", "left, is none"])
async def test_nothing_is_left_of_an_earlier_attempt(
    place: Calm, middle: Proxy, witness: redis.Redis, how: str
) -> None:
    """If the one after it ends before its first item, or is no stream."""
    api = Fickle()
    keep: dict[str, Any] = {"keep": 60, "keep_errors": 60}
    async with place.caller() as caller, place.worker(api, middle.url):
        call = await caller.start(caller.get_api().work(how), key="k", **keep)
        await some(call, 1)
        middle.freeze()
        place.take_away(witness)
        async with place.worker(api), anyio.create_task_group() as group:
            group.start_soon(place.tell, witness)
            with anyio.fail_after(BOUND):
                while (await call.state()).expires is None:
                    await anyio.sleep(0.02)
            group.cancel_scope.cancel()
        middle.thaw()
    names: list[bytes] = witness.keys(f"*{place.stream}*")
    mine = [place.keys.call(b"k"), place.keys.items(b"k"), place.keys.progress(b"k")]
    times = {name: witness.pttl(name) for name in names if name in mine}
    assert place.keys.call(b"k") in times
    assert all(0 <= time <= 60_000 for time in times.values()), times


class Changed:
    """An attempt that comes to a plain value, and one that is a stream, as after an upgrade."""

    def __init__(self) -> None:
        self.gates = [anyio.Event(), anyio.Event()]
        self.began: list[int] = []

    async def work(self) -> Any:
        attempt = current_call().attempt
        self.began.append(attempt)
        if attempt == 1:
            await self.gates[0].wait()
            return 5
        return self.numbers()

    async def numbers(self) -> AsyncIterator[int]:
        yield 1
        await self.gates[1].wait()


@pytest.mark.parametrize("again", [False, True])
async def test_a_value_comes_after_the_stream_of_another_attempt(
    place: Calm, middle: Proxy, witness: redis.Redis, again: bool
) -> None:
    """The value is what the call came to; the items go with it.

    :param again: whether the reply of Redis is lost, and it is written again
    """
    api, items = Changed(), place.keys.items(b"k")
    async with place.caller() as caller, place.worker(api, middle.url):
        call = await caller.start(caller.get_api().work(), key="k", keep=60)
        await until(lambda: api.began == [1])
        middle.freeze()
        place.take_away(witness)
        async with place.worker(api):
            async with anyio.create_task_group() as telling:
                telling.start_soon(place.tell, witness)
                await until(lambda: witness.xlen(items) == 2)
                telling.cancel_scope.cancel()
            if again:
                middle.swallow_reply_to(script(FINISH))
            middle.thaw()
            api.gates[0].set()
            assert await call.result() == 5
            await until(lambda: 0 < witness.pttl(items) <= 60_000)
            api.gates[1].set()


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda text: text.split()[0])
async def test_what_it_came_to_is_refused_for_now(place: Place, refused: str) -> None:
    """It is written again; where the server leads elsewhere, on another connection."""
    api = Api()
    async with (
        fake_server(place.url) as fake,
        place.worker(api, fake.url) as worker,
        place.caller() as caller,
    ):
        call = await caller.start(caller.get_api().work(400), key="k")
        await until(lambda: api.began == [1])
        before = worker.statistics().reconnects
        fake.refuse(refused, matches=runs(FINISH_ITEMS))
        api.gates[0].set()
        await fake.wait_refused(1)
        fake.accept()
        assert await call.result() is None
        moves = refused.startswith(("READONLY", "LOADING"))
        assert (worker.statistics().reconnects > before) is moves


@pytest.mark.one_server
async def test_items_are_gone(place: Place, witness: redis.Redis) -> None:
    """If the server loses them, the call fails; it doesn't begin a stream of less."""
    api = Api()
    async with place.caller() as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(), key="k")
        first = await some(call, 3)
        witness.delete(place.keys.items(b"k"))
        api.gates[0].set()
        for after in (None, first[-1].position):
            with pytest.raises(RemoteError, match="were removed"):
                await read(call, after)
        with pytest.raises(RemoteError, match="were removed"):
            await call.result()


@pytest.mark.one_server
async def test_large_items_come_few_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a page, however many entries it may have; the first one is a small one."""
    pages: list[list[int]] = []
    run = _items_in.run_script

    async def watched(*args: Any) -> Any:
        reply = await run(*args)
        pages.append([len(fields[1]) for _, fields in reply[1]])
        return reply

    async with place.caller() as caller, place.worker(Large()):
        for key, size, count in (("small", 10, 300), ("large", 60_000, 20)):
            call = await caller.start(caller.get_api().work(count, size), key=key, keep=60)
            await call.result()
            monkeypatch.setattr(_items_in, "run_script", watched)
            pages.clear()
            assert len(await read(call)) == count
            monkeypatch.setattr(_items_in, "run_script", run)
            assert len(pages[0]) <= 8
            assert max(sum(page) for page in pages) < 256 * 1024 + 60_010
            assert len(pages) <= 8


class Large:
    """Its items are each an entry of their own."""

    async def work(self, count: int, size: int) -> AsyncIterator[str]:
        for _ in range(count):
            yield "x" * size


@pytest.mark.one_server
async def test_some_are_trimmed_by_hand(place: Place, witness: redis.Redis) -> None:
    api = Api()
    async with place.caller() as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(), key="k")
        first = await some(call, 3)
        api.gates[0].set()
        await call.result()
        witness.xtrim(place.keys.items(b"k"), minid=first[-1].position, approximate=False)
        with pytest.raises(ItemsLostError) as lost:
            await read(call)
        assert (lost.value.wanted, await read(call, lost.value.position)) != (1, [])
        assert len(await read(call, first[-1].position)) == 5


@pytest.mark.one_server
async def test_signed(place: Place, witness: redis.Redis) -> None:
    """Items that somebody without the key has written, or moved, are read by nobody."""
    options: dict[str, Any] = {"signing_key": b"0123456789abcdef"}
    api = Api()
    items = place.keys.items(b"k")
    async with place.caller(**options) as caller, place.worker(api, **options):
        call = await caller.start(caller.get_api().work(), key="k")
        first = await some(call, 3)
        epoch = first[0].position.partition("-")[0]
        (fields,) = [fields for name, fields in witness.xrange(items) if name.endswith(b"-1")]
        witness.xadd(items, fields, id=f"{epoch}-4")
        with pytest.raises(ProtocolError, match="isn't signed as it must be"):
            await read(call)
        witness.xdel(items, f"{epoch}-4")
        witness.xadd(items, {"json": "5"}, id=f"{epoch}-5")
        with pytest.raises(ProtocolError, match="isn't signed as it must be"):
            await read(call)
        await call.cancel()
    async with place.caller() as caller:
        for fields in ({"begin": "x"}, {"json": "{"}, {"end": "json:5"}, {"nothing": "1"}):
            witness.xadd(items, fields)  # type: ignore[arg-type]
            with pytest.raises(
                (ProtocolError, ItemsLostError, DeliveryError, StreamRestartedError)
            ):
                await read(caller.attach("k"))


@pytest.mark.one_server
async def test_not_a_stream(place: Place, witness: redis.Redis) -> None:
    """What holds something else than items ends the one call whose items it should hold."""
    api = Api()
    async with place.caller() as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(), key="k")
        other = await caller.start(caller.get_api().work(7), key="other")
        await some(other, 3)
        async with anyio.create_task_group() as group:
            group.start_soon(some, other, 7)
            await some(call, 3)
            witness.set(place.keys.items(b"k"), "x")
            with pytest.raises(Exception, match="WRONGTYPE|wrong kind"):
                await read(call)
            api.gates[0].set()
        with pytest.raises(RemoteError, match="refuses an item"):
            await call.result()


@pytest.mark.one_server
async def test_many_streams(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one connection waits for; and more readers than one of each."""
    monkeypatch.setattr(_tails, "_STREAMS", 4)
    api = Api()
    async with place.caller() as caller, place.worker(api):
        calls = [await caller.start(caller.get_api().work(), key=f"k{n}") for n in range(10)]
        counts = dict.fromkeys(range(30), 0)

        async def follow(number: int) -> None:
            async for _ in caller.attach(calls[number % 10].key).items():
                counts[number] += 1

        async with anyio.create_task_group() as group:
            for number in counts:
                group.start_soon(follow, number)
            await until(lambda: set(counts.values()) == {3})
            api.gates[0].set()
    assert set(counts.values()) == {8}


@pytest.mark.one_server
async def test_slow_reader(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that doesn't take what comes asks for it later; others don't wait for it."""
    monkeypatch.setattr(_tails, "_MOST_WAITING", 2)
    monkeypatch.setattr(_items_in, "LOOKS_AFTER", BOUND)
    api = Api()
    async with place.caller() as caller, place.worker(api):
        call = await caller.start(caller.get_api().work(2000), key="k")
        async with aclosing(call.items()) as slow:
            seen = [(await slow.__anext__()).number for _ in range(3)]
            async with anyio.create_task_group() as group:

                async def one_more() -> None:
                    seen.append((await slow.__anext__()).number)

                group.start_soon(one_more)
                api.gates[0].set()
                assert len(await read(call)) == 2000
            async for item in slow:
                seen.append(item.number)
    assert seen == list(range(1, 2001))


@pytest.mark.one_server
async def test_items_of_an_earlier_call(place: Place) -> None:
    """Those that are there still aren't taken for those of a new call with the key."""
    api = Api()
    async with place.caller() as caller:
        async with place.worker(api):
            call = await caller.start(caller.get_api().work(), key="k")
            first = await some(call, 3)
            assert await call.cancel()
            with pytest.raises(CallCancelledError):
                await call.result()
        api = Api()
        await caller.start(caller.get_api().work(), key="k")
        with pytest.raises(StreamRestartedError):
            await read(call, first[0].position)
        async with anyio.create_task_group() as group:
            values: list[Any] = []

            async def follow() -> None:
                values.extend([item.value async for item in call.items()])

            group.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            api.gates[0].set()
            async with place.worker(api):
                await until(lambda: len(values) == 8)


@pytest.mark.one_server
async def test_end_of_the_transport(place: Place) -> None:
    """Who reads is told."""
    api = Api()
    errors: list[BaseException] = []
    async with place.worker(api), anyio.create_task_group() as group:
        async with place.caller() as caller:
            call = await caller.start(caller.get_api().work(), key="k")

            async def follow() -> None:
                try:
                    await read(call)
                except Exception as exc:
                    errors.append(exc)

            group.start_soon(follow)
            await some(call, 3)
            await anyio.wait_all_tasks_blocked()
        await until(lambda: errors)
    assert "closed" in str(errors[0]) or "destroyed" in str(errors[0])
