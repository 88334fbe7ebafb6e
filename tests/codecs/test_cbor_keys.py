"""Keys of CBOR maps and items of sets: honest ones of any type are taken, hostile ones refused."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol._records import Reply
from anyio_kkrpc.codecs import _cbor_keys
from anyio_kkrpc.codecs.cbor import CBORCodec, _decode_keys
from tests.alike import MODULUS, pairs

CBOR = CBORCodec()
COUNT = 2000


def head(kind: int, count: int) -> bytes:
    return bytes([kind << 5 | 26]) + count.to_bytes(4, "big")


def a_map(key: Callable[[int], Any], count: int = COUNT, value: bytes = b"\0") -> bytes:
    """A map whose keys are those of multiples of the modulus, none of them twice."""
    parts = (cbor2.dumps(key(n * MODULUS)) + value for n in range(1, count + 1))
    return head(5, count) + b"".join(parts)


def reply(value: bytes) -> bytes:
    return b"\xa3\x61t\x61r\x62id\x611\x61v" + value


HOSTILE: dict[str, bytes] = {
    "int": a_map(lambda n: n),
    "negative": a_map(lambda n: -n),
    "decimal": a_map(lambda n: decimal.Decimal(n)),
    "uuid": a_map(lambda n: uuid.UUID(int=n)),
    "array": a_map(lambda n: (n,)),
    "arrays of 61 bits": head(5, COUNT)
    + b"".join(cbor2.dumps(pair) + b"\0" for pair in pairs(COUNT)),
    "map as a key": a_map(lambda n: cbor2.frozendict({"x": n})),
    "set": b"\xd9\x01\x02"
    + head(4, COUNT)
    + b"".join(cbor2.dumps(n * MODULUS) for n in range(COUNT)),
    "endless map": b"\xbf" + a_map(lambda n: n)[5:] + b"\xff",
    "endless set": b"\xd9\x01\x02\x9f"
    + b"".join(cbor2.dumps(n * MODULUS) for n in range(COUNT))
    + b"\xff",
    "deep in it": head(4, 3) + b"\x01\x81\xa1\x61x\x82\x02" + a_map(lambda n: n) + b"\x03",
    "behind much": head(4, 5001) + b"\x01\x18\x20\x61x\xf6\x80" * 1000 + a_map(lambda n: n),
    "in a key": head(5, 1) + b"\x81" + a_map(lambda n: n) + b"\0",
    "in a value": a_map(lambda n: n % 1000, count=1)[:-1] + a_map(lambda n: n),
    "in a tag": b"\xd9\xd9\xf7" + a_map(lambda n: n),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_keys(value: bytes) -> None:
    """They are refused for what they are, before a dict is made of them."""
    with pytest.raises(ProtocolError, match="same hash|not accepted"):
        CBOR.decode(reply(value))


def test_many_containers_beside_other_keys() -> None:
    """A walk through them would take its time; with keys of text nobody walks."""
    tiny = head(4, 100_000) + b"\x81\x80" * 100_000
    assert CBOR.decode(reply(b"\xa2\x61a\x01\x61b" + tiny))
    with pytest.raises(ProtocolError, match="too many or too deep"):
        CBOR.decode(reply(b"\xa2\x01\x01\x02" + tiny))


def test_deeper_than_any_decoder_goes() -> None:
    """The walk ends at a depth that no decoder takes, not where a million brackets do."""
    looked_at: list[int] = []

    class Bytes(bytes):
        def __getitem__(self, key: Any) -> Any:
            looked_at.append(key)
            return super().__getitem__(key)

    for nested in (b"\x81", b"\xc1", b"\xa1\x01", b"\x9f"):
        looked_at.clear()
        with pytest.raises(ValueError, match="too deep"):
            _cbor_keys.check_keys(Bytes(nested * 500_000), _decode_keys)
        assert len(looked_at) < 2000


HONEST: dict[str, Any] = {
    "ints": {n: [n, str(n)] for n in range(20_000)},
    "-1, -2": {(x, y): 0 for x in range(-30, 30) for y in range(-30, 30)},
    "large ints": {2**70 + n: n for n in range(3000)},
    "floats": {n / 7: "x" * 30 for n in range(3000)},
    "uuids": {uuid.uuid5(uuid.NAMESPACE_DNS, str(n)): n for n in range(3000)},
    "decimals": {decimal.Decimal(n) / 100: n for n in range(3000)},
    "dates": {datetime.date.fromordinal(n): n for n in range(1, 3000)},
    "texts": {str(n): n for n in range(5000)},
    "bytes": {str(n).encode() * 10: n for n in range(3000)},
    "mixed": {**{n: n for n in range(3000)}, "x": {None: True, False: {b"y": [{}, [], ()]}}},
}


@pytest.mark.parametrize("value", HONEST.values(), ids=HONEST)
def test_honest_keys(value: Any) -> None:
    """Many of any type go through."""
    decoded = CBOR.decode(CBOR.encode(Reply("1", value)))
    assert isinstance(decoded, Reply)
    assert cbor2.dumps(decoded.v) == cbor2.dumps(value)


keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30)
    | st.binary(max_size=30) | st.uuids() | st.decimals(allow_nan=False, allow_infinity=False),
    lambda inner: st.tuples(inner, inner),
    max_leaves=3,
)  # fmt: skip
values = st.recursive(
    keys,
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(keys, inner, max_size=20)
        | st.frozensets(keys, max_size=20)
    ),
    max_leaves=20,
)


@given(values, st.booleans())
@example([1] * 3000, False)
@example({n: n for n in range(300)}, True)
@example(["x" * 1000, b"x" * 70_000], True)
def test_walk(value: Any, endless: bool) -> None:
    """The walk goes through all of it, to its end, and finds the keys that are to be looked at."""
    data = cbor2.dumps(value, indefinite_containers=endless)
    found = [place for places in _cbor_keys._keys(data + b"more") for place in places]
    for begin, end in found:
        _decode_keys(data[begin:end])
    assert all(0 <= begin < end <= len(data) for begin, end in found)
    _cbor_keys.check_keys(data, _decode_keys)


@given(st.binary(max_size=300))
@example(b"\x81" * 100_000)
@example(b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x9f\x9f\xff")
@example(b"\xff")
@example(b"\xfc")
@example(b"\x1c")
@example(b"\x5f\x41")
@example(b"\x62x")
def test_arbitrary_bytes(data: bytes) -> None:
    """Whatever the bytes are: it ends, and nothing else is raised."""
    try:
        _cbor_keys.check_keys(data, _decode_keys)
    except (ValueError, cbor2.CBORDecodeError):
        pass
