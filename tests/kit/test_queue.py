"""The bounded queue: bounds, policies, order, cancellation, closing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any

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
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from anyio_kkrpc._runtime._fresh import fresh_copy
from anyio_kkrpc.kit._queue import BoundedQueue, Overflow, QueueStatistics
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

POLICIES: tuple[Overflow, ...] = ("drop_oldest", "drop_newest", "block")
each_policy = pytest.mark.parametrize("policy", POLICIES)


class Receiver:
    """A task in ``get()``."""

    def __init__(self, queue: BoundedQueue[Any]) -> None:
        self.queue = queue
        self.scope = CancelScope()
        self.outcome: Any = None

    async def run(self) -> None:
        with self.scope:
            try:
                self.outcome = await self.queue.get()
            except Exception as exc:
                self.outcome = exc

    @classmethod
    async def start(cls, group: TaskGroup, queue: BoundedQueue[Any]) -> Receiver:
        self = cls(queue)
        group.start_soon(self.run)
        await wait_all_tasks_blocked()
        return self


class Sender:
    """A task in ``put()`` or ``wait_room()``."""

    def __init__(self, call: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        self.call, self.args = call, args
        self.scope = CancelScope()
        self.outcome: Any = "waiting"

    async def run(self) -> None:
        with self.scope:
            try:
                self.outcome = await self.call(*self.args)
            except Exception as exc:
                self.outcome = exc

    @classmethod
    async def start(cls, group: TaskGroup, call: Any, *args: Any) -> Sender:
        self = cls(call, *args)
        group.start_soon(self.run)
        await wait_all_tasks_blocked()
        return self


def drained(queue: BoundedQueue[Any]) -> list[Any]:
    return [queue.get_nowait() for _ in range(len(queue))]


class TestArguments:
    @pytest.mark.parametrize("name", ["max_items", "max_bytes"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "1", None, True])
    def test_bounds(self, name: str, value: Any) -> None:
        """A bound that is no positive int is refused, with the argument's name."""
        with pytest.raises(ValueError, match=f"^{name}: "):
            BoundedQueue(**{name: value})

    @pytest.mark.parametrize("value", ["drop", "", None, ["block"]])
    def test_overflow(self, value: Any) -> None:
        """An unknown policy is refused, with the argument's name."""
        with pytest.raises(ValueError, match=r"^overflow: .*drop_oldest, drop_newest, block"):
            BoundedQueue(overflow=value)

    def test_on_drop(self) -> None:
        """A callback that can't be called is refused, with the argument's name."""
        with pytest.raises(ValueError, match=r"^on_drop: "):
            BoundedQueue(on_drop=3)  # type: ignore[arg-type]

    async def test_size(self) -> None:
        """A negative size is refused and leaves the queue as it was."""
        queue: BoundedQueue[int] = BoundedQueue(overflow="block")
        with pytest.raises(ValueError, match=r"^size: "):
            queue.put_nowait(1, -1)
        with pytest.raises(ValueError, match=r"^size: "):
            await queue.put(1, -1)
        with pytest.raises(ValueError, match=r"^size: "):
            await queue.wait_room(-1)
        assert len(queue) == queue.statistics().current_bytes == 0

    def test_defaults(self) -> None:
        """The defaults are 1000 items, 64 MiB, and to drop the oldest; nothing can be changed."""
        statistics = BoundedQueue[int]().statistics()
        assert statistics == QueueStatistics(0, 0, 0, 0, 0, 1000, 64 * 1024 * 1024, 0, 0)
        with pytest.raises(dataclasses.FrozenInstanceError):
            statistics.dropped = 1  # type: ignore[misc]


class TestBounds:
    def test_drop_oldest_by_number(self) -> None:
        """Over its number, the queue drops exactly one oldest item for each new one."""
        dropped: list[int] = []
        queue: BoundedQueue[int] = BoundedQueue(3, on_drop=dropped.append)
        assert [queue.put_nowait(n) for n in range(5)] == [True] * 5
        assert dropped == [0, 1]
        assert drained(queue) == [2, 3, 4]
        assert queue.statistics().dropped == 2

    def test_drop_oldest_by_bytes(self) -> None:
        """Over its bytes, the queue drops as few of the oldest items as needed."""
        dropped: list[str] = []
        queue: BoundedQueue[str] = BoundedQueue(10, 100, on_drop=dropped.append)
        for item, size in (("a", 30), ("b", 30), ("c", 40)):
            queue.put_nowait(item, size)
        assert dropped == []
        queue.put_nowait("d", 31)
        assert dropped == ["a", "b"]
        statistics = queue.statistics()
        assert (statistics.current_items, statistics.current_bytes) == (2, 71)
        assert (statistics.high_water_items, statistics.high_water_bytes) == (3, 100)

    def test_drop_newest(self) -> None:
        """With ``drop_newest`` what doesn't fit is refused, and a smaller item still fits."""
        dropped: list[str] = []
        queue: BoundedQueue[str] = BoundedQueue(3, 100, "drop_newest", on_drop=dropped.append)
        assert queue.put_nowait("a", 60)
        assert not queue.put_nowait("b", 50)
        assert queue.put_nowait("c", 40)
        assert dropped == ["b"]
        assert drained(queue) == ["a", "c"]

    def test_block(self) -> None:
        """With ``block`` what doesn't fit raises, and nothing is dropped."""
        queue: BoundedQueue[int] = BoundedQueue(2, 100, "block")
        queue.put_nowait(1, 60)
        with pytest.raises(WouldBlock):
            queue.put_nowait(2, 41)
        queue.put_nowait(3, 40)
        with pytest.raises(WouldBlock):
            queue.put_nowait(4)
        assert drained(queue) == [1, 3]
        assert queue.statistics().dropped == 0

    @each_policy
    def test_one_oversized_item(self, policy: Overflow) -> None:
        """An empty queue takes an item of any size, and then nothing more."""
        queue: BoundedQueue[str] = BoundedQueue(5, 10, policy)
        assert queue.put_nowait("huge", 1000)
        assert queue.room == 0
        assert queue.statistics().high_water_bytes == 1000
        if policy == "drop_oldest":
            assert queue.put_nowait("next", 1)
            assert drained(queue) == ["next"]
        elif policy == "drop_newest":
            assert not queue.put_nowait("next", 1)
            assert drained(queue) == ["huge"]
        else:
            with pytest.raises(WouldBlock):
                queue.put_nowait("next", 1)
            assert drained(queue) == ["huge"]
        assert queue.statistics().current_bytes == 0

    def test_oversized_item_evicts_all(self) -> None:
        """An oversized item drops everything older, and no more than that."""
        dropped: list[int] = []
        queue: BoundedQueue[int] = BoundedQueue(5, 10, on_drop=dropped.append)
        for n in range(3):
            queue.put_nowait(n, 3)
        assert queue.put_nowait(9, 11)
        assert dropped == [0, 1, 2]
        assert drained(queue) == [9]

    def test_room(self) -> None:
        """``room`` counts down by number, and is 0 once the bytes are used up."""
        queue: BoundedQueue[int] = BoundedQueue(3, 10, "block")
        rooms = [queue.room]
        for size in (4, 4, 1):
            queue.put_nowait(0, size)
            rooms.append(queue.room)
        assert rooms == [3, 2, 1, 0]
        drained(queue)
        queue.put_nowait(0, 10)
        assert queue.room == 0


class TestDropCallback:
    def test_may_use_the_queue(self) -> None:
        """``on_drop`` sees the queue in order, and may get from it and put to it."""
        seen: list[tuple[str, int, int]] = []

        def on_drop(item: str) -> None:
            statistics = queue.statistics()
            seen.append((item, statistics.current_items, statistics.current_bytes))
            if item == "a":
                assert queue.get_nowait() == "b"
                queue.put_nowait("from on_drop", 1)

        queue: BoundedQueue[str] = BoundedQueue(2, 100, on_drop=on_drop)
        for item in "abc":
            queue.put_nowait(item, 10)
        assert seen == [("a", 2, 20)]
        assert drained(queue) == ["c", "from on_drop"]
        assert queue.statistics().current_bytes == 0

    def test_may_close(self) -> None:
        """``on_drop`` may close the queue while several items are being dropped."""
        dropped: list[int] = []

        def on_drop(item: int) -> None:
            dropped.append(item)
            queue.close(discard=True)

        queue: BoundedQueue[int] = BoundedQueue(3, 10, on_drop=on_drop)
        queue.put_nowait(0, 5)
        queue.put_nowait(1, 5)
        assert queue.put_nowait(2, 9)
        assert dropped == [0, 1]
        with pytest.raises(ClosedResourceError):
            queue.get_nowait()

    def test_that_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        """An ``on_drop`` that raises is logged; the next dropped item is still reported."""
        dropped: list[int] = []

        def on_drop(item: int) -> None:
            dropped.append(item)
            raise RuntimeError("broken callback")

        queue: BoundedQueue[int] = BoundedQueue(3, 10, on_drop=on_drop)
        queue.put_nowait(0, 5)
        queue.put_nowait(1, 5)
        assert queue.put_nowait(2, 9)
        assert dropped == [0, 1]
        assert drained(queue) == [2]
        assert caplog.text.count("broken callback") >= 2


class TestWarnings:
    @pytest.fixture
    def warnings(self, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
        """What was logged since the last call."""
        caplog.set_level(logging.WARNING, "anyio_kkrpc")

        def take() -> list[str]:
            texts = [record.getMessage() for record in caplog.records]
            assert all(record.name == "anyio_kkrpc" for record in caplog.records)
            assert all(record.levelno == logging.WARNING for record in caplog.records)
            caplog.clear()
            return texts

        return take

    @pytest.mark.parametrize(
        ("policy", "which"), [("drop_oldest", "oldest"), ("drop_newest", "newest")]
    )
    def test_once_per_burst(
        self, policy: Overflow, which: str, warnings: Callable[[], list[str]]
    ) -> None:
        """A burst logs once, and ends when the queue is drained to half of its bound."""
        queue: BoundedQueue[int] = BoundedQueue(1000, overflow=policy)
        text = f"Message queue full (1000 messages), dropping {which} message"
        for n in range(1000):
            queue.put_nowait(n)
        assert warnings() == []
        for n in range(3000):
            queue.put_nowait(n)
        assert warnings() == [text]
        for _ in range(499):
            queue.get_nowait()
        for n in range(500):
            queue.put_nowait(n)
        assert warnings() == []
        for _ in range(500):
            queue.get_nowait()
        for n in range(501):
            queue.put_nowait(n)
        assert warnings() == [text]

    def test_bytes(self, warnings: Callable[[], list[str]]) -> None:
        """If the bytes are the reason, the text names them; the burst ends below half of them."""
        queue: BoundedQueue[int] = BoundedQueue(10, 100)
        text = "Message queue full (100 bytes), dropping oldest message"
        queue.put_nowait(0, 60)
        queue.put_nowait(1, 51)
        assert warnings() == [text]
        queue.put_nowait(2, 49)
        queue.put_nowait(3, 51)  # evicts 1
        assert warnings() == []
        assert queue.get_nowait() == 2  # 51 bytes are left
        queue.put_nowait(4, 50)  # evicts 3
        queue.put_nowait(5, 50)
        assert warnings() == []
        assert queue.get_nowait() == 4  # 50 bytes are left: half
        queue.put_nowait(6, 50)
        queue.put_nowait(7, 1)
        assert warnings() == [text]

    def test_number_is_named_before_bytes(self, warnings: Callable[[], list[str]]) -> None:
        """If both bounds are reached, the text is the one for the number of items."""
        queue: BoundedQueue[int] = BoundedQueue(2, 10, "drop_newest")
        queue.put_nowait(0, 5)
        queue.put_nowait(1, 5)
        queue.put_nowait(2, 5)
        assert warnings() == ["Message queue full (2 messages), dropping newest message"]

    @pytest.mark.parametrize("size", [0, 20])
    def test_eviction_does_not_end_a_burst(
        self, size: int, warnings: Callable[[], list[str]]
    ) -> None:
        """A queue that evicts down to nothing has not been drained: still one warning."""
        queue: BoundedQueue[int] = BoundedQueue(1, 10)
        for n in range(10):
            queue.put_nowait(n, size)
        assert len(warnings()) == 1

    def test_extracting_ends_a_burst(self, warnings: Callable[[], list[str]]) -> None:
        """Taking items out by ``extract`` drains the queue as getting does."""
        queue: BoundedQueue[int] = BoundedQueue(4)
        for n in range(6):
            queue.put_nowait(n)
        queue.extract(lambda n: n >= 4)
        for n in range(3):
            queue.put_nowait(n)
        assert len(warnings()) == 2

    def test_block_logs_nothing(self, warnings: Callable[[], list[str]]) -> None:
        """A full queue that makes its senders wait drops nothing and logs nothing."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(1)
        with pytest.raises(WouldBlock):
            queue.put_nowait(2)
        assert warnings() == []


class TestReceiving:
    async def test_order(self) -> None:
        """Items come out in the order in which they went in, whichever way."""
        queue: BoundedQueue[int] = BoundedQueue()
        for n in range(100):
            if n % 2:
                await queue.put(n)
            else:
                queue.put_nowait(n)
        assert [queue.get_nowait() if n % 3 else await queue.get() for n in range(100)] == list(
            range(100)
        )
        with pytest.raises(WouldBlock):
            queue.get_nowait()

    async def test_receivers_in_order(self) -> None:
        """Waiting receivers are served in the order in which they came."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            receivers = [await Receiver.start(group, queue) for _ in range(3)]
            assert queue.waiting_receivers == queue.statistics().waiting_receivers == 3
            for n in range(3):
                queue.put_nowait(n)
                assert queue.waiting_receivers == 2 - n
                await wait_all_tasks_blocked()
                assert [receiver.outcome for receiver in receivers] == [
                    m if m <= n else None for m in range(3)
                ]

    async def test_a_newcomer_does_not_overtake(self) -> None:
        """An item that a waiting receiver was told of is not taken by a later ``get``."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            first = await Receiver.start(group, queue)
            queue.put_nowait(1)
            second = Receiver(queue)
            group.start_soon(second.run)
            await wait_all_tasks_blocked()
            assert (first.outcome, second.outcome) == (1, None)
            queue.put_nowait(2)
            await wait_all_tasks_blocked()
            assert second.outcome == 2

    @pytest.mark.parametrize("thief", ["get_nowait", "extract"])
    async def test_a_robbed_receiver_keeps_its_place(self, thief: str) -> None:
        """Receivers whose items were taken before they ran wait on, in their old order."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            receivers = [await Receiver.start(group, queue) for _ in range(4)]
            for n in range(3):
                queue.put_nowait(n)
            if thief == "extract":
                assert queue.extract(lambda n: True) == [0, 1, 2]
            else:
                assert drained(queue) == [0, 1, 2]
            await wait_all_tasks_blocked()
            assert queue.waiting_receivers == 4
            for n in range(10, 14):
                queue.put_nowait(n)
                await wait_all_tasks_blocked()
            assert [receiver.outcome for receiver in receivers] == [10, 11, 12, 13]

    async def test_an_evicted_promise(self) -> None:
        """If the item that a receiver was told of is evicted first, it gets the one after it."""
        queue: BoundedQueue[int] = BoundedQueue(1)
        async with create_task_group() as group:
            receiver = await Receiver.start(group, queue)
            queue.put_nowait(1)
            queue.put_nowait(2)
            await wait_all_tasks_blocked()
            assert receiver.outcome == 2

    async def test_cancelled_receiver_passes_on(self) -> None:
        """A receiver that was cancelled, and told of an item before it ran, tells the next one."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            first = await Receiver.start(group, queue)
            second = await Receiver.start(group, queue)
            first.scope.cancel()
            queue.put_nowait(1)
            await wait_all_tasks_blocked()
            assert (first.outcome, second.outcome) == (None, 1)

    async def test_cancelled_receiver_leaves_the_item(self) -> None:
        """If there is no next receiver, the item is there for the one who comes."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            first = await Receiver.start(group, queue)
            first.scope.cancel()
            queue.put_nowait(1)
            await wait_all_tasks_blocked()
            assert first.outcome is None
            with anyio.fail_after(BOUND):
                assert await queue.get() == 1

    async def test_cancelled_waiting_receiver(self) -> None:
        """A receiver that is cancelled while it waits leaves the line."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            first = await Receiver.start(group, queue)
            second = await Receiver.start(group, queue)
            first.scope.cancel()
            await wait_all_tasks_blocked()
            assert queue.waiting_receivers == 1
            queue.put_nowait(1)
            await wait_all_tasks_blocked()
            assert second.outcome == 1

    async def test_in_a_cancelled_scope(self) -> None:
        """In a cancelled scope ``get`` and ``put`` raise and change nothing, 100 times."""
        queue: BoundedQueue[int] = BoundedQueue()
        queue.put_nowait(1)
        for _ in range(50):
            with CancelScope() as scope:
                scope.cancel()
                await queue.get()
            assert scope.cancelled_caught
            with CancelScope() as scope:
                scope.cancel()
                await queue.put(2)
            assert scope.cancelled_caught
        assert drained(queue) == [1]

    @each_policy
    async def test_never_starves_others(self, policy: Overflow) -> None:
        """A task that always finds an item, or room, yields to others within 32 operations."""
        queue: BoundedQueue[int] = BoundedQueue(1000, overflow=policy)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await checkpoint()
                turns += 1

        async with create_task_group() as group:
            group.start_soon(other)
            for n in range(320):
                await queue.put(n)
            # Of 320 operations 10 yield; a turn or two of the other task may be before or after.
            assert turns >= 6
            for _ in range(320):
                await queue.get()
            assert turns >= 14
            group.cancel_scope.cancel()

    async def test_an_item_taken_during_the_yield(self) -> None:
        """A receiver that yields and finds its item gone waits for the next one."""
        queue: BoundedQueue[int] = BoundedQueue()
        for n in range(31):
            queue.put_nowait(n)
            await queue.get()
        queue.put_nowait(1)
        async with create_task_group() as group:
            receiver = Receiver(queue)
            group.start_soon(receiver.run)
            await checkpoint()
            assert queue.extract(lambda n: True) == [1]
            await wait_all_tasks_blocked()
            assert queue.waiting_receivers == 1
            queue.put_nowait(2)
            await wait_all_tasks_blocked()
            assert receiver.outcome == 2


class TestSending:
    async def test_senders_in_order(self) -> None:
        """Waiting senders are admitted in the order in which they came; none overtakes."""
        queue: BoundedQueue[int] = BoundedQueue(2, 10, "block")
        queue.put_nowait(0, 1)
        queue.put_nowait(1, 9)
        async with create_task_group() as group:
            large = await Sender.start(group, queue.put, 2, 9)
            small = await Sender.start(group, queue.put, 3, 1)
            assert queue.statistics().waiting_senders == 2
            assert queue.get_nowait() == 0
            await wait_all_tasks_blocked()
            # 1 byte is free, and who wants no more still waits behind who wants more.
            assert (large.outcome, small.outcome) == ("waiting", "waiting")
            with pytest.raises(WouldBlock):
                queue.put_nowait(4, 0)
            assert queue.get_nowait() == 1
            with pytest.raises(WouldBlock):
                queue.put_nowait(4, 0)
            await wait_all_tasks_blocked()
            assert (large.outcome, small.outcome) == (True, True)
            assert drained(queue) == [2, 3]

    async def test_a_newcomer_does_not_overtake(self) -> None:
        """A sender that comes when there is room again waits behind those who were told of it."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(0)
        async with create_task_group() as group:
            await Sender.start(group, queue.put, 1)
            assert queue.get_nowait() == 0
            newcomer = Sender(queue.put, 2)
            group.start_soon(newcomer.run)
            await wait_all_tasks_blocked()
            assert newcomer.outcome == "waiting"
            assert queue.get_nowait() == 1
            await wait_all_tasks_blocked()
            assert drained(queue) == [2]

    @pytest.mark.parametrize("told", [False, True])
    async def test_cancelled_sender(self, told: bool) -> None:
        """A cancelled ``put`` leaves nothing behind, and the next one has its turn."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(0)
        async with create_task_group() as group:
            first = await Sender.start(group, queue.put, 1)
            second = await Sender.start(group, queue.put, 2)
            first.scope.cancel()
            if not told:
                await wait_all_tasks_blocked()
                assert queue.statistics().waiting_senders == 1
            assert queue.get_nowait() == 0
            await wait_all_tasks_blocked()
            assert (first.outcome, second.outcome) == ("waiting", True)
            assert drained(queue) == [2]

    async def test_a_large_sender_that_gives_up(self) -> None:
        """If the sender at whose size all others waited is cancelled, they have their turn."""
        queue: BoundedQueue[int] = BoundedQueue(5, 10, "block")
        queue.put_nowait(0, 5)
        async with create_task_group() as group:
            large = await Sender.start(group, queue.put, 1, 6)
            others = [await Sender.start(group, queue.put, n, 1) for n in (2, 3)]
            large.scope.cancel()
            await wait_all_tasks_blocked()
            assert [other.outcome for other in others] == [True, True]
            assert drained(queue) == [0, 2, 3]

    async def test_an_oversized_item_waits_for_an_empty_queue(self) -> None:
        """With ``block`` an item larger than the bound is admitted when the queue is empty."""
        queue: BoundedQueue[int] = BoundedQueue(5, 10, "block")
        queue.put_nowait(0, 1)
        queue.put_nowait(1, 1)
        async with create_task_group() as group:
            sender = await Sender.start(group, queue.put, 2, 100)
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert sender.outcome == "waiting"
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert sender.outcome is True
            assert queue.statistics().current_bytes == 100

    @pytest.mark.parametrize(("policy", "outcome"), [("drop_oldest", True), ("drop_newest", False)])
    async def test_put_that_drops(self, policy: Overflow, outcome: bool) -> None:
        """With a policy that drops, ``put`` never waits, and tells what became of the item."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow=policy)
        with anyio.fail_after(BOUND):
            assert await queue.put(1)
            assert await queue.put(2) is outcome
        assert drained(queue) == [2 if outcome else 1]


class TestExtract:
    async def test_extract(self) -> None:
        """``extract`` takes exactly what was asked for, in order, and keeps the accounts."""
        dropped: list[int] = []
        queue: BoundedQueue[int] = BoundedQueue(on_drop=dropped.append)
        for n in range(10):
            queue.put_nowait(n, n)
        assert queue.extract(lambda n: n % 3 == 0) == [0, 3, 6, 9]
        statistics = queue.statistics()
        assert (statistics.current_items, statistics.current_bytes) == (6, 45 - 18)
        assert (statistics.dropped, dropped) == (0, [])
        assert queue.extract(lambda n: False) == []
        assert drained(queue) == [1, 2, 4, 5, 7, 8]

    async def test_failing_predicate(self) -> None:
        """A predicate that raises leaves the queue as it was."""
        queue: BoundedQueue[int] = BoundedQueue()
        for n in (1, 2, 0):
            queue.put_nowait(n, 10)
        with pytest.raises(ZeroDivisionError):
            queue.extract(lambda n: 1 // n > 0)
        assert queue.statistics().current_bytes == 30
        assert drained(queue) == [1, 2, 0]

    async def test_makes_room(self) -> None:
        """As many waiting senders are admitted as ``extract`` made room for."""
        queue: BoundedQueue[int] = BoundedQueue(3, overflow="block")
        for n in range(3):
            queue.put_nowait(n)
        async with create_task_group() as group:
            senders = [await Sender.start(group, queue.put, n) for n in (3, 4, 5)]
            assert queue.extract(lambda n: n != 1) == [0, 2]
            await wait_all_tasks_blocked()
            assert [sender.outcome for sender in senders] == [True, True, "waiting"]
            assert drained(queue) == [1, 3, 4]


class TestWaitRoom:
    async def test_waits(self) -> None:
        """``wait_room`` returns at once if there is room, and else when there is."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        with anyio.fail_after(BOUND):
            await queue.wait_room()
        queue.put_nowait(1)
        async with create_task_group() as group:
            waiter = await Sender.start(group, queue.wait_room)
            assert queue.statistics().waiting_senders == 1
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert waiter.outcome is None
            assert queue.statistics().waiting_senders == 0

    async def test_size(self) -> None:
        """It waits for as many bytes as asked for; the default is any room at all."""
        queue: BoundedQueue[int] = BoundedQueue(5, 10, "block")
        queue.put_nowait(0, 4)
        queue.put_nowait(1, 5)
        async with create_task_group() as group:
            with anyio.fail_after(BOUND):
                await queue.wait_room()
            waiter = await Sender.start(group, queue.wait_room, 5)
            assert waiter.outcome == "waiting"
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert waiter.outcome is None
            queue.put_nowait(2, 5)
            assert queue.room == 0
            waiter = await Sender.start(group, queue.wait_room)
            assert waiter.outcome == "waiting"
            waiter.scope.cancel()

    async def test_all_are_woken_in_turn(self) -> None:
        """All who wait are woken if nobody uses the room, and go on waiting if one does."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(0)
        admitted: list[int] = []

        async def reader(n: int) -> None:
            while True:
                await queue.wait_room()
                try:
                    queue.put_nowait(n)
                except WouldBlock:
                    continue
                admitted.append(n)
                return

        async with create_task_group() as group:
            for n in (1, 2, 3):
                group.start_soon(reader, n)
                await wait_all_tasks_blocked()
            waiter = await Sender.start(group, queue.wait_room)
            for n in (1, 2, 3):
                queue.get_nowait()
                await wait_all_tasks_blocked()
                assert admitted == list(range(1, n + 1))
            assert waiter.outcome == "waiting"
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert waiter.outcome is None

    @each_policy
    async def test_a_robbed_waiter_is_first_again(self, policy: Overflow) -> None:
        """A waiter whose room was taken before it ran waits on, before those who came later."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow=policy)
        queue.put_nowait(0)
        order: list[int] = []

        async def reader(n: int) -> None:
            await queue.wait_room()
            queue.put_nowait(n)
            order.append(n)

        async with create_task_group() as group:
            for n in (1, 2):
                group.start_soon(reader, n)
                await wait_all_tasks_blocked()
            queue.get_nowait()
            assert queue.put_nowait(9)
            await wait_all_tasks_blocked()
            assert (order, queue.statistics().waiting_senders) == ([], 2)
            for n in (1, 2):
                queue.get_nowait()
                await wait_all_tasks_blocked()
                assert order == list(range(1, n + 1))

    async def test_putters_go_first(self) -> None:
        """Room goes to those who wait in ``put``; then to who waits in ``wait_room``."""
        queue: BoundedQueue[int] = BoundedQueue(2, overflow="block")
        queue.put_nowait(0)
        queue.put_nowait(1)
        async with create_task_group() as group:
            waiter = await Sender.start(group, queue.wait_room)
            putter = await Sender.start(group, queue.put, 2)
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert (waiter.outcome, putter.outcome) == ("waiting", True)
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert waiter.outcome is None

    async def test_cancelled(self) -> None:
        """A cancelled ``wait_room`` leaves the line, and the next is woken in its place."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(0)
        async with create_task_group() as group:
            first = await Sender.start(group, queue.wait_room)
            second = await Sender.start(group, queue.wait_room)
            first.scope.cancel()
            queue.get_nowait()
            await wait_all_tasks_blocked()
            assert (first.outcome, second.outcome) == ("waiting", None)

    async def test_eviction_can_make_room(self) -> None:
        """Who waits for bytes is woken when one eviction freed more than the new item takes."""
        queue: BoundedQueue[int] = BoundedQueue(5, 100)
        queue.put_nowait(0, 60)
        queue.put_nowait(1, 30)
        async with create_task_group() as group:
            waiter = await Sender.start(group, queue.wait_room, 20)
            assert waiter.outcome == "waiting"
            queue.put_nowait(2, 50)
            await wait_all_tasks_blocked()
            assert waiter.outcome is None

    async def test_yields(self) -> None:
        """A loop that calls it with the wrong size polls, but doesn't stop the event loop."""
        queue: BoundedQueue[int] = BoundedQueue(5, 10, "block")
        queue.put_nowait(0, 6)
        with anyio.fail_after(BOUND):
            async with create_task_group() as group:
                group.start_soon(queue.get)
                while True:
                    try:
                        queue.put_nowait(1, 5)
                        break
                    except WouldBlock:
                        await queue.wait_room(4)


class CustomError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class TestClosing:
    @each_policy
    async def test_wakes_everybody(self, policy: Overflow) -> None:
        """Closing fails all who wait, and each later call."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow=policy)
        async with create_task_group() as group:
            tasks: list[Any] = [await Receiver.start(group, queue) for _ in range(3)]
            queue.close()
            await wait_all_tasks_blocked()
            assert [type(task.outcome) for task in tasks] == [ClosedResourceError] * 3
        with anyio.fail_after(BOUND):
            for call in (queue.get, lambda: queue.put(1), queue.wait_room):
                with pytest.raises(ClosedResourceError):
                    await call()
        for nowait in (queue.get_nowait, lambda: queue.put_nowait(1)):
            with pytest.raises(ClosedResourceError):
                nowait()
        assert queue.waiting_receivers == queue.statistics().waiting_senders == 0

    async def test_senders_fail_and_receivers_drain(self) -> None:
        """Closing fails senders at once; receivers get what is queued, then the reason."""
        queue: BoundedQueue[int] = BoundedQueue(2, overflow="block")
        queue.put_nowait(1)
        queue.put_nowait(2)
        async with create_task_group() as group:
            senders = [
                await Sender.start(group, queue.put, 3),
                await Sender.start(group, queue.wait_room),
            ]
            queue.close(EndOfStream("the end"))
            await wait_all_tasks_blocked()
            for sender in senders:
                assert isinstance(sender.outcome, EndOfStream)
        with anyio.fail_after(BOUND):
            assert await queue.get() == 1
            assert queue.get_nowait() == 2
            with pytest.raises(EndOfStream, match="the end"):
                await queue.get()
            with pytest.raises(EndOfStream, match="the end"):
                queue.get_nowait()
            with pytest.raises(EndOfStream, match="the end"):
                queue.put_nowait(3)

    async def test_a_sender_told_of_room_before_the_end(self) -> None:
        """A sender that was told of room, and had not run when the queue closed, adds nothing."""
        queue: BoundedQueue[int] = BoundedQueue(1, overflow="block")
        queue.put_nowait(1)
        async with create_task_group() as group:
            sender = await Sender.start(group, queue.put, 2)
            waiter = await Sender.start(group, queue.wait_room)
            queue.get_nowait()
            queue.close()
            await wait_all_tasks_blocked()
            assert isinstance(sender.outcome, ClosedResourceError)
            assert isinstance(waiter.outcome, ClosedResourceError)
        assert len(queue) == 0

    @pytest.mark.parametrize("discard", [False, True])
    async def test_a_receiver_told_of_an_item_before_the_end(self, discard: bool) -> None:
        """A receiver that was told of an item gets it after a close, unless it is discarded."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            first = await Receiver.start(group, queue)
            second = await Receiver.start(group, queue)
            queue.put_nowait(1)
            queue.close(discard=discard)
            await wait_all_tasks_blocked()
            outcomes = [first.outcome, second.outcome]
            errors = [one for one in outcomes if isinstance(one, ClosedResourceError)]
            assert len(errors) == (2 if discard else 1)
            assert discard or 1 in outcomes

    async def test_a_newcomer_after_the_end(self) -> None:
        """Who comes after the close gets what is queued, also if others were told of it."""
        queue: BoundedQueue[int] = BoundedQueue()
        async with create_task_group() as group:
            receiver = await Receiver.start(group, queue)
            queue.put_nowait(1)
            queue.close()
            receiver.scope.cancel()
            with anyio.fail_after(BOUND):
                outcomes: list[Any] = []
                try:
                    outcomes.append(await queue.get())
                except ClosedResourceError:
                    pass
                await wait_all_tasks_blocked()
                assert [*outcomes, receiver.outcome].count(1) == 1

    async def test_discard(self) -> None:
        """Discarding empties the queue, also when it was closed before; nothing is dropped."""
        dropped: list[int] = []
        queue: BoundedQueue[int] = BoundedQueue(on_drop=dropped.append)
        queue.put_nowait(1, 10)
        queue.close(EndOfStream())
        assert len(queue) == 1
        queue.close(ValueError("too late"), discard=True)
        statistics = queue.statistics()
        assert (statistics.current_items, statistics.current_bytes) == (0, 0)
        assert (statistics.dropped, dropped) == (0, [])
        with pytest.raises(EndOfStream):
            queue.get_nowait()

    async def test_fresh_exceptions(self) -> None:
        """Each failure raises its own exception, with the reason's cause and no old traceback."""
        reason = OSError(5, "broken")
        reason.__cause__ = KeyError("why")
        queue: BoundedQueue[int] = BoundedQueue()
        queue.close(reason)
        raised: list[BaseException] = []
        for _ in range(5):
            with pytest.raises(OSError, match="broken") as caught:
                queue.get_nowait()
            raised.append(caught.value)
        assert len({id(exc) for exc in [reason, *raised]}) == 6
        assert all(exc.__cause__ is reason.__cause__ for exc in raised)
        assert all(exc.errno == 5 for exc in raised if isinstance(exc, OSError))
        assert reason.__traceback__ is None
        depths = set()
        for exc in raised:
            depth, frame = 0, exc.__traceback__
            while frame is not None:
                depth, frame = depth + 1, frame.tb_next
            depths.add(depth)
        assert len(depths) == 1

    async def test_a_reason_that_cannot_be_copied(self) -> None:
        """A reason whose constructor refuses its args is raised itself, without old tracebacks."""
        reason = CustomError(code=3)
        queue: BoundedQueue[int] = BoundedQueue()
        queue.close(reason)
        depths = set()
        for _ in range(3):
            with pytest.raises(CustomError, match="code 3") as caught:
                queue.get_nowait()
            assert caught.value is reason
            depths.add(len(caught.traceback))
        assert len(depths) == 1

    def test_a_copy_of_another_type(self) -> None:
        """A class whose copies are something else isn't copied."""

        class Odd(Exception):
            def __reduce__(self) -> Any:
                return ValueError, ("not odd",)

        reason = Odd("odd")
        assert fresh_copy(reason) is reason


class TestIteration:
    @pytest.mark.parametrize("reason", [None, EndOfStream()])
    async def test_ends(self, reason: Exception | None) -> None:
        """Iterating receives what is queued and what comes, and ends after a clean close."""
        queue: BoundedQueue[int] = BoundedQueue()
        received: list[int] = []

        async def consume() -> None:
            async for item in queue:
                received.append(item)

        with anyio.fail_after(BOUND):
            async with create_task_group() as group:
                queue.put_nowait(1)
                group.start_soon(consume)
                await wait_all_tasks_blocked()
                assert received == [1]
                queue.put_nowait(2)
                queue.put_nowait(3)
                queue.close(reason)
        assert received == [1, 2, 3]

    @pytest.mark.parametrize("reason", [OSError("broken"), anyio.BrokenResourceError("broken")])
    async def test_raises_the_reason(self, reason: Exception) -> None:
        """Iterating over a queue that was closed for another reason raises that in the end."""
        queue: BoundedQueue[int] = BoundedQueue()
        queue.put_nowait(1)
        queue.close(reason)
        received: list[int] = []
        with pytest.raises(type(reason), match="broken"):
            async for item in queue:
                received.append(item)
        assert received == [1]

    async def test_raises_a_subclass_of_closed(self) -> None:
        """A reason that only derives from ``ClosedResourceError`` is not swallowed."""
        from anyio_kkrpc import TransportClosedError

        queue: BoundedQueue[int] = BoundedQueue()
        queue.close(TransportClosedError("destroyed"))
        with pytest.raises(TransportClosedError, match="destroyed"):
            async for _ in queue:
                pass


def test_outlives_event_loops() -> None:
    """A queue in which a task has waited serves those of another event loop, of whichever kind."""
    queue: BoundedQueue[int] = BoundedQueue()

    async def wait() -> int:
        with anyio.fail_after(BOUND):
            async with create_task_group() as group:
                receiver = await Receiver.start(group, queue)
                await queue.put(1)
        outcome: int = receiver.outcome
        return outcome

    kinds = ("asyncio", "asyncio", "trio", "trio", "asyncio")
    assert [anyio.run(wait, backend=kind) for kind in kinds] == [1] * len(kinds)
