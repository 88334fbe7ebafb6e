"""Streams whose other peer goes, or is followed by another one."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol import _stream_table
from anyio_kkrpc._protocol._calls import Call
from anyio_kkrpc._protocol._conversation import Conversation
from anyio_kkrpc._protocol._dependencies import Dependencies, Role
from anyio_kkrpc._protocol._events import (
    Answer,
    CallFinished,
    StreamLeft,
    StreamPulled,
    StreamsClosed,
)
from anyio_kkrpc._protocol._records import Reply, StreamReply, StreamRequest
from anyio_kkrpc._protocol._state import CallInput, CallState
from anyio_kkrpc._protocol._stream_table import Streams
from anyio_kkrpc._protocol._streams import Consumer, Producer


class Source:
    """Looks like a stream to the core, which never touches it."""

    def __aiter__(self) -> Any:
        raise AssertionError("the core must not run user code")


class Side:
    """A peer, and who it needs."""

    def __init__(self, *, broadcast: bool = False) -> None:
        self.needs: set[tuple[str | None, Role]] = set()
        self.peer = Conversation("a-", lambda *_: print, broadcast=broadcast, depend=self._depend)

    def _depend(self, peer: str | None, role: Role, wanted: bool) -> None:
        assert ((peer, role) in self.needs) is not wanted
        (self.needs.add if wanted else self.needs.remove)((peer, role))

    def call(self, **options: Any) -> tuple[Call, Producer]:
        """Make a call with a stream as its argument."""
        call, _ = self.peer.call("call", ["total"], args=[Source()], **options)
        (producer,) = call.producers or ()
        return call, producer

    def pull(self, producer: Producer, worker: str, n: int = 8) -> StreamReply | None:
        """Let a worker pull; return how it was refused."""
        record = StreamRequest(id="1", sid=producer.id, op="pull", n=n)
        return self._ask(record, worker)

    def leave(self, producer: Producer, worker: str) -> StreamReply | None:
        """Let a worker leave; return what it is answered, unless its source is closed."""
        return self._ask(StreamRequest(id="2", sid=producer.id, op="return"), worker)

    def _ask(self, record: StreamRequest, worker: str) -> StreamReply | None:
        event = self.peer.receive(record, worker)
        if isinstance(event, Answer):
            assert event.recipient == worker
            assert isinstance(event.record, StreamReply)
            return event.record
        assert isinstance(event, (StreamPulled, StreamLeft))
        return None

    def answer(self, call: Call, worker: str, **reply: Any) -> StreamsClosed:
        """Let a worker answer; return what that closes."""
        event = self.peer.receive(Reply(call.id, **reply), worker)
        assert isinstance(event, CallFinished)
        assert event.closed is not None
        return event.closed


def refusal(record: StreamReply | None) -> str:
    """Return the text of a precise error."""
    assert record is not None
    assert isinstance(record.e, dict)
    assert record.e["rpc_error"] == "delivery"
    return str(record.e["m"])


def told(closed: StreamsClosed) -> list[str | None]:
    """Return who is told that the stream is over, each with an error."""
    for answer in closed.told:
        assert isinstance(answer.record, StreamReply)
        assert "answered by another worker" in refusal(answer.record)
    return [answer.recipient for answer in closed.told]


def test_next_worker_reads_from_the_start() -> None:
    """Nothing was sent to the first one: the next one gets all, and no credit of the other."""
    side = Side()
    call, producer = side.call()
    assert side.pull(producer, "one", 8) is None
    assert side.pull(producer, "two", 3) is None
    assert (producer.consumer, producer.credit) == ("two", 3)
    assert producer.item("x").i == 0
    # The first one was only slow: it is told when the call is over, and changes nothing.
    assert "another worker" in refusal(side.pull(producer, "one"))
    late = side.leave(producer, "one")
    assert late is not None
    assert late.d is True
    assert producer.open
    closed = side.answer(call, "two", v=1)
    assert (closed.producers, told(closed)) == ([], ["one"])
    assert side.leave(producer, "two") is None


def test_third_worker_reads_from_the_start() -> None:
    side = Side()
    call, producer = side.call()
    for worker in ("one", "two", "three"):
        assert side.pull(producer, worker, 1) is None
    assert producer.item("x").i == 0
    assert "has had 1 items" in refusal(side.pull(producer, "four"))
    closed = side.answer(call, "three", v=1)
    assert told(closed) == ["one", "two"]


@pytest.mark.parametrize("gone", [False, True], ids=["slow", "gone"])
def test_next_worker_can_not_read_the_rest(gone: bool) -> None:
    """Its handler gets a precise error; whoever answers, the source is closed."""
    side = Side()
    call, producer = side.call()
    side.pull(producer, "one")
    producer.item("x")
    if gone:
        assert side.peer.lose_peer("one", "reader").producers == [producer]
        assert not side.peer.producers
        # It was only silent, and hears why there is no more.
        assert "taken for gone" in refusal(side.pull(producer, "one"))
    assert "has had 1 items" in refusal(side.pull(producer, "two"))
    closed = side.answer(call, "two", e={"n": "E", "m": "m"})
    assert call.state is CallState.FAILED
    if gone:
        assert (closed.producers, closed.told) == ([], [])
    else:
        assert closed.producers == [producer]
        assert told(closed) == ["one"]
    assert not side.needs
    # And now it isn't known any more.
    unknown = side.pull(producer, "two")
    assert unknown is not None
    assert unknown.e == {"n": "Error", "m": f"Unknown RPC stream {producer.id}"}


def test_worker_that_is_gone_before_it_was_sent_anything() -> None:
    """The stream waits for the next worker, with no credit."""
    side = Side()
    call, producer = side.call()
    side.pull(producer, "one")
    assert side.needs == {("one", "reader")}
    gone = side.peer.lose_peer("one", "reader")
    assert (gone.producers, gone.consumers, gone.told) == ([], [], [])
    assert side.needs == {(None, "reader")}
    assert (producer.open, producer.credit) == (True, 0)
    assert side.pull(producer, "two", 2) is None
    assert (producer.consumer, producer.credit) == ("two", 2)
    side.answer(call, "two", v=1)
    assert side.peer.lose_peer("two", "reader").producers == [producer]
    assert not side.needs


@pytest.mark.parametrize("how", ["ended", "failed", "left", "read"])
def test_stream_that_is_over_for_the_worker_before(how: str) -> None:
    """What has ended without an item is so for the next worker; else it gets a precise error."""
    side = Side()
    call, producer = side.call()
    side.pull(producer, "one")
    if how == "left":
        side.leave(producer, "one")
    else:
        if how == "read":
            producer.item("x")
        side.peer.end_production(producer, {"n": "E", "m": "m"} if how == "failed" else None)
    for _ in range(2):  # before its end is on its way, and after that
        answer = side.pull(producer, "two")
        assert answer is not None
        if how == "ended":
            assert (answer.d, answer.e, answer.i) == (True, UNSET, 0)
        elif how == "failed":
            assert answer.e == {"n": "E", "m": "m"}
        else:
            assert ("has had 1" if how == "read" else "has closed it") in refusal(answer)
        side.peer.forget(producer)
    assert not side.needs
    assert side.answer(call, "two", v=1) == StreamsClosed([], [])


@pytest.mark.parametrize("read", [False, True])
def test_worker_that_runs_the_request_once_more(read: bool) -> None:
    """It had finished, and another server hadn't the reply: an empty stream is read once more, and
    of another one it gets a precise error, as long as somebody waits for the call.
    """
    side = Side()
    call, producer = side.call()
    side.pull(producer, "one")
    if read:
        producer.item("x")
    side.peer.end_production(producer, None)
    side.peer.forget(producer)
    answer = side.pull(producer, "one")
    assert answer is not None
    if read:
        assert "this peer, which runs the request once more, has had 1 items" in refusal(answer)
    else:
        assert (answer.d, answer.e) == (True, UNSET)
    side.answer(call, "one", v=1)
    unknown = side.pull(producer, "one")
    assert unknown is not None
    assert unknown.e == {"n": "Error", "m": f"Unknown RPC stream {producer.id}"}


@pytest.mark.parametrize("failed", [False, True], ids=["result", "error"])
def test_answer_of_one_who_has_not_pulled(failed: bool) -> None:
    """After a result it may still read what nobody has begun to read; after an error it won't."""
    side = Side()
    call, producer = side.call()
    closed = side.answer(call, "one", **({"e": {}} if failed else {"v": 1}))
    if failed:
        assert closed == StreamsClosed([producer], [])
        assert not side.needs
        return
    assert closed == StreamsClosed([], [])
    assert side.needs == {("one", "reader")}
    assert "another peer" in refusal(side.pull(producer, "two"))
    assert side.pull(producer, "one") is None


@pytest.mark.parametrize("step", [CallInput.CANCEL, CallInput.TIMEOUT, CallInput.LOSE])
def test_call_that_is_given_up(step: CallInput) -> None:
    """The source is closed, and workers that it was taken from are told."""
    side = Side()
    call, producer = side.call()
    side.pull(producer, "one")
    side.pull(producer, "two")
    closed = side.peer.finish_call(call, step)
    assert closed is not None
    assert closed.producers == [producer]
    assert told(closed) == ["one"]
    assert not side.needs
    assert not side.peer.producers


@pytest.mark.parametrize(
    "options", [{"one_way": True}, {"gather": True}, {"recipient": "one"}, {}], ids=str
)
def test_streams_that_have_one_reader(options: Any) -> None:
    """Where no group runs the call, or nobody waits for its end, the first reader stays it."""
    side = Side(broadcast=not options)
    _, producer = side.call(**options)
    assert side.pull(producer, "one") is None
    assert "another peer" in refusal(side.pull(producer, "two"))
    assert side.peer.lose_peer("one", "reader").producers == [producer]
    assert not side.needs


def test_source_that_is_gone() -> None:
    """Who reads learns; what was left waits no longer; should it live, it learns as well."""
    side = Side()
    read: list[Consumer] = []
    for number in range(3):
        call, _ = side.peer.call("call", ["count"], args=[])
        side.peer.receive(
            Reply(call.id, {"__kkrpc_next_stream__": "async-iterable", "id": f"s{number}"}),
            "one" if number < 2 else "two",
        )
        read.append(call.stream)
    assert side.needs == {("one", "source"), ("two", "source")}
    read[0].wait()
    assert side.peer.leave(read[1]) is not None
    gone = side.peer.lose_peer("one", "source")
    assert gone.consumers == [read[0]]
    ((record, recipient),) = [(one.record, one.recipient) for one in gone.told]
    assert isinstance(record, StreamRequest)
    assert (record.sid, record.op, recipient) == ("s0", "return", "one")
    assert (read[0].finished, read[1].finished, read[2].finished) == (True, True, False)
    assert side.needs == {("two", "source")}
    assert side.peer.receive(StreamReply(id="9", sid="s0", d=False, v=1), "one") is None
    assert side.peer.lose_peer("one", "source") == side.peer.lose_peer("nobody", "reader")
    side.peer.lose()
    assert not side.needs


class Alone:
    """The table alone, and who it needs."""

    def __init__(self) -> None:
        self.needs: list[tuple[str | None, Role, bool]] = []
        dependencies = Dependencies(lambda *need: self.needs.append(need))
        self.streams = Streams(lambda: f"s{len(self.needs)}", dependencies)


def test_passed_twice() -> None:
    """Ids are of the peer that has the source: another one's may be the same."""
    alone = Alone()
    first = alone.streams.consume("1", "x", "c")
    with pytest.raises(ProtocolError, match="passed twice"):
        alone.streams.consume("1", "x", "c")
    alone.streams.consume("1", "y", "c")
    assert alone.needs == [("x", "source", True), ("y", "source", True)]
    record = alone.streams.leave(first)
    assert record is not None
    assert alone.streams.leave(first) is None
    # Its source has told what it was asked, and is needed no more.
    alone.streams.receive_reply(StreamReply(id=record.id, sid="1", d=True), "x")
    assert alone.needs[2:] == [("x", "source", False)]


def test_readers_that_were_given_up_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes back is told why; the oldest are forgotten first."""
    monkeypatch.setattr(_stream_table, "_MAX_GIVEN_UP", 2)
    alone = Alone()
    ids = []
    for peer in ("x", "y", "z"):
        producer = alone.streams.produce(Source(), peer)
        ids.append(producer.id)
        assert alone.streams.lose_peer(peer, "source").producers == []
        assert alone.streams.lose_peer(peer, "reader").producers == [producer]
        assert not producer.open
    assert alone.streams.producers == {}
    texts = []
    for peer, stream_id in zip(("x", "y", "z"), ids, strict=True):
        pull = StreamRequest(id="1", sid=stream_id, op="pull", n=1)
        event = alone.streams.receive_request(pull, peer)
        assert isinstance(event, Answer)
        assert isinstance(event.record, StreamReply)
        texts.append("taken for gone" in event.record.e["m"])
    assert texts == [False, True, True]


def test_late_items() -> None:
    alone = Alone()
    assert alone.streams.receive_reply(StreamReply(id="1", sid="gone"), "x") is None
    assert alone.streams.ignored == 1
    consumer, producer = alone.streams.consume("1", "x", "c"), alone.streams.produce(Source(), "y")
    assert alone.streams.lose() == ([consumer], [producer])
    assert alone.streams.lose() == ([], [])
    assert [wanted for _, _, wanted in alone.needs] == [True, True, False, False]
