"""What TypeScript peers wrote is read as it was meant, and written as they would."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import uuid
from array import array
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc import ProtocolError, RemoteError
from anyio_kkrpc._protocol._records import (
    Bye,
    CallbackCall,
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from anyio_kkrpc._protocol._values import is_envelope, stream_envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis.dialects import Dialects, Entry, SharedPeer
from anyio_kkrpc.typescript import URL, BigInt, Map
from anyio_kkrpc.typescript._releases import DELAY, Releases
from anyio_kkrpc.typescript._streams import ClassicStreams
from anyio_kkrpc.typescript.classic import ClassicCodec, answer_unknown
from anyio_kkrpc.typescript.compact import CompactCodec
from anyio_kkrpc.typescript.superjson import dumps, loads

VECTORS = Path(__file__).parent / "vectors"
STREAM = stream_envelope("s")
GENERATIONS = ["kkrpc-2", "kkrpc-0-json", "kkrpc-0-superjson"]


def vectors() -> Iterator[Any]:
    for name in GENERATIONS:
        for number, line in enumerate((VECTORS / f"{name}.jsonl").read_text().splitlines(), 1):
            vector = json.loads(line)
            yield pytest.param(name, vector, id=f"{name}:{number}:{vector['kind']}")


def make_dialects(own: str = "native", session_id: str = "server") -> Dialects:
    """Return the dialects of a peer."""
    return Dialects(
        own.removesuffix("-json").removesuffix("-superjson"),
        session_id,
        get_codec("json"),
        superjson=not own.endswith("-json"),
        remote_peer_id=None,
        skips_own=False,
        max_queue_size=10,
        max_queue_bytes=1000,
        deliver=lambda record, peer: None,
        now=lambda: 0.0,
        time_of_day=lambda: 0.0,
    )


def decode(vector: dict[str, Any], dialects: Dialects) -> Entry | None:
    """Read an entry as it is in Redis."""
    fields = [part.encode() for pair in vector["fields"].items() for part in pair]
    return dialects.decode(fields)


# Kinds of records, by kinds of vectors.
RECORDS: dict[str, tuple[type[Record], dict[str, Any]]] = {
    "q.call": (Request, {"op": "call"}),
    "q.get": (Request, {"op": "get"}),
    "q.set": (Request, {"op": "set"}),
    "q.new": (Request, {"op": "new"}),
    "q.ref": (CallbackCall, {"id": "x", "r": "h1", "p": [""]}),
    "r": (Reply, {"e": UNSET}),
    "r.error": (Reply, {"v": UNSET}),
    "r.stream": (Reply, {"e": UNSET}),
    "cb": (CallbackCall, {}),
    "cbr": (CallbackRelease, {"all": True}),
    "sq.pull": (StreamRequest, {"op": "pull"}),
    "sq.return": (StreamRequest, {"op": "return"}),
    "sq.throw": (StreamRequest, {"op": "throw"}),
    "sr": (StreamReply, {"d": False}),
    "sr.done": (StreamReply, {"d": True}),
    "sr.error": (StreamReply, {"d": UNSET}),
    "request": (Request, {"op": "call"}),
    "get": (Request, {"op": "get"}),
    "set": (Request, {"op": "set"}),
    "construct": (Request, {"op": "new"}),
    "response": (Reply, {"e": UNSET}),
    "response-error": (Reply, {"v": UNSET}),
    "response-error-string": (Reply, {"v": UNSET}),
    "response-stream": (Reply, {"e": UNSET}),
    "callback": (CallbackCall, {}),
    "stream-chunk": (StreamReply, {"d": False}),
    "stream-end": (StreamReply, {"d": True}),
    "stream-error": (StreamReply, {"d": UNSET}),
    "stream-cancel": (StreamRequest, {"op": "return"}),
    "destroy": (Bye, {}),
}
# What can't come back as it was, by a piece of the note, and why.
LOSSY = {
    "echo(Buffer)": "bytes are an Uint8Array, which TypeScript peers can read",
    "looks like a callback": "as at TypeScript peers, it is a callback now",
    "throwWithCause": "TypeScript's JSON makes {} of a cause; it is left out",
    "without the argument envelope": "arguments are put into envelopes",
    "without a": "a call has a list of arguments",
    "addressed to another peer": "a call has a list of arguments",
    "another transportId": "a call has a list of arguments",
    "echo(Set)": "a set in Python has no order",
    "Float64Array": "null in a typed array is 0",
}


@pytest.mark.parametrize(("generation", "vector"), list(vectors()))
def test_recorded_entries(generation: str, vector: dict[str, Any]) -> None:
    """Each entry is the record that its kind says, and becomes the same entry again."""
    dialects, note = make_dialects(), vector["note"]
    if "not a valid envelope" in note:
        with pytest.raises(ProtocolError):
            decode(vector, dialects)
        return
    entry = decode(vector, dialects)
    assert entry is not None or "No API exposed" in vector["fields"]["data"]
    if entry is None:
        return
    cls, members = RECORDS[vector["kind"]]
    record = entry.record
    assert type(record) is cls
    assert {name: getattr(record, name) for name in members} == members
    sender = entry.sender
    assert isinstance(sender, SharedPeer)
    assert "to another peer" not in note or entry.recipient == "elsewhere"
    if isinstance(record, StreamReply) and record.e is not UNSET:
        return  # what it says is the text of an error that isn't there any more
    if any(piece in note for piece in LOSSY) or vector["kind"] == "q.ref":
        return  # that one is made by hand, and doesn't say how the reference is used
    writer = make_dialects(session_id=str(sender))
    if generation == "kkrpc-2":
        expected = json.loads(vector["fields"]["data"])
        fields = writer.compact.encode(record, entry.recipient)
        assert fields is not None
        assert fields[0] == b"data"
        assert fields[1].endswith(b"}\n")
        got = json.loads(fields[1])
        if "sentAt" in expected:
            assert isinstance(got["sentAt"], int)
            assert list(got) == list(expected)
            got["sentAt"] = expected["sentAt"]
        else:  # handmade, by less than a peer writes
            got = {name: value for name, value in got.items() if name in expected}
            got["transportId"] = expected["transportId"]
        assert got == expected
        return
    assert bool(dialects.classic_seen)
    codec = ClassicCodec(superjson=generation == "kkrpc-0-superjson")
    names = [name.encode() for name in vector["fields"]]
    if isinstance(record, Bye):
        assert writer.classic.encode(record, None) == (
            *(b"data", b"__DESTROY__"),
            *(b"sessionId", sender.encode()),
        )
        return
    assert names == [b"data", b"sessionId"]
    assert sender.dialect is not None
    got, expected = json.loads(codec.encode(record)), json.loads(vector["fields"]["data"])
    if isinstance(record, CallbackCall):
        for message in (got, expected):  # an id that nothing refers to
            del message.get("json", message)["id"]
    assert got == expected
    assert list(got.get("json", got)) == list(expected.get("json", expected))


def test_lossy_cases_exist() -> None:
    """None of the exceptions is out of date."""
    notes = "".join(vector.values[1]["note"] for vector in vectors())
    assert [piece for piece in LOSSY if piece not in notes] == []


@pytest.mark.parametrize("generation", GENERATIONS)
def test_recorded_errors(generation: str) -> None:
    """Errors keep name, message, fields and cause; what kkrpc says itself is recognized."""
    errors = {}
    for parameters in vectors():
        name, vector = parameters.values
        if name == generation and "error" in vector["kind"]:
            entry = decode(vector, make_dialects())
            if entry is not None and isinstance(entry.record, Reply):
                assert entry.record.e is not UNSET
                errors[vector["note"].partition(" [")[0]] = entry.record.e
    custom = errors["throwCustomError()"]
    assert (custom["n"], custom["m"], custom["code"]) == (
        "CustomError",
        "This is a custom error",
        418,
    )
    not_found = {note for note, error in errors.items() if error.get("rpc_error")}
    assert len(not_found) >= 4
    assert not any("throw" in note for note in not_found)
    if generation == "kkrpc-0-superjson":
        assert errors["throwWithCause()"]["cause"] == {"n": "Error", "m": "inner"}


# superjson


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    when: datetime


class Shape(msgspec.Struct, tag="shape"):
    points: list[Point]
    missing: Any = UNSET


MOMENT = datetime(2024, 2, 3, 4, 5, 6, 789000, tzinfo=timezone.utc)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=20)
    | st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)).map(
        lambda moment: moment.replace(
            tzinfo=timezone.utc, microsecond=moment.microsecond // 1000 * 1000
        )
    )
)
keys = st.text(st.sampled_from("ab.\\ü0")).filter(lambda key: key != "__proto__")
hashable = st.integers() | st.text(st.sampled_from("ab."))


def values_with(sets: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return values of all types, sets as given."""
    return st.recursive(
        scalars | sets,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(hashable, inner, max_size=4).map(Map)
        ),
        max_leaves=20,
    )


values = values_with(st.sets(hashable, max_size=4))


@given(values)
def test_superjson_round_trip(value: Any) -> None:
    """What superjson has types for comes back equal, also with equal parts."""
    text = dumps({"value": value, "again": [value]})
    back = loads(text)
    assert back == {"value": value, "again": [value]}
    json.loads(text)


@given(values_with(st.sets(hashable, max_size=1)))  # a set in Python has no order to keep
def test_a_reencoded_document_is_the_same(value: Any) -> None:
    """What was read is written as it was, types and all."""
    text = dumps(value)
    assert dumps(loads(text)) == text


@given(st.binary(max_size=60) | values.map(dumps))
def test_superjson_refuses_the_rest(data: bytes) -> None:
    """Whatever the bytes are, there is a value or a ProtocolError."""
    for piece in (data, data[:-2], data.replace(b'"', b"'"), data.replace(b"0", b"1")):
        try:
            loads(piece)
        except ProtocolError:
            continue


@given(
    st.recursive(
        st.sampled_from(["undefined", "Date", "map", "set", "bigint", "regexp", "Error", "x"])
        | st.integers(0, 2),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "a.0", "a.0.1", "", "\\", "a\\.0", "1"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ),
    st.sampled_from(["values", "referentialEqualities"]),
)
def test_hostile_annotations(tree: Any, member: str) -> None:
    """Annotations that don't fit are refused."""
    plain = {"a": [["k", [1]], {"0": "2024"}], "1": "/x/i"}
    document = {"json": plain, "meta": {member: tree, "v": 1}}
    try:
        loads(json.dumps(document).encode())
    except ProtocolError as exc:
        assert "superjson" in str(exc)


@pytest.mark.parametrize(
    ("value", "plain", "annotation"),
    [
        (MOMENT, "2024-02-03T04:05:06.789Z", ["Date"]),
        (MOMENT.astimezone(timezone(timedelta(hours=5))), "2024-02-03T04:05:06.789Z", ["Date"]),
        (2**53, "9007199254740992", ["bigint"]),
        (2**53 - 1, 2**53 - 1, None),
        (BigInt(1), "1", ["bigint"]),
        (math.inf, "Infinity", ["number"]),
        (-math.inf, "-Infinity", ["number"]),
        (-0.0, "-0", ["number"]),
        ({1: MOMENT}, [[1, "2024-02-03T04:05:06.789Z"]], ["map", {"0.1": ["Date"]}]),
        (Map(a=1), [["a", 1]], ["map"]),
        (frozenset({1}), [1], ["set"]),
        ({"x.y": {"\\": {1}}}, {"x.y": {"\\": [1]}}, {"x\\.y.\\\\": ["set"]}),
        (re.compile("a(?P<b>c)", re.I | re.S), "/a(?<b>c)/is", ["regexp"]),
        (URL("http://example.com/"), "http://example.com/", ["URL"]),
        (bytearray(b"\x01\xff"), [1, 255], [["typed-array", "Uint8Array"]]),
        (array("h", [-1, 2]), [-1, 2], [["typed-array", "Int16Array"]]),
        (array("B", [1]), [1], [["typed-array", "Uint8Array"]]),
        (array("d", [1.5, math.nan]), [1.5, None], [["typed-array", "Float64Array"]]),
        (KeyError("k"), {"name": "KeyError", "message": "'k'"}, ["Error"]),
        (UNSET, None, ["undefined"]),
        (Color.RED, "red", None),
        (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000", None),
        (date(2024, 2, 3), "2024-02-03", None),
        ((1, (2,)), [1, [2]], None),
        (
            Shape([Point(1, MOMENT)]),
            {"type": "shape", "points": [{"x": 1, "when": "2024-02-03T04:05:06.789Z"}]},
            {"points.0.when": ["Date"]},
        ),
    ],
)
def test_superjson_of(value: Any, plain: Any, annotation: Any) -> None:
    """Each type is written as superjson writes its counterpart."""
    document = json.loads(dumps(value))
    assert document["json"] == plain
    assert document.get("meta", {}).get("values") == annotation


def test_superjson_errors_with_causes() -> None:
    """A cause travels with its error, and comes back as its cause."""
    outer = ValueError("outer")
    outer.__cause__ = KeyError("inner")
    back = loads(dumps([outer]))
    assert isinstance(back[0], RemoteError)
    assert isinstance(back[0].__cause__, RemoteError)
    assert back[0].__cause__.name == "KeyError"
    plain = RemoteError("A", "b", {"cause": {"why": MOMENT}})
    back = loads(dumps(plain))
    assert back.data == {"cause": {"why": MOMENT}}


def test_superjson_equalities() -> None:
    """Shared and cyclic objects are the same object again, wherever they are."""
    shared: dict[str, Any] = {"v": 1}
    loop: list[Any] = []
    loop.append(loop)
    value = {"x": shared, "y": [shared], "m": Map({1: shared}), "loop": loop}
    text = dumps(value)
    assert json.loads(text)["meta"]["referentialEqualities"] == {
        "x": ["y.0", "m.0.1"],
        "loop": ["loop.0"],
    }
    back = loads(text)
    assert back["y"][0] is back["x"]
    assert back["m"][1] is back["x"]
    assert back["loop"][0] is back["loop"]
    root: dict[str, Any] = {"s": shared, "t": shared}
    root["c"] = root
    text = dumps(root)
    assert json.loads(text)["meta"]["referentialEqualities"] == [["c"], {"s": ["t"]}]
    back = loads(text)
    assert back["c"] is back
    assert back["s"] is back["t"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2024, 1, 1), "time zone"),
        ({"__proto__": 1}, "__proto__"),
        (object(), "object"),
        (array("q", [1]), "typed array"),
        (re.compile(b"x"), "bytes"),
        ("\ud800", "superjson"),
        pytest.param(10**5000, "superjson", id="huge"),
    ],
)
def test_superjson_cannot_carry(value: Any, text: str) -> None:
    """What has no counterpart is refused by name."""
    with pytest.raises(TypeError, match=text):
        dumps({"a": [value]})


@pytest.mark.parametrize(
    ("plain", "annotation", "value"),
    [
        ("+010000-01-01T00:00:00.000Z", ["Date"], "+010000-01-01T00:00:00.000Z"),
        ("2024-01-01T00:00:00", ["Date"], "2024-01-01T00:00:00"),
        ("/(?<=a)b{2,1}/", ["regexp"], "/(?<=a)b{2,1}/"),
        ("/" + "x" * 2000 + "/", ["regexp"], "/" + "x" * 2000 + "/"),
        ([[{"a": 1}, 2]], ["map"], [[{"a": 1}, 2]]),
        ([[1, "x"], [True, "y"]], ["map"], [[1, "x"], [True, "y"]]),
        ([[[1, [2]], 3]], ["map"], {(1, (2,)): 3}),
        ([{}], ["set"], [{}]),
        ([1, True], ["set"], [1, True]),
        ([[1], [2]], ["set"], {(1,), (2,)}),
        ([1, None], [["typed-array", "Float32Array"]], array("f", [1, 0])),
        ([1, 2], [["typed-array", "Buffer"]], b"\x01\x02"),
    ],
)
def test_superjson_that_python_lacks(plain: Any, annotation: Any, value: Any) -> None:
    """What Python can't make of it stays as near as can be."""
    document = {"json": plain, "meta": {"values": annotation, "v": 1}}
    assert loads(json.dumps(document).encode()) == value


def test_superjson_flags_survive() -> None:
    """Flags that Python lacks come back, also for a pattern of which there are two."""
    document = {"json": ["/x/gi", "/x/iy"], "meta": {"values": {"0": ["regexp"], "1": ["regexp"]}}}
    back = loads(json.dumps(document).encode())
    assert all(isinstance(pattern, re.Pattern) and pattern.pattern == "x" for pattern in back)
    assert json.loads(dumps(back))["json"] == ["/x/gi", "/x/iy"]


def test_superjson_of_the_first_version() -> None:
    """Without ``v``, a backslash in a path stands for itself."""
    document = {"json": {"a\\b": {"c.d": [1]}}, "meta": {"values": {"a\\b.c\\.d": ["set"]}}}
    assert loads(json.dumps(document).encode()) == {"a\\b": {"c.d": {1}}}


def test_equalities_that_multiply() -> None:
    """A short document doesn't become an endless value."""
    plain: Any = []
    for _ in range(60):
        plain = [plain, None]
    equalities = {}
    path = "0"
    for _ in range(59):
        equalities[path] = [path[:-1] + "1"]
        path += ".0"
    document = {"json": plain, "meta": {"referentialEqualities": equalities, "v": 1}}
    with pytest.raises(ProtocolError, match="multiply"):
        loads(json.dumps(document).encode())


def test_values_that_multiply() -> None:
    """Nor does a small value become an endless document."""
    value: Any = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(TypeError, match="too many"):
        dumps(value)


# kkrpc 0.x


def test_integer_ids_are_echoed() -> None:
    """The id of an answer is the integer that the request had."""
    codec = ClassicCodec(superjson=False)
    request = codec.decode(b'{"id":7,"method":"f","args":[],"type":"request"}')
    assert isinstance(request, Request)
    assert json.loads(codec.encode(Reply(request.id, 1)))["id"] == 7


@pytest.mark.parametrize("superjson", [False, True])
@pytest.mark.parametrize(
    ("record", "text"),
    [
        (Request("1", "call", ["f"], k={"a": 1}), "keyword"),
        (CallbackCall("1", [], k={"a": 1}), "keyword"),
        (Request("1", "call", ["a.b"], []), "dot"),
        (Request("1", "call", ["f"], ["__callback__x"]), "__callback__"),
        (
            Request(
                "1",
                "call",
                ["f"],
                [
                    {"__kkrpc_next_arg__": "value", "v": STREAM},
                ],
            ),
            "streams",
        ),
        (Request("1", "set", ["p"], v=STREAM), "streams"),
        (StreamReply("1", "s", d=False, v=STREAM), "streams"),
        (Request("1", "call", ["f"], [datetime(2024, 1, 1)]), "time zone"),
        (Request("1", "call", ["f"], ["\ud800"]), "can't be encoded"),
        (Request("1", "call", ["f"], [object()]), "object"),
    ],
)
def test_classic_cannot_carry(record: Record, text: str, superjson: bool) -> None:
    """What the dialect lacks is a TypeError that says so, not a message of another meaning."""
    with pytest.raises(TypeError, match=text):
        ClassicCodec(superjson=superjson).encode(record)


@pytest.mark.parametrize("superjson", [False, True])
@pytest.mark.parametrize(
    ("message", "member"),
    [
        ({"id": "1", "type": "response", "args": {"result": STREAM}}, "v"),
        ({"id": "1", "type": "stream-chunk", "args": {"value": STREAM}}, "v"),
        ({"id": "1", "type": "set", "path": ["p"], "value": STREAM}, "v"),
    ],
)
def test_what_is_a_stream_in_kkrpc_2_only(
    message: dict[str, Any], member: str, superjson: bool
) -> None:
    """In kkrpc 0.x it is data, which nobody may take for something else."""
    text = json.dumps({"json": message} if superjson else message).encode()
    value = getattr(ClassicCodec().decode(text), member)
    assert value == STREAM
    assert not is_envelope(value)


@pytest.mark.parametrize("codec", [CompactCodec(), ClassicCodec(), ClassicCodec(superjson=False)])
def test_our_own_records_stay_behind(codec: Any) -> None:
    """Cancels and destroy signals aren't written, and are no messages."""
    assert codec.encode(Cancel("1")) == codec.encode(Bye()) == b""
    for text in (b'{"t":"x","id":"1"}', b'{"t":"bye"}', b"[]", b"{", b'{"type":[]}', b'"type"'):
        with pytest.raises(ProtocolError):
            codec.decode(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"id":1.5,"method":"f","args":[],"type":"request"}',
        b'{"id":"1","method":1,"args":[],"type":"request"}',
        b'{"id":"1","method":"f","args":{},"type":"request"}',
        b'{"id":"1","method":"","args":{},"type":"get","path":"a"}',
        b'{"id":"1","method":"","args":{},"type":"get","path":[1]}',
        b'{"id":"1","method":"","args":[],"type":"response"}',
        b'{"id":"1","method":"c","args":{},"type":"callback"}',
        b'{"id":"1","method":"f","args":[],"type":"zap"}',
        b'{"id":"1","method":"f","args":[{"type":"Uint8Array","data":[256]}],"type":"request"}',
    ],
)
def test_classic_refuses(text: bytes) -> None:
    """A message that isn't one is a ProtocolError."""
    with pytest.raises(ProtocolError):
        ClassicCodec().decode(text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("Method nope is not a function", {"rpc_error": "method_not_found"}),
        ("No API implementation available", {"n": "Error"}),
        ({"message": "m"}, {"n": "Error", "m": "m"}),
        (
            {"name": "A", "message": "m", "cause": "why", "m": 1},
            {"cause": {"n": "Error", "m": "why"}},
        ),
        ({"name": "A", "message": "m", "cause": {}}, {"n": "A", "m": "m"}),
        (5, {"n": "Error", "m": "5"}),
    ],
)
def test_classic_errors(error: Any, expected: dict[str, Any]) -> None:
    """Errors in the forms that peers write them."""
    message = {"id": "1", "method": "", "args": {"error": error}, "type": "response"}
    record = ClassicCodec().decode(json.dumps(message).encode())
    assert isinstance(record, Reply)
    assert record.e is not UNSET
    assert {name: record.e[name] for name in expected} == expected


def test_error_replies_have_name_and_message() -> None:
    """TypeScript peers show anything else as [object Object]."""
    for error in ({"n": "A", "m": ""}, {"n": "", "m": ""}, {}):
        message = json.loads(ClassicCodec(superjson=False).encode(Reply("1", e=error)))
        assert message["args"]["error"]["name"]
        assert message["args"]["error"]["message"]


def test_json_of_kkrpc_0() -> None:
    """Values in plain JSON, as JSON.stringify has them."""
    codec = ClassicCodec(superjson=False)
    value = [b"\x01", MOMENT, math.nan, {1}, Point(1, MOMENT), Color.RED, date(2024, 2, 3), (1,)]
    message = json.loads(codec.encode(Reply("1", value)))
    assert message["args"]["result"] == [
        {"type": "Uint8Array", "data": [1]},
        "2024-02-03T04:05:06.789Z",
        None,
        [1],
        {"x": 1, "when": "2024-02-03T04:05:06.789Z"},
        "red",
        "2024-02-03",
        [1],
    ]
    with pytest.raises(TypeError, match=r"2\*\*53"):
        codec.encode(Reply("1", {"n": [2**53]}))
    assert codec.encode(Reply("1", [0.30000000000000004, 1e300, -1.2345678901234567e-8]))
    assert codec.encode(Reply("1", "9" * 30))


@pytest.mark.parametrize(
    ("request_", "at", "text"),
    [
        (Request("1", "call", ["a", "b"]), 0, "Method path a.b not found at a"),
        (Request("1", "call", ["a", "b"]), 1, "Method a.b is not a function"),
        (Request("1", "new", ["a", "B"]), 0, "Constructor path a.B not found at a"),
        (Request("1", "new", ["B"]), 0, "B is not a constructor function"),
        (Request("1", "get", ["a", "b"]), 1, "Property path a.b not found at b"),
    ],
)
def test_classic_answers_to_unknown_names(request_: Request, at: int, text: str) -> None:
    """In the words of kkrpc 0.x."""
    error = {"n": "MethodNotFoundError", "m": "x", "rpc_error": "method_not_found", "at": at}
    message = json.loads(
        ClassicCodec(superjson=False).encode(answer_unknown(request_, Reply("1", e=error)))
    )
    assert message["args"] == {"error": text}


@pytest.mark.parametrize("name", ["json", "cbor", "kkrpc-2", "kkrpc-0"])
def test_what_was_read_can_be_passed_on(name: str) -> None:
    """Types that were read from superjson are sent as what they are subclasses of."""
    codecs = {"kkrpc-2": CompactCodec(), "kkrpc-0": ClassicCodec(superjson=False)}
    codec = codecs.get(name) or get_codec(name)
    value = {"big": BigInt(5), "map": Map({"k": BigInt(6)}), "url": URL("http://example.com/")}
    record = codec.decode(codec.encode(Reply("1", value)))
    assert record == Reply("1", {"big": 5, "map": {"k": 6}, "url": "http://example.com/"})
    with pytest.raises(TypeError, match="object"):
        codec.encode(Reply("1", object()))


# Entries


def test_senders_without_session_id_are_answered() -> None:
    """kkrpc 0.x doesn't need an id of a peer."""
    dialects = make_dialects()
    entry = dialects.decode([b"data", b'{"id":"1","method":"f","args":[],"type":"request"}\n'])
    assert entry is not None
    assert entry.sender == ""
    assert dialects.of(entry.sender) is not dialects.own


@pytest.mark.parametrize(
    "fields",
    [
        [b"data", b"{}\n{}\n"],
        [b"data", b"\xff"],
        [b"data", b""],
        [b"other", b"x"],
        [b"data", b'{"protocol":"kkrpc.bus.v1"'],
        [b"data", b"__DESTROY__", b"sessionId", b"x" * 300],
        [
            b"data",
            b'{"protocol":"kkrpc.bus.v1","from":"","transportId":"","message":{"t":"x","id":""}}',
        ],
        [
            b"data",
            b'{"protocol":"kkrpc.bus.v1","from":"","transportId":"","message":{"t":"cbr","ids":[]}}',
        ],
    ],
)
def test_invalid_entries(fields: list[bytes]) -> None:
    """They are refused, whatever is wrong with them."""
    with pytest.raises(ProtocolError):
        make_dialects().decode(fields)


def test_own_entries_are_skipped() -> None:
    """Where a peer has no interest in what it wrote, it isn't even decoded."""
    options: dict[str, Any] = {"superjson": True, "max_queue_size": 1, "max_queue_bytes": 1}
    options.update(remote_peer_id=None, skips_own=True, deliver=lambda record, peer: None)
    options.update(now=lambda: 0.0, time_of_day=lambda: 0.0)
    dialects = Dialects("native", "me", get_codec("json"), **options)
    for dialect in (dialects.compact, dialects.classic):
        fields = dialect.encode(Request("1", "call", ["f"], []), None)
        assert fields is not None
        assert dialects.decode(list(fields)) is None
        assert make_dialects().decode(list(fields)) is not None
    assert not dialects.classic_seen


@pytest.mark.parametrize("member", ["to", "correlationId", "sequence", "sentAt"])
def test_null_is_not_absent(member: str) -> None:
    """kkrpc 2 doesn't accept null where something may be absent, nor do we."""
    bus = {
        "protocol": "kkrpc.bus.v1",
        "transportId": "x",
        "from": "c",
        "message": {"t": "r", "id": "1"},
        "more": 1,
    }
    assert make_dialects().decode([b"data", json.dumps(bus).encode()]) is not None
    with pytest.raises(ProtocolError):
        make_dialects().decode([b"data", json.dumps({**bus, member: None}).encode()])


def test_answers_of_peers_that_expose_nothing() -> None:
    """They don't win over the peer that was meant, unless it was meant itself."""
    bus = {
        "protocol": "kkrpc.bus.v1",
        "transportId": "x",
        "from": "c",
        "message": {"t": "r", "id": "1", "e": {"n": "Error", "m": "No API exposed"}},
    }
    fields = [b"data", json.dumps(bus).encode()]
    dialects = make_dialects("kkrpc-2")
    assert dialects.decode(fields) is None
    dialects.compact._remote_peer_id = "c"
    assert dialects.decode(fields) is not None


def test_peers_are_answered_in_the_dialect_they_used_last() -> None:
    """Also where only their id is known."""
    dialects = make_dialects()
    message = b'{"id":"1","method":"f","args":[],"type":"request"}\n'
    dialects.decode([b"data", message, b"sessionId", b"peer"])
    assert dialects.of("peer").shared
    native = make_dialects(session_id="peer").native.encode(Request("2", "call", ["f"]), None)
    dialects.decode(list(native))
    assert dialects.of("peer") is dialects.native
    for number in range(5000):
        dialects.decode([b"data", message, b"sessionId", b"%d" % number])
    assert dialects.of("0") is dialects.own
    assert dialects.of("4999").shared


RECORDED = [
    [part.encode() for pair in vector.values[1]["fields"].items() for part in pair]
    for vector in vectors()
]


@given(
    st.sampled_from(RECORDED),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.binary(max_size=3),
)
def test_damaged_entries(fields: list[bytes], start: int, length: int, patch: bytes) -> None:
    """An entry of which bytes are lost or changed is a record or a ProtocolError."""
    data = fields[1]
    damaged = data[: start % (len(data) + 1)] + patch + data[start % (len(data) + 1) + length % 9 :]
    dialects = make_dialects()
    try:
        entry = dialects.decode([fields[0], damaged, *fields[2:]])
    except ProtocolError:
        return
    if entry is not None:
        assert isinstance(entry.sender, SharedPeer)
        try:
            dialects.of(entry.sender).encode(entry.record, entry.sender)
        except TypeError:
            return


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3).map(lambda parts: parts * 2))
def test_arbitrary_entries(fields: list[bytes]) -> None:
    """Whatever is in an entry."""
    with pytest.raises(ProtocolError):
        make_dialects().decode(fields)
    if fields[1] != b"__DESTROY__":
        with pytest.raises(ProtocolError):
            make_dialects().decode([b"data", *fields[1:]])


# Streams of kkrpc 0.x


class Core:
    """Stands for the core: keeps what it is told."""

    def __init__(self, **options: Any) -> None:
        self.told: list[Any] = []
        options = {"items_per_tick": 10, "max_items": 3, "max_bytes": 100, **options}
        self.streams = ClassicStreams(lambda record, peer: self.told.append(record), **options)


STREAM = {"__kkrpc_next_stream__": "async-iterable", "id": "s"}


def test_pulls_are_paced() -> None:
    """All sources together get no more than a tick allows, and only what they used up."""
    core = Core()
    for number in range(3):
        core.streams.outgoing(Reply(f"r{number}", {**STREAM, "id": f"s{number}"}), "peer")
    core.streams.tick()
    assert [record.n for record in core.told] == [3, 3, 3]
    core.streams.tick()
    assert len(core.told) == 3
    for _ in range(2):
        item = core.streams.outgoing(StreamReply("i", "s1", d=False, v=1), "peer")
        assert isinstance(item, StreamReply)
        assert item.sid == "r1"
    core.told.clear()
    core.streams.tick()
    assert [(record.sid, record.n) for record in core.told] == [("s1", 2)]
    for number in range(3):
        end = core.streams.outgoing(StreamReply("e", f"s{number}", d=True), "peer")
        assert end is not None
    assert not core.streams.busy


def test_more_streams_than_a_tick_allows() -> None:
    """They take turns."""
    core = Core(items_per_tick=2)
    for number in range(5):
        core.streams.outgoing(Reply(f"r{number}", {**STREAM, "id": f"s{number}"}), "peer")
    for _ in range(3):
        core.streams.tick()
    assert {record.sid for record in core.told} == {"s0", "s1", "s2", "s3", "s4"}


def test_cancel_reaches_the_source_and_is_not_answered() -> None:
    """A cancel of another peer's stream reaches nobody."""
    core = Core()
    core.streams.outgoing(Reply("r", STREAM), "peer")
    assert core.streams.incoming(StreamRequest("r", "r", "return"), "other", 1) is None
    left = core.streams.incoming(StreamRequest("r", "r", "return"), "peer", 1)
    assert isinstance(left, StreamRequest)
    assert left.sid == "s"
    assert core.streams.outgoing(StreamReply("x", "s", d=True), "peer") is None


def test_items_wait_for_pulls() -> None:
    """The core gets no more than it asked for, and the end after the items."""
    core = Core()
    core.streams.outgoing(Request("q", "call", ["f"]), None)
    reply = Reply("q", {**STREAM, "id": "q"})
    assert core.streams.incoming(reply, "peer", 1) is reply
    assert core.streams.incoming(Reply("unknown", 1), "peer", 1) is None
    for number in range(2):
        item = StreamReply("q", "q", d=False, v=number)
        assert core.streams.incoming(item, "peer", 1) is None
    core.streams.incoming(StreamReply("q", "q", d=True), "peer", 1)
    assert core.told == []
    assert core.streams.outgoing(StreamRequest("p", "q", "pull", 1), "peer") is None
    assert [record.v for record in core.told] == [0]
    core.streams.outgoing(StreamRequest("p", "q", "pull", 5), "peer")
    assert [record.d for record in core.told] == [False, False, True]
    assert core.streams.outgoing(StreamRequest("p", "q", "pull", 1), "peer") is None


@pytest.mark.parametrize("size", [1, 60])
def test_a_flood_is_cancelled(size: int) -> None:
    """By the number of items and by their bytes; what came before is kept."""
    core = Core()
    core.streams.outgoing(Request("q", "call", ["f"]), None)
    core.streams.incoming(Reply("q", {**STREAM, "id": "q"}), "peer", 1)
    for number in range(10):
        core.streams.incoming(StreamReply("q", "q", d=False, v=number), "peer", size)
    assert len(core.streams.to_send) == 1
    cancel, producer = core.streams.to_send.popleft()
    assert producer == "peer"
    assert core.streams.outgoing(cancel, producer) is cancel
    message = json.loads(ClassicCodec(superjson=False).encode(cancel))
    assert (message["id"], message["type"]) == ("q", "stream-cancel")
    core.streams.outgoing(StreamRequest("p", "q", "pull", 32), "peer")
    *items, end = core.told
    assert [record.v for record in items] == list(range(3 if size == 1 else 1))
    assert end.e["rpc_error"] == "overloaded"


def test_leaving_is_acknowledged_here() -> None:
    """Nothing answers a cancel, so the core's own question is answered for the peer."""
    core = Core()
    core.streams.outgoing(Request("q", "call", ["f"]), None)
    core.streams.incoming(Reply("q", {**STREAM, "id": "q"}), "peer", 1)
    left = StreamRequest("p", "q", "return")
    assert core.streams.outgoing(left, "peer") is left
    assert [(record.id, record.d) for record in core.told] == [("p", True)]
    assert core.streams.outgoing(left, "peer") is left  # of a stream that came too late


def test_forgotten_calls() -> None:
    """What a peer never answers doesn't pile up."""
    core = Core()
    for number in range(10_001):
        core.streams.outgoing(Request(f"q{number}", "call", ["f"]), "peer")
    assert core.streams.incoming(Reply("q0", 1), "peer", 1) is None
    assert core.streams.incoming(Reply("q1", 1), "peer", 1) is not None
    assert core.streams.was_addressed(Request("q1", "call", ["f"]))
    assert not core.streams.was_addressed(Request("q0", "call", ["f"]))


# Callbacks of kkrpc 2


def test_releases_wait_for_the_last_use() -> None:
    """One release ends a callback there, so it is told once, a while after the last use."""
    releases = Releases()
    argument = {"__kkrpc_next_arg__": "callback", "id": "c"}
    for number in range(2):
        releases.received(Request(str(number), "call", ["f"], [1, argument]), "peer")
    releases.released(["c", "unknown"], "peer", 0.0)
    assert not releases.pending
    releases.released(["c"], "peer", 1.0)
    assert releases.due(DELAY) == {}
    releases.received(Request("3", "call", ["f"], [argument]), "peer")
    assert not releases.pending
    releases.released(["c"], "peer", 5.0)
    assert releases.due(5.0 + DELAY) == {"peer": ["c"]}
    assert not releases.pending
