"""What is written by many tasks: order, few writes, whole messages, a bound, and the end."""

from __future__ import annotations

import anyio
import pytest
from anyio import CancelScope, Event, create_task_group, wait_all_tasks_blocked

from anyio_kkrpc.kit._outgoing import HIGH_WATER, Outgoing
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Wire:
    """Takes what is written, one write after the other, when its gate is open."""

    def __init__(self, timeout: float = BOUND) -> None:
        self.writes: list[list[bytes]] = []
        self.failures: list[BaseException] = []
        self.begun = 0
        self.error: Exception | None = None
        self.gate = Event()
        self.outgoing = Outgoing(self._write, self._failed, timeout=timeout)

    async def _write(self, messages: list[bytes]) -> None:
        self.begun += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.writes.append(messages)

    async def _failed(self, exc: BaseException) -> None:
        self.failures.append(exc)
        self.outgoing.clear()


async def test_a_write_takes_along_what_came_meanwhile() -> None:
    """The first sender writes alone, all that wait then go in one write, in order."""
    wire = Wire()
    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            group.start_soon(wire.outgoing.send, b"0")
            await wait_all_tasks_blocked()
            for number in range(1, 5):
                await wire.outgoing.send(b"%d" % number)  # there is room: nobody waits
            wire.outgoing.post(b"5")
            assert wire.begun == 1
            wire.gate.set()
            await wire.outgoing.drain()
            wire.outgoing.stop()
    assert wire.writes == [[b"0"], [b"1", b"2", b"3", b"4", b"5"]]
    assert wire.outgoing.sent == 6


async def test_what_is_posted_is_written_by_the_task() -> None:
    """Who must not wait has it written nevertheless, and each time."""
    wire = Wire()
    wire.gate.set()
    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            for number in range(3):
                wire.outgoing.post(b"%d" % number)
                await wire.outgoing.drain()
            wire.outgoing.stop()
    assert wire.writes == [[b"0"], [b"1"], [b"2"]]


async def test_what_was_posted_and_waits_is_known() -> None:
    """What senders wait for themselves isn't part of it."""
    wire = Wire()
    outgoing = wire.outgoing
    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            outgoing.start(group, "writer")
            group.start_soon(outgoing.send, b"0")
            await wait_all_tasks_blocked()
            for size in (10, 20):
                outgoing.post(b"x" * size)
                group.start_soon(outgoing.send, b"y" * HIGH_WATER)
                await wait_all_tasks_blocked()
            assert outgoing.posted == 30
            wire.gate.set()
            await outgoing.drain()
            assert outgoing.posted == 0
            wire.gate = Event()
            group.start_soon(outgoing.send, b"0")
            await wait_all_tasks_blocked()
            outgoing.post(b"x" * 5)
            assert outgoing.posted == 5
            outgoing.clear()
            assert outgoing.posted == 0
            outgoing.post(b"x" * 7)
            assert outgoing.posted == 7
            wire.gate.set()
            await outgoing.drain()
            assert outgoing.posted == 0
            outgoing.stop()


@pytest.mark.parametrize("which", [0, 1])
async def test_a_sender_that_is_cancelled_tears_nothing(which: int) -> None:
    """Neither the one who writes, nor one whose message waits, nor those behind them."""
    wire = Wire()
    scopes = [CancelScope(), CancelScope()]

    async def send(number: int) -> None:
        with scopes[number]:
            await wire.outgoing.send(b"%d" % number * HIGH_WATER)

    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            for number in range(2):
                group.start_soon(send, number)
                await wait_all_tasks_blocked()
            scopes[which].cancel()
            await wait_all_tasks_blocked()
            wire.gate.set()
            await wire.outgoing.drain()
            await wire.outgoing.send(b"last")
            wire.outgoing.stop()
    assert wire.writes == [[b"0" * HIGH_WATER], [b"1" * HIGH_WATER], [b"last"]]


async def test_senders_wait_while_too_much_waits() -> None:
    """More than the bound makes them wait, and what is written in between is bounded as well."""
    wire = Wire()
    done: list[int] = []

    async def send(number: int) -> None:
        await wire.outgoing.send(b"x" * (HIGH_WATER // 2))
        done.append(number)

    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            for number in range(7):
                group.start_soon(send, number)
                await wait_all_tasks_blocked()
            assert done == [1]  # the first one writes, with the second one the bound is reached
            wire.gate.set()
            await wire.outgoing.drain()
            await wait_all_tasks_blocked()
            wire.outgoing.stop()
    assert sorted(done) == list(range(7))
    assert [len(messages) for messages in wire.writes] == [1, 2, 2, 2]


async def test_a_write_that_fails_is_the_last_one() -> None:
    """It is told once, what waits is forgotten, and who waited for room goes on."""
    wire = Wire()
    wire.error = OSError("gone")
    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            async with create_task_group() as senders:
                for _ in range(3):
                    senders.start_soon(wire.outgoing.send, b"x" * HIGH_WATER)
                await wait_all_tasks_blocked()
                wire.gate.set()
            await wire.outgoing.drain()
            wire.outgoing.stop()
    assert wire.failures == [wire.error]
    assert (wire.begun, wire.writes) == (1, [])


async def test_a_write_that_takes_too_long() -> None:
    """It is given up, whoever began it."""
    wire = Wire(timeout=0.01)
    with anyio.fail_after(BOUND):
        async with create_task_group() as group:
            wire.outgoing.start(group, "writer")
            await wire.outgoing.send(b"x")
            wire.outgoing.post(b"y")
            await wire.outgoing.drain()
            wire.outgoing.stop()
    assert [str(error) for error in wire.failures] == ["it took no data for 0.01 seconds"] * 2
    assert all(isinstance(error, TimeoutError) for error in wire.failures)
