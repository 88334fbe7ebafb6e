"""Objects by reference, as recorded peers of kkrpc 2.1 have them."""

from __future__ import annotations

import gc
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    MethodNotFoundError,
    RemoteObject,
    by_reference,
    expose,
    release,
    set_member,
)
from anyio_kkrpc._spoken._kkrpc2 import CompactSpoken
from anyio_kkrpc.records import CallbackCall, CallbackRelease, Reply
from anyio_kkrpc.redis.dialects.kkrpc2 import CompactDialect
from anyio_kkrpc.typescript._references import ids_in
from anyio_kkrpc.typescript._releases import DELAY

from .replaying import MemoryBytes, Recorded, cases_in, recorded_peer, texts_in

pytestmark = pytest.mark.anyio

CASES = cases_in("kkrpc-2-refs")


class RangeError(Exception):
    def __init__(self) -> None:
        super().__init__("in ref")
        self.code = 5


class Inner:
    x: Any = 5


class Deep:
    def __init__(self) -> None:
        self.n = Inner()


class DeepObject:
    def getK(self) -> int:  # names as they were recorded
        return 3


class Frozen:
    a = 1


class Counter:
    """The object of the recorded server."""

    value: Any = 1
    hook: Any = None
    marked: Any

    def __init__(self) -> None:
        self.deep = Deep()
        self.deepObj = DeepObject()
        self.frozen = Frozen()

    def inc(self, by: int) -> int:
        self.value += by
        return int(self.value)

    def self(self) -> Any:
        return table_of(self)

    def makeFn(self) -> Any:
        return by_reference(lambda text: f"made {text}")

    def fail(self) -> None:
        raise RangeError

    async def withCb(self, function: Callable[[int], Awaitable[Any]]) -> Any:
        return await function(3)


class Error(Exception):
    """As it is named there."""

    def __init__(self, text: str, **fields: Any) -> None:
        super().__init__(text)
        vars(self).update(fields)


def table_of(counter: Any) -> Any:
    if not hasattr(counter, "table"):
        counter.table = expose(counter, writable=["value", "deep.n.x", "hook"])
    return by_reference(counter.table)


class Acc:
    def __init__(self, base: int) -> None:
        self.base = base

    def add(self, more: int) -> int:
        self.base += more
        return self.base


class Server:
    """The recorded server, in Python."""

    def __init__(self) -> None:
        self._applied = anyio.Event()
        self._function = self._fn
        self._counter = Counter()
        self._held: Any = None
        self._held_obj: Any = None

    def _fn(self, value: Any = None) -> Any:
        if value == 3:
            self._applied.set()
        return None if value is None else value * 2

    def echo(self, value: Any) -> Any:
        return value

    def nothing(self) -> None:
        """Return nothing."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def getFn(self) -> Any:
        return by_reference(self._function)

    def getCounter(self) -> Any:
        return table_of(self._counter)

    def newAcc(self, base: int) -> Any:
        return by_reference(Acc(base))

    def getMethodMarked(self) -> Any:
        acc = Acc(10)
        return {"base": 10, "addTo": by_reference(acc.add)}

    def getNested(self) -> Any:
        return {
            "a": [1, {"f": by_reference(self._function)}],
            "c": table_of(Counter()),
            "plain": True,
        }

    def isSameFn(self, function: Any) -> bool:
        return function is self._function

    def isSameCounter(self, counter: Any) -> bool:
        return counter is self._counter.table  # type: ignore[attr-defined]

    async def callIt(self, function: Any, *args: Any) -> Any:
        return passed_on(await function(*args))

    async def runHooks(self, options: Any) -> Any:
        return await options["hooks"]["onProgress"](7)

    async def callNested(self, options: Any) -> Any:
        return await options["list"][1]["f"]("n")

    async def useObj(self, thing: Any) -> Any:
        return [await thing.value, await thing.inc(4), await thing.deep.n.x]

    async def setObj(self, thing: Any) -> Any:
        await set_member(thing.value, 77)
        return await thing.value

    def receive(self, value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    def typeOf(self, value: Any) -> str:
        return "function" if isinstance(value, RemoteObject) else "object"

    def slowRef(self) -> Any:
        async def slow() -> int:
            await self._applied.wait()
            return 1

        return by_reference(slow)

    def holdFn(self, function: Any) -> bool:
        self._held = function
        return True

    def holdObj(self, thing: Any) -> bool:
        self._held_obj = thing
        return True

    async def callHeld(self, *args: Any) -> Any:
        return await self._held(*args)

    def getHeld(self) -> Any:
        return self._held

    def throwWithRef(self) -> None:
        raise Error("has ref", code=3, retry=by_reference(lambda: "retried"))

    def throwWithFn(self) -> None:
        raise Error("has raw fn", retry=lambda: "raw")

    async def releaseHeld(self) -> bool:
        return await released(self._held)

    async def releaseHeldObj(self) -> bool:
        return await released(self._held_obj)

    async def getHeldObjPath(self) -> Any:
        return await self._held_obj.deep.n


async def released(thing: RemoteObject) -> bool:
    """Release an object, and answer when its owner was told."""
    release(thing)
    await anyio.wait_all_tasks_blocked()
    return True


def passed_on(value: Any) -> Any:
    """Return what an asynchronous handler returns, wherever it comes from."""
    return value


# What is otherwise here, by the beginning of the case, and why.
OTHERWISE = {
    "echo(undefined)": "undefined as an argument is null, as it is there",
    "apply with no argument": "NaN",
    "call of that hook": "what is set as a property is read, and not called by its path",
    "returnsPassed": "a function with a receiver is a bound method, which comes back as itself",
    "isDeepN": "a path below a table is its member",
    "echo({x: [reference]})": "what comes back is the function, and isn't marked any more",
    "echo(counter.deep)": "an object that isn't passed by reference can't be sent",
    "get of an unmarked nested object": "the same",
    "callIt(proxy(returns undefined))": "undefined is None, which is null where it is sent on",
    "setObjUndef": "there is no word for undefined as a value that is set",
    "set settings.cb": "a property of a dict",
    "callSetCb": "follows it",
    "new Box()": "an instance is its public fields, and functions aren't dropped",
    "unmarked": "a function that isn't passed by reference can't be sent: TypeError",
    "gen()": "a stream, where kkrpc's channel with references has none",
    "callHeld after release": "the error here has another name",
    "getHeldObjValue() after": "the same",
    "handmade: callback argument": "arguments of a callback stand in envelopes, which it reads, too",
    "default channel": "another channel of kkrpc's",
    "default client": "the same",
    "server with": "kkrpc's own options",
    "call of the root": "the text begins with a blank",
}


async def say_all(peer: Recorded, said: list[tuple[str, Any]]) -> None:
    """Replay a case: say what the client said, and expect what the server did."""
    for sender, message in said:
        if sender == "client":
            await peer.say(message)
            continue
        heard = await peer.hear()
        peer.learn(message, heard)
        expected = peer.translated(message)
        error = expected.get("e")
        if error is not None:
            error.pop("s", None)
            error["m"] = peer.translated_text(error["m"])
        assert heard == expected


@pytest.fixture
def unreleased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release nothing: it would be said in between on a slow machine."""
    monkeypatch.setattr("anyio_kkrpc.typescript._releases.DELAY", 1e6)


@pytest.mark.usefixtures("unreleased")
async def test_as_a_server() -> None:
    """Each case of the recorded client is answered as it was, or it is known why not."""
    replayed, otherwise = 0, set()
    async with recorded_peer(Server(), dialect="kkrpc-2") as (channel, peer):
        for name, said in CASES.items():
            if name.startswith("apply of the first of 1,030"):
                break  # what follows is said to other servers; tests/references has these
            if name.startswith("handmade: no action"):
                # An object that was given unrecorded.
                await peer.say({"t": "q", "id": "more", "op": "call", "p": ["getCounter"], "a": []})
                peer.learn({"id": said[0][1]["p"][0]}, (await peer.hear())["v"])
            reasons = {begin for begin in OTHERWISE if name.startswith(begin)}
            if not reasons:
                await say_all(peer, said)
                replayed += 1
            otherwise |= reasons
        assert otherwise == set(OTHERWISE)
        assert replayed == 91
        assert channel.statistics().references_given


class OverLines(Server):
    """The server that was recorded over stdio, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self._again = expose(self._counter)

    def nothing(self) -> None:
        """Return nothing."""

    def getNested(self) -> Any:
        return {"list": [1, by_reference(self._function)], "c": by_reference(self._again)}

    def isSame(self, function: Any, thing: Any, member: Any = None) -> Any:
        known = (getattr(self._counter, "table", None), self._again)
        return [function is self._function, thing in known, member is self._counter.deep.n]

    async def runHooks(self, options: Any) -> Any:
        return await options["hooks"][0]["onProgress"](7)

    async def useObj(self, thing: Any) -> Any:
        return [await thing.value, await thing.inc(4)]

    def hold(self, function: Any) -> bool:
        return self.holdFn(function)


# What is otherwise over stdio, by the beginning of the case, and why.
OTHERWISE_OVER_LINES = {
    "get inc": "a method is a bound method, which isn't passed by reference: see `OTHERWISE`",
    "get marked": "an object in an object is used by its path, and isn't read",
    "callHeld after the release": "the error here has another name",
    "unmarked": "see `OTHERWISE`",
}


@pytest.mark.usefixtures("unreleased")
async def test_over_lines() -> None:
    """The same over stdio, where lines come in pieces and together."""
    replayed, otherwise = 0, set()
    async with recorded_peer(OverLines(), dialect="kkrpc-2") as (_, peer):
        for name, said in texts_in("kkrpc-2-refs").items():
            if name.startswith("server of the streaming class"):
                break  # what follows is said to another server, and to one that exits
            reasons = {begin for begin in OTHERWISE_OVER_LINES if name.startswith(begin)}
            otherwise |= reasons
            if reasons:
                continue
            for sender, text in said:
                if sender == "client":
                    await peer.write(text)
                    continue
                message, heard = json.loads(text), await peer.hear()
                peer.learn(message, heard)
                expected = peer.translated(message)
                if (error := expected.get("e")) is not None:
                    error.pop("s", None)
                    error["m"] = peer.translated_text(error["m"])
                assert heard == expected, name
            replayed += 1
        assert otherwise == set(OTHERWISE_OVER_LINES)
        assert replayed == 34


@pytest.mark.usefixtures("unreleased")
async def test_as_a_client() -> None:
    """What is asked of an object of theirs, and what they ask of ours."""

    async def confirm(question: str) -> str:
        return f"{question}: yes"

    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        results: list[Any] = []

        async def use() -> None:
            counter, answer = await channel.get_api().open({"on": [by_reference(confirm)]})
            results.append(answer)
            async with counter:
                results.append(await counter.value)
                results.append(await counter.deep.inc(4, None))
                await set_member(counter.value, 5)
                with pytest.raises(MethodNotFoundError, match="is not a function"):
                    await counter.nope()
                results.append(await channel.get_api().is_it(counter.deep))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            asked = await peer.hear()
            function = asked["a"][0]["on"][0]
            assert function["__kkrpc_ref__"] is True
            assert function["kind"] == "function"
            await peer.say(
                {"t": "q", "id": "1", "op": "ref", "p": [function["id"], "apply"], "a": ["sure?"]}
            )
            assert await peer.hear() == {"t": "r", "id": "1", "v": "sure?: yes"}
            theirs = {"__kkrpc_ref__": True, "id": "theirs", "kind": "object"}
            await peer.say({"t": "r", "id": asked["id"], "v": [theirs, "opened"]})
            for path, rest, answer in (
                (["get", "value"], {}, {"v": 1}),
                (["call", "deep", "inc"], {"a": [4, None]}, {"v": 5}),
                (["set", "value"], {"v": 5}, {"v": True}),
                (["call", "nope"], {"a": []}, {"e": {"n": "Error", "m": "nope is not a function"}}),
            ):
                use_of = await peer.hear()
                told = {"t": "q", "id": use_of["id"], "op": "ref", "p": ["theirs", *path], **rest}
                assert use_of == told
                await peer.say({"t": "r", "id": use_of["id"], **answer})
            back = await peer.hear()
            assert back["a"] == [{**theirs, "p": ["deep"]}]
            await peer.say({"t": "r", "id": back["id"], "v": True})
            left = await peer.hear()
            assert left == {"t": "q", "id": left["id"], "op": "ref", "p": ["theirs", "release"]}
            await peer.say({"t": "r", "id": left["id"], "v": True})
        assert results == ["opened", 1, 5, True]
        # The function was given with a call that has succeeded: one release ends it.
        assert channel.statistics().references_given == 1
        await peer.say({"t": "q", "id": "2", "op": "ref", "p": [function["id"], "release"]})
        assert await peer.hear() == {"t": "r", "id": "2", "v": True}
        assert channel.statistics().references_given == 0
        await peer.say({"t": "q", "id": "3", "op": "ref", "p": [function["id"], "apply"]})
        error = (await peer.hear())["e"]
        assert error["n"] == "RPCRemoteReferenceReleasedError"


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_releases() -> None:
    """Those of the garbage collector are told late, each once; not of what came again meanwhile."""
    clock = Clock()
    spoken = CompactSpoken(clock)
    assert spoken.encode(CallbackRelease(["a", "b"], times=[1, 2]), "ts") is None
    assert spoken.busy
    assert list(spoken.due(clock.time + DELAY / 2)) == []
    again = b'{"t":"r","id":"1","v":[{"__kkrpc_ref__":true,"id":"a","kind":"object"}]}'
    assert ids_in(spoken.decode(again)) == ["a"]
    ((use, peer),) = spoken.due(clock.time + DELAY)
    assert peer == "ts"
    assert isinstance(use, CallbackCall)
    assert json.loads(spoken.encode(use, peer) or b"") == {
        "t": "q",
        "id": use.r,
        "op": "ref",
        "p": ["b", "release"],
    }
    assert not spoken.busy


REFERENCE = {"__kkrpc_ref__": True, "id": "x", "kind": "object"}


@pytest.mark.usefixtures("unreleased")
async def test_releases_that_somebody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told at once, those of one turn in one write; at the end of the channel, the rest."""
    writes: list[bytes] = []
    send = MemoryBytes.send

    async def note(stream: MemoryBytes, item: bytes) -> None:
        writes.append(bytes(item))
        await send(stream, item)

    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        held: list[Any] = []

        async def call() -> None:
            held.extend(await channel.get_api().open())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            asked = await peer.hear()
            given = [{**REFERENCE, "id": f"r{number}"} for number in range(6)]
            await peer.say({"t": "r", "id": asked["id"], "v": given})
        monkeypatch.setattr(MemoryBytes, "send", note)
        async with held[0]:
            release(held[1])
        release(held[1])
        assert [(await peer.hear())["p"] for _ in range(2)] == [
            ["r1", "release"],
            ["r0", "release"],
        ]
        assert len(writes) == 1
        del held[2]
        while len(channel._transport._messages._dialogue.spoken.references._gone) == 0:  # type: ignore[attr-defined]
            gc.collect()
            await anyio.lowlevel.checkpoint()
        assert len(writes) == 1
    told = b"".join(writes[1:]).splitlines()
    assert sorted(json.loads(line)["p"][0] for line in told) == ["r2", "r3", "r4", "r5"]


async def test_in_a_bus_envelope() -> None:
    """Over Redis it is a request with an id of its own, as any other use."""
    now = {"now": Clock(), "time_of_day": Clock()}
    dialect = CompactDialect("us", None, skips_own=True, **now)
    fields = dialect.encode(CallbackRelease(["a"], all=True, times=[3]), "ts")
    assert fields is not None
    envelope = json.loads(fields[1])
    assert envelope["to"] == "ts"
    assert envelope["message"] == {
        "t": "q",
        "id": envelope["correlationId"],
        "op": "ref",
        "p": ["a", "release"],
    }
    assert not list(dialect.due(1e9))


@pytest.mark.parametrize(
    ("came", "meant"),
    [
        (REFERENCE, {"__kkrpc_next_refs__": REFERENCE}),
        ([1, {"a": REFERENCE}], {"__kkrpc_next_refs__": [1, {"a": REFERENCE}]}),
        ({"__kkrpc_ref__": 1}, {"__kkrpc_ref__": 1}),
        (
            [REFERENCE, {"__kkrpc_ref__": 1}],
            {
                "__kkrpc_next_refs__": [
                    REFERENCE,
                    {"__kkrpc_ref__": "data", "v": {"__kkrpc_ref__": 1}},
                ]
            },
        ),
        ({"__kkrpc_next_refs__": 1}, {"__kkrpc_next_refs__": {"__kkrpc_next_refs__": 1}}),
        ({**REFERENCE, "id": 5}, {**REFERENCE, "id": 5}),
    ],
)
def test_values(came: Any, meant: Any) -> None:
    """What comes is said in this library's way, and goes back as it came."""
    spoken = CompactSpoken(Clock())
    message = json.dumps({"t": "r", "id": "1", "v": came}).encode()
    reply = spoken.decode(message)
    assert isinstance(reply, Reply)
    assert reply.v == meant
    assert json.loads(spoken.encode(reply, None) or b"")["v"] == came


def test_data_that_it_would_take_for_a_reference() -> None:
    """It is refused where it stands beside references: kkrpc has no way to say so."""
    value = {"__kkrpc_next_refs__": [{"__kkrpc_ref__": "data", "v": REFERENCE}]}
    with pytest.raises(TypeError, match="for a reference"):
        CompactSpoken(Clock()).encode(Reply("1", value), None)
    use = CallbackCall("x", [], k={"a": 1}, r="1", p=["call", "a"])
    with pytest.raises(TypeError, match="by position"):
        CompactSpoken(Clock()).encode(use, None)


@pytest.mark.parametrize(
    "p", [[], ["x"], ["x", "get"], ["x", "set", "a"], ["x", "apply"], ["x", "y", "z"]]
)
def test_uses(p: list[str]) -> None:
    """Whatever is asked is a use of something, and is answered."""
    spoken = CompactSpoken(Clock())
    message = json.dumps({"t": "q", "id": "1", "op": "ref", "p": p}).encode()
    use = spoken.decode(message)
    assert isinstance(use, CallbackCall)
    assert (use.id, use.r) == (p[0] if p else "", "1")
    assert use.p is not None
    error = {"n": "MethodNotFoundError", "m": "none", "rpc_error": "method_not_found", "at": 0}
    told = json.loads(spoken.encode(Reply("1", e=error), None) or b"")
    assert ("e" in told) is (p[1:] != ["get"])
    assert not spoken._uses
    again = json.loads(spoken.encode(Reply("1", 5), None) or b"")
    assert again == {"t": "r", "id": "1", "v": 5}


async def test_what_keeps_the_transport_from_ending() -> None:
    """Nothing of references does: what isn't released goes with the channel."""
    async with recorded_peer(dialect="kkrpc-2") as (channel, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.get_api().open)
            asked = await peer.hear()
            await peer.say({"t": "r", "id": asked["id"], "v": REFERENCE})
    assert channel.statistics().references_held == 0
