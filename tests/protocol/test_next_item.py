"""The quick way of most items comes to what the way of all records does."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc._protocol._budget import BUDGET
from anyio_kkrpc._protocol._errors import ProtocolError
from anyio_kkrpc._protocol._records import StreamReply
from anyio_kkrpc._protocol._state import CONSUMER, ConsumerInput, ConsumerState
from anyio_kkrpc._protocol._streams import FIRST_CREDIT, Consumer

REPLIES = st.builds(
    StreamReply,
    # The latter two stand for what the source is asked for now, and was asked for before.
    id=st.sampled_from(["x", "x", "asked", "late"]),
    sid=st.just("s"),
    d=st.sampled_from([False, False, False, UNSET, True]),
    v=st.sampled_from([1, "x" * 5000, UNSET]),
    e=st.sampled_from([UNSET, UNSET, UNSET, {"n": "Error", "m": ""}]),
    # Most often the next one, which is put in when the record comes.
    i=st.sampled_from([0, 0, 0, 0, -1, 1, UNSET]),
    w=st.sampled_from([UNSET, 0, 5000, BUDGET]),
)
STEPS = st.lists(
    REPLIES | st.sampled_from(["wait", "deliver", "leave", "leave and ask", "throw", "ask again"]),
    max_size=FIRST_CREDIT * 2,
)


def new_consumer() -> Consumer:
    numbers = iter(range(1, 1 << 30))
    return Consumer("s", None, "c", lambda: f"id{next(numbers)}")


def state_of(consumer: Consumer) -> list[Any]:
    names = sorted(set(Consumer.__slots__) - {"_new_id"})
    return [getattr(consumer, name) for name in names]


def take_step(consumer: Consumer, step: Any, at_hand: int) -> object:
    """Do what isn't a record; what can't be done in this state is left out by both."""
    if step == "wait":
        return consumer.wait() if consumer.readable else None
    if step == "deliver":
        return consumer.delivered() if at_hand else None
    if step == "throw":
        return consumer.throw({"n": "Error", "m": ""}) if consumer.readable else None
    if step == "ask again":
        return consumer.ask_again()
    return consumer.leave(ask=step == "leave and ask")


@given(STEPS)
def test_quick_way_is_the_same(steps: list[Any]) -> None:
    quick, plain = new_consumer(), new_consumer()
    both, delivered = (quick, plain), 0
    for step in ["wait", *steps]:
        if isinstance(step, str):
            at_hand = plain.received - delivered
            assert take_step(quick, step, at_hand) == take_step(plain, step, at_hand)
            delivered += step == "deliver" and at_hand > 0
        else:
            ids = {"asked": plain.asked, "late": next(iter(plain._late), None)}
            step.id = ids.get(step.id) or step.id
            step.i = step.i if step.i is UNSET else max(step.i + plain.received, 0)
            outcomes: list[object] = []
            for consumer in both:
                try:
                    taken = consumer is quick and consumer.take(step)
                    outcomes.append(ConsumerInput.ITEM if taken else consumer.receive(step))
                except ProtocolError as exc:
                    outcomes.append(str(exc))
            assert outcomes[0] == outcomes[1]
        assert state_of(quick) == state_of(plain)


def test_most_items_take_it() -> None:
    consumer = new_consumer()
    assert CONSUMER[ConsumerState.OPEN][ConsumerInput.ITEM] is ConsumerState.OPEN
    assert not consumer.take(StreamReply("x", "s", False, 1, UNSET, 0, 0))  # not asked for
    consumer.wait()
    for index in range(FIRST_CREDIT):
        assert consumer.take(StreamReply("x", "s", False, 1, UNSET, index, UNSET if index else 0))
    assert not consumer.take(StreamReply("x", "s", False, 1, UNSET, FIRST_CREDIT))


def test_answers_do_not_take_it() -> None:
    """What the source is asked for, or was asked for before, is beside the other items."""
    consumer = new_consumer()
    consumer.wait()
    first = consumer.throw({"n": "Error", "m": ""})
    assert not consumer.take(StreamReply(first.id, "s", False, 1, UNSET, 0, 0))
    second = consumer.throw({"n": "Error", "m": ""})
    assert consumer.receive(StreamReply(second.id, "s", False, 1)) is ConsumerInput.ANSWER
    late = StreamReply(first.id, "s", False, 1, UNSET, 0, 0)
    assert not consumer.take(late)
    assert consumer.receive(late) is None
    assert consumer.take(StreamReply("x", "s", False, 1, UNSET, 0, 0))
