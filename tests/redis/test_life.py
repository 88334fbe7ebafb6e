"""The phases of a transport: each comes once, in order, whatever comes when."""

from __future__ import annotations

import itertools

import anyio
import pytest

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc.redis._life import Life, Phase


def test_never_back() -> None:
    for turns in itertools.permutations(Phase):
        life = Life("it")
        latest = Phase.NEW
        for phase in turns:
            assert life.turn(phase) is (phase > latest)
            latest = max(phase, latest)
            assert life.phase is latest
            assert life.running is (latest is Phase.OPEN)


def test_check() -> None:
    """Who sends too early or too late learns which; of several reasons the first counts."""
    life = Life("it")
    with pytest.raises(RuntimeError, match="has not been entered"):
        life.check()
    life.enter()
    life.check()
    life.turn(Phase.OPEN)
    life.check()
    reason = TransportClosedError("first")
    life.end(reason)
    life.end(TransportClosedError("second"))
    for _ in range(2):
        with pytest.raises(TransportClosedError, match="first") as caught:
            life.check()
        assert caught.value is not reason


def test_entered_once() -> None:
    life = Life("it")
    life.enter()
    with pytest.raises(RuntimeError, match="it can be entered once"):
        life.enter()


@pytest.mark.parametrize("entered", [False, True])
def test_closed_without_an_end(entered: bool) -> None:
    """It was given up while it was entered; what comes then fails, too."""
    life = Life("it")
    if entered:
        life.enter()
        life.turn(Phase.CLOSED)
    life.end(TransportClosedError("given up"))
    assert not life.running
    with pytest.raises(TransportClosedError, match="given up"):
        life.check()


@pytest.mark.anyio
@pytest.mark.parametrize("fails", [False, True])
async def test_waiting_until_it_is_open(fails: bool) -> None:
    """Or until it won't be any more, or time is over."""
    life, outcomes = Life("it"), list[object]()

    async def wait() -> None:
        try:
            outcomes.append(await life.wait_open())
        except TransportClosedError as exc:
            outcomes.append(str(exc))

    with pytest.raises(RuntimeError, match="has not been entered"):
        await life.wait_open()
    life.enter()
    assert not await life.wait_open(anyio.current_time())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert outcomes == []
        if fails:
            life.end(TransportClosedError("over"))
        else:
            life.turn(Phase.OPEN)
    assert outcomes == (["over"] * 2 if fails else [True] * 2)
