"""Documents of superjson that were made to take long."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_kkrpc import ProtocolError
from anyio_kkrpc.typescript import _restoring
from anyio_kkrpc.typescript.superjson import dumps, loads
from tests.alike import MODULUS, pairs


def document(value: Any, values: Any = None, **meta: Any) -> bytes:
    meta = {"v": 1, **meta}
    if values is not None:
        meta["values"] = values
    return json.dumps({"json": value, "meta": meta}).encode()


def bigints(count: int) -> tuple[list[str], dict[str, Any]]:
    return [str(n * MODULUS) for n in range(count)], {str(n): ["bigint"] for n in range(count)}


def test_sets_and_maps_of_keys_that_hash_alike() -> None:
    items, below = bigints(1000)
    with pytest.raises(ProtocolError, match="same hash"):
        loads(document(items, ["set", below]))
    with pytest.raises(ProtocolError, match="same hash"):
        below = {f"{n}.0": ["bigint"] for n in range(1000)}
        loads(document([[item, 0] for item in items], ["map", below]))
    with pytest.raises(ProtocolError, match="same hash"):
        loads(document(pairs(100), ["set"]))
    with pytest.raises(ProtocolError, match="same hash"):
        loads(document({"deep": [items]}, {"deep.0": ["set", bigints(1000)[1]]}))


def test_honest_sets_and_maps() -> None:
    for value in (
        {2**70 + n for n in range(1000)},
        {(n, -n): n for n in range(-500, 500)},
        set(range(5000)),
    ):
        assert loads(dumps({"x": value})) == {"x": value}


def routes(depth: int, below: Any) -> Any:
    """Annotations that reach the same place by each way to cut its path into pieces."""
    if depth == 0:
        return below
    tree: dict[str, Any] = {}
    for first in range(1, depth + 1):
        tree[".".join("a" * first)] = routes(depth - first, below)
    return tree


@pytest.mark.parametrize("kind", ["set", "URL", "map"])
def test_annotations_of_the_same_value(kind: str) -> None:
    """One value may be reached in many ways; what that costs together is bounded."""
    value: Any = {
        "set": list(range(3000)),
        "URL": "x" * 9000,
        "map": [[n, n] for n in range(1500)],
    }[kind]
    for _ in range(9):
        value = {"a": value}
    annotated = document(value, routes(9, [kind]))
    if kind == "map":  # a Map isn't a list of pairs
        with pytest.raises(ProtocolError):
            loads(annotated)
        return
    with pytest.raises(ProtocolError, match="again and again"):
        loads(annotated)
    assert loads(document(value, {".".join("a" * 9): [kind]}))


def test_indices_written_in_different_ways() -> None:
    """``0``, ``00`` and so on are one place."""
    values = {"0" * n: ["set"] for n in range(1, 200)}
    with pytest.raises(ProtocolError, match="again and again"):
        loads(document([list(range(20_000))], values))


@pytest.mark.parametrize("count", [10, 1000])
def test_many_regexps(count: int) -> None:
    """So many are compiled as may be, and the rest stays text."""
    items = [f"/{'(a|b|[c-e])?' * 40}{n}/i" for n in range(count)]
    restored = loads(document(items, {str(n): ["regexp"] for n in range(count)}))
    compiled = [item for item in restored if isinstance(item, re.Pattern)]
    assert len(compiled) == 10
    assert sum(len(item.pattern) for item in compiled) <= 5000
    assert restored[len(compiled) :] == items[len(compiled) :]


@pytest.mark.parametrize(
    "source",
    [
        "[\\u0000-\\uffff]", "[^\x00-\uffff]", "[\\x00-\uffff\\w]", "[\\0-\\uffff]", "[\\n-\\uffff]",
        "[\\u{1}\\x01-\\uffff]", "[a\\u0000-\\uffff-z]", "[\\N{NULL}-\\uffff]",
    ],
)  # fmt: skip
def test_wide_ranges(source: str) -> None:
    """A range of all characters takes a thousand times as long as its text looks."""
    restored = loads(
        document([f"/{source * 20}/", f"/{source}/i"], {"0": ["regexp"], "1": ["regexp"]})
    )
    assert isinstance(restored[0], str)
    assert _restoring._cost(source) > 300


characters = st.characters(
    exclude_categories=["Cs"], exclude_characters="\\]^-[&~|"
) | st.sampled_from("az09\0\n")


def spelled(character: str, how: int) -> str:
    number = ord(character)
    if how == 1 and number < 0x10000:
        return f"\\u{number:04x}"
    if how == 2 and number < 0x100:
        return f"\\x{number:02X}"
    if how == 3 and number < 0o100:
        return f"\\0{number:02o}"
    return character


@given(
    st.lists(st.tuples(characters, characters, st.integers(0, 3), st.integers(0, 3)), max_size=5)
)
@example([("\0", "\uffff", 0, 1)] * 5)
def test_cost_of_ranges(ranges: list[tuple[str, str, int, int]]) -> None:
    """However it is spelled, each range counts by its width."""
    source, width = "", 0
    for first, last, how, and_how in ranges:
        first, last = min(first, last), max(first, last)
        source += f"{spelled(first, how)}-{spelled(last, and_how)}"
        width += ord(last) - ord(first)
    assert _restoring._cost(f"[{source}]") >= width // 100
    if width < 1000:
        re.compile(f"[{source}]" if source else "x")
    assert _restoring._cost("[а-яё]{2,20}") < 50


def test_warnings_of_the_compiler() -> None:
    """What Python warns of, and JavaScript means otherwise, stays text; warnings are errors here."""
    restored = loads(document(["/[[a]/", "/[a||b]/"], {"0": ["regexp"], "1": ["regexp"]}))
    assert restored == ["/[[a]/", "/[a||b]/"]


@given(st.lists(st.text(st.sampled_from("a.\\b"), max_size=8), min_size=1, max_size=5))
@example(["\\.", ".", "\\\\."])
def test_paths(segments: list[str]) -> None:
    """Paths come apart as they were put together."""
    path = ".".join(segment.replace("\\", "\\\\").replace(".", "\\.") for segment in segments)
    assert _restoring._Decoder(legacy=False, budget=0)._split(path) == segments
    legacy = [segment.replace("\\", "") for segment in segments]
    path = ".".join(segment.replace(".", "\\.") for segment in legacy)
    assert _restoring._Decoder(legacy=True, budget=0)._split(path) == legacy


def test_objects_in_many_places() -> None:
    """Shared within shared would be endless to whoever walks it."""
    value: Any = {str(n): [0, 0] for n in range(30)}
    same = {f"{n}": [f"{n + 1}.0", f"{n + 1}.1"] for n in range(29)}
    with pytest.raises(ProtocolError, match="multiply"):
        loads(document(value, referentialEqualities=same))
    shared = loads(document({"a": [1, 2], "b": 0}, referentialEqualities={"a": ["b"]}))
    assert shared["a"] is shared["b"]
