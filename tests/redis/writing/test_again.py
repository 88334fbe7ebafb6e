"""When what was refused is tried again, on a clock that is handed in."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import HEALING, LONGEST_PAUSE
from anyio_kkrpc.redis._writing._again import Again
from anyio_kkrpc.redis._writing._ledger import Post

FULL = ResponseError("OOM command not allowed")
RIGHTS = ResponseError("NOPERM no permissions")


class Patience:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def pause(self, exc: Exception) -> float:
        self.told.append(f"pause {exc}")
        return 0.5

    def worked(self) -> None:
        self.told.append("worked")

    def leave(self) -> None:
        self.told.append("left")


def again() -> tuple[Again, Patience]:
    patience: Any = Patience()
    return Again(patience), patience


def test_an_outage_is_over_once_it_stays_so() -> None:
    """What is taken between two refusals is no end; the first that nothing follows is."""
    parts, patience = again()
    assert parts.pause() == 0
    parts.refuse(10.0, FULL)
    assert parts.refusal is FULL
    assert parts.pause() == 0.5
    parts.recover(11.0)
    assert parts.pause() == 0
    parts.refuse(11.5, FULL)
    parts.look(11.0 + 2 * LONGEST_PAUSE)
    assert "left" not in patience.told
    parts.recover(12.0)
    assert parts.next_look == 12.0 + LONGEST_PAUSE
    parts.look(parts.next_look - 0.01)
    assert "left" not in patience.told
    parts.look(parts.next_look)
    parts.look(100.0)
    assert patience.told[-1:] == ["left"]
    assert patience.told.count("left") == 1


def test_a_right_that_came() -> None:
    """It is said at once, since it won't go again by itself."""
    parts, patience = again()
    parts.refuse(10.0, RIGHTS)
    parts.recover(10.1)
    parts.recover(10.2)
    assert patience.told == ["worked"]
    assert parts.refusal is None


def test_care_ends_after_a_while() -> None:
    parts, _ = again()
    assert parts.is_long_past(0.0)
    parts.refuse(5.0)
    assert not parts.is_long_past(14.9)
    assert parts.is_long_past(15.1)


def test_a_right_that_can_not_have_been_there() -> None:
    parts, _ = again()
    assert not parts.forbid(Post(b""), 0.0, may_wait=False)
    assert parts.look(100.0) == []


def test_only_so_many_wait() -> None:
    parts, _ = again()
    kept = [parts.forbid(Post(b""), 0.0, may_wait=True) for _ in range(1001)]
    assert kept == [True] * 1000 + [False]
    assert len(parts.look(1.0)) == 1000


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=40))
def test_each_is_tried_again_or_given_up(steps: list[tuple[float, bool]]) -> None:
    """What waits is returned once for each look, and given up when its time is over, not before."""
    parts, _ = again()
    now = 0.0
    first: dict[Post, float] = {}
    waiting: list[Post] = []
    for seconds, add in steps:
        now += seconds
        due = now >= parts.next_look
        looked = parts.look(now)
        assert looked == (waiting if due else [])
        if due:
            waiting = []
        for post in [*looked, *([Post(b"")] if add else [])]:  # all are refused again
            since = first.setdefault(post, now)
            kept = parts.forbid(post, now, may_wait=True)
            assert kept is (now - since < HEALING)
            if kept:
                waiting.append(post)
        assert (parts.next_look < float("inf")) is bool(waiting)
