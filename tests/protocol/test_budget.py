"""What a stream may hold is bounded by weight: both ends joined by hand, in any order of events."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc._protocol._budget import BUDGET, SMALL, weight_of
from anyio_kkrpc._protocol._records import MAX_NUMBER, StreamReply, StreamRequest
from anyio_kkrpc._protocol._state import ProducerState
from anyio_kkrpc._protocol._streams import FIRST_CREDIT, MAX_WINDOW, Consumer, Producer

SIZES = [1, SMALL, SMALL + 1, 20_000, 90_000, BUDGET // 3, BUDGET - 1, BUDGET, 3 * BUDGET]
ITEMS = {size: bytes(size) for size in SIZES}


class Link:
    """The two ends of a stream, and what is on its way between them.

    :param new: whether the source's side knows of weights
    """

    def __init__(self, *, new: bool = True) -> None:
        numbers = iter(range(1 << 30))
        self.consumer = Consumer("s", None, "c", lambda: str(next(numbers)))
        self.producer = Producer("s", None, None, lambda: str(next(numbers)))
        self.new = new
        self.pulls: deque[StreamRequest] = deque()
        self.items: deque[StreamReply] = deque()
        self.at_hand: deque[StreamReply] = deque()
        # Bytes of the items that were sent and not read; and what weigh those that aren't small.
        self.held = self.outstanding = 0
        self.waits()

    def waits(self) -> None:
        pull = self.consumer.wait()
        if pull is not None:
            self.pulls.append(pull)

    def pull_arrives(self) -> None:
        if self.pulls:
            pull = self.pulls.popleft()
            self.producer.pull(pull.n, pull.b if self.new else UNSET)

    def send(self, item: bytes) -> bool:
        if self.producer.state is not ProducerState.READY:
            return False
        record = self.producer.item(item)
        assert (record.w is UNSET) or self.new
        self.items.append(record)
        self.held += len(item)
        self.outstanding += weight_of(item)
        return True

    def item_arrives(self) -> None:
        if self.items:
            record = self.items.popleft()
            self.consumer.receive(record)
            assert self.consumer.readable
            self.at_hand.append(record)

    def read(self) -> bool:
        if not self.at_hand:
            self.waits()
            return False
        record = self.at_hand.popleft()
        self.held -= len(record.v)
        self.outstanding -= weight_of(record.v)
        pull = self.consumer.delivered()
        if pull is not None:
            self.pulls.append(pull)
        return True

    def settle(self) -> None:
        """Let all arrive that is on its way."""
        while self.pulls or self.items:
            self.pull_arrives()
            self.item_arrives()


def drain(link: Link, items: Iterator[bytes]) -> int:
    """Read as quickly as may be; return how many came. Fails if both ends wait for each other."""
    taken = 0
    item = next(items, None)
    while True:
        link.settle()
        moved = False
        while item is not None and link.send(item):
            item, moved = next(items, None), True
        link.settle()
        while link.read():
            taken, moved = taken + 1, True
        if not moved:
            assert item is None, "both ends wait"
            return taken


@settings(deadline=None)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=120),
    steps=st.lists(st.integers(0, 7), max_size=400),
    new=st.booleans(),
)
def test_any_order(sizes: list[int], steps: list[int], new: bool) -> None:
    """No more waits than the budget and one item, whatever their sizes, and nobody for ever."""
    link, taken = Link(new=new), 0
    items = iter([ITEMS[size] for size in sizes])
    item = next(items, None)
    for step in steps:
        if step == 0:
            taken += link.read()
        elif step == 1:
            link.pull_arrives()
        elif step == 2:
            link.item_arrives()
        elif item is not None and link.send(item):
            item = next(items, None)
        if new:
            assert link.held < BUDGET + max(SIZES) + MAX_WINDOW * SMALL
    rest = iter([item, *items] if item is not None else [])
    assert taken + drain(link, rest) == len(sizes)
    assert link.held == link.outstanding == 0


@pytest.mark.parametrize("size", SIZES)
def test_as_many_as_the_budget_allows(size: int) -> None:
    """Of a reader that has stopped no more waits; small items aren't held back by it."""
    link, sent = Link(), 0
    link.settle()
    while link.send(ITEMS[size]):
        sent += 1
        link.settle()
    if size <= SMALL:
        assert sent == FIRST_CREDIT
    else:
        weight = weight_of(ITEMS[size])
        assert sent == min(-(-BUDGET // weight), FIRST_CREDIT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("counted", [True, False])
def test_source_that_does_not_weigh(size: int, counted: bool) -> None:
    """It is granted fewer items, as many as weigh the budget, after the first 32."""
    link, weight = Link(new=False), weight_of(ITEMS[size])
    most = 0
    for number in range(200):
        link.settle()
        while link.send(ITEMS[size]):
            if not counted:  # TypeScript peers don't
                link.items[-1].i = UNSET
            link.settle()
        if number >= FIRST_CREDIT:
            most = max(most, link.outstanding)
        assert link.read()
    assert most <= max(BUDGET, weight)
    if weight:
        assert most >= min(BUDGET // 2, weight * FIRST_CREDIT // 2)


def longest_burst(link: Link, items: Iterator[Any], *, waits: bool = False) -> int:
    """Return how many of them are sent at most before the reader takes some.

    :param waits: whether the reader tells each time that it waits
    """
    item, most = next(items, None), 0
    while item is not None:
        if waits:
            link.waits()
        link.settle()
        sent = 0
        while item is not None and link.send(item):
            item, sent = next(items, None), sent + 1
        most = max(most, sent)
        link.settle()
        while link.read():
            pass
    return most


def test_window_opens_again() -> None:
    """One large item of a source that doesn't weigh is forgotten after some small ones."""
    link = Link(new=False)
    large = iter([ITEMS[BUDGET]] * 40)
    assert drain(link, large) == 40
    assert longest_burst(link, iter([ITEMS[1]] * 2000)) >= FIRST_CREDIT // 2


def test_reader_that_does_not_bound_it() -> None:
    """A source sends it as many as it pulled, without weighing."""
    producer = Producer("s", None, None, lambda: "i")
    producer.pull(5)
    for _ in range(5):
        assert producer.item(ITEMS[BUDGET]).w is UNSET
    assert producer.state is ProducerState.PAUSED


def test_weights_that_are_told() -> None:
    """The first item has one always, others if they aren't small; without room nothing is sent."""
    producer = Producer("s", None, None, lambda: "i")
    producer.pull(9, 50_000)
    assert [producer.item(item).w for item in (1, 2, bytes(20_000))] == [0, UNSET, 20_000]
    assert producer.item(bytes(40_000)).w == 40_000
    assert (producer.state, producer.credit, producer.room) == (ProducerState.PAUSED, 5, -10_000)
    producer.pull(1, 10_000)
    assert producer.state is ProducerState.PAUSED
    producer.pull(1, 1)
    assert (producer.state, producer.credit, producer.room) == (ProducerState.READY, 7, 1)
    # A pull without it bounds it no more.
    producer.pull(1)
    assert producer.item(bytes(40_000)).w is UNSET
    assert producer.state is ProducerState.READY


def test_hostile_weights() -> None:
    """Whatever a source says, the reader's pulls are records that its peer accepts."""
    link = Link()
    link.settle()
    link.send(b"")
    link.items[0].w = MAX_NUMBER
    link.item_arrives()
    assert link.read()
    for pull in link.pulls:
        assert pull.b is not UNSET
        assert 0 <= pull.b <= MAX_NUMBER
    assert link.pulls
    encoded = msgspec.json.encode(link.pulls[0])
    assert msgspec.json.decode(encoded, type=StreamRequest) == link.pulls[0]


@dataclasses.dataclass
class Plain:
    number: int
    text: str


@dataclasses.dataclass(slots=True)
class Slotted:
    number: int
    text: str


class Defined(msgspec.Struct):
    number: int
    text: str


class Odd:
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no")


TEXT = "x" * 10_000


@pytest.mark.parametrize(
    ("item", "least", "most"),
    [
        (1, 0, 0),
        ("x" * SMALL, 0, 0),
        ({"when": datetime.now(timezone.utc), "much": Decimal(1), "none": None}, 0, 0),
        (TEXT, 10_000, 10_000),
        (bytearray(10_000), 10_000, 10_000),
        (memoryview(bytes(10_000)), 10_000, 10_000),
        ([1] * 2000, 16_000, 17_000),
        ({n: n for n in range(2000)}, 32_000, 48_000),
        ({n: n for n in range(5000)}, 80_000, 80_000),
        ({TEXT: 1}, 10_000, 10_100),
        ({(1, 2): 1, TEXT: 1}, 10_000, 10_100),
        (Plain(1, TEXT), 10_000, 10_100),
        (Slotted(1, TEXT), 10_000, 10_100),
        (Defined(1, TEXT), 10_000, 10_100),
        ([Plain(1, TEXT), 1j], 10_000, 12_000),
        ([Slotted(1, TEXT), Defined(1, TEXT), 1j], 20_000, 22_000),
        ({"a": [{"b": (TEXT, {TEXT})}]}, 20_000, 20_100),
        ([["y" * 100] * 10] * 100, 100_000, 125_000),
        ([["y" * 100, 1j] * 10] * 100, 1_000_000, BUDGET),
        ([{"id": n, "text": "y" * 100} for n in range(1000)], 146_000, 170_000),
        ([{"id": n, "text": "y" * 100} for n in range(5000)], 600_000, 730_000),
        ([[[[] for _ in range(40)] for _ in range(40)] for _ in range(40)], 500_000, 1_000_000),
        ([[[[1j] for _ in range(10)] for _ in range(10)] for _ in range(10)], 900_000, BUDGET),
        ({str(n): n for n in range(40)} | {"body": TEXT}, 10_400, 10_800),
        ([1] * 1_000_000, BUDGET, BUDGET),
        (object(), SMALL + 1, SMALL + 1),
        (Odd(), SMALL + 1, SMALL + 1),
        ([int], SMALL + 1, SMALL + 100),
    ],
    ids=map(str, range(26)),
)
def test_weights(item: Any, least: int, most: int) -> None:
    assert least <= weight_of(item) <= most


def test_what_contains_itself_or_lies_deep() -> None:
    """It weighs as much as may be, without a look at all of it."""
    endless: list[Any] = [1]
    endless.append(endless)
    assert weight_of(endless) == BUDGET
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert weight_of(deep) == BUDGET


def test_window_grows_as_it_did() -> None:
    """To 256 for small items that come in bursts."""
    link = Link()
    assert longest_burst(link, iter([ITEMS[1]] * 4000), waits=True) == MAX_WINDOW
