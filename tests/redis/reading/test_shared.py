"""What is between this peer and TypeScript peers on one stream: decided without any I/O."""

from __future__ import annotations

from typing import Any, cast

import pytest
from anyio.abc import TaskGroup

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import Bye, Cancel, Record, Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._inbound import Inbound
from anyio_kkrpc.kit._queue import BoundedQueue
from anyio_kkrpc.redis._reading._destroying import DestroySignals
from anyio_kkrpc.redis._reading._shared import Shared, answer_shared
from anyio_kkrpc.redis.dialects import Dialects, Entry, SharedPeer

ME = "me"


class Stream:
    """A stream on which this peer came at 100-0, at 1000 s of Redis' clock."""

    def __init__(self, group: str | None = None, *, wants_own: bool = False) -> None:
        self.queue: BoundedQueue[Envelope] = BoundedQueue(10)
        inbound = Inbound(self.queue)
        self.dialects = Dialects(
            "kkrpc-2",
            ME,
            get_codec("json"),
            superjson=True,
            remote_peer_id=None,
            skips_own=group is None and not wants_own,
            max_queue_size=10,
            max_queue_bytes=1000,
            deliver=lambda record, sender: inbound.deliver(Envelope(record, sender)),
            now=lambda: 0.0,
            time_of_day=lambda: 0.0,
        )
        self.ended: list[Exception] = []
        self.answers: list[Envelope] = []
        self.listened: list[bytes] = []
        self.signals = DestroySignals(True, inbound, self.ended.append)
        self.shared = Shared(
            self.dialects,
            ME,
            group,
            wants_own=wants_own,
            inbound=inbound,
            signals=self.signals,
            answer=self.answers.append,
            now=lambda: 1000.0,
            listen=self.listened.append,
        )
        self.shared.begin_after(b"100-0", cast(TaskGroup, None))  # no stream goes on

    def peer(self, name: str, dialect: str = "compact") -> SharedPeer:
        return SharedPeer.of(name, getattr(self.dialects, dialect))

    def received(self) -> list[Record]:
        return [self.queue.get_nowait().record for _ in range(len(self.queue))]


def entry(sender: str, recipient: str | None = None, record: Record | None = None) -> Entry:
    record = Request("1", "call", ["f"]) if record is None else record
    return Entry(record, sender, 1, recipient=recipient)


@pytest.mark.parametrize(
    ("group", "recipient", "is_for_others"),
    [
        (None, None, False),
        (None, ME, False),
        (None, "other", True),
        (None, "workers", True),
        ("workers", None, False),
        ("workers", ME, False),
        ("workers", "workers", False),
        ("workers", "other", True),
    ],
)
def test_for_others(group: str | None, recipient: str | None, is_for_others: bool) -> None:
    stream = Stream(group)
    assert stream.shared.is_for_others(entry(stream.peer("x"), recipient)) is is_for_others


@pytest.mark.parametrize(
    ("options", "is_own"),
    [({}, True), ({"wants_own": True}, False), ({"group": "workers"}, False)],
)
def test_own(options: dict[str, Any], is_own: bool) -> None:
    """A broadcast leaves out what this peer wrote; a worker may get its own requests."""
    shared = Stream(**options).shared
    assert shared.is_own(entry(ME)) is is_own
    assert not shared.is_own(entry("x"))


def test_request() -> None:
    """From then on the stream is read for what its sender says next."""
    stream = Stream("workers")
    envelope = Envelope(Request("1", "call", ["f"]), stream.peer("x"), token=b"200-0")
    assert stream.shared.prepare(envelope, b"200-0")
    assert stream.listened == [b"200-0"]
    assert stream.answers == []


@pytest.mark.parametrize(
    ("token", "attempt", "entry_id", "runs"),
    [
        (b"t", 1, b"99-0", False),
        (b"t", 1, b"100-0", False),
        (b"t", 1, b"101-0", True),  # it came after this worker
        (b"t", 2, b"99-0", True),  # somebody has begun it
        (None, 1, b"99-0", True),  # a broadcast has no history
    ],
)
def test_history(token: bytes | None, attempt: int, entry_id: bytes, runs: bool) -> None:
    """What a new group finds and was asked long ago isn't run, and its caller is told."""
    stream = Stream("workers")
    sender = stream.peer("x")
    assert sender.dialect.stale_after < 900
    envelope = Envelope(Request("1", "call", ["f"]), sender, None, attempt, token=token)
    assert stream.shared.prepare(envelope, entry_id) is runs
    assert [answer.recipient for answer in stream.answers] == ([] if runs else ["x"])


@pytest.mark.parametrize(
    ("token", "entry_id", "ended", "unsaid"),
    [
        (None, b"101-0", True, None),
        (None, b"100-0", False, None),  # it was for those before
        (b"t", b"101-0", False, "x"),  # others haven't got it
    ],
)
def test_destroy_signal(
    token: bytes | None, entry_id: bytes, ended: bool, unsaid: str | None
) -> None:
    stream = Stream("workers" if token else None)
    envelope = Envelope(Bye(), stream.peer("x", "classic"), token=token)
    assert not stream.shared.prepare(envelope, entry_id)
    assert [type(reason) for reason in stream.ended] == [TransportClosedError] * ended
    assert stream.signals.unsaid == unsaid


def test_the_rest() -> None:
    """Replies are taken from the stream where they are for this peer; requests are read elsewhere."""
    stream = Stream()
    take, peer = stream.shared.take, stream.peer("x")
    reply = Reply("1", v=3)
    take(entry(peer, ME, reply), serving=False)
    assert stream.received() == [reply]
    for other in (
        entry(peer, ME),
        entry(peer, "other", reply),
        entry("native", ME, reply),
        entry(stream.peer(ME), ME, reply),
    ):
        take(other, serving=False)
    assert stream.received() == []
    assert stream.shared.received == 1


@pytest.mark.parametrize(
    ("group", "serving", "ended"), [(None, True, True), ("g", False, True), ("g", True, False)]
)
def test_who_leaves(group: str | None, serving: bool, ended: bool) -> None:
    """A worker that serves gets it from the group, and acknowledges it first."""
    stream = Stream(group)
    stream.shared.take(entry(stream.peer("x", "classic"), None, Bye()), serving=serving)
    assert bool(stream.ended) is ended


def test_answers() -> None:
    stream = Stream()
    request, reply = Request("1", "call", ["f"]), Reply("1", v=3)
    answer = Envelope(reply)
    answer_shared(Envelope(request, "native"), answer)
    assert answer.record is reply
    sender = stream.peer("x")
    expected = sender.dialect.answer(request, Reply("1", v=3))
    answer_shared(Envelope(request, sender), answer)
    assert answer.record == expected
    assert not isinstance(answer.record, Cancel)
