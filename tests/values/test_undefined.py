"""What becomes of ``undefined`` where there is no word for it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET

from anyio_kkrpc._values._undefined import defined, defined_record
from anyio_kkrpc.records import Request


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (UNSET, None),
        ([UNSET, 1, None], [None, 1, None]),
        ({"a": UNSET, "b": None}, {"b": None}),
        ({"a": ({"b": UNSET},)}, {"a": [{}]}),
        ({1, UNSET}, [1, None]),
    ],
)
def test_undefined_is_left_out(value: Any, plain: Any) -> None:
    """Members are left out, and items are None."""
    made = defined(value)
    assert (
        sorted(made, key=str) == sorted(plain, key=str) if isinstance(value, set) else made == plain
    )


@pytest.mark.parametrize("value", [None, 1, "x", [1, [2]], {"a": {"b": (1,)}}, {1, 2}, object()])
def test_what_has_none_of_it_is_the_same(value: Any) -> None:
    """It isn't even copied."""
    assert defined(value) is value


def test_records() -> None:
    """What a record doesn't say stays unsaid."""
    request = Request("1", "call", ["f"], [{"a": UNSET}])
    assert defined_record(request) == Request("1", "call", ["f"], [{}])
