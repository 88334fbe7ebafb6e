"""What the JSON of both generations has in common, alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc.typescript._plain import (
    NO_CONSTRUCTOR,
    NOT_FOUND,
    check_numbers,
    is_not_found,
    mark_kind,
    unknown_segment,
)

SAFE = 2**53 - 1
values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text("0123456789.e- ", max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def largest(value: Any) -> int:
    """Return the largest of all integers in a value."""
    if isinstance(value, int):
        return abs(value)
    inner = value.values() if isinstance(value, dict) else value
    return max(map(largest, inner), default=0) if isinstance(value, (dict, list)) else 0


@settings(max_examples=40)
@given(value=values | st.integers(SAFE - 2, SAFE + 2))
def test_numbers(value: Any) -> None:
    """Integers that JavaScript would round are refused, wherever they are; text and floats aren't."""
    text = json.dumps(value, allow_nan=True).replace("NaN", "null").replace("Infinity", "1")
    if largest(json.loads(text)) > SAFE:
        with pytest.raises(TypeError, match="send it as text"):
            check_numbers(text.encode())
    else:
        check_numbers(text.encode())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Method math.nope not found", False),
        ("Method path math.nope not found at nope", False),
        ("Cannot access nope on undefined", False),
        (NO_CONSTRUCTOR, False),
        ("nope is not a function", False),
        ("x not found in the database", True),
        ("", True),
    ],
)
def test_errors_of_kkrpc_itself(text: str, found: bool) -> None:
    """They are told by their text; what a user's function says about its own affairs isn't one."""
    assert is_not_found(text) is not found
    error = {"n": "Error", "m": text, "rpc_error": "what the other side says"}
    mark_kind(error)
    assert error.get("rpc_error") == (None if found else NOT_FOUND)


def test_errors_of_users() -> None:
    """Whatever they say, they are theirs; those with issues are of a validation."""
    error: dict[str, Any] = {"n": "TypeError", "m": "nope is not a function"}
    mark_kind(error)
    assert "rpc_error" not in error
    error = {"n": "RPCValidationError", "m": "x", "issues": []}
    mark_kind(error)
    assert error["rpc_error"] == "validation"
    error = {"n": "RPCValidationError", "m": "x", "issues": "many"}
    mark_kind(error)
    assert "rpc_error" not in error


@pytest.mark.parametrize(("at", "index"), [(0, 0), (1, 1), (99, 2), ("1", 0), (None, 0), (1.5, 0)])
def test_unknown_segment(at: Any, index: int) -> None:
    """What another peer says of it is not believed further than the path goes."""
    assert unknown_segment(["a", "b", "c"], {"at": at}) == index
    assert unknown_segment(["a", "b", "c"], {}) == 0
