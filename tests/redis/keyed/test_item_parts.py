"""The parts of streams of calls with keys that do no I/O."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from msgspec import UNSET

from anyio_kkrpc import ItemsLostError, OverloadedError, ProtocolError, StreamRestartedError
from anyio_kkrpc.abc import Codec, ItemBounds
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._items import Position, Unread
from anyio_kkrpc.records import Reply
from anyio_kkrpc.redis._keyed._entries import (
    Entries,
    Found,
    Reader,
    epoch_of,
    is_of,
    pack_id,
    parse_id,
)
from anyio_kkrpc.redis._keyed._item_scripts import APPEND, READ
from anyio_kkrpc.redis._keyed._items_in import RedisItems
from anyio_kkrpc.redis._keyed._items_out import ItemsOut
from anyio_kkrpc.redis._keyed._kept import Sealer
from anyio_kkrpc.redis._keyed._pacing import Batch, Pacer
from anyio_kkrpc.redis._keyed._tails import Feed, Tails, next_count
from anyio_kkrpc.redis.dialects._keyed import Keyed, parse_keyed
from anyio_kkrpc.redis.dialects._signing import Signer
from anyio_kkrpc.redis.dialects.native import NativeDialect
from anyio_kkrpc.transports._items import KeptItems, MemoryItems

PLACE = b"{s}:items:k"
DIGEST = b"abcdefghijklmnopqrstuv"
CALL = b"17-0"
EPOCH = epoch_of(CALL, 1)
NEXT = epoch_of(CALL, 2)
PARTS = (RedisItems, ItemsOut, Tails, MemoryItems, KeptItems, APPEND, READ)  # tried on servers


class Odd(Codec):
    """A codec of somebody's own."""

    name = "odd"

    def encode(self, record: Any) -> bytes:
        return b"!" + get_codec("json").encode(record)

    def decode(self, data: Any) -> Any:
        return get_codec("json").decode(bytes(data)[1:])


def entries(codec: Any = "json", *, signed: bool = False) -> Entries:
    native = NativeDialect("me", get_codec(codec) if isinstance(codec, str) else codec)
    signer = Signer(b"0123456789abcdef", lambda: 0.0, lambda: b"n") if signed else None
    return Entries(native, signer, Sealer(native, signer))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("codec", ["json", "cbor", Odd()], ids=["json", "cbor", "odd"])
def test_entries(codec: Any, signed: bool) -> None:
    """What is written is read again."""
    one = entries(codec, signed=signed)
    known = get_codec(codec) if isinstance(codec, str) else codec
    fields: list[bytes] = []
    for value in (None, UNSET, 1.5, "ä}", [1], {"v": 1}):
        fields += one.field(known, value)
    entry_id = pack_id(EPOCH, 6)
    written = one.sign(PLACE, entry_id, [*fields, b"mark", b"somebody"])
    found = one.read(PLACE, entry_id, written)
    assert found.values == [None, None, 1.5, "ä}", [1], {"v": 1}]
    assert (found.at, found.mark, found.reply) == (Position(EPOCH, 6), b"somebody", None)
    begin = one.begin(PLACE, pack_id(EPOCH, 0), 17, b"me")
    assert one.read(PLACE, pack_id(EPOCH, 0), begin).behind == 17
    for reply in (Reply(""), Reply("", e={"n": "Error", "m": "no tea"}), None):
        end = one.end(PLACE, entry_id, known, reply)
        found = one.read(PLACE, entry_id, [b"end", end])
        assert found.cancelled is (reply is None)
        assert found.reply is not None
        assert found.cancelled or found.reply == reply
        if signed:
            for place, name in ((PLACE + b"x", entry_id), (PLACE, pack_id(EPOCH, 7))):
                with pytest.raises(ProtocolError, match="signed"):
                    one.read(place, name, [b"end", end])
    if signed:
        for changed in ([*written[:-1], b"x" * 64], written[:-2], written[2:], [b"json", b"1"]):
            with pytest.raises(ProtocolError, match="signed"):
                one.read(PLACE, entry_id, changed)
        with pytest.raises(ProtocolError, match="signed"):
            one.read(PLACE, pack_id(EPOCH, 5), written)


def test_a_value_takes_its_own_bytes_only() -> None:
    assert entries().field(get_codec("json"), "x" * 20) == (b"json", b'"' + b"x" * 20 + b'"')
    assert len(entries().field(get_codec("cbor"), "x" * 20)[1]) == 21


@pytest.mark.parametrize(
    "fields",
    [
        [b"json", b"{"],
        [b"json", b'1,"e":{}'],
        [b"json", b'1},{"v":1'],
        [b"unknown", b"1"],
        [b"begin", b"x"],
        [b"begin", b"1" * 19],
        [b"end", b'json:{"t":"bye"}'],
        [b"end", b"x"],
        [b"mark", b"somebody"],
    ],
)
def test_bad_entries(fields: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        entries().read(PLACE, b"1-1", fields)


def test_epochs() -> None:
    """Each attempt has a greater one, and those of one request belong together."""
    ids = [(b"17-0", 1), (b"17-0", 2), (b"17-0", 999), (b"18-5", 1), (b"1795831320293-0", 1)]
    epochs = [epoch_of(*one) for one in ids]
    assert epochs == sorted(set(epochs))
    assert all(is_of(epoch, entry_id) for epoch, (entry_id, _) in zip(epochs, ids, strict=True))
    assert not is_of(epochs[0], b"18-5")
    assert epochs[-1] < 2**53  # Lua's numbers
    assert parse_id(pack_id(EPOCH, 3)) == Position(EPOCH, 3)


def items(epoch: int, *numbers: int) -> Found:
    return Found(Position(epoch, numbers[-1]), [f"{n}" for n in numbers])


def begin(epoch: int, behind: int) -> Found:
    return Found(Position(epoch, 0), behind=behind)


def end(epoch: int, number: int, error: Any = UNSET) -> Found:
    return Found(Position(epoch, number), reply=Reply("", e=error))


def take(reader: Reader, *found: Found) -> list[int]:
    reader.meet(CALL)
    return [item.number for one in found for item in reader.take(one)]


def test_reader() -> None:
    """Items come in order, each once, over the entries' bounds and those of attempts."""
    reader = Reader("k", None)
    found = (
        begin(EPOCH, 0),
        items(EPOCH, 1),
        items(EPOCH, 2, 3),
        begin(NEXT, 3),
        items(NEXT, 4, 5),
    )
    assert take(reader, *found, end(NEXT, 6)) == [1, 2, 3, 4, 5]
    assert (reader.at, reader.cursor) == (Position(NEXT, 5), Position(NEXT, 5))
    assert take(Reader("k", Position(EPOCH, 2)), *found[2:]) == [3, 4, 5]
    assert take(Reader("k", Position(NEXT, 4)), *found[4:]) == [5]
    nothing = (begin(EPOCH, 0), begin(NEXT, 0), items(NEXT, 1), end(NEXT, 2))
    assert take(Reader("k", None), *nothing) == [1]


@pytest.mark.parametrize(
    ("at", "found", "wanted"),
    [
        (None, [items(EPOCH, 3)], 1),
        (None, [begin(NEXT, 3)], 1),
        (None, [end(EPOCH, 2)], 1),
        (2, [items(EPOCH, 4, 5)], 3),
        (2, [begin(NEXT, 4)], 3),
        (2, [begin(EPOCH, 0), end(EPOCH, 4)], -1),
        (2, [end(EPOCH, 4)], 3),
        (2, [begin(NEXT, 0)], -1),
        (2, [begin(NEXT, 1)], -1),  # the server has lost one that was read
        (2, [items(NEXT, 3)], -1),  # where that attempt began isn't there any more
        (2, [end(NEXT, 3)], -1),
    ],
)
def test_what_does_not_follow(at: int | None, found: list[Found], wanted: int) -> None:
    """Is an error; never taken for what follows."""
    reader = Reader("k", None if at is None else Position(EPOCH, at))
    if wanted < 0:
        with pytest.raises(StreamRestartedError):
            take(reader, *found)
        return
    with pytest.raises(ItemsLostError) as lost:
        take(reader, *found)
    assert lost.value.wanted == wanted
    again = Reader("k", parse_id(lost.value.position.encode()))
    assert take(again, *found) == [int(value) for one in found for value in one.values]


def test_another_request_has_the_key() -> None:
    reader = Reader("k", Position(EPOCH, 2))
    with pytest.raises(StreamRestartedError):
        reader.meet(b"18-0")
    assert reader.take(end(EPOCH, 9, {"n": "Error", "m": ""})) == []  # whatever was lost before
    fresh = Reader("k", None)
    fresh.meet(b"18-0")
    assert not fresh.is_mine(Position(EPOCH, 1))
    fresh.skip(Position(EPOCH, 1))
    assert fresh.cursor == Position(EPOCH, 1)


@pytest.mark.parametrize(
    "bounds",
    [
        ItemBounds(),
        ItemBounds(None, 5, "cancel", 0.5),
        ItemBounds(7, 2**31, "go on", 3600.0),
    ],
)
def test_field(bounds: ItemBounds) -> None:
    keyed = Keyed(b"a, b 1", DIGEST, 10, 0, 2500, bounds=bounds)
    assert parse_keyed(keyed.field()) == keyed
    assert (b"," in keyed.field().rpartition(b" a,")[0]) is (bounds != ItemBounds())


@pytest.mark.parametrize("told", [b",1", b",1,1,x,1", b",1,1,p", b",-1,1,p,1", b",1,1,p,1,1"])
def test_bad_field(told: bytes) -> None:
    with pytest.raises(ProtocolError, match="how much is kept"):
        parse_keyed(DIGEST + b" 1 1 1%b k" % told)


class Writes:
    """A pacer, and what it has written."""

    def __init__(self, **bounds: Any) -> None:
        self.written: list[tuple[int, int, bytes, bool]] = []
        self.cancelled = anyio.Event()
        self.late: list[int] = []
        self.unread = Unread()
        drop = partial(self.unread.make_room, key="k")
        rest = (self.write, self.cancel, self.catch_up, drop)
        self.pacer = Pacer(PLACE, 7, ItemBounds(**bounds), 1000, *rest)

    def write(self, pacer: Pacer, batch: Batch) -> None:
        assert pacer.sent is batch
        self.written.append((batch.number, len(batch.fields) // 2, batch.gone, batch.marked))

    def cancel(self) -> None:
        self.cancelled.set()

    async def catch_up(self, pacer: Pacer) -> None:
        await anyio.lowlevel.checkpoint()
        if self.late:
            pacer.read(self.late.pop())


@pytest.mark.anyio
async def test_pacer() -> None:
    """One entry is on its way at a time; what comes meanwhile goes into the next one."""
    one = Writes()
    pacer = one.pacer
    for _ in range(4):
        await pacer.put((b"json", b"1"))
    assert one.written == [(1, 1, b"", False)]
    pacer.written()
    assert one.written[1:] == [(4, 3, b"", False)]
    with anyio.move_on_after(0) as scope:
        await pacer.flush()
    assert scope.cancelled_caught
    pacer.written()
    await pacer.flush()
    await pacer.put((b"json", b"1"))
    await pacer.put((b"json", b"1"))
    assert pacer.close() == b"7-6"  # what isn't on its way is left out
    pacer.fail(LookupError("no tea"))
    for ask in (pacer.flush, lambda: pacer.put((b"json", b"1"))):
        with pytest.raises(LookupError, match="no tea"):
            await ask()


@pytest.mark.anyio
async def test_pacer_has_bounds() -> None:
    """Of an entry, and of how much waits for the one that is on its way."""
    one = Writes()
    async with anyio.create_task_group() as group:

        async def yield_all() -> None:
            for _ in range(400):
                await one.pacer.put((b"json", b"1"))
            await one.pacer.put((b"json", b"x" * 20_000))
            await one.pacer.flush()

        group.start_soon(yield_all)
        while not one.written or one.written[-1][0] < 401:
            await anyio.wait_all_tasks_blocked()
            one.pacer.written()
        one.pacer.written()
    assert [count for _, count, _, _ in one.written] == [1, 128, 128, 128, 16]


@pytest.mark.anyio
async def test_pacer_waits_for_who_reads() -> None:
    one = Writes(keep_items=4)
    pacer = one.pacer
    for _ in range(4):
        await pacer.put((b"json", b"1"))
        pacer.written()
    assert [number for number, _, _, marked in one.written if marked] == [1, 2, 3, 4]
    async with anyio.create_task_group() as group:
        group.start_soon(pacer.put, (b"json", b"1"))
        await anyio.wait_all_tasks_blocked()
        pacer.read(1)
        await anyio.wait_all_tasks_blocked()
        assert len(one.written) == 4
        pacer.read(3)
    assert one.written[4:] == [(5, 1, b"7-2", True)]
    with anyio.move_on_after(0):
        pacer.written()
        await pacer.put((b"json", b"1"))  # it is kept all the same
    assert [number for number, *_ in one.written][-1] in (5, 6)


@pytest.mark.anyio
async def test_pacer_counts_what_nobody_has_read(caplog: pytest.LogCaptureFixture) -> None:
    """What was read before it goes doesn't count; of each stream the first is logged."""
    one = Writes(keep_items=4, when_unread="go on")
    pacer = one.pacer
    for number in range(1, 12):
        await pacer.put((b"json", b"1"))
        pacer.written()
        if number == 6:
            pacer.read(3)
    assert [batch[2] for batch in one.written if batch[2]] == [b"7-%d" % n for n in range(2, 9)]
    assert one.unread.count == 6  # not the third
    assert len(caplog.messages) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(("size", "most"), [(1, 129), (400_000, 4)])
async def test_pacer_bounds_what_is_left(size: int, most: int) -> None:
    """A handler that leaves each of its waits for room doesn't fill the memory."""
    one = Writes(keep_items=1)
    await one.pacer.put((b"json", b"1"))
    kept = 1
    with pytest.raises(OverloadedError, match="there is no room"):
        for _ in range(1000):
            with anyio.move_on_after(0):
                await one.pacer.put((b"json", b"x" * size))
            kept += 1
    assert kept == most


def test_pages_have_bounds() -> None:
    """In entries and bytes, as large as entries turn out to be."""
    small, large = [(b"1-1", [b"json", b"1"])], [(b"1-1", [b"json", b"x" * 100_000])] * 8
    assert next_count(8, [small]) == 16
    assert next_count(99, [small]) == 100
    assert next_count(8, [small, large]) == 2
    assert next_count(2, []) == 4
    assert next_count(1, [[(b"1-1", [b"json", b"x" * 2**20])]]) == 1


@pytest.mark.anyio
async def test_pacer_cancels_what_nobody_reads() -> None:
    """What others have said by then counts, whether it makes room or tells that somebody is there."""
    one = Writes(keep_items=4, when_unread="cancel", unread_timeout=0.001)
    one.late = [4, 1]
    for _ in range(5):
        await one.pacer.put((b"json", b"1"))
        one.pacer.written()
    assert not one.late
    one = Writes(keep_items=1, when_unread="cancel", unread_timeout=0.001)
    await one.pacer.put((b"json", b"1"))
    async with anyio.create_task_group() as group:
        group.start_soon(one.pacer.put, (b"json", b"1"))
        await one.cancelled.wait()
        group.cancel_scope.cancel()


def test_feed() -> None:
    """Who doesn't take what comes falls behind, and asks for it again."""
    feed = Feed(PLACE)
    entry = (b"1-1", [b"json", b"x" * 1000])
    feed.put([entry])
    assert feed.take() == [entry]
    assert feed.take() == []
    for _ in range(1000):
        feed.put([entry])
    assert feed.behind
    assert len(feed.take()) <= 262
    other = Feed(PLACE)
    for _ in range(1000):
        other.put([(b"1-1", [b"json", b"1"])])
    assert len(other.take()) == 200


@pytest.mark.anyio
async def test_tails() -> None:
    """Who is at the end of the same stream waits for it once, from where all are."""
    link: Any = SimpleNamespace(connection=None)
    outages: Any = None

    async def read_on(*args: Any) -> None:
        await anyio.sleep_forever()

    tails = Tails(link, outages, read_on, b"wake", 5.0, 10.0)
    first = tails.join(PLACE, Position(EPOCH, 5))
    second = tails.join(PLACE, Position(EPOCH, 7))
    assert first is not None
    assert second is not None
    assert tails.join(PLACE, Position(EPOCH, 4)) is None  # it has yet to read what is there
    tails.leave(first)
    tails.leave(second)
    third = tails.join(PLACE, Position(EPOCH, 4))
    assert third is not None
    tails.end(LookupError("over"))
    assert third.behind
    assert isinstance(tails.ended, LookupError)
