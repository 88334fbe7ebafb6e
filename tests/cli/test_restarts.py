"""When a worker is started again, and when its service ends: without processes."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc._cli._restarts import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    STARTED_WELL,
    End,
    Restarts,
    Verdict,
    Word,
)

SERVED = frozenset({Word.serving})


def ended(code: int = 0, *words: Word, lasted: float = 0.1) -> End:
    return End(1, code, frozenset(words), lasted)


@pytest.mark.parametrize("code", [0, 1, 2, 130, -signal.SIGTERM, -signal.SIGKILL, -64])
def test_whatever_ended_it(code: int) -> None:
    """It is started again, by status and by signal, at once for the first time."""
    restarts = Restarts(2)
    assert restarts.judge(1, ended(code, Word.serving)) == (Verdict.again, 0.0)


def test_who_dies_young_again_waits() -> None:
    """Pauses double up to a bound, for each worker by itself; one that has served well begins anew."""
    restarts = Restarts(2)
    young = ended(1, Word.serving)
    pauses = [restarts.judge(1, young)[1] for _ in range(9)]
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_PAUSE, LONGEST_PAUSE]
    assert restarts.judge(2, young)[1] == 0.0
    old = ended(1, Word.serving, lasted=STARTED_WELL)
    assert restarts.judge(1, old)[1] == 0.0
    assert restarts.judge(1, young)[1] == FIRST_PAUSE


def test_one_that_is_recycled_has_not_died() -> None:
    """However young it is."""
    restarts = Restarts(1)
    for _ in range(5):
        end = ended(0, Word.serving, Word.recycled)
        assert restarts.judge(1, end) == (Verdict.again, 0.0)
    assert restarts.judge(1, ended(1, Word.serving))[1] == 0.0


def test_a_destroy_signal_ends_the_service() -> None:
    """It is told; a status never says it."""
    restarts = Restarts(3)
    assert restarts.judge(2, ended(0, Word.serving))[0] is Verdict.again
    assert restarts.judge(2, ended(0, Word.serving, Word.destroyed))[0] is Verdict.over


@pytest.mark.parametrize(
    "end", [ended(1, Word.refused), ended(2), ended(-signal.SIGKILL)], ids=lambda end: end.how
)
def test_all_fail_at_first_in_the_same_way(end: End) -> None:
    """Then the service does not start."""
    restarts = Restarts(2)
    assert restarts.judge(1, end)[0] is Verdict.again
    assert restarts.judge(1, end)[0] is Verdict.again  # the other one may begin yet
    assert restarts.judge(2, end)[0] is Verdict.failed


def test_they_fail_in_different_ways() -> None:
    """That may pass."""
    restarts = Restarts(2)
    assert restarts.judge(1, ended(1, Word.refused))[0] is Verdict.again
    assert restarts.judge(2, ended(-signal.SIGKILL))[0] is Verdict.again
    assert restarts.judge(2, ended(1, Word.refused))[0] is Verdict.again


def test_no_server_yet() -> None:
    """It is waited for."""
    restarts = Restarts(1)
    for _ in range(5):
        assert restarts.judge(1, ended(5, Word.unreachable))[0] is Verdict.again


ENDS = st.builds(
    ended,
    st.integers(-64, 255),
    *(),
    lasted=st.floats(0, 100),
)


@given(st.lists(st.tuples(st.integers(1, 3), ENDS)))
def test_once_one_has_served(ends: list[tuple[int, End]]) -> None:
    """Nothing but a destroy signal ends the service."""
    restarts = Restarts(3)
    restarts.judge(2, ended(3, Word.serving))
    for number, end in ends:
        verdict, pause = restarts.judge(number, end)
        assert verdict is Verdict.again
        assert 0 <= pause <= LONGEST_PAUSE
