"""How the one peer of a link is spoken to, without any link."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._spoken._dialogue import Dialogue
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.records import (
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from anyio_kkrpc.typescript._releases import DELAY

NATIVE = b'{"t":"q","id":"1","op":"call","p":["a","b"],"k":{"x":1}}'
PLAIN = b'{"id":"1","method":"a.b","args":[],"type":"request","version":"json"}'
RICH = b'{"json":' + PLAIN.replace(b'"json"', b'"superjson"') + b"}"
UNKNOWN = {"n": "MethodNotFoundError", "m": "a", "rpc_error": "method_not_found", "at": 0}


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def dialogue(dialect: Any, *, codec: str = "json", **options: Any) -> Dialogue:
    some: dict[str, Any] = {"superjson": True, "deliver": lambda record, peer: None}
    some |= {"now": Clock(), "max_items": 10, "max_bytes": 1000, **options}
    return Dialogue(dialect, get_codec(codec), **some)


@pytest.mark.parametrize("dialect", ["native", "kkrpc-2", "kkrpc-0"])
@pytest.mark.parametrize(("message", "superjson"), [(PLAIN, False), (RICH, True)])
@pytest.mark.parametrize("begins", [False, True])
def test_who_speaks_as_kkrpc_0_is_answered_so(
    dialect: str, message: bytes, superjson: bool, begins: bool
) -> None:
    """In the serialization that it used last, whatever this side has begun with."""
    one = dialogue(dialect, superjson=begins)
    assert one.decode(message) == Request("1", "call", ["a", "b"], a=[])
    answer = one.spoken.encode(Reply("1", 5), None)
    assert answer is not None
    assert answer.startswith(b'{"json":') is superjson
    assert not one.spoken.native
    other = PLAIN if superjson else RICH
    one.decode(other)
    answer = one.spoken.encode(Reply("1", 5), None)
    assert answer is not None
    assert answer.startswith(b'{"json":') is not superjson


@pytest.mark.parametrize("dialect", ["native", "kkrpc-2"])
@pytest.mark.parametrize(
    "message",
    [NATIVE, b'{"type":"response","id":"1","args":{"result":5},"version":"json"}'],
)
def test_what_else_comes_changes_nothing(dialect: str, message: bytes) -> None:
    """Neither what is said as this side speaks, nor anything but a request in another way."""
    one = dialogue(dialect)
    before = one.spoken
    one.decode(message)
    assert one.spoken is before


@pytest.mark.parametrize("message", [b"", b"5", b"{}", b'{"type":"no"}', b'{"type":[]}', b"\xff"])
@pytest.mark.parametrize("dialect", ["native", "kkrpc-2", "kkrpc-0"])
def test_invalid(dialect: str, message: bytes) -> None:
    """It is refused, and how the peer is spoken to stays."""
    one = dialogue(dialect)
    before = one.spoken
    with pytest.raises(ProtocolError):
        one.decode(message)
    assert one.spoken is before


def test_other_codecs_than_json_recognize_nobody() -> None:
    """With them there are native peers only."""
    one = dialogue("native", codec="cbor")
    with pytest.raises(ProtocolError):
        one.decode(PLAIN)
    record = Reply("1", b"\x00")
    message = one.spoken.encode(record, None)
    assert message is not None
    assert one.decode(message) == record


@pytest.mark.parametrize(
    ("record", "kkrpc_2", "kkrpc_0"),
    [
        (Cancel("1"), None, None),
        (CallbackRelease(["f"]), None, None),
        (Reply("1"), {"t": "r", "id": "1"}, {"id": "1", "type": "response"}),
    ],
)
def test_what_kkrpc_has_no_word_for_is_not_said(record: Record, kkrpc_2: Any, kkrpc_0: Any) -> None:
    """A native peer is told everything."""
    for dialect, expected in (("kkrpc-2", kkrpc_2), ("kkrpc-0", kkrpc_0)):
        said = dialogue(dialect, superjson=False).spoken.encode(record, None)
        if expected is None:
            assert said is None
        else:
            assert said is not None
            assert expected.items() <= msgspec.json.decode(said).items()
    native = dialogue("native")
    message = native.spoken.encode(record, None)
    assert message is not None
    assert native.decode(message) == record


@pytest.mark.parametrize("dialect", ["native", "kkrpc-2", "kkrpc-0"])
def test_unknown_names(dialect: str) -> None:
    """Peers of kkrpc get its own words."""
    request, reply = Request("1", "call", ["a"]), Reply("1", e=dict(UNKNOWN))
    answer = dialogue(dialect).spoken.answer(request, reply)
    assert (answer == reply) is (dialect == "native")


def test_callbacks_are_released_late() -> None:
    """To kkrpc 2, when the last use is over for a while, and once."""
    clock = Clock()
    spoken = dialogue("kkrpc-2", now=clock).spoken
    passed = {"__kkrpc_next_arg__": "callback", "id": "f"}
    spoken.begin(Request("1", "call", ["a"], a=[passed]), "peer")
    assert not spoken.busy
    assert spoken.encode(CallbackRelease(["f"]), "peer") is None
    assert spoken.busy
    assert list(spoken.due(clock.time + DELAY / 2)) == []
    due = list(spoken.due(clock.time + DELAY))
    assert due == [(CallbackRelease(["f"], all=True), "peer")]
    assert not spoken.busy
    assert list(spoken.due(clock.time + 2 * DELAY)) == []


def test_streams_to_kkrpc_0_go_on_by_the_clock() -> None:
    """Its reader asks for nothing, so each tick does."""
    got: list[Record] = []
    spoken = dialogue("kkrpc-0", deliver=lambda record, peer: got.append(record)).spoken
    assert not spoken.busy
    stream = {"__kkrpc_next_stream__": "async-iterable", "id": "s"}
    assert spoken.encode(Reply("1", stream), None) is not None
    assert spoken.busy
    spoken.tick()
    (pull,) = got
    assert isinstance(pull, StreamRequest)
    assert pull.n == 1000
    assert spoken.encode(StreamReply("1", "s", d=True), None) is not None
    assert not spoken.busy


def test_streams_of_kkrpc_0_that_come_too_fast() -> None:
    """They are cancelled at their source by what is due."""
    spoken = dialogue("kkrpc-0", max_items=2).spoken
    assert spoken.encode(Request("1", "call", ["a"]), None) is not None
    stream = {"__kkrpc_next_stream__": "async-iterable", "id": "1"}
    assert spoken.take(Reply("1", stream), None, 10) is not None
    for number in range(3):
        assert spoken.take(StreamReply("1", "1", v=number), None, 10) is None
    assert list(spoken.due(0.0)) == [(StreamRequest("1", "1", "throw"), None)]
    assert list(spoken.due(0.0)) == []


@pytest.mark.parametrize("dialect", ["kkrpc-2", "kkrpc-0"])
def test_kkrpc_has_json_only(dialect: str) -> None:
    """The text names the option."""
    with pytest.raises(ValueError, match=r"^codec:"):
        dialogue(dialect, codec="cbor")
