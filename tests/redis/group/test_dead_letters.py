"""What dead letters hold, whoever wrote them: this version, the one before, a newer one, anybody."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import ProtocolError, RedisStreamsTransport, RPCChannel, RPCError
from anyio_kkrpc.redis._group._dead_letters import parse
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

ABOUT = (
    *(b"id", b"1795420521577-0", b"group", b"workers", b"reason", b"delivered 5 times"),
    *(b"attempts", b"5", b"first", b"1795420521577", b"last", b"1795420531000"),
)
NATIVE = (b"from", b"client", b"json", b'{"t":"q","id":"1","op":"call","p":["add"],"a":[1,2]}')
SIGNED = (*NATIVE, b"sig", b"1.2.3")
COMPACT = (b"data", b"{}\n")
CLASSIC = (b"data", b"{}\n", b"sessionId", b"client")
# The names of what is about the letter, as names of what is in the request.
LOOKALIKE = (*NATIVE, b"id", b"7", b"reason", b"none", b"request", b"0 1")


def fields_of(*parts: Sequence[bytes]) -> dict[str, bytes]:
    """Return the request's own fields, as they are read from a letter of these parts."""
    flat = [item for part in parts for item in part]
    letter = parse(b"5-0", flat)
    assert (letter.id, letter.entry_id, letter.group) == ("5-0", "1795420521577-0", "workers")
    assert (letter.reason, letter.attempts) == ("delivered 5 times", 5)
    assert (letter.first, letter.last) == (1795420521.577, 1795420531)
    return letter.fields


def as_dict(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def boundary(first: int, request: Sequence[bytes]) -> tuple[bytes, bytes]:
    return (b"request", b"%d %d" % (first, len(request) // 2))


def reordered() -> list[bytes]:
    pairs = [ABOUT[index : index + 2] for index in range(0, len(ABOUT), 2)]
    return [item for pair in reversed(pairs) for item in pair]


@pytest.mark.parametrize("request_", [NATIVE, SIGNED, COMPACT, CLASSIC])
class TestWhatIsWhat:
    """The library's fields are told from the request's own."""

    def test_this_version(self, request_: tuple[bytes, ...]) -> None:
        assert fields_of(ABOUT, request_, boundary(6, request_)) == as_dict(request_)

    def test_version_before(self, request_: tuple[bytes, ...]) -> None:
        assert fields_of(ABOUT, request_) == as_dict(request_)

    def test_newer_version(self, request_: tuple[bytes, ...]) -> None:
        """Whatever it adds, and where, and in which order the rest is."""
        more = (b"shard", b"3", b"from", b"elsewhere")
        behind = (*request_, *more)
        assert fields_of(ABOUT, behind, boundary(6, request_)) == as_dict(request_)
        assert fields_of(ABOUT, more, request_, boundary(8, request_)) == as_dict(request_)
        assert fields_of(more, reordered(), request_, boundary(8, request_)) == as_dict(request_)

    def test_without_the_boundary(self, request_: tuple[bytes, ...]) -> None:
        """A newer one may not, but what is there is still the best guess."""
        more = (b"shard", b"3")
        assert fields_of(reordered(), request_) == as_dict(request_)
        assert fields_of(more, ABOUT, request_) == as_dict(request_)
        assert fields_of(reordered()[:6], more, reordered()[6:], request_) == as_dict(request_)
        if request_[0] == b"from":
            assert fields_of(ABOUT, more, request_) == as_dict(request_)


def test_request_that_resembles_a_letter() -> None:
    """Its fields stay its own."""
    assert fields_of(ABOUT, LOOKALIKE, boundary(6, LOOKALIKE)) == as_dict(LOOKALIKE)


def changed(name: bytes, value: bytes) -> list[bytes]:
    flat = list(ABOUT)
    flat[flat.index(name) + 1] = value
    return [*flat, *NATIVE]


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        ([b"hello", b"world"], "without a request"),
        (list(NATIVE), "without id, group, reason, attempts, first, last"),
        ([*ABOUT[:10], *NATIVE], "without last"),
        ([*ABOUT, *NATIVE, b"request", b"0 8"], "without id, group"),
        (changed(b"attempts", b"many"), "whose attempts is b'many'"),
        (changed(b"attempts", b"-1"), "whose attempts"),
        (changed(b"attempts", b"9" * 400), "whose attempts"),
        (changed(b"attempts", b"9" * 19), "whose attempts"),
        (changed(b"first", b""), "whose first is b''"),
        (changed(b"first", b"1e3"), "whose first"),
        (changed(b"last", b"%d" % 10**15), "whose last"),
        (changed(b"last", "\N{ARABIC-INDIC DIGIT ONE}".encode()), "whose last"),
    ],
)
def test_what_is_no_letter(flat: list[bytes], text: str) -> None:
    """It is said what is wrong, and it is nothing else than a `ProtocolError`."""
    with pytest.raises(ProtocolError, match=text):
        parse(b"5-0", flat)


@pytest.mark.parametrize("mark", [b"", b"6", b"6 ", b"-6 2", b"6 2 2", b"6 99", b"9" * 30 + b" 1"])
def test_a_boundary_that_is_none(mark: bytes) -> None:
    """It is a field of the request, then."""
    request = (*NATIVE, b"request", mark)
    assert fields_of(ABOUT, request) == as_dict(request)


def test_text_that_is_none() -> None:
    """What isn't UTF-8 is shown escaped."""
    letter = parse(b"5-0", changed(b"group", b"a\xff"))
    assert letter.group == "a\\xff"


@pytest.fixture
def options(redis_server: RedisServer, stream_name: str) -> dict[str, Any]:
    return {"url": redis_server.url, "stream": stream_name, "use_consumer_group": True}


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_malformed_ones_are_skipped(
    options: dict[str, Any],
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are counted and logged; those behind them are found, however many there are."""
    caplog.set_level(logging.WARNING)
    dead = f"{{{stream_name}}}:dead"
    pipeline = witness.pipeline(transaction=False)
    for _ in range(600):
        pipeline.xadd(dead, {"hello": "world"})
    for _ in range(3):
        pipeline.xadd(dead, as_dict((*ABOUT, *NATIVE)))
    malformed = pipeline.execute()[0].decode()
    async with RedisStreamsTransport(**options) as transport:
        letters = await transport.dead_letters(2)
        assert [letter.fields for letter in letters] == [as_dict(NATIVE)] * 2
        assert transport.statistics().invalid == 600
        assert f"skipped entry {malformed} of {dead}: a dead letter without a request" in (
            caplog.text
        )
        assert len(await transport.dead_letters()) == 3
        with pytest.raises(LookupError, match=f"{malformed} is no dead letter: .* a request"):
            await transport.retry_dead_letter(malformed)
        assert witness.xlen(stream_name) == 0
        assert witness.xlen(dead) == 603
        assert await transport.purge_dead_letters() == 603


class Api:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, number: int) -> int:
        self.asked.append(number)
        return number


def raw_entry(witness: redis.Redis, key: str) -> list[bytes]:
    """Return the fields of the last entry, as they are: a dict has each name once."""
    connection = witness.connection_pool.make_connection()
    try:
        connection.send_command("XREVRANGE", key, "+", "-", "COUNT", "1")
        ((_, flat),) = connection.read_response()
    finally:
        connection.disconnect()
    return list(flat)


@pytest.mark.anyio
@pytest.mark.parametrize("pairs", [0, 5_000])
async def test_letters_as_written(
    options: dict[str, Any], stream_name: str, witness: redis.Redis, pairs: int
) -> None:
    """The version before finds what it looks for in the first six pairs; too much is cut."""
    request = {
        "from": "client",
        "json": '{"t":"q","id":"1","op":"call","p":["ask"],"a":[1]}',
        **{f"id{number}" if number else "id": "x" for number in range(pairs)},
    }
    witness.xgroup_create(stream_name, "kkrpc-group", "0", mkstream=True)
    entry_id = witness.xadd(stream_name, request)
    assert witness.xreadgroup("kkrpc-group", "gone", {stream_name: ">"})
    api, dead = Api(), f"{{{stream_name}}}:dead"
    async with (
        RedisStreamsTransport(**options, claim_idle=0.05, max_deliveries=1) as transport,
        RPCChannel(transport, expose=api),
    ):
        await until(lambda: witness.exists(dead))
        flat = raw_entry(witness, dead)
        assert flat[:12:2] == [b"id", b"group", b"reason", b"attempts", b"first", b"last"]
        assert flat[1:4:2] == [entry_id, b"kkrpc-group"]
        kept = list(request.items())[:3000]
        own = [item.encode() for pair in kept for item in pair]
        assert flat[12:] == [*own, b"request", b"6 %d" % len(kept)]
        (letter,) = await transport.dead_letters()
        assert letter.entry_id.encode() == entry_id
        assert letter.fields == as_dict(own)
        await transport.retry_dead_letter(letter.id)
        await until(lambda: api.asked)
        assert raw_entry(witness, stream_name) == own
        assert await transport.dead_letters() == []
        assert transport.statistics().invalid == 0


@pytest.mark.anyio
async def test_letters_that_can_not_be_put_back_stay(
    options: dict[str, Any], witness: redis.Redis, stream_name: str
) -> None:
    """Neither one that Redis refuses as a request, nor one that no script can pass on, is lost."""
    dead = f"{{{stream_name}}}:dead"
    async with RedisStreamsTransport(**options) as transport:
        many = [b"x"] * 9_000
        for request_ in (NATIVE, (*NATIVE, *many)):
            flat = [*ABOUT, *request_]
            witness.execute_command("XADD", dead, "*", *flat)
        good, large = (entry_id.decode() for entry_id, _ in witness.xrange(dead))
        with pytest.raises(LookupError, match="has 4502 fields"):
            await transport.retry_dead_letter(large)
        witness.delete(stream_name)
        witness.set(stream_name, "no stream")
        with pytest.raises(RPCError, match="WRONGTYPE"):
            await transport.retry_dead_letter(good)
        assert witness.xlen(dead) == 2
        witness.delete(stream_name)
        await transport.retry_dead_letter(good)
        assert witness.xlen(dead) == 1
        assert witness.xlen(stream_name) == 1
