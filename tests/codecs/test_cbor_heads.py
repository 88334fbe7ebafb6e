"""Large integers are found in what was encoded, and large values aren't looked through for them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import cbor2
import pytest

from anyio_kkrpc.codecs._cbor_heads import may_have_large_integers
from anyio_kkrpc.codecs.cbor import CBORCodec
from anyio_kkrpc.records import Reply

CBOR = CBORCodec()
ALIKE = b"\xc2\x59\xc3\x5a" * 2000


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (ALIKE, False),
        (["\xe9" * 5000, {"a": ALIKE}, 1.5, -1, 1 << 70, None, 1 << 32], False),
        ([ALIKE, 1 << 2048], True),
        ([1 << 2048, ALIKE], True),
        ([ALIKE, -1 << 2048], True),
        ([1] * 5000 + [1 << 2048], True),  # more than are looked at
        (1 << 2048, True),
        ("a", False),
    ],
    ids=["bytes", "mixed", "last", "first", "negative", "many", "short", "none"],
)
def test_large_integers_are_found(value: Any, found: bool) -> None:
    assert may_have_large_integers(cbor2.dumps({"t": "r", "v": value})) is found


@pytest.mark.parametrize(
    "beside", [b"\xc2\x59\xc3\x5a" * 2000, "\xc2Y" * 2000, [1.5, -1, None] * 2000]
)
def test_large_numbers_beside_large_values_in_cbor(beside: Any) -> None:
    """They are found behind and before what is large itself, and may look like them."""
    for value in ([10**4300, beside], [beside, 10**4300], {"a": beside, "b": [[-(10**5000)]]}):
        with pytest.raises(TypeError, match="CBOR"):
            CBOR.encode(Reply("1", value))
    for value in ([10**4299, beside], [beside, -(10**4299)]):
        assert CBOR.decode(CBOR.encode(Reply("1", value))) == Reply("1", value)


def test_large_bytes_are_encoded_in_cbor_with_one_copy() -> None:
    """They may look like numbers that are to be tried: that would make them once more."""
    record = Reply("1", b"\xc2\x59\xc3\x5a" * 2**16)
    size = len(CBOR.encode(record))
    tracemalloc.start()
    try:
        CBOR.encode(record)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 <= peak / size < 1.5
