"""How far callers of a function may be ahead of it, whatever happens in what order."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol._ahead import WINDOW, Ahead
from anyio_kkrpc._protocol._budget import BUDGET
from anyio_kkrpc._protocol._conversation import Conversation
from anyio_kkrpc._protocol._events import Answer, CallbackInvoked, CallbackRan
from anyio_kkrpc._protocol._records import CallbackCall, CallbackProgress, CallbackRelease

WEIGHTS = st.sampled_from([0, 1, 5000, BUDGET // 2 - 1, BUDGET // 2, BUDGET])
STEPS = st.one_of(
    st.tuples(st.just("send"), WEIGHTS),
    st.tuples(st.just("refused"), WEIGHTS),
    st.tuples(st.just("lost"), st.integers(0, 100)),
    st.tuples(st.just("run"), st.integers(1, 5)),
    st.tuples(st.just("hear"), st.integers(1, 5)),
)


class Line:
    """Somebody who calls, the way to the function, the function, and the way back."""

    def __init__(self, window: int) -> None:
        self.ahead = Ahead("f", "owner", window)
        self.way: list[tuple[int, CallbackCall, int]] = []
        self.back: deque[int] = deque()
        self.ran = 0

    def send(self, weight: int) -> tuple[int, CallbackCall, int]:
        record = CallbackCall("c", [])
        return self.ahead.send(record, weight), record, weight

    def run(self) -> None:
        number, record, _ = self.way.pop(0)
        assert number > self.ran
        self.ran = number
        if record.i is not UNSET:
            assert (record.f, record.i) == ("f", number)
            self.back.append(number)

    def hear(self) -> None:
        self.ahead.ran(self.back.popleft())


@given(st.integers(1, 9) | st.just(WINDOW), st.lists(STEPS, max_size=120))
def test_any_order(window: int, steps: list[tuple[str, int]]) -> None:
    """What is on its way is bounded, and whenever nothing more may be sent an answer will come."""
    line = Line(window)
    for step, value in steps:
        if step in ("send", "refused"):
            if line.ahead.full:
                with pytest.raises(ProtocolError):
                    line.send(value)
                continue
            sent = line.send(value)
            if step == "send":
                line.way.append(sent)
            else:
                line.ahead.take_back(sent[0], sent[1])
        elif step == "lost" and line.way:
            number, record, _ = line.way.pop(value % len(line.way))
            line.ahead.take_back(number, record)
        elif step == "run":
            for _ in range(min(value, len(line.way))):
                line.run()
        elif step == "hear":
            for _ in range(min(value, len(line.back))):
                line.hear()
        assert len(line.way) <= window
        assert sum(weight for *_, weight in line.way[:-1]) < BUDGET
        if line.ahead.full:
            assert line.back or any(record.i is not UNSET for _, record, _ in line.way)
    while line.way:
        line.run()
    while line.back:
        line.hear()
    assert not line.ahead.full


@given(st.lists(st.integers(1, WINDOW // 2), min_size=1, max_size=40))
def test_few_answers(batches: list[int]) -> None:
    """One answer for each half of what may be ahead, and none for a few invocations."""
    line = Line(WINDOW)
    answers = sent = 0
    for batch in batches:
        for _ in range(batch):
            assert not line.ahead.full
            line.way.append(line.send(10))
            sent += 1
        while line.way:
            line.run()
        answers += len(line.back)
        while line.back:
            line.hear()
    assert answers == sent // (WINDOW // 2)


def make_pair() -> tuple[Conversation, Conversation, CallbackCall, Ahead]:
    """An owner, who has called with a function, and a worker, who calls that."""

    def remote(callback_id: str, owner: str | None, request_id: str, ahead: Ahead | None) -> Any:
        assert owner == "owner"
        assert ahead is not None
        return callback_id, ahead

    owner, worker = Conversation("a-", remote), Conversation("b-", remote)
    _, request = owner.call("call", ["f"], args=[print])
    assert request.cw == WINDOW
    (arg,), _ = worker.unpack(request, worker.begin(request, "owner"))
    callback_id, ahead = arg
    return owner, worker, worker.callback_call(callback_id, [1], None), ahead


def flood(worker: Conversation, record: CallbackCall, ahead: Ahead) -> list[CallbackCall]:
    """Send as much as may be."""
    sent = []
    while not ahead.full:
        one = CallbackCall(record.id, record.a)
        worker.send_callback(ahead, one, 0)
        sent.append(one)
    return sent


def test_between_peers() -> None:
    """The owner answers what asks, to who has sent it, and nobody else's answer counts."""
    owner, worker, record, ahead = make_pair()
    for turn in range(1, 4):
        told = []
        for one in flood(worker, record, ahead):
            event = owner.receive(one, "worker")
            assert isinstance(event, CallbackInvoked)
            if event.progress is not None:
                told.append(event.progress)
        assert [progress.n for progress in told] == [
            WINDOW * turn - WINDOW // 2,
            WINDOW * turn,
        ]
        assert worker.receive(told[1], "another") is None
        assert ahead.full
        assert worker.receive(told[1], "owner") == CallbackRan(ahead, False)
        assert not ahead.full
        assert worker.receive(told[0], "owner") == CallbackRan(ahead, False)  # late, and no harm
    with pytest.raises(ProtocolError):
        worker.receive(CallbackProgress(ahead.id, WINDOW * 3 + 1), "owner")
    assert worker.called_of("owner") == [ahead]
    worker.end_callback(ahead)
    assert worker.called_of("owner") == []
    assert worker.receive(CallbackProgress(ahead.id, 1), "owner") is None


def test_function_that_is_gone() -> None:
    """Whoever asks about it is told, and others are ignored."""
    owner, worker, record, ahead = make_pair()
    (call,) = owner.calls.values()
    owner.receive(worker.reply(worker.handlings["owner", call.id], None), "worker")
    owner.receive(CallbackRelease([record.id], q=[call.id]), "worker")
    assert not owner.callbacks
    answers = [owner.receive(one, "worker") for one in flood(worker, record, ahead)]
    told = [answer for answer in answers if answer is not None]
    assert len(told) == 2
    assert isinstance(told[0], Answer)
    assert told[0] == Answer(CallbackProgress(ahead.id, WINDOW // 2, gone=True), "worker")
    assert isinstance(told[0].record, CallbackProgress)
    assert worker.receive(told[0].record, "owner") == CallbackRan(ahead, True)


def test_owner_of_an_older_version() -> None:
    """It doesn't say that it counts; nothing is asked of it."""
    aheads: list[Ahead | None] = []
    worker = Conversation("b-", lambda *args: aheads.append(args[3]) or print)  # type: ignore[func-returns-value]
    _, request = Conversation("a-", lambda *_: print).call("call", ["f"], args=[print])
    request.cw = UNSET
    worker.unpack(request, worker.begin(request, "owner"))
    assert aheads == [None]


def test_link_that_is_lost() -> None:
    """Those who wait for answers are to be told."""
    _, worker, record, ahead = make_pair()
    flood(worker, record, ahead)
    assert worker.lose().ahead == [ahead]
    assert worker.lose().ahead == []


def test_what_may_be_lost() -> None:
    """Nobody waits for word of it; word that comes after all does no harm."""
    _, worker, record, ahead = make_pair()
    flood(worker, record, ahead)
    assert ahead.full
    assert worker.doubt_callbacks() == [ahead]
    assert not ahead.full
    sent = flood(worker, record, ahead)
    assert len(sent) == WINDOW
    assert sum(one.i is not UNSET for one in sent) == 2
    worker.receive(CallbackProgress(ahead.id, WINDOW), "owner")
    assert ahead.full
    worker.receive(CallbackProgress(ahead.id, 2 * WINDOW), "owner")
    assert not ahead.full
