"""What can be reached, and that nothing else can."""

from __future__ import annotations

import enum
import functools
import types
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from anyio_kkrpc import (
    MemoryTransport,
    MethodNotFoundError,
    ProtocolError,
    RPCChannel,
    expose,
    in_thread,
)
from anyio_kkrpc._protocol._records import Reply, Request
from anyio_kkrpc.abc import Envelope
from tests.pairs import pair

touched: list[str] = []


class Nested:
    def hello(self) -> str:
        return "hello"


@dataclass
class Point:
    x: int = 1
    y: int = 2

    def norm(self) -> int:
        return self.x


class Color(enum.Enum):
    RED = 1


class Base:
    def inherited(self) -> str:
        return "inherited"

    def _protected(self) -> str:
        touched.append("_protected")
        return "secret"


class Api(Base):
    number = 5
    text = "plain"
    nested = Nested()
    point = Point()
    color = Color.RED
    table = {"first": {"second": lambda: 2}, "_hidden": lambda: 1, 3: "not a name"}

    _private = "secret"
    __mangled = "secret"

    def __init__(self) -> None:
        self.settings = {"theme": "light", "size": 3}
        self._cache = {"secret": 1}

    def __call__(self) -> str:
        touched.append("__call__")
        return "called"

    def call(self) -> str:
        return "fine"

    @property
    def computed(self) -> int:
        touched.append("computed")
        return 42

    @classmethod
    def made(cls) -> str:
        return cls.__name__

    @staticmethod
    def static() -> str:
        return "static"

    class Counter:
        def __init__(self, start: int = 0) -> None:
            self.value = start
            self._steps = 1


ATTACKS: list[list[Any]] = [
    ["__class__"],
    ["__class__", "__init__", "__globals__"],
    ["__init__", "__globals__"],
    ["__init__", "__globals__", "os", "system"],
    ["__class__", "__mro__"],
    ["__class__", "mro"],
    ["mro"],
    ["constructor"],
    ["constructor", "prototype"],
    ["prototype"],
    ["__proto__"],
    ["__dict__"],
    ["__call__"],
    ["__reduce_ex__"],
    ["__subclasses__"],
    ["_private"],
    ["_Api__mangled"],
    ["_protected"],
    ["_cache"],
    ["_cache", "secret"],
    ["call", "__globals__"],
    ["call", "func_globals"],
    ["call", "__func__"],
    ["call", "__self__"],
    ["call", "__self__", "call"],
    ["nested.hello"],
    ["nested", "hello", ""],
    ["settings.theme"],
    [""],
    ["", ""],
    ["", "call"],
    ["call", ""],
    [],
    ["text", "format"],
    ["text", "upper"],
    ["settings", "update"],
    ["settings", "clear"],
    ["settings", "__class__"],
    ["table", "_hidden"],
    ["table", "3"],
    ["color", "name"],
    ["color", "__class__"],
    ["number", "real"],
    ["made", "__func__"],
    ["Counter", "__init__"],
    ["Counter", "mro"],
    ["Counter", "_steps"],
    ["\uff43all"],  # a full-width c
    ["call\u200b"],
    ["CALL"],
    ["call "],
    ["call\x00"],
    ["x" * 100_000],
    ["call"] * 10_000,
    ["a"] * 10_000,
]
WRONG_TYPES: list[Any] = [
    [1],
    [None],
    ["call", 0],
    [["call"]],
    [{"call": 1}],
    [True],
    "call",
    None,
    {"0": "call"},
]


def _reached(table: Any, op: str, path: list[str]) -> bool:
    entries = {"call": table.methods, "new": table.classes}.get(op, table.properties)
    return tuple(path) in entries


@pytest.mark.anyio
@pytest.mark.parametrize("codec", ["json", "cbor", None])
async def test_attack_paths(codec: str | None) -> None:
    """Nothing but the table is reached, nothing of the object runs, and the channel goes on."""
    touched.clear()
    api = Api()
    table = expose(api, writable=["settings.theme"])
    async with pair(table, codec=codec) as link:
        for op in ("call", "get", "set", "new"):
            for path in ATTACKS:
                with pytest.raises(MethodNotFoundError) as caught:
                    await link.client._calls.request(
                        op,  # type: ignore[arg-type]
                        path,
                        args=[] if op in ("call", "new") else None,
                        value=1 if op == "set" else msgspec.UNSET,
                    )
                assert len(str(caught.value)) < 300
                assert not _reached(table, op, path)
        assert await link.api.call() == "fine"
        assert link.server.statistics().handlers == 0
    assert touched == []
    assert api._cache == {"secret": 1}
    assert api.settings == {"theme": "light", "size": 3}


@pytest.mark.anyio
@pytest.mark.parametrize("path", WRONG_TYPES, ids=repr)
async def test_paths_of_a_wrong_type(path: Any) -> None:
    """A record whose path isn't a list of texts is none, and harms nobody."""
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b, expose=Api()) as channel:
        with pytest.raises(ProtocolError):
            await a.send(Envelope(Request("bad", "call", path)))
        await a.send(Envelope(Request("good", "call", ["call"])))
        reply = (await a.receive()).record
        assert isinstance(reply, Reply)
        assert (reply.id, reply.v) == ("good", "fine")
        assert channel.statistics().handlers == 0


@pytest.mark.anyio
async def test_what_is_reached() -> None:
    """Public members, inherited ones, nested objects, dicts, dataclasses, properties, classes."""
    touched.clear()
    table = expose(Api(), writable=["settings.theme"])
    assert touched == []  # properties aren't evaluated by exposing
    assert list(table) == [
        "Counter",
        "call",
        "color",
        "computed",
        "inherited",
        "made",
        "nested.hello",
        "number",
        "point",
        "point.norm",
        "point.x",
        "point.y",
        "settings",
        "settings.size",
        "settings.theme",
        "static",
        "table",
        "table.first",
        "table.first.second",
        "text",
    ]
    assert repr(table).startswith("<Exposed Counter, call")
    async with pair(table) as link:
        api = link.api
        assert await api.inherited() == "inherited"
        assert await api.made() == "Api"
        assert await api.static() == "static"
        assert await api.nested.hello() == "hello"
        assert await api.table.first.second() == 2
        assert await api.point.norm() == 1
        assert await api.point.x == 1
        assert await api.computed == 42
        assert await api.color == 1
        assert await link.client.construct("Counter", 5) == {"value": 5}
        await link.client.set_property("settings.theme", "dark")
        assert await api.settings.theme == "dark"
        for name in ("settings.size", "number", "computed", "point.x"):
            with pytest.raises(MethodNotFoundError, match="is not writable"):
                await link.client.set_property(name, 1)


def test_what_comes_later_is_not_reached() -> None:
    """The table is built once."""
    api = Api()
    table = expose(api)
    api.added = lambda: 1  # type: ignore[attr-defined]
    assert "added" not in list(table)


@pytest.mark.parametrize(
    "api",
    [Api, len, lambda: 1, 5, "text", None, [1]],
    ids=["class", "builtin", "function", "int", "str", "none", "list"],
)
def test_what_cannot_be_exposed(api: Any) -> None:
    """Classes, functions and plain values are refused, with what to give instead."""
    with pytest.raises(TypeError, match="expose: needs an object"):
        expose(api)


def test_wrong_writable() -> None:
    """Names that aren't properties are refused at once."""
    with pytest.raises(ValueError, match="'call' is not an exposed property"):
        expose(Api(), writable=["call"])
    with pytest.raises(ValueError, match="'nothing'"):
        expose(Api(), writable=["nothing"])
    with pytest.raises(TypeError, match="a list of names"):
        expose(Api(), writable="number")


def test_modules() -> None:
    """A module shows its __all__, else its own functions, classes and data, not its imports."""
    module = types.ModuleType("some_module")
    exec(
        "import os\nfrom json import dumps\nLIMIT = 3\nITEMS = {'a': 1}\n_hidden = 1\n"
        "def run(): return 1\nclass Thing: pass\n",
        module.__dict__,
    )
    assert list(expose(module)) == ["ITEMS", "ITEMS.a", "LIMIT", "Thing", "run"]
    module.__all__ = ["run", "_hidden"]  # type: ignore[attr-defined]
    assert list(expose(module)) == ["run"]
    holder = types.SimpleNamespace(math=module, lib=types.ModuleType("json"), os=__import__("os"))
    assert list(expose(vars(holder))) == ["math.run"]


def test_cycles_and_depth() -> None:
    """An object that contains itself doesn't make an endless table."""

    class Node:
        def name(self) -> str:
            return "node"

    node = Node()
    node.me = node  # type: ignore[attr-defined]
    assert list(expose(node)) == ["name"]
    deep: dict[str, Any] = {"leaf": len}
    for _ in range(50):
        deep = {"down": deep}
    assert max(name.count(".") for name in expose(deep)) < 20


def test_slots_and_structs() -> None:
    """Slots without a value are left out; Structs are both values and namespaces."""

    class Slotted:
        __slots__ = ("full", "void")

        def __init__(self) -> None:
            self.full = 1

    class Limits(msgspec.Struct):
        high: int = 9

    assert list(expose(Slotted())) == ["full"]
    assert list(expose({"limits": Limits()})) == ["limits", "limits.high"]


def test_in_thread_is_for_synchronous_functions() -> None:
    """An asynchronous function never blocks the loop."""

    async def asynchronous() -> None: ...

    with pytest.raises(TypeError, match="is asynchronous"):
        in_thread(asynchronous)


@pytest.mark.anyio
async def test_names_as_typescript_has_them() -> None:
    """With naming="camel" each name has a second one; what the API itself has comes first."""

    class Settings:
        font_size = 10

    class Naming:
        user_settings = Settings()
        sameName = "own"
        same_name = "other"

        def with_progress(self) -> str:
            return "done"

        def trailing_(self) -> str:
            return "trailing"

    table = expose(Naming(), writable=["user_settings.font_size"], naming="camel")
    a, b = MemoryTransport.pair()
    async with (
        a,
        b,
        RPCChannel(b, expose=table),
        RPCChannel(a) as channel,
    ):
        api = channel.get_api()
        assert await api.withProgress() == await api.with_progress() == "done"
        assert await api.trailing() == "trailing"
        await channel.set_property("userSettings.fontSize", 12)
        assert await api.user_settings.font_size == 12
        assert await api.sameName == "own"
        assert await api.same_name == "other"
    with pytest.raises(ValueError, match="naming"):
        expose(Naming(), naming="kebab")  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_cached_properties() -> None:
    """They are read when somebody asks, and not when they are exposed."""

    class Lazy:
        made = 0

        @functools.cached_property
        def answer(self) -> int:
            self.made += 1
            return 42

    lazy = Lazy()
    async with pair(lazy) as link:
        assert lazy.made == 0
        assert await link.api.answer == 42
        assert await link.api.answer == 42
        assert lazy.made == 1


def test_a_class_is_to_be_made_first() -> None:
    """The error says how."""

    class Api:
        pass

    with pytest.raises(TypeError, match=r"make one: Api\(\)"):
        expose(Api)
