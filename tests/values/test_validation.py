"""Arguments, results and items of streams against annotations, at either side."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, Protocol

import pytest
from msgspec import Meta, Struct
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator
from typing_extensions import TypedDict

from anyio_kkrpc import (
    MemoryTransport,
    RemoteError,
    RemoteStream,
    RPCChannel,
    RPCValidationError,
    expose,
)
from anyio_kkrpc.middleware import CallNext, Invocation, access_log
from anyio_kkrpc.testing import connected
from tests.bounds import CALL_BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio
CODECS = pytest.mark.parametrize("codec", ["json", "cbor", None])


class Item(BaseModel):
    """A model with an alias, a constraint, a rich type and a validator of its own."""

    name: str = Field(alias="itemName", min_length=2)
    amount: int = Field(default=1, gt=0)
    due: date | None = None

    @field_validator("name")
    @classmethod
    def _strip(cls, value: str) -> str:
        return value.strip()


class Special(Item):
    """Has a field that isn't for those who are promised an `Item`."""

    secret: str = "sugar"


class Renamed(BaseModel):
    """Goes out under another name than it comes in, with a field that it makes itself."""

    model_config = ConfigDict(extra="forbid")
    size: int = Field(serialization_alias="theSize")

    @computed_field
    def double(self) -> int:
        return self.size * 2


class Strict(BaseModel):
    """Takes nothing that isn't of the right type."""

    model_config = ConfigDict(strict=True)
    day: date


@dataclass
class Line:
    """A plain dataclass with a model inside."""

    item: Item
    note: str = ""


class Row(TypedDict):
    """A dict with a model inside."""

    item: Item


@dataclass
class Point:
    """Checked by msgspec."""

    x: int
    y: int = 0


def sums(a: int, b: int = 0) -> int:
    return a + b


class Box(Struct):
    """A Struct with a model inside."""

    item: Item
    more: list[Item] = []


class Echo:
    """An object that can be called."""

    def __call__(self, a: int) -> int:
        return a


class Api:
    """Takes and gives models, and some that lie about it."""

    called_with = Echo()

    broken: int = "text"  # type: ignore[assignment]
    shared: ClassVar[int] = "text"  # type: ignore[assignment]

    def __init__(self) -> None:
        self._theme = "light"
        self.add = functools.partial(sums)

    @property
    def answer(self) -> int:
        return 42

    @property
    def wrong(self) -> int:
        return None  # type: ignore[return-value]

    @property
    def theme(self) -> str:
        return self._theme

    @theme.setter
    def theme(self, value: Annotated[str, Meta(max_length=5)]) -> None:
        self._theme = value

    def order(self, item: Item, times: int = 1) -> Item:
        assert isinstance(item, Item)
        return item.model_copy(update={"amount": item.amount * times})

    def line(self, line: Line, *, row: Row | None = None) -> list[Item]:
        assert isinstance(line.item, Item)
        return [line.item, *([row["item"]] if row else [])]

    def strict(self, value: Strict) -> int:
        return value.day.year

    def small(self, number: Annotated[int, Field(lt=10)]) -> int:
        return number

    def loose(self) -> Item:
        return {"itemName": "ab ", "amount": "3"}  # type: ignore[return-value]

    def special(self) -> Item:
        return Special(itemName="cake")

    def constructed(self) -> Item:
        return Item.model_construct(name="cake", amount="many")

    def no_stream(self) -> AsyncIterator[int]:
        return 5  # type: ignore[return-value]

    def a_stream(self) -> int:
        return of(1)  # type: ignore[return-value]

    def partly(self, known: int, unknown: NotThere, *, more: int = 0) -> int:  # type: ignore[name-defined]  # noqa: F821
        return known

    def names_of_names(self, *args: int, **kwargs: str) -> list[Any]:
        return [args, kwargs]

    def position(self, a: int, /, **others: str) -> list[Any]:
        return [a, others]

    def keyed(self, by_number: dict[int, str]) -> dict[int, str]:
        return by_number

    def boxed(self, box: Box) -> Box:
        assert isinstance(box.item, Item)
        return box

    def either(self, shape: Point | Line) -> str:
        return type(shape).__name__

    def choose(self, choice: Literal["a", "b"]) -> str:
        return choice

    async def maybe(self, numbers: AsyncIterator[int] | None = None) -> int:
        return -1 if numbers is None else sum([number async for number in numbers])

    def renamed(self) -> Renamed:
        return Renamed(size=1)

    async def many_renamed(self) -> AsyncIterator[Renamed]:
        yield Renamed(size=2)

    def unfit(self) -> Item:
        return {"itemName": "a", "amount": 0}  # type: ignore[return-value]

    def text(self) -> int:
        return "text"  # type: ignore[return-value]

    def nothing(self) -> None:
        return 5  # type: ignore[return-value]

    def point(self, x: Any) -> Point:
        return Point(x)

    def points(self) -> dict[str, list[Point]]:
        return {"a": [Point(1), Point("2")]}  # type: ignore[arg-type]

    async def later(self) -> Annotated[int, Meta(ge=10)]:
        return 9

    def raises(self) -> int:
        raise RPCValidationError("input", "inner", ["not of this call"])

    async def items(self, last: Any) -> AsyncIterator[int]:
        yield 1
        yield 2
        yield last

    async def models(self) -> AsyncIterator[Item]:
        yield Item(itemName="one")
        yield {"itemName": "two"}  # type: ignore[misc]

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def names(self, items: AsyncIterator[Item]) -> list[str]:
        return [item.name async for item in items]

    async def called(self, show: Callable[[Item], Awaitable[None]]) -> None:
        await show(Item(itemName="shown"))


class Picky(BaseModel):
    """Has a validator that fails in its own way."""

    value: int

    @field_validator("value")
    @classmethod
    def _fail(cls, value: int) -> int:
        raise RuntimeError("never")


class Picking(Protocol):
    async def pick(self) -> Picky: ...


async def of(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def check_refusal(
    codec: str | None, call: Callable[[Any], Awaitable[Any]], phase: str, issues: list[str]
) -> None:
    """Check that a call is refused in that phase, for reasons with these texts in them."""
    async with connected(Api(), codec=codec) as api:
        with pytest.raises(RPCValidationError) as caught:
            await call(api)
    assert caught.value.phase == phase
    assert len(caught.value.issues) == len(issues)
    for issue, text in zip(caught.value.issues, issues, strict=True):
        assert text in issue


@CODECS
async def test_models_travel(codec: str | None) -> None:
    """A model arrives as itself where one is annotated, by its aliases and with its defaults."""
    async with connected(Api(), codec=codec) as api:
        got = await api.order(Item(itemName="apple", due=date(2026, 12, 24)), 3)
        assert got == {"itemName": "apple", "amount": 3, "due": "2026-12-24"}
        assert await api.small(9) == 9
        wire = {"itemName": " pear "}
        pear = Item(itemName="pear")
        expected = [pear.model_dump(by_alias=True)] * 2
        assert await api.line({"item": wire}, row={"item": wire}) == expected
        assert await api.strict({"day": "2026-11-24"}) == 2026


@CODECS
@pytest.mark.parametrize(
    ("call", "issues"),
    [
        (
            lambda api: api.order({"itemName": "a", "amount": 0}),
            ["`item.itemName`", "`item.amount`"],
        ),
        (lambda api: api.order(item={"amount": 1}), ["`item.itemName`"]),
        (
            lambda api: api.order({"itemName": "ab"}, "x"),
            ["Expected `int`, got `str` - at `times`"],
        ),
        (lambda api: api.line({"item": {"itemName": "ab"}}, row={"item": 1}), ["`row.item`"]),
        (lambda api: api.line(1), ["`line`"]),
        (lambda api: api.small(10), ["less than 10 - at `number`"]),
        (lambda api: api.strict({"day": 5}), ["`value.day`"]),
        (lambda api: api.total([1, 2]), ["Expected a stream, got `list` - at `numbers`"]),
        (lambda api: api.maybe(1), ["Expected a stream, got `int` - at `numbers`"]),
        (lambda api: api.partly("1", 2), ["Expected `int`, got `str` - at `known`"]),
        (lambda api: api.partly(1, 2, more="x"), ["Expected `int`, got `str` - at `more`"]),
        (lambda api: api.add("1", 2), ["Expected `int`, got `str` - at `a`"]),
        (lambda api: api.called_with("1"), ["Expected `int`, got `str` - at `a`"]),
        (lambda api: api.names_of_names("1"), ["Expected `int`, got `str` - at `[0]`"]),
        (lambda api: api.names_of_names(a=1), ["Expected `str`, got `int` - at `a`"]),
        (
            lambda api: api.boxed({"item": {"itemName": "a"}}),
            ["itemName: String should have at least 2 characters - at `box.item`"],
        ),
        (lambda api: api.keyed({"x": "y"}), ["got `str` as a key - at `by_number`"]),
        (lambda api: api.either({"z": 1}), ["`shape.Point.x`", "`shape.Line.item`"]),
        (lambda api: api.choose("$[99]"), ["'$[99]' - at `choice`"]),
        (lambda api: api.choose("x - at `$[0].y`"), ["'x - at `$[0].y`' - at `choice`"]),
    ],
)
async def test_arguments_that_do_not_fit(
    codec: str | None, call: Callable[[Any], Awaitable[Any]], issues: list[str]
) -> None:
    """Each wrong value is named with its path, and the handler isn't run."""
    await check_refusal(codec, call, "input", issues)


@CODECS
@pytest.mark.parametrize(
    ("call", "issues"),
    [
        (lambda api: api.unfit(), ["`$.itemName`", "`$.amount`"]),
        (lambda api: api.text(), ["Expected `int`, got `str`"]),
        (lambda api: api.nothing(), ["Expected `null`, got `int`"]),
        (lambda api: api.point("x"), ["Expected `int`, got `str` - at `$.x`"]),
        (lambda api: api.points(), ["Expected `int`, got `str` - at `$[...][1].x`"]),
        (lambda api: api.later(), ["Expected `int` >= 10"]),
        (lambda api: api.wrong, ["Expected `int`, got `null`"]),
        (lambda api: api.broken, ["Expected `int`, got `str`"]),
        (lambda api: api.shared, ["Expected `int`, got `str`"]),
        (lambda api: api.constructed(), ["Expected `int`"]),
        (lambda api: api.no_stream(), ["Expected a stream, got `int`"]),
        (lambda api: api.a_stream(), ["Expected a value, got a stream"]),
    ],
)
async def test_results_that_do_not_fit(
    codec: str | None, call: Callable[[Any], Awaitable[Any]], issues: list[str]
) -> None:
    """The caller is told that the handler broke its own promise, and where."""
    await check_refusal(codec, call, "output", issues)


@CODECS
async def test_results_that_fit(codec: str | None) -> None:
    """They go out as they are; what a model makes of a value is what goes out of it."""
    async with connected(Api(), codec=codec) as api:
        assert await api.loose() == {"itemName": "ab", "amount": 3, "due": None}
        assert await api.special() == {"itemName": "cake", "amount": 1, "due": None}
        keys = {1: "a"} if codec != "json" else {"1": "a"}
        assert await api.keyed({1: "a"}) == keys
        boxed = await api.boxed({"item": {"itemName": "tea"}, "more": [Item(itemName="cup")]})
        if codec is not None:
            assert [boxed["item"]["itemName"], boxed["more"][0]["itemName"]] == ["tea", "cup"]
        assert await api.either({"x": 1}) == "Point"
        assert await api.point(5) == (Point(5) if codec is None else {"x": 5, "y": 0})
        assert await api.answer == 42


async def test_results_are_not_checked_if_not_wanted() -> None:
    """Of calls, properties and streams."""
    async with connected(expose(Api(), validate_results=False)) as api:
        assert await api.text() == "text"
        assert await api.point("x") == {"x": "x", "y": 0}
        assert await api.wrong is None
        assert [item async for item in api.items("three")] == [1, 2, "three"]


async def test_what_a_handler_raises_is_its_own() -> None:
    """A validation error that came out of a handler isn't taken for one of its arguments."""
    async with connected(Api()) as api:
        with pytest.raises(RemoteError) as caught:
            await api.raises()
        assert caught.value.name == "RPCValidationError"


@CODECS
async def test_items_of_results(codec: str | None) -> None:
    """The items before the wrong one arrive, and the source is closed."""
    got = []
    async with connected(Api(), codec=codec) as api:
        assert [item async for item in api.items(3)] == [1, 2, 3]
        with pytest.raises(RPCValidationError) as caught:
            async for item in api.items("three"):
                got.append(item)
        assert got == [1, 2]
        assert (caught.value.phase, caught.value.method) == ("output", "items")
        assert [item["itemName"] async for item in api.models()] == ["one", "two"]


async def test_arguments_by_name() -> None:
    """Names of other parameters may be names of keyword arguments."""
    async with connected(Api()) as api:
        assert await api.names_of_names(1, args="x", kwargs="y") == [
            [1],
            {"args": "x", "kwargs": "y"},
        ]
        assert await api.position(1, a="x") == [1, {"a": "x"}]
        assert await api.maybe() == -1
        assert await api.maybe(of(1, 2)) == 3
        with pytest.raises(RemoteError, match="invalid input"):
            await api.maybe(of("1"))


async def test_constructor_of_a_struct() -> None:
    """What a Struct's fields say is checked, though its constructor tells nothing."""

    class Pair(Struct):
        left: int
        right: list[int] = []

    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose={"Pair": Pair}), RPCChannel(a) as channel:
        with pytest.raises(RPCValidationError, match="at `left`"):
            await channel.construct("Pair", "x")
        with pytest.raises(RPCValidationError, match="at `right\\[0\\]`"):
            await channel.construct("Pair", 1, right=["x"])


def test_what_is_not_checked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """An annotation that doesn't resolve."""
    expose(Api())
    assert [record.getMessage() for record in caplog.records] == [
        "Api.partly: unknown isn't checked: name 'NotThere' is not defined"
    ]


async def test_validator_that_fails_in_its_own_way() -> None:
    """It is an answer that doesn't fit, also among those to a broadcast."""

    async with pair({"pick": lambda: {"value": 1}}) as link:
        channel = link.client
        typed = channel.get_api(Picking)
        with pytest.raises(RPCValidationError, match="RuntimeError: never"):
            await typed.pick()
        replies = [
            reply async for reply in channel.broadcast(typed.pick(), timeout=CALL_BOUND, limit=1)
        ]
        assert isinstance(replies[0].error, RPCValidationError)


@CODECS
async def test_items_of_arguments(codec: str | None) -> None:
    """They are converted as the handler reads them."""
    async with connected(Api(), codec=codec) as api:
        assert await api.total(of(1, 2, 3)) == 6
        assert await api.names(of({"itemName": "one"}, Item(itemName="two"))) == ["one", "two"]
        with pytest.raises(RemoteError, match="total: invalid input: Expected `int`, got `str`"):
            await api.total(of(1, "2"))


async def test_model_for_a_callback() -> None:
    """A callback's annotation isn't taken for a model."""
    shown = []
    async with connected(Api()) as api:
        await api.called(shown.append)
    assert shown == [{"itemName": "shown", "amount": 1, "due": None}]


class Typed(Protocol):
    """What a client says of `Api`."""

    @property
    def answer(self) -> Awaitable[int]: ...

    broken: Awaitable[Item]

    async def order(self, item: Item, times: int = 1) -> Item: ...

    async def text(self) -> list[Item]: ...

    async def total(self, numbers: Any) -> AsyncIterator[int]: ...

    async def later(self) -> int: ...

    def models(self) -> AsyncIterator[Item]: ...

    def items(self, last: Any) -> RemoteStream[int]: ...

    def called(self, show: Any) -> AbstractAsyncContextManager[AsyncIterator[Item]]: ...


async def test_protocol_with_models() -> None:
    """Results, properties and items become what the client's Protocol says."""
    table = expose(Api(), validate_results=False)
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose=table), RPCChannel(a) as channel:
        api = channel.get_api(Typed)
        assert await api.order(Item(itemName="apple"), 2) == Item(itemName="apple", amount=2)
        assert [item async for item in api.models()] == [
            Item(itemName="one"),
            Item(itemName="two"),
        ]
        with pytest.raises(RPCValidationError) as caught:
            await api.text()
        assert (caught.value.phase, caught.value.method) == ("output", "text")
        assert await api.answer == 42
        with pytest.raises(RPCValidationError, match="broken"):
            await api.broken
        async with api.items("three") as items:
            with pytest.raises(RPCValidationError, match=r"items: invalid output: Expected `int`"):
                assert [item async for item in items]


async def test_setter() -> None:
    """What a setter takes is its own annotation, not the getter's."""
    a, b = MemoryTransport.pair(codec="json")
    table = expose(Api(), writable=["theme"])
    async with a, b, RPCChannel(b, expose=table), RPCChannel(a) as channel:
        await channel.set_property("theme", "dark")
        assert await channel.get_api().theme == "dark"
        with pytest.raises(RPCValidationError) as caught:
            await channel.set_property("theme", "darker")
        assert caught.value.phase == "input"


async def test_results_are_checked_after_middleware() -> None:
    """What a middleware returns goes out too."""

    async def spoil(call: Invocation, call_next: CallNext) -> Any:
        return str(await call_next(call))

    async with connected(Api(), middleware=[spoil]) as api:
        with pytest.raises(RPCValidationError) as caught:
            await api.small(1)
        assert caught.value.phase == "output"


@pytest.mark.parametrize("middleware", [[], [access_log()]], ids=["plain", "middleware"])
async def test_a_result_is_made_once(middleware: list[Any]) -> None:
    """What a model is on the wire need not be what the model takes."""
    async with connected(Api(), middleware=middleware) as api:
        assert await api.renamed() == {"theSize": 1, "double": 2}
        assert [item async for item in api.many_renamed()] == [{"theSize": 2, "double": 4}]


async def test_model_that_can_not_be_sent() -> None:
    """A model whose values pydantic can't make JSON of is the sender's TypeError."""

    class Odd(BaseModel):
        value: Any

    async with connected(Api()) as api:
        with pytest.raises(TypeError, match="Odd can't be encoded"):
            await api.order(Odd(value=object()))
