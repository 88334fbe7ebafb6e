"""What came before, against the set of all that came."""

from __future__ import annotations

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from anyio_kkrpc._protocol._records import Cancel
from anyio_kkrpc.redis._reading import _repeats
from anyio_kkrpc.redis._reading._in_order import InOrder
from anyio_kkrpc.redis._reading._repeats import Repeats
from anyio_kkrpc.redis.dialects import Entry
from anyio_kkrpc.redis.dialects.native import numbered

KEY = b"{s}:inbox:me"


def came(repeats: Repeats, sender: str, epoch: bytes, count: int) -> bool:
    return repeats.came_before(KEY, sender, b"%s.%d" % (epoch, count))


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([b"x+1", b"x+2"]), st.integers(1, 12)),
        max_size=60,
    )
)
def test_any_order(entries: list[tuple[str, bytes, int]]) -> None:
    """Without gaps in what is written, each number is new once, in whatever order they come."""
    repeats, seen = Repeats(KEY), set()
    for entry in entries:
        assert came(repeats, *entry) is (entry in seen)
        seen.add(entry)
    assert repeats.dropped == len(entries) - len(seen)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from([b"x+1", b"x+2"]),
            st.integers(1, 12),
            st.integers(1, 4),
        ),
        max_size=60,
    )
)
def test_several_at_once(entries: list[tuple[str, bytes, int, int]]) -> None:
    """What follows is new, all of it; whatever doesn't is told one by one, as if alone."""
    repeats, seen = Repeats(KEY), set()
    for sender, epoch, first, many in entries:
        numbers = [(sender, epoch, count) for count in range(first, first + many)]
        if repeats.follow(KEY, sender, b"%s.%d" % (epoch, first), many):
            assert not seen.intersection(numbers)
            assert first == 1 or (sender, epoch, first - 1) in seen
        else:
            assert [came(repeats, *one) for one in numbers] == [one in seen for one in numbers]
        seen.update(numbers)
    assert not repeats.follow(KEY, "a", b"x+1.x", 1)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_version_before(counts: list[int]) -> None:
    """What counts with gaps comes in order: what isn't greater than the last came before."""
    repeats, last = Repeats(KEY), 0
    for count in counts:
        assert came(repeats, "old", b"x", count) is (count <= last)
        last = max(last, count)


def test_no_number() -> None:
    """What isn't a number says nothing."""
    repeats = Repeats(KEY)
    for number in (b"", b"x", b"x.", b"x.-1", b"x.1.2", b"x.%d" % 10**18, b"x.\xb2"):
        assert not repeats.came_before(KEY, "a", number)
        assert not repeats.came_before(KEY, "a", number)


def test_a_sender_turns_to_another_epoch_and_back() -> None:
    """It has forgotten the inbox and opened it again, while something of before waited still."""
    repeats = Repeats(KEY)
    assert not came(repeats, "a", b"x+1", 1)
    assert not came(repeats, "a", b"x+1", 3)
    assert not came(repeats, "a", b"x+2", 1)
    assert not came(repeats, "a", b"x+1", 2)
    assert came(repeats, "a", b"x+1", 3)
    assert came(repeats, "a", b"x+2", 1)


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders and gaps are remembered up to a number; the latest are."""
    monkeypatch.setattr(_repeats, "_SENDERS", 3)
    monkeypatch.setattr(_repeats, "_GAPS_OF_ONE", 4)
    monkeypatch.setattr(_repeats, "_GAPS", 6)
    repeats = Repeats(KEY)
    for count in range(2, 22, 2):
        assert not came(repeats, "a", b"x+1", count)
    assert came(repeats, "a", b"x+1", 11)
    assert not came(repeats, "a", b"x+1", 13)
    for count in (2, 4, 6, 8):
        assert not came(repeats, "b", b"x+1", count)
    assert came(repeats, "a", b"x+1", 15)
    assert not came(repeats, "b", b"x+1", 1)
    for sender in "cde":
        assert not came(repeats, sender, b"x+1", 2)
    assert len(repeats._senders) == 3
    assert repeats._gaps == 3
    assert len(repeats._incomplete) == 3
    assert not came(repeats, "a", b"x+1", 20)


def sorted_ids(
    repeats: Repeats, count: int, *, now: float = 0.0, sender: str = "a", epoch: bytes = b"x+1"
) -> list[int]:
    """Return what may be handled when an entry comes."""
    assert not came(repeats, sender, epoch, count)
    if not repeats.disorder:
        return [count]
    return repeats.sort(KEY, sender, b"%s.%d" % (epoch, count), count, 0, now)


@given(st.permutations(range(1, 13)))
def test_in_order(counts: list[int]) -> None:
    """Whatever the order in which they come, they are handled in that of their numbers."""
    repeats, handled = Repeats(KEY), []
    for count in counts:
        handled += sorted_ids(repeats, count)
        assert handled == list(range(1, len(handled) + 1))
    assert len(handled) == 12
    assert repeats.disorder == {}


def test_what_does_not_come_is_not_waited_for_long() -> None:
    """After a while what is behind it is handled; it is taken late, and others wait again."""
    repeats = Repeats(KEY)
    assert sorted_ids(repeats, 2, now=10.0) == []
    assert sorted_ids(repeats, 4, now=12.0) == []
    assert repeats.overdue(14.9) == []
    assert repeats.overdue(15.0) == [2, 4]
    assert repeats.disorder == {}
    assert sorted_ids(repeats, 3) == [3]
    assert sorted_ids(repeats, 6, now=20.0) == []
    assert sorted_ids(repeats, 1, now=21.0) == [1]
    assert sorted_ids(repeats, 5, now=21.0) == [5, 6]


def test_what_is_not_waited_for() -> None:
    """Another sender, another key, and what has no number."""
    repeats = Repeats(KEY)
    assert sorted_ids(repeats, 2) == []
    assert not came(repeats, "b", b"x+1", 1)
    for sender, number in (
        ("b", b"x+1.1"),
        ("a", b"x"),
        ("a", b"x+1.1" + b"0" * 20),
        ("c", b"x+1.1"),
        ("a", b"y+1.1"),
    ):
        assert repeats.sort(KEY, sender, number, number, 0, 0.0) == [number]
    assert sorted_ids(repeats, 1) == [1, 2]
    assert not repeats.came_before(b"{s}:control", "a", b"x+1.2")
    assert repeats.disorder == {}


def test_epoch_that_is_left() -> None:
    """What waits in an epoch is handled ahead of what its sender writes in the next one."""
    repeats = Repeats(KEY)
    assert sorted_ids(repeats, 2) == []
    assert sorted_ids(repeats, 1, epoch=b"x+2") == [2, 1]
    assert repeats.disorder == {}
    assert sorted_ids(repeats, 3, epoch=b"x+2") == []
    assert sorted_ids(repeats, 1) == [3, 1]
    assert repeats.disorder == {}


def test_lost_entries(caplog: pytest.LogCaptureFixture) -> None:
    """After entries of the inbox may have been lost the next gap of each sender isn't waited for. It
    is counted and said.
    """
    repeats = Repeats(KEY)
    for sender in ("a", "b"):
        assert sorted_ids(repeats, 1, sender=sender) == [1]
    repeats.lose()
    assert repeats.lost == 0
    assert sorted_ids(repeats, 3) == [3]
    assert repeats.lost == 1
    assert sorted_ids(repeats, 2, sender="b") == [2]
    assert sorted_ids(repeats, 4, sender="b") == [4]
    assert sorted_ids(repeats, 5) == []
    assert sorted_ids(repeats, 2) == [2]
    assert sorted_ids(repeats, 4) == [4, 5]
    assert sorted_ids(repeats, 6, sender="b") == []
    assert repeats.lost == 2
    said = [one.message for one in caplog.records]
    assert [one[:10] for one in said] == ["1 entries "] * 2
    assert "(2 so far)" in said[1]


def test_early_ones_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is handled when it is too much, and when its sender is forgotten."""
    monkeypatch.setattr(_repeats, "_EARLY", 3 * _repeats._OVERHEAD)
    monkeypatch.setattr(_repeats, "_SENDERS", 1)
    repeats = Repeats(KEY)
    assert [sorted_ids(repeats, count) for count in (2, 4, 3)] == [[], [], []]
    assert sorted_ids(repeats, 5) == [2, 3, 4, 5]
    assert sorted_ids(repeats, 7) == []
    assert not came(repeats, "b", b"x+1", 1)
    assert repeats.overdue(0.0) == [7]
    assert repeats.disorder == {}
    assert repeats._weight == 0


def test_one_large_entry_is_handled_at_once() -> None:
    """No more than a number of bytes waits."""
    repeats = Repeats(KEY)
    assert sorted_ids(repeats, 2) == []
    assert not came(repeats, "a", b"x+1", 4)
    assert repeats.sort(KEY, "a", b"x+1.4", "large", _repeats._EARLY, 0.0) == [2, "large"]
    assert sorted_ids(repeats, 1) == [1]


def test_handed_on_in_order() -> None:
    """Entries are handed on in order: what could not be read, and what doesn't come, is left out."""

    async def check() -> None:
        repeats = Repeats(KEY)
        handled: list[bytes] = []

        def handle(entry_id: bytes, entry: Entry) -> None:
            handled.append(entry_id)

        in_order = InOrder(repeats, handle)

        def entry(count: int) -> None:
            number = b"x+1.%d" % count
            if not repeats.came_before(KEY, "a", number):
                found = Entry(Cancel("c"), "a", 10, number)
                in_order.sort(KEY, b"%d" % count, found, number)

        async with anyio.create_task_group() as group:
            group.start_soon(in_order.run)
            in_order.skipped(KEY, "a", [b"x+1.1"])
            entry(3)
            assert handled == []
            in_order.skipped(KEY, "a", [b"x+1.2"])
            assert handled == [b"3"]
            for fields in ([], [b"from", b"a"], [b"from", b"", b"json", b"?", b"n", b"x+1.4"]):
                in_order.skipped(KEY, *numbered(fields))
            entry(6)
            entry(5)
            entry(5)
            entry(4)
            assert handled == [b"3", b"4", b"5", b"6"]
            entry(9)
            assert handled == [b"3", b"4", b"5", b"6"]
            started = anyio.current_time()
            while len(handled) == 4:
                await anyio.sleep(0.1)
            assert 4 < anyio.current_time() - started < 6
            entry(8)
            assert handled[-2:] == [b"9", b"8"]
            group.cancel_scope.cancel()

    trio.run(check, clock=MockClock(autojump_threshold=0))
