"""Options in one place: the signature that a dataclass gives, and the rules of its fields."""

from __future__ import annotations

import inspect
import pydoc
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._options import (
    AnyCodec,
    Count,
    Flag,
    Seconds,
    Text,
    checked,
    one_of,
    seconds,
    takes,
)


@dataclass(frozen=True, kw_only=True)
class House:
    """Options of a house."""

    street: str = field(kw_only=False)
    name: Text = "a house"
    rooms: Count = 3
    heated: Flag = True
    roof: Annotated[Literal["flat", "gable"], one_of(Literal["flat", "gable"])] = "flat"
    patience: Seconds | None = None
    warm_up: Annotated[float, seconds(0.5)] = 1.0
    codec: AnyCodec = "json"


class Builder:
    """What takes them."""

    @takes(House, checked)
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options


def test_signature() -> None:
    """It is the dataclass's own, with types in place of rules, for ``help()`` as for editors."""
    found = inspect.signature(Builder).parameters
    assert list(found) == [*House.__dataclass_fields__]
    assert found["street"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert found["street"].default is inspect.Parameter.empty
    assert found["rooms"].kind is inspect.Parameter.KEYWORD_ONLY
    assert (found["rooms"].annotation, found["rooms"].default) == (int, 3)
    assert found["patience"].annotation == float | None
    text = pydoc.plain(pydoc.render_doc(Builder))
    # Python 3.13 gives each parameter a line, behind the bar of its class.
    words = "".join(text.replace("|", " ").split())
    assert "Builder(street:str,*,name:str='ahouse',rooms:int=3" in words


def test_values() -> None:
    """What is given is handed on by name, as its rule leaves it."""
    options = Builder("Main", rooms=4, patience=2).options
    text = {"street": "Main", "name": "a house", "roof": "flat"}
    numbers = {"rooms": 4, "heated": True, "patience": 2.0, "warm_up": 1.0}
    assert options == {**text, **numbers, "codec": options["codec"]}
    assert type(options["patience"]) is float
    assert options["codec"].name == "json"
    assert Builder("Main", codec=get_codec("cbor")).options["codec"].name == "cbor"


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "missing a required argument: 'street'"),
        (("Main", "a house"), {}, "too many positional arguments"),
        (("Main",), {"street": "Main"}, "multiple values for argument 'street'"),
        (("Main",), {"room": 1}, "unexpected keyword argument 'room'. Did you mean 'rooms'?"),
        (("Main",), {"rooms": 1, "heat": 1}, "argument 'heat'. Did you mean 'heated'?"),
        (("Main",), {"zzz": 1}, "got an unexpected keyword argument 'zzz'"),
    ],
)
def test_wrong_calls(args: Any, kwargs: Any, text: str) -> None:
    """They are TypeErrors of Python's kind, which name the constructor."""
    with pytest.raises(TypeError) as caught:
        Builder(*args, **kwargs)
    assert str(caught.value).startswith("Builder.__init__() ")
    assert str(caught.value).endswith(text)
    assert caught.value.__cause__ is None


NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "name": [None, b"x", 1, "", "x" * 257, "\xdf" * 129],
    "rooms": [None, True, 1.0, "1", 0, -1],
    "heated": [None, 0, 1, "no"],
    "roof": [None, "", "Flat", [], {}, 1],
    "patience": [True, "1", 1j, 0, -1.0, 0.0009, 1.01e7, NAN, INF],
    "warm_up": [None, 0.4999, NAN],
    "codec": [None, "pickle", b"json", []],
}
GOOD: dict[str, list[Any]] = {
    "name": ["x", "x" * 256, "\xdf" * 128],
    "rooms": [1, 10**30],
    "heated": [True, False],
    "roof": ["flat", "gable"],
    "patience": [None, 1, 0.001, 1e7],
    "warm_up": [0.5],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    """The error names the option."""
    for value in BAD[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            Builder("Main", **{name: value})


@pytest.mark.parametrize("name", GOOD)
def test_what_is_taken(name: str) -> None:
    """The bounds belong to what is taken."""
    for value in GOOD[name]:
        assert Builder("Main", **{name: value}).options[name] == value
