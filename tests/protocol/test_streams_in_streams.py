"""Items that stand for streams, as records: entered to be read, ended if nobody will, weighed."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from msgspec import UNSET

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol._budget import BUDGET
from anyio_kkrpc._protocol._dependencies import Dependencies
from anyio_kkrpc._protocol._events import Answer, StreamAnswered, StreamFailed, StreamItem
from anyio_kkrpc._protocol._records import StreamReply
from anyio_kkrpc._protocol._stream_table import Streams
from anyio_kkrpc._protocol._streams import MAX_CREDIT, Consumer, Producer
from anyio_kkrpc._protocol._values import REFERENCES, stream_envelope


class Reader:
    """A peer that reads a stream."""

    def __init__(self) -> None:
        ids = map(str, count())
        self.late: list[Any] = []
        self.streams = Streams(
            lambda: next(ids),
            Dependencies(lambda *_: None),
            lambda value, sender: self.late.append(value),
        )
        self.outer = self.streams.consume("outer", "peer", "call")
        self.outer.wait()

    def take(self, value: Any, *, index: Any = UNSET, identifier: str = "i") -> Any:
        record = StreamReply(identifier, "outer", d=False, v=value, i=index)
        return self.streams.receive_reply(record, "peer")


def test_an_item() -> None:
    """It is read from the peer that the item came from; what only looks so is a value."""
    reader = Reader()
    event = reader.take(stream_envelope("inner"), index=0)
    assert isinstance(event, StreamItem)
    assert isinstance(event.value, Consumer)
    assert reader.streams.consumers["peer", "inner"] is event.value
    for number, plain in enumerate(
        (
            {**stream_envelope("x"), "more": 1},
            {**stream_envelope("x"), "id": 5},
            {**stream_envelope("x"), "id": "x" * 257},
            {"__kkrpc_next_stream__": "iterable", "id": "x"},
            [stream_envelope("x")],
            {"v": stream_envelope("x")},
        ),
        1,
    ):
        event = reader.take(plain, index=number)
        assert isinstance(event, StreamItem)
        assert event.value == plain
    with pytest.raises(ProtocolError, match="twice"):
        reader.take(stream_envelope("inner"), index=7)
    assert len(reader.streams.consumers) == 2


def test_an_answer_that_is_one() -> None:
    reader = Reader()
    asked = reader.outer.throw({"n": "Error", "m": ""})
    event = reader.take(stream_envelope("inner"), identifier=asked.id)
    assert isinstance(event, StreamAnswered)
    assert isinstance(event.reply.v, Consumer)


@pytest.mark.parametrize("index", [0, UNSET])
def test_one_for_a_reader_that_has_left(index: Any) -> None:
    """Its source is told that nobody reads it, unless it came twice, and is being read."""
    reader = Reader()
    reader.take(stream_envelope("read"), index=index)
    reader.streams.leave(reader.outer)
    event = reader.take(stream_envelope("late"))
    assert isinstance(event, Answer)
    assert event.recipient == "peer"
    assert (event.record.sid, event.record.op) == ("late", "return")  # type: ignore[union-attr]
    assert reader.take(stream_envelope("read"), index=index) is None
    assert reader.take({"plain": 1}) is None


def test_one_that_came_twice() -> None:
    reader = Reader()
    for _ in range(2):
        event = reader.take(stream_envelope("inner"), index=0)
    assert event is None
    assert reader.streams.ignored == 1


def test_an_item_behind_one_that_was_lost() -> None:
    """Nobody gets it: it isn't entered to be read, and what it has of references is released."""
    reader = Reader()
    assert isinstance(reader.take(stream_envelope("inner"), index=1), StreamFailed)
    assert not reader.streams.consumers
    reader = Reader()
    assert isinstance(reader.take({REFERENCES: [1]}, index=1), StreamFailed)
    assert reader.late == [{REFERENCES: [1]}]


def test_references_that_came_twice() -> None:
    """They were given once: what is released counts those that were."""
    reader = Reader()
    for _ in range(2):
        event = reader.take({REFERENCES: [1]}, index=0)
    assert event is None
    assert reader.streams.ignored == 1
    assert reader.late == []
    reader.streams.leave(reader.outer)
    assert reader.take({REFERENCES: [2]}, index=1) is None
    assert reader.late == [{REFERENCES: [2]}]


def test_a_late_answer() -> None:
    """Nobody waits for it any more, nor will read it."""
    reader = Reader()
    first = reader.outer.throw({"n": "Error", "m": ""})
    reader.outer.throw({"n": "Error", "m": ""})
    event = reader.take(stream_envelope("late"), identifier=first.id)
    assert isinstance(event, Answer)
    assert event.record.sid == "late"  # type: ignore[union-attr]


def test_they_are_heavy() -> None:
    """A source is one of them ahead; one that doesn't weigh is granted one at a time."""
    ids = map(str, count())
    producer = Producer("s", "peer", None, lambda: next(ids))
    producer.pull(32, BUDGET)
    record = producer.item(stream_envelope("inner"), BUDGET)
    assert record.w == BUDGET
    assert producer.paused
    reader = Reader()
    pulled = 32
    for number in range(64):
        reader.take(stream_envelope(f"{number}"))
        pull = reader.outer.delivered()
        pulled += 0 if pull is None else pull.n
        assert pulled <= 32 + number


@pytest.mark.parametrize(
    ("n", "wanted"),
    [
        *[(1, 1), (2, 2), (2.7, 2), (1.5, 1), (0, 1), (-3, 1), ("5", 1), (None, 1), (True, 1)],
        *[(UNSET, 1), (float("inf"), MAX_CREDIT), (float("nan"), 1), (1 << 60, MAX_CREDIT)],
    ],
)
def test_what_a_pull_allows(n: Any, wanted: int) -> None:
    """What isn't a number above one counts as one, as in kkrpc."""
    ids = map(str, count())
    producer = Producer("s", "peer", None, lambda: next(ids))
    producer.pull(n)
    assert producer.credit == wanted
