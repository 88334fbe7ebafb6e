"""The codecs: round trips, and arbitrary bytes."""

from __future__ import annotations

import datetime
import decimal
import fractions
import ipaddress
import re
import subprocess
import sys
from typing import Any

import cbor2
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol._records import Record, Reply, Request
from anyio_kkrpc.abc import Codec
from anyio_kkrpc.codecs import JSONCodec, get_codec
from anyio_kkrpc.codecs.cbor import CBORCodec
from tests.bounds import BOUND
from tests.strategies import cbor_values, json_values, records

JSON, CBOR = JSONCodec(), CBORCodec()
BOTH = pytest.mark.parametrize("codec", [JSON, CBOR], ids=["json", "cbor"])


@given(records(json_values))
def test_json_round_trip(record: Record) -> None:
    """Every record comes back from JSON as it was, in one line."""
    data = JSON.encode(record)
    assert b"\n" not in data
    assert JSON.decode(data) == record


@given(records(cbor_values))
def test_cbor_round_trip(record: Record) -> None:
    """Every record comes back from CBOR as it was, rich values included."""
    assert CBOR.decode(CBOR.encode(record)) == record


@given(records(json_values))
def test_both_codecs_mean_the_same(record: Record) -> None:
    """What JSON carries, CBOR carries with the same result."""
    assert JSON.decode(JSON.encode(record)) == CBOR.decode(CBOR.encode(record))


def decodes_or_refuses(codec: Codec, data: bytes) -> Record | None:
    """Decode; only a ProtocolError with a short text may come instead of a record."""
    try:
        return codec.decode(data)
    except ProtocolError as exc:
        assert len(str(exc)) < 400
        assert exc.__cause__ is not None
        return None


@BOTH
@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=b"\x81" * 100_000)
@example(data=b"[" * 100_000)
@example(data=b'{"t":"q","id":"1","op":"call","p":["x"],"a":null}')
@example(data=b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff")
@example(data=b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff")
@example(data=b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff")
@example(data=b"\xc4\x82\x1b\x7f\xff\xff\xff\xff\xff\xff\xff\x01")
def test_arbitrary_bytes(codec: Codec, data: bytes) -> None:
    """Any bytes are a record or a protocol error, and nothing else."""
    decodes_or_refuses(codec, data)


@BOTH
@given(data=st.data())
def test_damaged_records(codec: Codec, data: st.DataObject) -> None:
    """A record that was truncated, flipped or extended is a record or a protocol error."""
    record = data.draw(records(json_values))
    whole = bytearray(codec.encode(record))
    for cut in range(len(whole)):
        assert decodes_or_refuses(codec, bytes(whole[:cut])) is None
    assert decodes_or_refuses(codec, bytes(whole) + b"x") is None
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))
    decodes_or_refuses(codec, bytes(whole))


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"id": 1}, {"id": None}, {"op": "zap"}, {"p": "add"}, {"p": [1]}, {"p": [None]},
        {"a": None}, {"a": {}}, {"k": []}, {"k": None}, {"meta": None}, {"d": "1"}, {"o": 1},
        {"t": "zap"}, {"t": None}, {"t": 5},
    ],
)  # fmt: skip
def test_wrong_members(codec: Codec, change: dict[str, Any]) -> None:
    """Members of wrong types, and null where a member may be absent, make a record invalid."""
    valid = {"t": "q", "id": "1", "op": "call", "p": ["add"]}
    encode = msgspec.json.encode if codec is JSON else cbor2.dumps
    assert isinstance(codec.decode(encode(valid)), Request)
    assert isinstance(codec.decode(encode({**valid, "unknown": 1})), Request)
    with pytest.raises(ProtocolError):
        codec.decode(encode({**valid, **change}))


@pytest.mark.parametrize(
    "value",
    [
        fractions.Fraction(1, 2),
        re.compile("a+"),
        ipaddress.ip_address("127.0.0.1"),
        cbor2.CBORTag(9999, "x"),
        cbor2.CBORTag(28, []),
        cbor2.CBORTag(24, b"\x01"),
        1 + 2j,
    ],
    ids=repr,
)
def test_tags_that_are_not_plain_data(value: Any) -> None:
    """Tags beyond numbers, dates, UUIDs and sets are refused."""
    data = cbor2.dumps({"t": "r", "id": "1", "v": value})
    with pytest.raises(ProtocolError):
        CBOR.decode(data)


def test_cyclic_and_shared_references_are_refused() -> None:
    """References, by which few bytes could make endless or huge values, are not followed."""
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ProtocolError):
        CBOR.decode(cbor2.dumps({"t": "r", "id": "1", "v": cycle}, value_sharing=True))


@BOTH
@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, "\ud800", None],
    ids=["object", "function", "surrogate", "deep"],
)
def test_values_that_cannot_be_encoded(codec: Codec, value: Any) -> None:
    """They are a TypeError, whatever is wrong with them."""
    if value is None:
        value = []
        for _ in range(100_000):
            value = [value]
    with pytest.raises(TypeError):
        codec.encode(Reply("1", value))


def test_datetimes() -> None:
    """CBOR has no naive datetimes, and says so; JSON has them."""
    naive = datetime.datetime(2026, 1, 2, 3, 4)
    with pytest.raises(TypeError, match="naive"):
        CBOR.encode(Reply("1", naive))
    assert JSON.encode(Reply("1", naive)) == b'{"t":"r","id":"1","v":"2026-01-02T03:04:00"}'
    with_zone = naive.replace(tzinfo=datetime.timezone.utc)
    assert CBOR.decode(CBOR.encode(Reply("1", with_zone))) == Reply("1", with_zone)


def test_large_numbers() -> None:
    """Integers of any size go through CBOR, those of 64 bits through JSON; so do decimals."""
    for value in (2**100, -(2**100), decimal.Decimal("1e400")):
        assert CBOR.decode(CBOR.encode(Reply("1", value))) == Reply("1", value)
    for number in (2**64 - 1, -(2**63)):
        assert JSON.decode(JSON.encode(Reply("1", number))) == Reply("1", number)


NOT_NUMBERS = [10**16, -(10**16), 10**30, -(10**400), 10**4000, 1e16, 1e308, -1e308]
NOT_INDICES = [*NOT_NUMBERS, -1, 0.5]
LONG_IDS = ["x" * 257, "x" * 1_000_000]
REQUEST: dict[str, Any] = {"t": "q", "id": "1", "op": "call", "p": ["add"]}
STREAM_REQUEST: dict[str, Any] = {"t": "sq", "id": "1", "sid": "1", "op": "pull"}
STREAM_REPLY: dict[str, Any] = {"t": "sr", "id": "1", "sid": "1", "v": 1}


@BOTH
@pytest.mark.parametrize(
    ("valid", "member", "wrong"),
    [
        (REQUEST, "d", NOT_NUMBERS),
        (REQUEST, "id", LONG_IDS),
        ({"t": "r", "id": "1"}, "id", LONG_IDS),
        ({"t": "cb", "id": "1", "a": []}, "id", LONG_IDS),
        ({"t": "cbr", "ids": ["1"]}, "ids", [["1", long] for long in LONG_IDS]),
        (STREAM_REQUEST, "id", LONG_IDS),
        (STREAM_REQUEST, "sid", LONG_IDS),
        (STREAM_REPLY, "id", LONG_IDS),
        (STREAM_REPLY, "sid", LONG_IDS),
        (STREAM_REPLY, "i", NOT_INDICES),
        ({"t": "x", "id": "1"}, "id", LONG_IDS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bounds(codec: Codec, valid: dict[str, Any], member: str, wrong: list[Any]) -> None:
    """What is kept of a record, or calculated with, is bounded: else the record is invalid."""
    encode = msgspec.json.encode if codec is JSON else cbor2.dumps
    assert codec.decode(encode(valid))
    for value in wrong:
        with pytest.raises(ProtocolError):
            codec.decode(encode({**valid, member: value}))


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), float("-inf")])
def test_budgets_that_are_no_numbers(budget: float) -> None:
    with pytest.raises(ProtocolError):
        CBOR.decode(cbor2.dumps({**REQUEST, "d": budget}))


def test_integers_of_too_many_digits_in_json() -> None:
    """Python makes no text of them and reads none: that is told as what it is, on both sides."""
    with pytest.raises(TypeError, match="4300"):
        JSON.encode(Reply("1", 10**5000))
    decodes_or_refuses(JSON, b'{"t":"r","id":"1","v":1%s}' % (b"0" * 5000))
    value = int("9" * 4300)
    assert JSON.decode(JSON.encode(Reply("1", value))) == Reply("1", value)


@pytest.mark.parametrize(
    "value",
    [
        10**4300,
        -(10**4300),
        decimal.Decimal("1E+4301"),
        decimal.Decimal("1E-4301"),
        decimal.Decimal("1E+999999999999999999"),
        decimal.Decimal("9" * 4301),
        [{"deep": decimal.Decimal("-1E+5000000")}],
        1 << 800_000,
    ],
    ids=["integer", "negative", "large", "small", "largest", "long", "inner", "100 KB"],
)
def test_numbers_of_too_many_digits_in_cbor(value: Any) -> None:
    """They would cost whoever converts them time that grows with the square; neither side has them."""
    with pytest.raises(TypeError, match="CBOR"):
        CBOR.encode(Reply("1", value))
    data = cbor2.dumps({"t": "r", "id": "1", "v": value})
    with pytest.raises(ProtocolError):
        CBOR.decode(data)


def test_decimals_that_cbor_makes_of_hostile_parts() -> None:
    for parts in (
        [0, 1 << 800_000],
        [10**400, 1],
        [1 << 62, 1],
        ["1", 1],
        [1],
        1,
        [0.5, 1],
        [1, 2, 3],
    ):
        for tag in (4, 5):
            data = cbor2.dumps({"t": "r", "id": "1", "v": cbor2.CBORTag(tag, parts)})
            with pytest.raises(ProtocolError):
                CBOR.decode(data)


@given(
    st.integers(1 - 10**4300, 10**4300 - 1)
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.builds(
        lambda digits, exponent: decimal.Decimal(f"{digits}E{exponent}"),
        st.integers(-(10**40), 10**40),
        st.integers(-4300, 4300),
    )
    | st.binary(max_size=3000)
)
@example(10**4300 - 1)
@example(1 - 10**4300)
@example(b"\xc2\x59" * 1000)
@example(decimal.Decimal("9" * 4300))
@example(decimal.Decimal("-1E-4300"))
def test_numbers_within_the_bounds(value: Any) -> None:
    """What isn't beyond the bounds goes through CBOR, and so do bytes that look like a number."""
    assert CBOR.decode(CBOR.encode(Reply("1", value))) == Reply("1", value)


def test_get_codec() -> None:
    """By name, or the codec itself; wrong names are told."""
    assert isinstance(get_codec("json"), JSONCodec)
    assert isinstance(get_codec("cbor"), CBORCodec)
    assert get_codec(JSON) is JSON
    for wrong in ("xml", None, 5):
        with pytest.raises(ValueError, match="codec"):
            get_codec(wrong)  # type: ignore[arg-type]


def test_without_cbor2() -> None:
    """Without the extra, the error says which one to install, and JSON works."""
    program = """
import sys
sys.modules["cbor2"] = None
from anyio_kkrpc.codecs import get_codec
get_codec("json")
try:
    get_codec("cbor")
except ImportError as exc:
    print(exc)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=BOUND
    )
    assert "pip install 'anyio_kkrpc[cbor]'" in result.stdout
