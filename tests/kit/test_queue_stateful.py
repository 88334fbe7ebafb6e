"""The bounded queue against a plain model, and under random interleavings.

The state machine's rules run in an event loop of its own for each example. After each rule all
tasks are let run until they wait, and everything that can be seen is compared with the model.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, ClassVar

import anyio
import pytest
from anyio import (
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    WouldBlock,
    create_task_group,
    wait_all_tasks_blocked,
)
from anyio.from_thread import start_blocking_portal
from anyio.lowlevel import checkpoint
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anyio_kkrpc.kit._queue import BoundedQueue, Overflow
from tests.bounds import BOUND

POLICIES: tuple[Overflow, ...] = ("drop_oldest", "drop_newest", "block")
CANCELLED = "cancelled"


class Model:
    """What the queue must do, written down as plainly as possible.

    :ivar items: what is queued, each with its size
    :ivar receivers: tasks that wait in ``get()``, by number
    :ivar putters: tasks that wait in ``put()``: number, item, size
    :ivar room_waiters: tasks that wait in ``wait_room()``: number, size
    :ivar outcomes: what came of each task that doesn't wait any more
    """

    def __init__(self, policy: Overflow, max_items: int, max_bytes: int) -> None:
        self.policy, self.max_items, self.max_bytes = policy, max_items, max_bytes
        self.items: list[tuple[int, int]] = []
        self.receivers: list[int] = []
        self.putters: list[tuple[int, int, int]] = []
        self.room_waiters: list[tuple[int, int]] = []
        self.outcomes: dict[int, Any] = {}
        self.dropped: list[int] = []
        self.warnings: list[str] = []
        self.in_burst = False
        self.high_items = self.high_bytes = 0
        self.reason: type[Exception] | None = None
        self.evicted_at_once = 0
        self.told = 0
        self.ended_at_half_bytes = 0

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.items)

    def fits(self, size: int) -> bool:
        if not self.items:
            return True
        return len(self.items) < self.max_items and self.bytes + size <= self.max_bytes

    @property
    def full(self) -> bool:
        return not self.fits(1)

    def add(self, item: int, size: int) -> None:
        self.items.append((item, size))
        self.told = max(self.told, min(len(self.items), len(self.receivers)))
        self.high_items = max(self.high_items, len(self.items))
        self.high_bytes = max(self.high_bytes, self.bytes)

    def drop(self, which: str) -> None:
        if not self.in_burst:
            self.in_burst = True
            if len(self.items) == self.max_items:
                bound = f"{self.max_items} messages"
            else:
                bound = f"{self.max_bytes} bytes"
            self.warnings.append(f"Message queue full ({bound}), dropping {which} message")

    def put(self, item: int, size: int) -> Any:
        self.evicted_at_once = 0
        if self.reason is not None:
            return self.reason
        if self.policy == "block" and (self.putters or not self.fits(size)):
            return WouldBlock
        if self.policy == "drop_newest" and not self.fits(size):
            self.drop("newest")
            self.dropped.append(item)
            return False
        while not self.fits(size):
            self.drop("oldest")
            self.dropped.append(self.items.pop(0)[0])
            self.evicted_at_once += 1
        self.add(item, size)
        return True

    def after_taking(self) -> None:
        if len(self.items) <= self.max_items / 2 and self.bytes <= self.max_bytes / 2:
            if self.in_burst and self.bytes == self.max_bytes / 2:
                self.ended_at_half_bytes += 1
            self.in_burst = False

    def get(self) -> Any:
        if not self.items:
            return WouldBlock if self.reason is None else self.reason
        item, _ = self.items.pop(0)
        self.after_taking()
        return item

    def extract(self, predicate: Callable[[int], bool]) -> list[int]:
        out = [item for item, _ in self.items if predicate(item)]
        self.items = [(item, size) for item, size in self.items if not predicate(item)]
        if out:
            self.after_taking()
        return out

    def close(self, reason: type[Exception], discard: bool) -> None:
        self.reason = self.reason or reason
        if discard:
            self.items.clear()

    def settle(self, served: set[int]) -> None:
        """Let everyone have what he waits for, as far as there is enough.

        If more receivers were told than there are items left, because some were taken away again,
        it is up to the scheduler which of those who were told run first: ``served`` says which did.
        """
        told, self.told = self.receivers[: self.told], 0
        if len(told) > len(self.items):
            first = [number for number in told if number in served]
            if len(first) == len(self.items):
                self.receivers.sort(key=lambda number: number not in first)
        if self.reason is not None:
            for number, *_ in (*self.putters, *self.room_waiters):
                self.outcomes[number] = self.reason
            self.putters, self.room_waiters = [], []
        while True:
            if self.receivers and (self.items or self.reason is not None):
                self.outcomes[self.receivers.pop(0)] = self.get()
            elif self.putters and self.fits(self.putters[0][2]):
                number, item, size = self.putters.pop(0)
                self.add(item, size)
                self.outcomes[number] = True
            elif self.room_waiters and not self.putters and self.fits(self.room_waiters[0][1]):
                self.outcomes[self.room_waiters.pop(0)[0]] = None
            else:
                return

    def cancel(self, number: int) -> None:
        self.receivers = [one for one in self.receivers if one != number]
        self.putters = [one for one in self.putters if one[0] != number]
        self.room_waiters = [one for one in self.room_waiters if one[0] != number]
        self.outcomes[number] = CANCELLED


class Tasks:
    """Tasks that wait at the queue, in the machine's event loop."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Any] = {}
        self.scopes: dict[int, CancelScope] = {}

    async def run(self) -> None:
        self.stopped = anyio.Event()
        async with create_task_group() as self.group:
            await self.stopped.wait()

    async def call(self, number: int, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with CancelScope() as self.scopes[number]:
            try:
                outcome = await call(*args)
            except Exception as exc:
                outcome = type(exc)
            self.outcomes[number] = outcome
        if self.scopes.pop(number).cancelled_caught:
            self.outcomes[number] = CANCELLED

    def start(self, number: int, call: Callable[..., Any], *args: Any) -> None:
        self.group.start_soon(self.call, number, call, args)

    async def settle(self) -> None:
        # On asyncio wait_all_tasks_blocked() polls ten times a second, so it should find it true.
        for _ in range(2 * len(self.scopes) + 4):
            await checkpoint()
        await wait_all_tasks_blocked()


class Warnings(logging.Handler):
    """Collects what the queue logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


# How large an item is, as seen from the queue: "fit" takes all the bytes that are left.
sizes = st.sampled_from(("none", "small", "small", "half", "fit", "fit+1", "whole", "over"))
REASONS: tuple[Exception | None, ...] = (None, EndOfStream(), OSError("broken"))


def when(condition: Callable[[Any], bool]) -> Any:
    """A rule's precondition, for as long as the queue is open."""
    return precondition(lambda self: self.model.reason is None and condition(self))


class QueueMachine(RuleBasedStateMachine):
    """Random operations, compared with the model after each.

    Random walks seldom fill a queue and let it go just below half; so several rules do just that,
    and others need waiting tasks. How often each interesting state came about is counted.
    """

    backend: ClassVar[str]
    policy: ClassVar[Overflow]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.numbers = iter(range(1_000_000))
        self.rules_run = 0
        self.noted: list[str] = []

    @initialize(
        max_items=st.sampled_from((1, 2, 3, 4, 6)), max_bytes=st.sampled_from((1, 8, 20, 1000))
    )
    def begin(self, max_items: int, max_bytes: int) -> None:
        """Start an event loop, with tasks to come."""
        self.portal = self.stack.enter_context(start_blocking_portal(self.backend))
        self.tasks = Tasks()
        running = self.portal.start_task_soon(self.tasks.run)
        self.stack.callback(running.result, 10)
        self.stack.callback(self.portal.call, self.stop)
        self.dropped: list[int] = []
        self.queue: BoundedQueue[int] = BoundedQueue(
            max_items, max_bytes, self.policy, on_drop=self.dropped.append
        )
        self.model = Model(self.policy, max_items, max_bytes)
        self.log = Warnings()
        logger = logging.getLogger("anyio_kkrpc")
        logger.addHandler(self.log)
        self.stack.callback(logger.removeHandler, self.log)

    async def stop(self) -> None:
        self.tasks.group.cancel_scope.cancel()

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.do(lambda: self.close(None, discard=False))
                assert not self.tasks.scopes, "closing leaves nobody waiting"
        finally:
            self.stack.close()

    def note(self, name: str, happened: bool = True) -> None:
        if happened:
            self.noted.append(name)

    # One step: run it in the loop, let tasks run, compare.

    def do(self, *operations: Callable[[], None]) -> None:
        """Run operations one right after the other, then compare everything with the model."""
        before = set(self.model.outcomes)
        self.portal.call(self.step, operations)
        in_order = list(self.model.receivers)
        self.model.settle(set(self.tasks.outcomes) - before)
        if self.backend == "asyncio":
            waiting = len(self.model.receivers)
            assert self.model.receivers == in_order[len(in_order) - waiting :]
        self.rules_run += 1
        self.compare(before)
        self.note_states()

    async def step(self, operations: tuple[Callable[[], None], ...]) -> None:
        for operation in operations:
            operation()
        with anyio.fail_after(BOUND):
            await self.tasks.settle()

    def compare(self, before: set[int]) -> None:
        model = self.model
        assert self.portal.call(self.peek) == [item for item, _ in model.items]
        assert self.dropped == model.dropped
        assert self.log.texts == model.warnings
        # Trio runs tasks that are woken together in any order: who has got something is compared
        # exactly, and what they have got as a whole.
        assert set(self.tasks.outcomes) == set(model.outcomes)
        new = set(model.outcomes) - before
        found = Counter(self.tasks.outcomes[number] for number in new)
        assert found == Counter(model.outcomes[number] for number in new)
        model.outcomes.update(self.tasks.outcomes)
        statistics = self.queue.statistics()
        assert len(self.queue) == statistics.current_items == len(model.items)
        assert statistics.current_bytes == model.bytes
        assert statistics.high_water_items == model.high_items
        assert statistics.high_water_bytes == model.high_bytes
        assert statistics.dropped == len(model.dropped)
        assert statistics.waiting_receivers == len(model.receivers)
        assert statistics.waiting_senders == len(model.putters) + len(model.room_waiters)
        used_up = model.items and model.bytes >= model.max_bytes
        assert self.queue.room == (0 if used_up else model.max_items - len(model.items))

    async def peek(self) -> list[int]:
        seen: list[int] = []
        assert self.queue.extract(lambda item: bool(seen.append(item))) == []  # type: ignore[func-returns-value]
        return seen

    def note_states(self) -> None:
        model = self.model
        self.note("steps")
        self.note("full", model.full)
        self.note("full, 2 or more putters", model.full and len(model.putters) > 1)
        self.note("2 or more receivers", len(model.receivers) > 1)
        self.note("2 or more room waiters", len(model.room_waiters) > 1)
        self.note("in a burst", model.in_burst)
        later = [size for _, _, size in model.putters[1:]]
        self.note("burst ended at half of the bytes", model.ended_at_half_bytes > 0)
        model.ended_at_half_bytes = 0
        self.note("small putter behind a large one", any(map(model.fits, later)))
        noted, self.noted = self.noted, []
        for name in noted:  # here, because an event must come from the test's own thread
            self.seen[name] += 1
            event(name)

    # Operations: the queue's and the model's, side by side

    def expect(self, expected: Any, call: Callable[..., Any], *args: Any) -> None:
        try:
            found = call(*args)
        except Exception as exc:
            found = type(exc)
        assert found == expected

    def size(self, kind: str) -> int:
        limit, left = self.model.max_bytes, max(0, self.model.max_bytes - self.model.bytes)
        size = {"none": 0, "small": 1, "half": limit // 2, "fit": left, "fit+1": left + 1}.get(kind)
        return size if size is not None else limit if kind == "whole" else limit + 5

    def put_now(self, kind: str) -> None:
        item, size = next(self.numbers), self.size(kind)
        self.expect(self.model.put(item, size), self.queue.put_nowait, item, size)
        self.note("several evicted for one", self.model.evicted_at_once > 1)
        self.note("larger than the bound", self.model.bytes > self.model.max_bytes)

    def get_now(self) -> None:
        self.expect(self.model.get(), self.queue.get_nowait)

    def start_get(self) -> None:
        self.model.receivers.append(number := next(self.numbers))
        self.tasks.start(number, self.queue.get)

    def start_put(self, kind: str) -> None:
        number, size = next(self.numbers), self.size(kind)
        outcome = self.model.put(number, size)
        if outcome is WouldBlock:
            self.model.putters.append((number, number, size))
        else:
            self.model.outcomes[number] = outcome
        self.tasks.start(number, self.queue.put, number, size)

    def start_wait_room(self, kind: str) -> None:
        number, size = next(self.numbers), self.size(kind)
        if self.model.reason is None and (self.model.putters or not self.model.fits(size)):
            self.model.room_waiters.append((number, size))
        else:
            self.model.outcomes[number] = self.model.reason
        self.tasks.start(number, self.queue.wait_room, size)

    def cancel(self, number: int) -> None:
        self.tasks.scopes[number].cancel()
        self.model.cancel(number)

    def close(self, reason: Exception | None, discard: bool) -> None:
        model = self.model
        self.note("closed with receivers", bool(model.receivers))
        self.note("closed with senders", bool(model.putters or model.room_waiters))
        self.note("closed with items", bool(model.items) and model.reason is None)
        self.queue.close(reason, discard=discard)
        self.model.close(ClosedResourceError if reason is None else type(reason), discard)

    def want_receivers(self) -> None:
        """See to it that somebody waits for an item."""
        while self.model.items:
            self.do(self.get_now)
        while len(self.model.receivers) < 2:
            self.do(self.start_get)

    def want_senders(self) -> None:
        """See to it that somebody waits for room."""
        if self.model.receivers:
            self.do(*[lambda: self.put_now("none")] * len(self.model.receivers))
            for number in tuple(self.model.receivers):
                self.do(lambda number=number: self.cancel(number))  # type: ignore[misc]
        if not self.model.putters and not self.model.room_waiters:
            while self.model.fits(0):
                self.do(lambda: self.put_now("none"))
            if self.policy == "block" and self.rules_run % 2:
                self.do(lambda: self.start_put("none"))
                self.do(lambda: self.start_put("small"))
            else:
                self.do(lambda: self.start_wait_room("none"))
                self.do(lambda: self.start_wait_room("small"))

    # Rules

    @rule(kind=sizes)
    def put(self, kind: str) -> None:
        self.do(lambda: self.put_now(kind))

    @rule(kinds=st.lists(sizes, min_size=2, max_size=9), to_receivers=st.booleans())
    def put_several(self, kinds: list[str], to_receivers: bool) -> None:
        """Put one after the other, before any receiver can run."""
        if to_receivers and self.model.reason is None:
            self.want_receivers()
        self.note("several put to waiting receivers", len(self.model.receivers) > 1)
        self.do(*(lambda kind=kind: self.put_now(kind) for kind in kinds))  # type: ignore[misc]

    @when(lambda self: not self.model.full and not self.model.receivers)
    @rule(extra=st.integers(0, 2))
    def fill(self, extra: int) -> None:
        """Fill the queue to its last place, and put some more."""
        count = self.model.max_items - len(self.model.items) + extra
        self.do(*[lambda: self.put_now("none")] * count)

    @rule()
    def get_nowait(self) -> None:
        self.do(self.get_now)

    @when(lambda self: self.policy != "block" and not self.model.receivers)
    @rule(above=st.sampled_from((0, 0, 1)), by_bytes=st.booleans())
    def two_bursts(self, above: int, by_bytes: bool) -> None:
        """Begin a burst, drain to half exactly or to a bit more, and see if a new one begins."""
        model = self.model
        kinds = ["half", "fit", "fit+1", "half"] if by_bytes else ["none"] * (model.max_items + 1)
        while not model.in_burst:
            self.do(*(lambda kind=kind: self.put_now(kind) for kind in kinds))  # type: ignore[misc]
        for _ in range(len(model.items) - model.max_items // 2 - above):
            self.do(self.get_now)
        self.note("burst drained to half", not model.in_burst)
        self.note("burst drained to just above half", model.in_burst)
        self.do(*(lambda kind=kind: self.put_now(kind) for kind in kinds))  # type: ignore[misc]

    @rule()
    def receive(self) -> None:
        self.do(self.start_get)

    @when(lambda self: not self.model.items)
    @rule(count=st.integers(1, 4))
    def several_receive(self, count: int) -> None:
        for _ in range(count):
            self.do(self.start_get)

    @rule(kind=sizes)
    def send(self, kind: str) -> None:
        self.do(lambda: self.start_put(kind))

    @when(lambda self: self.policy == "block" and self.model.full)
    @rule(kinds=st.lists(sizes, min_size=1, max_size=4))
    def several_send(self, kinds: list[str]) -> None:
        for kind in kinds:
            self.do(lambda kind=kind: self.start_put(kind))  # type: ignore[misc]

    @rule(kind=sizes)
    def wait_room(self, kind: str) -> None:
        self.do(lambda: self.start_wait_room(kind))

    @when(lambda self: self.model.full)
    @rule(kinds=st.lists(sizes, min_size=1, max_size=3))
    def several_wait_room(self, kinds: list[str]) -> None:
        for kind in kinds:
            self.do(lambda kind=kind: self.start_wait_room(kind))  # type: ignore[misc]

    @rule(divisor=st.integers(1, 3))
    def extract(self, divisor: int) -> None:
        def chosen(item: int) -> bool:
            return item % divisor == 0

        if self.policy == "block" and self.model.reason is None:
            self.want_senders()
        self.note("extracted for waiting putters", bool(self.model.putters))
        self.do(lambda: self.expect(self.model.extract(chosen), self.queue.extract, chosen))

    @when(lambda self: bool(self.tasks.scopes))
    @rule(data=st.data())
    def cancel_one(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tasks.scopes)))
        self.do(lambda: self.cancel(number))

    @when(lambda self: True)
    @rule(data=st.data(), kind=sizes)
    def cancel_a_receiver_and_put(self, data: st.DataObject, kind: str) -> None:
        """A receiver that was cancelled is told of an item before it has run."""
        self.want_receivers()
        number = data.draw(st.sampled_from(self.model.receivers))
        self.note("promise passed on", number == self.model.receivers[0])
        self.do(lambda: self.cancel(number), lambda: self.put_now(kind))

    @when(lambda self: True)
    @rule(data=st.data())
    def cancel_a_sender_and_get(self, data: st.DataObject) -> None:
        """A sender that was cancelled is told of room before it has run."""
        self.want_senders()
        waiting = [number for number, *_ in (*self.model.putters, *self.model.room_waiters)]
        number = data.draw(st.sampled_from(waiting))
        self.note("turn passed on", number == waiting[0])
        self.do(lambda: self.cancel(number), self.get_now)

    @when(lambda self: True)
    @rule(kind=sizes, by_extract=st.booleans())
    def rob_a_receiver(self, kind: str, by_extract: bool) -> None:
        """Take an item before the receiver that was told of it has run."""
        self.want_receivers()
        self.note("receiver robbed")

        def take_all() -> None:
            self.expect(self.model.extract(bool), self.queue.extract, bool)

        self.do(lambda: self.put_now(kind), take_all if by_extract else self.get_now)

    @when(lambda self: True)
    @rule(kind=sizes)
    def rob_a_room_waiter(self, kind: str) -> None:
        """Take the room before the one who was told of it has run."""
        self.want_senders()
        self.note("room waiter robbed", not self.model.putters)
        self.do(self.get_now, lambda: self.put_now(kind))

    @when(lambda self: self.rules_run > 25)
    @rule(reason=st.sampled_from(REASONS), discard=st.booleans())
    def end(self, reason: Exception | None, discard: bool) -> None:
        self.do(lambda: self.close(reason, discard))

    @when(lambda self: self.rules_run > 25)
    @rule(reason=st.sampled_from(REASONS), discard=st.booleans())
    def get_and_end(self, reason: Exception | None, discard: bool) -> None:
        """Close before the sender that was told of room has run."""
        self.want_senders()
        self.do(self.get_now, lambda: self.close(reason, discard))

    @when(lambda self: self.rules_run > 25)
    @rule(kind=sizes, reason=st.sampled_from(REASONS), discard=st.booleans())
    def put_and_end(self, kind: str, reason: Exception | None, discard: bool) -> None:
        """Close before the receiver that was told of an item has run."""
        self.want_receivers()
        self.note("closed with a promise")
        self.do(lambda: self.put_now(kind), lambda: self.close(reason, discard))

    @precondition(lambda self: self.model.reason is not None)
    @rule(reason=st.sampled_from(REASONS), discard=st.booleans())
    def end_again(self, reason: Exception | None, discard: bool) -> None:
        self.do(lambda: self.close(reason, discard))


# States that must come about in a run, or it has shown nothing of them.
COMMON = {
    "full",
    "2 or more receivers",
    "2 or more room waiters",
    "several put to waiting receivers",
    "larger than the bound",
    "promise passed on",
    "receiver robbed",
    "room waiter robbed",
    "closed with receivers",
    "closed with items",
}
OFTEN: dict[str, set[str]] = {
    "drop_oldest": {"in a burst", "burst drained to half", "several evicted for one"},
    "drop_newest": {"in a burst", "burst drained to half"},
    "block": {"full, 2 or more putters", "turn passed on"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_against_the_model(backend: str, policy: Overflow) -> None:
    """Whatever is done, the queue does as the model does; and interesting things are done."""
    seen: Counter[str] = Counter()
    machine = type(
        f"QueueMachine_{backend}_{policy}",
        (QueueMachine,),
        {"backend": backend, "policy": policy, "seen": seen},
    )
    wanted = COMMON | OFTEN[policy]
    # Twice is enough in most runs; the rest goes on until the rare cases have come.
    for _ in range(15):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine, settings=settings(max_examples=10, stateful_step_count=50, derandomize=False)
        )
        if seen["steps"] > 1000 and all(seen[name] for name in wanted):
            break
    assert seen["steps"] > 1000
    assert {name for name in wanted if not seen[name]} == set()


class Fuzz:
    """Producers and consumers that yield, are cancelled and extract at random moments.

    :ivar admitted: items whose put returned true
    :ivar taken: items in the order in which they left the queue to somebody
    """

    def __init__(self, seed: int, policy: Overflow) -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.queue: BoundedQueue[tuple[int, int]] = BoundedQueue(
            self.random.choice((1, 2, 3, 8)),
            self.random.choice((5, 20, 1000)),
            policy,
            on_drop=lambda item: self.dropped.append(item),
        )
        self.slowness = self.random.choice((1, 3, 10))
        self.scopes: list[CancelScope] = []
        self.events: Counter[str] = Counter()
        self.admitted: list[tuple[int, int]] = []
        self.refused: list[tuple[int, int]] = []
        self.dropped: list[tuple[int, int]] = []
        self.taken: list[tuple[int, int]] = []
        self.extracted: list[tuple[int, int]] = []

    async def pause(self, factor: int = 1) -> None:
        for _ in range(factor * self.random.choice((0, 0, 0, 1, 1, 2, 5))):
            await checkpoint()

    async def attempt(self, call: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Run a call in a scope that the cancelling task may cancel at any moment."""
        with CancelScope() as scope:
            self.scopes.append(scope)
            if self.random.random() < 0.1:
                scope.cancel()
            try:
                await call()
            finally:
                self.scopes.remove(scope)
        if scope.cancelled_caught:
            self.events[f"{name} cancelled"] += 1

    async def produce(self, who: int, count: int) -> None:
        for n in range(count):
            item, size = (who, n), self.random.randrange(8)

            async def put(item: tuple[int, int] = item, size: int = size) -> None:
                way = self.random.randrange(3)
                if way == 0:
                    try:
                        done = self.queue.put_nowait(item, size)
                    except WouldBlock:
                        return
                else:
                    if way == 1:
                        await self.queue.wait_room(size)
                    done = await self.queue.put(item, size)
                (self.admitted if done else self.refused).append(item)

            await self.attempt(put, "put")
            await self.pause()

    async def consume(self) -> None:
        async def get() -> None:
            if self.random.random() < 0.1:
                try:
                    self.taken.append(self.queue.get_nowait())
                except WouldBlock:
                    pass
            else:
                self.taken.append(await self.queue.get())

        while True:
            try:
                await self.attempt(get, "get")
            except ClosedResourceError:
                return
            await self.pause(self.slowness)

    async def disturb(self) -> None:
        while True:
            await self.pause()
            await checkpoint()
            if self.scopes and self.random.random() < 0.5:
                self.random.choice(self.scopes).cancel()
                self.events["cancel"] += 1
            if self.random.random() < 0.2:
                out = self.queue.extract(lambda item, who=self.random.randrange(4): item[0] == who)
                self.extracted += out
                self.events["extracted"] += len(out)

    async def run(self) -> None:
        with anyio.fail_after(BOUND):
            async with create_task_group() as group:
                async with create_task_group() as disturbers:
                    disturbers.start_soon(self.disturb)
                    async with create_task_group() as producers:
                        for _ in range(self.random.randrange(1, 5)):
                            group.start_soon(self.consume)
                        for who in range(self.random.randrange(1, 5)):
                            producers.start_soon(self.produce, who, 25)
                    disturbers.cancel_scope.cancel()
                self.queue.close()

    def check(self) -> None:
        left = Counter(self.taken) + Counter(self.extracted) + Counter(self.dropped)
        # A refused item is reported as dropped as well.
        assert left == Counter(self.admitted) + Counter(self.refused)
        assert not left or max(left.values()) == 1
        assert self.queue.statistics().dropped == len(self.dropped)
        assert self.policy != "block" or not self.dropped
        for who in range(4):
            for order in (self.taken, self.extracted, self.dropped):
                numbers = [n for producer, n in order if producer == who]
                assert numbers == sorted(numbers)
        statistics = self.queue.statistics()
        assert statistics.current_items == statistics.current_bytes == 0
        assert statistics.waiting_receivers == statistics.waiting_senders == 0
        assert statistics.high_water_items <= statistics.max_items
        assert statistics.high_water_bytes <= max(statistics.max_bytes, 7)


@pytest.mark.anyio
@pytest.mark.parametrize("policy", POLICIES)
async def test_fuzz(policy: Overflow) -> None:
    """Whatever is cancelled when, each admitted item leaves the queue once, and in order."""
    events: Counter[str] = Counter()
    for seed in range(40):
        fuzz = Fuzz(seed, policy)
        await fuzz.run()
        try:
            fuzz.check()
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}, {policy}") from exc
        events += fuzz.events
        events["dropped"] += len(fuzz.dropped)
        events["taken"] += len(fuzz.taken)
    assert events["get cancelled"] > 100
    assert events["put cancelled"] > 100
    assert events["taken"] > 500
    assert events["extracted"] > 20
    assert policy == "block" or events["dropped"] > 100
