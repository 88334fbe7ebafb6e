"""Models of pydantic, as annotations and as values, by themselves."""

from __future__ import annotations

import dataclasses
from datetime import date
from typing import Annotated, Any, TypedDict

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_serializer

from anyio_kkrpc._values._pydantic import (
    MOST_ISSUES,
    ModelKind,
    Unfit,
    decode,
    dump,
    is_model,
    mentions_model,
    plain,
)


class Pet(BaseModel):
    model_config = ConfigDict(strict=True, populate_by_name=True)
    name: str = Field(alias="Name")
    born: date | None = None


class Odd(BaseModel):
    x: int

    @field_serializer("x")
    def refuse(self, value: int) -> int:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")


@dataclasses.dataclass
class Owner:
    pet: Pet


class Row(TypedDict):
    pet: Pet


class Unresolved:
    __total__ = True
    x: "Missing"  # type: ignore[name-defined]  # noqa: F821, UP037


@pytest.mark.parametrize(
    ("annotation", "mentioned"),
    [
        (Pet, True),
        (list[Pet], True),
        (dict[str, Pet | None], True),
        (Owner, True),
        (Row, True),
        (Annotated[int, Field(gt=1)], True),
        (Annotated[list[Pet], "x"], True),
        (Annotated[int, "x"], False),
        (list[int], False),
        (Unresolved, False),
        (Any, False),
    ],
)
def test_where_models_are(annotation: Any, mentioned: bool) -> None:
    assert mentions_model(annotation) is mentioned


def test_as_json() -> None:
    """A strict model takes the text of a date, which is all that JSON has."""
    pet = ModelKind(Pet).convert({"Name": "Rex", "born": "2020-01-02"})
    assert pet.born == date(2020, 1, 2)
    # A value that isn't JSON is taken as it is, and so is a model.
    assert ModelKind(Pet).convert({"Name": "Rex", "born": pet.born}) == pet
    assert ModelKind(Pet).convert(pet) is pet


def test_what_does_not_fit() -> None:
    """Each wrong value has its path; very many are counted only."""
    with pytest.raises(Unfit) as caught:
        ModelKind(list[Pet]).convert([{"Name": "Rex"}, {"Name": 1}])
    assert [path for path, _ in caught.value.args[0]] == ["[1].Name"]
    with pytest.raises(Unfit) as caught:
        ModelKind(list[Pet]).convert([{}] * (MOST_ISSUES + 1))
    assert caught.value.args[0] == [("", f"{MOST_ISSUES + 1} values don't fit")]


def test_goes_out() -> None:
    """By its aliases, as JSON, and only if it still is what it says."""
    pet = Pet(Name="Rex", born=date(2020, 1, 2))
    wire = {"Name": "Rex", "born": "2020-01-02"}
    assert ModelKind(Pet).dump(pet) == dump(pet) == plain(pet) == wire
    pet.name = 1  # type: ignore[assignment]
    with pytest.raises(Unfit):
        ModelKind(Pet).dump(pet)
    with pytest.raises(Unfit, match="no text"):
        ModelKind(Odd).dump(Odd(x=1))
    with pytest.raises(TypeError, match="Odd can't be encoded"):
        dump(Odd(x=1))


def test_within_what_msgspec_decodes() -> None:
    assert decode(Pet, {"Name": "Rex"}) == Pet(Name="Rex")
    assert decode(int, "as it is") == "as it is"
    with pytest.raises(ValueError, match=r"^Name: "):
        decode(Pet, {})


def test_plain_values() -> None:
    class Name(str):
        __slots__ = ()

    assert type(plain(Name("x"))) is str
    assert type(plain(True)) is int
    with pytest.raises(TypeError, match="Encoding objects of type object"):
        plain(object())
    assert not is_model(Pet)
