"""Which handlers are said to hold the event loop."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from anyio_kkrpc._serving._slow import SLOW_HANDLER, SlowHandlers, run_delay
from tests.bounds import BOUND
from tests.pairs import pair


class Machine:
    """A thread's clock and counters, which stand still unless they are told to go on."""

    def __init__(self, counts: bool = True) -> None:
        self.time = 1000.0
        self.used = self.delay = 5.0
        self.looks = 0
        self._counts = counts

    def spend(self, *, computing: float = 0.0, waiting: float = 0.0, blocked: float = 0.0) -> None:
        self.time += computing + waiting + blocked
        self.used += computing
        self.delay += waiting

    def waited(self) -> float | None:
        self.looks += 1
        return self.delay if self._counts else None

    def handlers(self) -> SlowHandlers:
        return SlowHandlers(lambda: self.time, lambda: self.used, self.waited)


@pytest.mark.parametrize(
    ("counts", "spent", "told"),
    [
        (True, {"computing": 0.25}, "0.25"),
        (True, {"blocked": 0.25}, "0.25"),
        (True, {"computing": 0.05, "blocked": 0.15, "waiting": 3.0}, "0.20"),
        (True, {"computing": 0.09, "waiting": 9.0}, None),
        (True, {"waiting": 100.0}, None),
        (False, {"computing": 0.25, "waiting": 0.5}, "0.25"),
        (False, {"computing": 0.01, "waiting": 0.9}, None),
        (False, {"blocked": 2.0}, "2.00"),
    ],
)
def test_what_a_handler_took_itself(
    counts: bool, spent: dict[str, float], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """What it computed and what it was blocked for, not what the thread waited for a processor."""
    machine = Machine(counts)
    slow = machine.handlers()
    slow.begin()
    started = machine.time
    machine.spend(**spent)
    slow.judge("add", started)
    messages = [record.getMessage() for record in caplog.records]
    assert [text.partition(";")[0] for text in messages] == (
        [] if told is None else [f"add() held the event loop for {told} s"]
    )


def test_counters_are_read_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """Not for each handler; but what was waited long before a handler isn't taken off."""
    machine = Machine()
    slow = machine.handlers()
    for _ in range(1000):
        if machine.time > slow.stale_at:
            slow.begin()
        machine.spend(computing=0.001)
    assert 15 <= machine.looks <= 25
    machine.spend(waiting=10.0)
    assert machine.time > slow.stale_at
    slow.begin()
    started = machine.time
    machine.spend(blocked=1.0)
    slow.judge("add", started)
    assert "add() held the event loop for 1.00 s" in caplog.text


class Api:
    def blocks(self) -> None:
        time.sleep(3 * SLOW_HANDLER)


@pytest.mark.anyio
async def test_handler_that_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """It holds the loop without computing."""
    async with pair(Api()) as link:
        await link.api.blocks()
    assert "blocks() held the event loop for" in caplog.text
    assert "@in_thread" in caplog.text


HELD_UP = r"""
import os, subprocess, sys, time
import anyio
from anyio_kkrpc.testing import connected

ONE = {min(os.sched_getaffinity(0))}
BUSY = f"import os; os.sched_setaffinity(0, {ONE})\nprint(flush=True)\nwhile True: pass"

async def waits() -> None:
    os.sched_setaffinity(0, ONE)
    os.nice(19)
    started, used = time.perf_counter(), time.thread_time()
    held_up = 0.0
    while held_up < 0.4:
        os.sched_yield()
        held_up = time.perf_counter() - started - (time.thread_time() - used)
    await anyio.sleep(0.001)
    busy.kill()
    print(held_up, flush=True)
    os._exit(0)  # the rest would take long

async def main() -> None:
    async with connected({"waits": waits}) as api:
        await api.waits()

with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
    busy.stdout.readline()
    anyio.run(main)
"""


@pytest.mark.skipif(run_delay() is None, reason="this system doesn't count run delays")
def test_handler_on_a_busy_machine() -> None:
    """It gets the processor late, and isn't to blame for that."""
    done = subprocess.run(
        [sys.executable, "-c", HELD_UP], capture_output=True, text=True, timeout=BOUND, check=True
    )
    assert float(done.stdout) >= 3 * SLOW_HANDLER
    assert done.stderr == ""
