"""Keys that hash alike: what would take time that grows with the square is refused before."""

from __future__ import annotations

import dataclasses
import decimal
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, NewType, TypedDict

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from anyio_kkrpc import RPCValidationError
from anyio_kkrpc._protocol._hashes import MOST_ALIKE, AlikeError, check_hashes
from anyio_kkrpc._values._alike import KeyGuard
from anyio_kkrpc._values._arguments import ArgumentConverter
from anyio_kkrpc._values._conversion import GuardedKind, checkable, convert_value
from anyio_kkrpc._values._pydantic import Unfit
from tests.alike import MODULUS, pairs

ALIKE = [n * MODULUS for n in range(1, 2001)]


class CountedKey:
    """A key that counts how often keys were compared."""

    compared = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        CountedKey.compared += 1
        return isinstance(other, CountedKey) and self.number == other.number


@pytest.mark.parametrize("repeated", [1, 50])
def test_comparisons_grow_with_the_keys(repeated: int) -> None:
    """However the keys are chosen, as many comparisons as there are keys, times a constant."""
    for numbers in (ALIKE, ALIKE[:MOST_ALIKE], ALIKE[: MOST_ALIKE + 1], [*range(5000), *ALIKE]):
        keys = [CountedKey(number) for number in numbers for _ in range(repeated)]
        CountedKey.compared = 0
        try:
            check_hashes(keys)
            set(keys)
        except AlikeError:
            pass
        assert CountedKey.compared <= 2 * (MOST_ALIKE + 1) * len(keys)


@pytest.mark.parametrize(
    "keys",
    [
        ALIKE,
        [*range(10_000), *ALIKE[: MOST_ALIKE + 1]],
        [float(n) for n in range(100)] + ALIKE[:40],
        [decimal.Decimal(n) for n in ALIKE],
        [decimal.Decimal(f"{pow(10, -n, MODULUS)}E{n}") for n in range(400)],
        [uuid.UUID(int=n) for n in ALIKE],
        [(n,) for n in ALIKE],
        pairs(200),
        [(1, (n, "x")) for n in ALIKE],
        [frozenset({n}) for n in ALIKE],
    ],
    ids=[
        "int",
        "some",
        "mixed",
        "decimal",
        "exponents",
        "uuid",
        "tuple",
        "pairs",
        "nested",
        "frozenset",
    ],
)
def test_alike(keys: list[Any]) -> None:
    with pytest.raises(AlikeError):
        check_hashes(keys)


@pytest.mark.parametrize(
    "keys",
    [
        [],
        list(range(-10_000, 10_000)),
        [-1, -2] * 10_000,
        [5] * 10_000,
        [0, 0.0, decimal.Decimal(0), False] * 1000,
        [(x, y, z) for x in range(-9, 9) for y in range(-9, 9) for z in range(-9, 9)],
        [uuid.UUID(int=n) for n in range(5000)],
        [2**n for n in range(1000)],
        [str(n) for n in ALIKE],
        ALIKE[:MOST_ALIKE],
    ],
    ids=["none", "ints", "-1, -2", "same", "equal", "grid", "uuid", "powers", "text", "few"],
)
def test_not_alike(keys: list[Any]) -> None:
    """Honest keys are taken, though some of them hash alike, or are the same."""
    check_hashes(keys)


@dataclasses.dataclass
class Data:
    x: set[int]


class Node(msgspec.Struct):
    keys: dict[uuid.UUID, int] = {}
    below: list[Node] = []


class Typed(TypedDict):
    x: frozenset[int]


class Named(NamedTuple):
    x: set[int]


class Frozen(msgspec.Struct, frozen=True):
    n: int


class Model(BaseModel):
    numbers: set[int] = set()
    by_id: dict[decimal.Decimal, int] = {}


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True)
    n: int


class Holder(msgspec.Struct):
    model: Model


Numbers = NewType("Numbers", set[int])
TEXTS = [str(n) for n in ALIKE]
HOSTILE: dict[str, tuple[Any, Any]] = {
    "set": (set[int], ALIKE),
    "any": (set[Any], ALIKE),
    "bare": (set, ALIKE),
    "frozenset": (frozenset[int], ALIKE),
    "decimals": (set[decimal.Decimal], TEXTS),
    "decimals of numbers": (set[decimal.Decimal], ALIKE),
    "uuids": (set[uuid.UUID], [str(uuid.UUID(int=n)) for n in ALIKE]),
    "tuples": (set[tuple[int, ...]], [[n] for n in ALIKE]),
    "pairs": (set[tuple[int, int]], [list(pair) for pair in pairs(200)]),
    "structs": (set[Frozen], [{"n": n} for n in ALIKE]),
    "union": (set[int | str], ALIKE),
    "dict": (dict[int, int], dict.fromkeys(TEXTS, 0)),
    "dict of uuids": (dict[uuid.UUID, int], {str(uuid.UUID(int=n)): 0 for n in ALIKE}),
    "mapping": (Mapping[int, int], dict.fromkeys(TEXTS, 0)),
    "list": (list[set[int]], [[1], ALIKE]),
    "optional": (set[int] | None, ALIKE),
    "annotated": (Annotated[set[int], msgspec.Meta(max_length=10**6)], ALIKE),
    "new type": (Numbers, ALIKE),
    "dataclass": (Data, {"x": ALIKE}),
    "recursive": (Node, {"below": [{}, {"keys": {str(uuid.UUID(int=n)): 0 for n in ALIKE}}]}),
    "typed dict": (Typed, {"x": ALIKE}),
    "named tuple": (Named, [ALIKE]),
    "model": (Model, {"numbers": ALIKE}),
    "model's dict": (Model, {"by_id": dict.fromkeys(TEXTS, 0)}),
    "models": (list[Model], [{}, {"numbers": TEXTS}]),
    "model's own words for numbers": (Model, {"numbers": [f"{n}.0" for n in ALIKE]}),
    "struct of a model": (Holder, {"model": {"numbers": [f" {n} " for n in ALIKE]}}),
    "frozen models": (set[FrozenModel], [{"n": n} for n in ALIKE]),
    "one that doesn't fit": (set[int], [*ALIKE, "x"]),
    "one that can't be a key": (set[Any], [*ALIKE, []]),
    "model with one that doesn't fit": (Model, {"numbers": [*ALIKE, "x"]}),
}


@pytest.mark.parametrize(("annotation", "value"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_values(annotation: Any, value: Any) -> None:
    """Wherever an annotation has such a set or dict, it isn't made."""
    kind = checkable(annotation)
    assert isinstance(kind, GuardedKind)
    with pytest.raises(RPCValidationError, match="keys with the same hash"):
        convert_value(value, kind, "f", "input")


def test_arguments() -> None:
    """They are looked at however they are passed."""

    def f(a: set[int] | None = None, *rest: set[int], **others: set[int]) -> None: ...

    converter = ArgumentConverter(
        "f", f, {"a": set[int] | None, "rest": set[int], "others": set[int]}
    )
    assert converter.convert([[1, 1]], {"x": [2]}) == ([{1}], {"x": {2}})
    for args, kwargs in ([ALIKE], {}), ([None, ALIKE], {}), ([], {"a": ALIKE}), ([], {"b": ALIKE}):
        with pytest.raises(RPCValidationError, match="keys with the same hash"):
            converter.convert(args, kwargs)


@pytest.mark.parametrize(
    "annotation",
    [int, str, list[int], dict[str, Any], dict[str, list[int]], set[str], set[bytes], set[float],
     dict[bytes, int], Any, int | None, tuple[int, ...], dict, uuid.UUID],
    ids=str,
)  # fmt: skip
def test_most_annotations_cost_nothing(annotation: Any) -> None:
    assert not isinstance(checkable(annotation), GuardedKind)


def _containers(value: Any) -> Iterator[Iterable[Any]]:
    if isinstance(value, (set, frozenset, dict)):
        yield value
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "mapping"):
        for item in value:
            yield from _containers(item)


numbers = st.integers() | st.integers(0, 400).map(lambda n: n * MODULUS)
many = st.lists(numbers, max_size=60) | st.integers(30, 60).map(lambda n: ALIKE[:n])
shapes: st.SearchStrategy[tuple[Any, Any]] = st.recursive(
    st.one_of(
        st.tuples(st.just(set[int]), many),
        st.tuples(st.just(frozenset[decimal.Decimal]), many.map(lambda ns: [str(n) for n in ns])),
        st.tuples(st.just(dict[int, int]), many.map(lambda ns: {str(n): 0 for n in ns})),
        st.tuples(st.just(set[tuple[int, int]]), many.map(lambda ns: [[1, n] for n in ns])),
        st.tuples(st.just(set[int | str]), many.map(lambda ns: [*ns, *map(str, ns)])),
    ),
    lambda inner: st.one_of(
        inner.map(lambda one: (list[one[0]], [one[1]])),  # type: ignore[name-defined]
        inner.map(lambda one: (dict[str, one[0]], {"k": one[1]})),  # type: ignore[name-defined]
        inner.map(lambda one: (one[0] | None, one[1])),
    ),
    max_leaves=3,
)


@given(shapes)
@example((set[int], ALIKE))
def test_what_is_made_has_few_alike(shape: tuple[Any, Any]) -> None:
    """Whatever was taken has no set or dict with too many keys of one hash; the rest as ever."""
    annotation, value = shape
    plain = msgspec.convert(value, annotation, str_keys=True)
    try:
        made = convert_value(value, checkable(annotation), "f", "input")
    except RPCValidationError:
        made = None
    worst = max(
        (
            list(map(hash, keys)).count(number)
            for keys in _containers(plain)
            for number in set(map(hash, keys))
        ),
        default=0,
    )
    if worst > MOST_ALIKE:
        assert made is None
    else:
        assert made == plain


def test_many_wrong_values() -> None:
    """What is wrong is told one by one to a bound, be there thousands."""

    def f(*numbers: int) -> None: ...

    with pytest.raises(RPCValidationError) as caught:
        ArgumentConverter("f", f, {"numbers": int}).convert(["x"] * 10_000, {})
    assert len(caught.value.issues) == 101
    with pytest.raises(RPCValidationError, match="10000 values don't fit"):
        convert_value({"numbers": ["x"] * 10_000}, checkable(Model), "f", "input")


def test_guard_alone() -> None:
    """It looks at lists and mappings however deep they are, as the kinds of key that there are."""
    guard = KeyGuard.of(dict[str, frozenset[int]])
    assert guard is not None
    guard.check({"a": list(range(5000)), "b": ALIKE[:MOST_ALIKE]})
    with pytest.raises(Unfit):
        guard.check({"a": [[ALIKE]]})
    guard.check(dict.fromkeys(ALIKE))  # its names are text
    around: list[Any] = []
    around.append(around)
    guard.check(around)


@pytest.mark.parametrize("annotation", [int, list[int], dict[str, int], set[str], Any])
def test_nothing_to_guard(annotation: Any) -> None:
    assert KeyGuard.of(annotation) is None
