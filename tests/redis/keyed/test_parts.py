"""The parts of calls with keys that do no I/O."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from anyio_kkrpc import CallCancelledError, DeliveryError, ProtocolError, RPCError
from anyio_kkrpc.abc import Envelope, KeyedRequest
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._keyed import ended_state, ran_too_long, unfit_state
from anyio_kkrpc.records import Reply, Request
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._group._dead_letters import RETRY_DEAD
from anyio_kkrpc.redis._group._held import Held, HeldEntry
from anyio_kkrpc.redis._keyed._calls import RedisCalls
from anyio_kkrpc.redis._keyed._claim import Claim, Claims
from anyio_kkrpc.redis._keyed._keeping import CallKeeping
from anyio_kkrpc.redis._keyed._kept import (
    Sealer,
    cancel_word,
    is_to_cancel,
    pack_fields,
    parse_kept,
    split_word,
    unpack_fields,
    word_of,
)
from anyio_kkrpc.redis._keyed._later import Later
from anyio_kkrpc.redis._keyed._retrying import keyed_of, retry_command
from anyio_kkrpc.redis._keyed._script import is_unknown
from anyio_kkrpc.redis._keyed._scripts import CLAIM, FINISH, HINTED, RETRY
from anyio_kkrpc.redis._keyed._telling import Teller
from anyio_kkrpc.redis._keyed._waits import ASK, Waiting
from anyio_kkrpc.redis._keyed._work import Work, kind_of
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis.dialects._keyed import Keyed, parse_keyed
from anyio_kkrpc.redis.dialects._signing import Signer
from anyio_kkrpc.redis.dialects.native import NativeDialect

DIGEST = b"abcdefghijklmnopqrstuv"
PLACE = b"{s}:call:k"
KEPT = b"w" + DIGEST + b"17-3|somebody"
PARTS = (RedisCalls, CallKeeping, Later, Teller, Work)  # tried on servers


def sealer(signed: bool = False) -> Sealer:
    signer = Signer(b"0123456789abcdef", lambda: 0.0, lambda: b"n") if signed else None
    return Sealer(NativeDialect("me", get_codec("json")), signer)


@pytest.mark.anyio
async def test_a_word_that_comes_while_one_looks() -> None:
    """Is heard: who looks may have been answered before there was what it tells of."""
    looks: list[bytes] = []

    class Link:
        async def request(self, *command: Any) -> Any:
            if command[0] == b"EXISTS":
                return 1
            looks.append(command[0])
            if len(looks) == 1:
                later.look()
            return [[], 60_000 if len(looks) == 1 else -1]

    link: Any = Link()
    outages: Any = SimpleNamespace(end=lambda part: None)
    later = Later(link, Keys.of("s"), sealer(), None, outages, anyio.current_time)
    later.look()
    await later.go_on()
    assert len(looks) == 2
    assert later.at == inf


class Answers:
    """In place of a connection: keeps what is to be told of each answer."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.waiting: list[Callable[[Any], object]] = []
        self.written: list[bytes] = []

    def post(self, packed: bytes, replies: int, done: Callable[[Any], object]) -> None:
        self.written.append(packed)
        self.waiting.append(done)

    def flush_nowait(self) -> bool:
        return True


class Working:
    """What a worker does for calls with keys, before a server that answers when it is told to."""

    def __init__(self, **options: Any) -> None:
        self.server, self.held = Answers(), Held(30.0)
        self.rooms: list[int] = []
        link: Any = SimpleNamespace(connection=self.server)
        room = SimpleNamespace(notify=lambda: self.rooms.append(len(self.held.entries)))
        keeper: Any = SimpleNamespace(held=self.held, room=room)
        outages: Any = SimpleNamespace(end=lambda part: None)
        native, later = NativeDialect("me", get_codec("json")), Any
        items: Any = SimpleNamespace(forget=lambda keyed: None, attach=lambda connection: None)
        self.work = Work(
            *(link, Keys.of("s"), (b"g", b"c"), native, sealer(), keeper, outages, later, items),
            interval=30.0,
            max_message_size=options.pop("max_message_size", 100_000),
            deliver=lambda envelope: None,
            added=None,
        )

    def take(self, entry_id: bytes, key: bytes = b"k") -> HeldEntry:
        """Have a request run."""
        request, keyed = Request("1", "call", ["f"]), Keyed(key, DIGEST, 1, 1, 0)
        held = HeldEntry(entry_id, 1, 30.0, "somebody", record=request, keyed=keyed)
        held.start()
        self.held.entries[entry_id] = held
        return held


@pytest.mark.anyio
async def test_a_request_whose_id_is_another_ones() -> None:
    """A server that has taken the place of another may give an id again: what each request came to
    is its own, and none goes on taking a place.
    """
    worker = Working()
    first = worker.take(b"17-1", b"a")
    worker.work.finish(first, Envelope(Reply("1", 1)))
    worker.held.displace(first)
    second = worker.take(b"17-1", b"b")
    worker.work.finish(second, Envelope(Reply("1", 2)))
    assert all(b"$4\r\n17-1\r\n" in packed for packed in worker.server.written)
    answer, answer_second = worker.server.waiting
    answer(0)
    assert worker.held.entries == {b"17-1": second}
    answer(0)  # of the connection that it was written to again
    assert worker.held.entries == {b"17-1": second}
    answer_second(1)
    assert worker.held.entries == {}
    assert worker.rooms == [1, 0]


class Refusing:
    """In place of a link: refuses what it is asked, as it is told to, and answers then."""

    connection = None

    def __init__(self, *refusals: str) -> None:
        self.refusals = list(refusals)
        self.asked = 0

    async def request(self, *command: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        self.asked += 1
        if self.refusals:
            raise ResponseError(self.refusals.pop(0))
        return b"d" + DIGEST + b"17-3|json:" + get_codec("json").encode(Reply("", 5))

    attempt = request


def asking(link: Refusing) -> RedisCalls:
    """Return a caller's side."""
    native, parts = NativeDialect("me", get_codec("json")), (Keys.of("s"), b"g", "me")
    claims = Claims(*parts, native, sealer(), None, max_message_size=10_000, max_backlog=None)
    anything: Any = link
    return RedisCalls(
        *(anything, *parts, claims, sealer(), cast(Any, SimpleNamespace(post=lambda *_: None))),
        report=cast(Any, None),
        stir=lambda: None,
        refusal=lambda exc: RPCError(f"refused: {exc}"),
        added=None,
    )


@pytest.mark.anyio
async def test_refused_for_now() -> None:
    """While a slot moves, or replicas are missing, it is asked again; the rest is told."""
    passing = (
        "TRYAGAIN Multiple keys",
        "ASK 4772 127.0.0.1:1",
        "NOREPLICAS Not enough good replicas",
    )
    wanted = KeyedRequest("k", DIGEST.decode(), Request("1", "call", ["f"]), 1.0, 1.0)
    uses: list[Callable[[RedisCalls], Awaitable[Any]]] = [
        lambda calls: calls.start(wanted),
        lambda calls: calls.call(wanted, deadline=None),
        lambda calls: calls.wait("k"),
        lambda calls: calls.cancel("k"),
    ]
    for use in uses:
        link = Refusing(*passing)
        await use(asking(link))
        assert link.asked == len(passing) + 1
        with pytest.raises(RPCError, match="^refused: WRONGTYPE"):
            await use(asking(Refusing(passing[0], "WRONGTYPE no")))
    assert await asking(Refusing(*passing)).call(wanted) == Reply("", 5)
    # The deadline bounds that, too.
    refusing = asking(Refusing(*passing * 1000))
    assert await refusing.call(wanted, deadline=anyio.current_time() + 0.05) is None


@pytest.mark.anyio
@pytest.mark.parametrize("size", [HINTED - 100, HINTED + 1])
async def test_what_goes_along_with_a_hint(size: int) -> None:
    """The result, unless it is large: who is told asks for that."""
    worker, told = Working(), []
    worker.work.teller.tell_soon = lambda *word: told.append(word)  # type: ignore[method-assign]
    worker.work.finish(worker.take(b"17-1"), Envelope(Reply("1", "x" * size)))
    worker.server.waiting[0](2)
    ((key, value),) = told
    assert key == b"k"
    if size > HINTED:
        assert value == b""
    else:
        assert parse_kept(value).entry_id == b"17-1"


def test_field() -> None:
    for key in (b"k", b"a key with spaces", "ä\n".encode(), b"x" * 512):
        keyed = Keyed(key, DIGEST, 10, 0, 2500)
        assert parse_keyed(keyed.field()) == keyed
        assert keyed.name.encode() == key


@pytest.mark.parametrize(
    "value",
    [
        b"",
        DIGEST,
        DIGEST + b" 1 1 1",
        DIGEST + b" 1 1 1 ",
        DIGEST + b" 1 1 1 " + b"x" * 513,
        DIGEST + b" 1 -1 1 k",
        DIGEST + b" 1 1 1.5 k",
        DIGEST + b" 1 1 %b k" % (b"1" * 15),
        DIGEST[1:] + b" 1 1 1 k",
        DIGEST + b" 1 1 1 \xff",
    ],
)
def test_fields_that_are_none(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_keyed(value)


def test_kept() -> None:
    kept = parse_kept(KEPT)
    assert (kept.state, kept.digest, kept.entry_id, kept.rest) == (
        b"w",
        DIGEST,
        b"17-3",
        b"somebody",
    )
    assert not kept.ended
    assert all(parse_kept(state + KEPT[1:]).ended for state in (b"d", b"f", b"x", b"k", b"e"))
    for value in (b"", b"w", KEPT[:20], KEPT.replace(b"|", b""), b"w" + DIGEST + b"1" * 60 + b"|"):
        with pytest.raises(ProtocolError):
            parse_kept(value)
        assert not is_to_cancel(value, b"17-3")
    assert is_to_cancel(b"c" + KEPT[1:], b"17-3")
    assert not is_to_cancel(b"c" + KEPT[1:], b"17-4")
    assert not is_to_cancel(KEPT, b"17-3")
    assert not is_to_cancel(None, b"17-3")


def test_words() -> None:
    for key in (b"k", b"1:2", b":", b"call"):
        assert split_word(word_of(key, KEPT)) == (key, KEPT)
        assert split_word(cancel_word(key)) == (key, b"")
    for word in (b"call", b"call ", b"call x", b"call x:y", b"call -1:y", b"call 99999:y"):
        with pytest.raises(ProtocolError):
            split_word(word)


def test_what_it_came_to() -> None:
    ran: list[tuple[Reply, str]] = [
        (Reply("", 1), "done"),
        (Reply("", e={"n": "ValueError", "m": ""}), "failed"),
        (ran_too_long(1.0), "failed"),
        (Reply("", e={"n": "", "m": "", "rpc_error": "validation", "phase": "output"}), "failed"),
        (Reply("", e={"n": "", "m": "", "rpc_error": "validation", "phase": "input"}), "refused"),
        (Reply("", e={"n": "", "m": "", "rpc_error": "method_not_found"}), "refused"),
        (Reply("", e={"n": "", "m": "", "rpc_error": "overloaded"}), "refused"),
    ]
    for reply, expected in ran:
        assert ended_state(reply) == expected
        assert kind_of(reply) == ("failed" if expected == "failed" else "refused")
    assert [unfit_state(kind, 1.0) for kind in ("done", "failed", "dead")] == [False] * 3
    assert unfit_state("failed", 0.0)
    assert unfit_state("refused", 1.0)


@pytest.mark.parametrize("signed", [False, True])
def test_values(signed: bool) -> None:
    """Each is read as it was written, in either codec; sealed, nowhere else."""
    one = sealer(signed)
    for codec in ("json", "cbor"):
        data = one.reply(get_codec(codec), Reply("the request's", {"a": [1, "x"]}))
        rest = one.seal(PLACE, b"d", DIGEST, b"17-3", data)
        kept = parse_kept(b"d" + DIGEST + b"17-3|" + rest)
        assert one.value_of(PLACE, "k", kept) == Reply("", {"a": [1, "x"]})
        if signed:
            for place, value in (
                (b"{s}:call:other", b"d" + DIGEST + b"17-3|" + rest),
                (PLACE, b"f" + DIGEST + b"17-3|" + rest),
                (PLACE, b"d" + DIGEST + b"17-4|" + rest),
                (PLACE, b"d" + DIGEST + b"17-3|" + data),
                (PLACE, b"d" + DIGEST + b"17-3|"),
            ):
                with pytest.raises(ProtocolError, match="signed"):
                    one.value_of(place, "k", parse_kept(value))
        assert one.progress_of(one.progress(get_codec(codec), [1])) == [1]
    assert one.progress_of(one.progress(get_codec("json"), None)) is None


def test_values_that_are_none() -> None:
    one = sealer()
    for rest in (b"", b"json:", b"json:{", b"none:{}", b'json:{"t":"x","id":""}'):
        with pytest.raises(ProtocolError):
            one.value_of(PLACE, "k", parse_kept(b"d" + DIGEST + b"1-1|" + rest))
    with pytest.raises(CallCancelledError):
        one.value_of(PLACE, "k", parse_kept(b"k" + DIGEST + b"1-1|"))
    with pytest.raises(DeliveryError, match="it died"):
        one.value_of(PLACE, "k", parse_kept(b"x" + DIGEST + b"1-1|it died"))
    assert unpack_fields(pack_fields((b"a", b"\xff"))) == (b"a", b"\xff")
    for data in (b"", b"x", b"\xff"):
        with pytest.raises(ProtocolError):
            unpack_fields(data)


def test_scripts() -> None:
    """By their digest, or as text where a server doesn't know them."""
    assert CLAIM.sha != FINISH.sha
    assert len(CLAIM.sha) == 40
    claim = Claim(CLAIM, (b"a", b"b"), (b"c",), (b"d",))
    assert claim.command() == (b"EVALSHA", CLAIM.sha, b"2", b"a", b"b", b"c", b"0", b"d")
    claim.again = b"1"
    assert claim.command(known=False) == (
        *(b"EVAL", CLAIM.source, b"2"),
        *(b"a", b"b", b"c", b"1", b"d"),
    )
    assert CLAIM.sha in claim.packed()
    assert is_unknown(ResponseError("NOSCRIPT No matching script"))
    assert not is_unknown(ResponseError("ERR no"))
    assert not is_unknown(1)


def test_dead_letters() -> None:
    """One with a key is put back with it."""
    keys, keyed = Keys.of("s"), Keyed(b"k", DIGEST, 1, 1, 0)
    request = (b"from", b"me", b"json", b"{}", b"v", b"3 3")
    with_key = (*request, b"call", keyed.field())
    assert keyed_of(with_key) == keyed
    for fields in (request, (*request, b"call", b"none"), (b"data", b"x"), ()):
        assert keyed_of(fields) is None
        assert retry_command(keys, "1-1", fields)[1] == RETRY_DEAD
    command = retry_command(keys, "1-1", with_key)
    assert command[1] == RETRY.source
    assert command[3:] == (
        *(b"s", b"{s}:dead", b"{s}:call:k", b"{s}:progress:k"),
        *("1-1", DIGEST, *with_key),
    )


@pytest.mark.anyio
async def test_who_waits() -> None:
    waiting = Waiting()
    one, two = (waiting.join(b"a", anyio.Event, 1.0) for _ in range(2))
    other = waiting.join(b"b", anyio.Event, 2.0)
    waiting.tell(b"nobody", KEPT)
    assert waiting.ask(3.0) == 1.0 + ASK
    waiting.tell(b"a", KEPT)
    for waiter in (one, two):
        await waiter.word.wait()
        assert waiter.kept == parse_kept(KEPT)
        waiter.renew(4.0)
        assert waiter.kept is None
    assert waiting.ask(2.0 + ASK) == 4.0 + ASK
    await other.word.wait()
    assert (other.late, one.late) == (True, False)
    waiting.tell(b"a", b"no value")
    await one.word.wait()
    assert one.kept is None
    assert not waiting.leave(b"a", one)
    assert waiting.leave(b"a", two)
    waiting.end(reason := ConnectionError())
    assert other.failed is reason
    late = waiting.join(b"c", anyio.Event, 5.0)
    await late.word.wait()
    assert late.failed is reason


@pytest.mark.anyio
async def test_answers_to_claims() -> None:
    """One that makes a new call wakes nobody."""
    waiting = Waiting()
    waiter = waiting.join(b"a", anyio.Event, 1.0)
    waiter.take_claim(b"17-3")
    assert waiter.entry_id == b"17-3"
    answers: list[Any] = [KEPT, 0, ResponseError("OOM no")]
    for answer in answers:
        waiter.take_claim(answer)
        await waiter.word.wait()
        assert waiter.claimed is answer


def test_a_request_with_a_key() -> None:
    """Its entry says that who reads it must know of keys; its sender speaks the same as ever."""
    native = NativeDialect("me", get_codec("json"))
    keyed = Keyed(b"k", DIGEST, 1, 1, 0)
    fields = native.encode_keyed(Request("1", "call", ["f"]), keyed.field())
    assert fields[4:6] == (b"v", b"3 3")
    entry = native.decode([*fields])
    assert (entry.record, entry.keyed) == (Request("1", "call", ["f"]), keyed)
    assert native.version_of("me") == 3
    large = native.encode_keyed(Request("1", "call", ["f"], ["x" * 100_000]), keyed.field())
    assert native.decode([*large]).keyed == keyed
    with pytest.raises(ProtocolError):
        native.decode([*fields[:7], b"none"])
