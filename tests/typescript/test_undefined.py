"""``undefined`` of JavaScript, as recorded peers have it and as Python says and reads it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec import UNSET, Struct, UnsetType

from anyio_kkrpc import RPCValidationError, expose
from anyio_kkrpc._protocol._values import ARGUMENT
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.records import Reply, Request, StreamReply
from anyio_kkrpc.typescript import UNDEFINED
from anyio_kkrpc.typescript.classic import ClassicCodec
from anyio_kkrpc.typescript.compact import CompactCodec
from tests.pairs import pair

from .replaying import VECTORS, cases_in, recorded_peer

CASES = cases_in("kkrpc-undefined")
LINES = [json.loads(line) for line in (VECTORS / "kkrpc-undefined.jsonl").read_text().splitlines()]


def shown(value: Any) -> str:
    """Return a value as the recorded server shows it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
    return {None: "null", UNDEFINED: "undefined"}.get(value, str(value))


class Api:
    def __init__(self) -> None:
        self.s: dict[str, Any] = {"x": 1}

    def nothing(self) -> None:
        return None

    def nul(self) -> Any:
        return None

    def echo(self, *args: Any) -> Any:
        return args[0] if args else UNDEFINED

    def see(self, *args: Any) -> str:
        return f"{len(args)} arguments {','.join(map(shown, args))}"

    def has(self, value: Any) -> str:
        return shown(value)

    def objU(self) -> Any:  # names as they were recorded
        return {"a": UNDEFINED, "b": 1}

    def listU(self) -> Any:
        return [UNDEFINED, 1]

    def readS(self) -> str:
        return shown(self.s)

    async def cb(self, f: Callable[..., Any]) -> None:
        await f()
        await f(UNDEFINED)
        await f(1, UNDEFINED)
        await f(UNDEFINED, 1)

    async def gen(self) -> AsyncIterator[Any]:
        yield UNDEFINED
        yield None


def answered_at_once(case: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return a case with answers behind what they answer: Python waits for what a function gives,
    and the recorded server didn't.
    """
    answers = {said["id"]: (who, said) for who, said in case if (who, said["t"]) == ("client", "r")}
    ordered: list[tuple[str, Any]] = []
    for who, said in case:
        if (who, said["t"]) != ("client", "r"):
            ordered.append((who, said))
            if who == "server" and said["t"] == "q":
                ordered.append(answers[said["id"]])
    return ordered


@pytest.mark.anyio
@pytest.mark.parametrize("generation", ["0.7 json", "0.7 superjson", "2.1", "2.1 remote-refs"])
async def test_recorded_cases(generation: str) -> None:
    """A Python server says what the recorded one said, and sees what that one saw."""
    cases = [case for name, case in CASES.items() if name.startswith(f"{generation}:")]
    assert len(cases) >= 14
    if "remote-refs" in generation:
        cases = [answered_at_once(case) for case in cases]
    api = Api()
    options = {"dialect": "kkrpc-2"} if generation[0] == "2" else {}
    async with recorded_peer(expose(api, writable=["s.x"]), **options) as (_, peer):
        for sender, message in [line for case in cases for line in case]:
            if sender == "client":
                await peer.say(message)
            else:
                await peer.expect(message)
    assert api.s == {"x": UNDEFINED}


@pytest.mark.parametrize("vector", LINES, ids=lambda vector: vector["note"][:40])
def test_recorded_lines(vector: dict[str, Any]) -> None:
    """Each is the same again once it was read and written."""
    text = vector["fields"]["data"]
    codec: Any = CompactCodec()
    if text.endswith("\n"):
        codec = ClassicCodec(superjson=text.startswith('{"json":'))
    got, expected = json.loads(codec.encode(codec.decode(text.encode()))), json.loads(text)
    if vector["kind"] == "callback":
        for message in (got, expected):  # an id that nothing refers to
            del message.get("json", message)["id"]
    if "2.1 remote-refs" in vector["note"] and "a" in got:
        # That class of kkrpc writes arguments bare, and reads them in envelopes, too.
        got["a"] = [bare(item) for item in got["a"]]
    assert got == expected


def bare(item: Any) -> Any:
    """Return what stands in the envelope of an argument."""
    return item["v"] if item.__class__ is dict and item.keys() == {ARGUMENT, "v"} else item


class Options(Struct):
    depth: int = 3
    note: str | UnsetType = UNSET


class Defaults:
    name: str | None = "none"

    def greet(self, name: str = "you", greeting: str = "hello", *, mark: str = "!") -> str:
        return f"{greeting} {name}{mark}"

    def by_place(self, first: int = 1, second: int = 2, /, *rest: int) -> list[int]:
        return [first, second, *rest]

    def wrong_default(self, first: int = None, second: int = 2) -> Any:  # type: ignore[assignment]  # noqa: RUF013
        return [first, second]

    def optional(self, value: int | None) -> Any:
        return value

    def either(self, value: int | UnsetType) -> bool:
        return value is UNDEFINED

    def whole(self, value: int) -> int:
        return value

    def inner(self, values: list[int | None], options: Options) -> Any:
        return [values, options.depth, options.note is UNSET]

    def kinds(self, values: dict[str, int]) -> dict[str, int]:
        return values

    def any_kind(self, value: Any) -> str:
        return shown(value)

    def gives(self) -> int | None:
        return UNDEFINED  # type: ignore[return-value]


@pytest.mark.anyio
@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_arguments_with_defaults(codec: str) -> None:
    """One that is undefined has its default, as in JavaScript; without one it is None, or itself."""
    async with pair(expose(Defaults()), codec=codec) as (_, _, api, _):
        assert await api.greet(UNDEFINED) == "hello you!"
        assert await api.greet(UNDEFINED, "hi") == "hi you!"
        assert await api.greet("ada", UNDEFINED, mark=UNDEFINED) == "hello ada!"
        assert await api.greet(UNDEFINED, UNDEFINED, mark="?") == "hello you?"
        assert await api.by_place(UNDEFINED, 5) == [1, 5]
        assert await api.by_place(UNDEFINED, UNDEFINED, 7) == [1, 2, 7]
        assert await api.wrong_default(UNDEFINED, 3) == [None, 3]
        assert await api.optional(UNDEFINED) is None
        assert await api.either(UNDEFINED) is True
        assert await api.any_kind(UNDEFINED) == "undefined"
        assert await api.inner([1, UNDEFINED], {"note": UNDEFINED}) == [[1, None], 3, True]
        assert await api.kinds({"a": 1, "b": UNDEFINED}) == {"a": 1}
        assert await api.gives() is None
        for call in (api.whole(UNDEFINED), api.kinds({"a": [UNDEFINED]})):
            with pytest.raises(RPCValidationError):
                await call


@pytest.mark.anyio
async def test_what_is_set_to_undefined() -> None:
    """Where an annotation doesn't take it, it is None."""
    holder = Defaults()
    async with pair(expose(holder, writable=["name"])) as (client, _, _, _):
        await client.set_property("name", UNDEFINED)
    assert holder.name is None


@pytest.mark.anyio
@pytest.mark.parametrize("checked", [False, True])
async def test_results_that_are_none(checked: bool) -> None:
    """What is annotated as None is told as undefined, checked or not; what else is None is null."""

    results: list[Any] = []

    async def seen(call: Any, forward: Any) -> Any:
        results.append(await forward(call))
        return results[-1]

    table = expose(Api(), validate_results=checked)
    for middleware in ((), (seen,)):
        async with recorded_peer(table, dialect="kkrpc-2", middleware=middleware) as (_, peer):
            for name in ("nothing", "nul"):
                await peer.say({"t": "q", "id": name, "op": "call", "p": [name], "a": []})
            assert await peer.hear() == {"t": "r", "id": "nothing"}
            assert await peer.hear() == {"t": "r", "id": "nul", "v": None}
    assert results == [None, None]


class Fields(Struct):
    items: list[Any]


@pytest.mark.parametrize("name", ["json", "cbor", "kkrpc-2", "kkrpc-0"])
def test_undefined_within_values(name: str) -> None:
    """Where a codec has no word for it, a member is left out, and an item is null."""
    codecs = {"kkrpc-2": CompactCodec(), "kkrpc-0": ClassicCodec(superjson=False)}
    codec: Any = codecs.get(name) or get_codec(name)
    value = {"a": UNDEFINED, "b": [UNDEFINED, {"c": (UNDEFINED,)}], "d": {1}, "e": None}
    record = codec.decode(codec.encode(Reply("1", value)))
    assert record == Reply("1", {"b": [None, {"c": [None]}], "d": [1], "e": None})
    item = StreamReply("1", "s", d=False, v=UNDEFINED)
    assert codec.decode(codec.encode(Reply("1", UNDEFINED))) == Reply("1")
    assert codec.decode(codec.encode(item)).v is UNDEFINED
    with pytest.raises(TypeError, match="undefined"):
        get_codec("json").encode(Reply("1", Fields([UNDEFINED])))
    assert codec.encode(Request("1", "set", ["a"], v=UNDEFINED))
