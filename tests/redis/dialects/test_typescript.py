"""Entries of TypeScript peers, alone: the two dialects of kkrpc, as they are written and read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anyio_kkrpc import ProtocolError
from anyio_kkrpc.records import Bye, CallbackRelease, Cancel, Reply, Request
from anyio_kkrpc.redis.dialects import SharedPeer
from anyio_kkrpc.redis.dialects.kkrpc0 import ClassicDialect
from anyio_kkrpc.redis.dialects.kkrpc2 import CompactDialect
from anyio_kkrpc.typescript._releases import DELAY

REQUEST = Request("1", "call", ["a"], a=[])
REPLY = Reply("1", 5)


def compact(name: str = "me", peer: str | None = None, *, skips_own: bool = True) -> CompactDialect:
    clocks: dict[str, Any] = {"now": lambda: 100.0, "time_of_day": lambda: 7.5}
    return CompactDialect(name, peer, skips_own=skips_own, **clocks)


def classic(name: str = "me", *, skips_own: bool = True, superjson: bool = False) -> ClassicDialect:
    bounds = {"max_items": 10, "max_bytes": 1000}
    both = ClassicDialect.pair(name, lambda record, peer: None, skips_own=skips_own, **bounds)
    return both[superjson]


def fields_of(entry: tuple[bytes, ...] | None) -> list[bytes]:
    assert entry is not None
    return [*entry]


def test_envelope_of_kkrpc_2() -> None:
    """Members that are optional are absent, not null, and a newline ends it."""
    name, data = fields_of(compact().encode(REQUEST, None))
    assert name == b"data"
    assert data.endswith(b"\n")
    envelope = json.loads(data)
    message = envelope.pop("message")
    assert message == {"t": "q", "id": "1", "op": "call", "p": ["a"], "a": []}
    assert envelope == {
        "protocol": "kkrpc.bus.v1",
        "transportId": "redis-streams",
        "from": "me",
        "correlationId": "1",
        "sentAt": 7500,
    }
    assert json.loads(fields_of(compact(peer="ts").encode(REQUEST, None))[1])["to"] == "ts"
    assert json.loads(fields_of(compact(peer="ts").encode(REPLY, "other"))[1])["to"] == "other"
    release = CallbackRelease(["f"], all=True)
    assert "correlationId" not in json.loads(fields_of(compact().encode(release, "ts"))[1])


@pytest.mark.parametrize("make", [compact, classic])
def test_own_entries(make: Any) -> None:
    """Who has no interest in what it wrote itself doesn't read it."""
    own = fields_of(make().encode(REQUEST, None))
    assert make().decode(own) is None
    for reader in (make("other"), make(skips_own=False)):
        entry = reader.decode(own)
        assert entry is not None
        assert (entry.record, entry.sender) == (REQUEST, "me")
        assert entry.sender.dialect is reader


def test_for_one_peer() -> None:
    """What kkrpc 2 addresses is read with whom it is for, so that it can be handed on."""
    fields = fields_of(compact("ts").encode(REQUEST, "worker"))
    entry = compact().decode(fields)
    assert entry is not None
    assert (entry.recipient, entry.fields) == ("worker", fields)
    entry = compact().decode(fields_of(compact("ts").encode(REQUEST, None)))
    assert entry is not None
    assert (entry.recipient, entry.fields) == (None, None)


@pytest.mark.parametrize("addressed", [False, True])
def test_answer_of_who_exposes_nothing(addressed: bool) -> None:
    """Another peer may serve what was for anybody."""
    answer = Reply("1", e={"n": "Error", "m": "No API exposed"})
    fields = fields_of(compact("ts").encode(answer, "me"))
    reader = compact(peer="ts" if addressed else None)
    assert (reader.decode(fields) is not None) is addressed


@pytest.mark.parametrize("dialect", [compact(), classic(), classic(superjson=True)])
@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"a":1}\n', b'{"id":1}\n{"id":2}\n', b"\xff\xfe", b"null"]
)
def test_not_valid(dialect: CompactDialect | ClassicDialect, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        dialect.decode([b"data", data, b"sessionId", b"x"])


def test_what_it_has_no_words_for() -> None:
    """Cancels are of this library's own; a release is said later."""
    assert compact().encode(Cancel("1"), "ts") is None
    assert classic().encode(Cancel("1"), "ts") is None
    dialect = compact()
    envelope = {"__kkrpc_next_arg__": "callback", "id": "f"}
    dialect.begin(Request("1", "call", ["a"], a=[envelope]), "ts")
    assert dialect.encode(CallbackRelease(["f"]), "ts") is None
    assert list(dialect.due(101 + DELAY)) == [(CallbackRelease(["f"], all=True), "ts")]


def test_destroyed() -> None:
    """The signal of kkrpc 0.x is no message, and may come from nobody in particular."""
    fields = fields_of(classic().encode(Bye(), None))
    assert fields == [b"data", b"__DESTROY__", b"sessionId", b"me"]
    entry = classic("other").decode(fields)
    assert entry is not None
    assert (entry.record, entry.sender) == (Bye(), "me")
    entry = classic().decode(fields[:2])
    assert entry is not None
    assert entry.sender == ""


def test_lines_of_kkrpc_0() -> None:
    """A newline ends each; one without it is read like others."""
    fields = fields_of(classic("ts").encode(REQUEST, None))
    assert fields[1].endswith(b"\n")
    for data in (fields[1], fields[1].strip()):
        entry = classic().decode([b"data", data, b"sessionId", b"ts"])
        assert entry is not None
        assert entry.record == REQUEST


@pytest.mark.parametrize("superjson", [False, True])
def test_answered_in_its_serialization(superjson: bool) -> None:
    fields = fields_of(classic("ts", superjson=superjson).encode(REQUEST, None))
    entry = classic().decode(fields)
    assert entry is not None
    assert isinstance(entry.sender, SharedPeer)
    answer = fields_of(entry.sender.dialect.encode(REPLY, entry.sender))
    assert answer[1].startswith(b'{"json":') is superjson
