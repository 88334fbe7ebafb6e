"""What is done to an object that others hold, without any of them."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest

from anyio_kkrpc import MethodNotFoundError, RPCValidationError, expose, in_thread
from anyio_kkrpc._driver._asking import RefusedError
from anyio_kkrpc._references._given import Referent
from anyio_kkrpc._serving._referring import operation

pytestmark = pytest.mark.anyio


class Thing:
    kind: str = "a thing"

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    def __hash__(self) -> int:
        return 1

    def __call__(self, number: int) -> int:
        return number + 1

    def told(self) -> str:
        return self.name

    @in_thread
    def slowly(self) -> str:
        return f"slowly: {self.name}"

    def nothing(self) -> None:
        return


class Slotted:
    """It can't be referred to weakly."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def told(self) -> int:
        return self.number


async def do(value: Any, what: str, *path: str, args: Any = ()) -> Any:
    referent = value if isinstance(value, Referent) else Referent(value)
    result = operation(referent, what, path)(*args)
    return await result if hasattr(result, "__await__") else result


async def test_each_object_has_a_table_of_its_own() -> None:
    """Also one that is equal to another one. It keeps the object no longer than who asks."""
    one, two = Referent(Thing("one")), Referent(Thing("two"))
    for thing in (one, two, one):
        name = thing.value.name
        assert await do(thing, "call", "told") == name
        assert await do(thing, "get", "name") == name
        assert await do(thing, "apply", args=(1,)) == 2
        assert await do(thing, "member", "name") == name
    assert await do(one, "call", "slowly") == "slowly: one"
    assert await do(Slotted(5), "call", "told") == 5
    gone = weakref.ref(one.value)
    del one, thing
    gc.collect()
    assert gone() is None


async def test_what_is_not_in_it() -> None:
    """It can't be reached in any way, nor can what isn't of its kind."""
    thing = Thing("one")
    ways = [(what, path) for what in ("call", "set") for path in ((), ("__class__",), ("x",))]
    ways += [("get", ("__class__",)), ("get", ("x",))]
    ways += [("apply", ("told",)), ("call", ("name",)), ("get", ("told",)), ("set", ("name",))]
    ways += [("other", ("told",)), ("member", ("__dict__",)), ("member", ("told", "__self__"))]
    for what, path in ways:
        with pytest.raises(RefusedError) as refused:
            await do(thing, what, *path, args=(1,) if what == "set" else ())
        assert isinstance(refused.value.error, MethodNotFoundError)
    for value in (Thing, object(), 5, [1]):
        with pytest.raises(RefusedError):
            await do(value, "apply")


async def test_arguments_and_values_are_checked() -> None:
    thing = Thing("one")
    table = expose(thing, writable=["kind"])
    assert await do(table, "set", "kind", args=("new",)) is True
    assert thing.kind == "new"
    for value, what, path in ((table, "set", ("kind",)), (thing, "apply", ())):
        with pytest.raises(RefusedError) as refused:
            await do(value, what, *path, args=([],))
        assert isinstance(refused.value.error, RPCValidationError)


async def test_a_partial_is_a_function() -> None:
    """What it has bound is neither read nor gone round."""
    bound = partial(pow, 2, mod=1000)
    assert await do(bound, "apply", args=(10,)) == 24
    for what, name in [("get", "args"), ("get", "keywords"), ("call", "func"), ("member", "func")]:
        with pytest.raises(RefusedError, match="a function has no"):
            await do(bound, what, name)


async def test_what_is_between_is_passed_back_of_a_table_too() -> None:
    """What is meant is of the object that the table is of, and nothing of the table itself."""

    class Inner:
        def told(self) -> int:
            return 1

    class Outer:
        def __init__(self) -> None:
            self.methods = self.some_inner = Inner()
            self.nested = {"inner": self.methods}

    outer = Outer()
    table = expose(outer, naming="camel")
    assert await do(table, "member", "methods") is outer.methods
    assert await do(table, "member", "someInner") is outer.methods
    assert await do(table, "member", "nested", "inner") is outer.methods
    assert await do(outer, "member", "some_inner") is outer.methods
    for name in ("properties", "of", "copy"):
        with pytest.raises(RefusedError):
            await do(table, "member", name)
