"""What JSON weighs: its bytes and its values, but what is in long texts is no value."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from anyio_kkrpc.codecs._weight import weight_of_json

VALUE = 48
LONG, MANY, BACKSLASHES = "," * 20_000, "1," * 20_000, "\\" * 40_000


def weight(data: str) -> int:
    """Return how many values there seem to be in JSON."""
    found, rest = divmod(weight_of_json(data.encode()) - len(data), VALUE)
    assert rest == 0
    return found


@pytest.mark.parametrize(
    ("data", "values"),
    [
        ("[1,2,3]", 3),
        (f'["{LONG}",1]', 2),
        (f'[1,2,"{LONG}",3,"{LONG}",4]', 6),
        (rf'["a\"b{LONG}",1]', 2),
        (f'["","{LONG}"]', 2),
        (f'["a,b","{LONG}"]', 3),  # short texts are looked through
        (f"[{MANY}1]", 20_001),
        (f'["a",{MANY}"b"]', 20_002),
        # Texts that end with a backslash hide nothing that stands behind them.
        (rf'["\\",{MANY}"b"]', 20_002),
        (rf'["\\\\",{MANY}"b"]', 20_002),
        (rf'["x\\\"",{MANY}"b"]', 20_002),
        (rf'["{BACKSLASHES}",{MANY}"b"]', 20_002),
    ],
)
def test_values(data: str, values: int) -> None:
    assert weight(data) == values


def test_many_quotes() -> None:
    """After some, long texts are looked through like all else."""
    quoted = json.dumps(['"' * 1000, LONG])
    assert weight(quoted) == 2 + len(LONG)
    assert weight(json.dumps([*["x"] * 500, LONG])) == 501 + len(LONG)


def test_a_long_text_is_not_copied() -> None:
    data = json.dumps({"t": "q", "a": ["x," * 500_000]}).encode()
    tracemalloc.start()
    try:
        assert weight_of_json(data) == len(data) + VALUE * 5
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) / 10
