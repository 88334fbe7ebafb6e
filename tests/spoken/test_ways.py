"""Each way to speak to a peer, alone: what it says, and what it leaves out or says later."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._spoken._base import Spoken
from anyio_kkrpc._spoken._kkrpc0 import ClassicSpoken
from anyio_kkrpc._spoken._kkrpc2 import CompactSpoken
from anyio_kkrpc._spoken._native import NativeSpoken
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.records import CallbackRelease, Cancel, Reply, Request
from anyio_kkrpc.typescript._releases import DELAY

REQUEST = Request("1", "call", ["a", "b"], a=[])


def classic(*, superjson: bool = False) -> ClassicSpoken:
    bounds = {"items_per_tick": 5, "max_items": 10, "max_bytes": 1000}
    return ClassicSpoken.pair(lambda record, peer: None, **bounds)[superjson]


WAYS: dict[str, Any] = {
    "native": lambda: NativeSpoken(get_codec("json")),
    "kkrpc 2": lambda: CompactSpoken(lambda: 100.0),
    "kkrpc 0": classic,
    "kkrpc 0, superjson": lambda: classic(superjson=True),
}


@pytest.fixture(params=WAYS)
def spoken(request: pytest.FixtureRequest) -> Spoken:
    one: Spoken = WAYS[request.param]()
    return one


def test_there_and_back(spoken: Spoken) -> None:
    for record in (REQUEST, Reply("1", {"x": None})):
        message = spoken.encode(record, None)
        assert message
        assert spoken.decode(message) == record
    for bad in (b"", b"{", b"[]", b"\xff", b'{"t":"?"}'):
        with pytest.raises(ProtocolError):
            spoken.decode(bad)


def test_at_rest(spoken: Spoken) -> None:
    """Time brings nothing as long as nothing is open."""
    assert not spoken.busy
    spoken.tick()
    assert list(spoken.due(1e9)) == []
    assert spoken.pause > 0


def test_cancels_are_native_only(spoken: Spoken) -> None:
    assert bool(spoken.encode(Cancel("1"), None)) is spoken.native


@pytest.mark.parametrize("way", ["kkrpc 2", "kkrpc 0"])
def test_name_that_is_not_there(way: str) -> None:
    """kkrpc's peers expect a text of their own kind; other errors stay as they are."""
    one: Spoken = WAYS[way]()
    error = {
        "n": "MethodNotFoundError",
        "m": "a.b is not a function",
        "rpc_error": "method_not_found",
    }
    answer = one.answer(REQUEST, Reply("1", e={**error, "at": 0}))
    assert answer.e["m"] != error["m"]
    other = Reply("1", e={"n": "Error", "m": "x"})
    assert one.answer(REQUEST, other).e == {"n": "Error", "m": "x"}


def test_releases_are_said_late_and_once_for_all() -> None:
    """kkrpc 2 forgets a function at the first release: it is said once all calls have had time."""
    one = CompactSpoken(lambda: 100.0)
    envelope = {"__kkrpc_next_arg__": "callback", "id": "f"}
    one.begin(Request("1", "call", ["a"], a=[envelope]), "x")
    assert one.encode(CallbackRelease(["f"]), "x") is None
    assert one.busy
    assert list(one.due(100.0 + DELAY / 2)) == []
    assert list(one.due(101.0 + DELAY)) == [(CallbackRelease(["f"], all=True), "x")]
    assert not one.busy
    assert one.encode(CallbackRelease(["f"], all=True), "x")


def test_answers_in_the_serialization_of_the_question() -> None:
    plain, rich = ClassicSpoken.pair(lambda *_: None, items_per_tick=5, max_items=10, max_bytes=100)
    for asked in (plain, rich):
        message = asked.encode(REQUEST, None)
        assert message is not None
        assert plain.as_in(message) is asked
        assert rich.as_in(message) is asked
    assert plain.streams is rich.streams
