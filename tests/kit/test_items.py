"""Positions of items, and how much of a stream is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc import DeliveryError, StreamRestartedError
from anyio_kkrpc.abc import ItemBounds
from anyio_kkrpc.kit._items import Position, Window, no_stream, parse_position, restarted


def test_positions() -> None:
    assert parse_position(None) is None
    assert parse_position("17-3") == Position(17, 3)
    assert str(Position(17, 3)) == "17-3"
    assert Position(1, 9) < Position(1, 10) < Position(2, 0)
    for wrong in ("", "-", "1-", "-1", "1-2-3", "1-٣", "+1-1", "1" * 19 + "-1"):
        with pytest.raises(ValueError, match="^after: "):
            parse_position(wrong)
    with pytest.raises(TypeError, match="^after: "):
        parse_position(b"1-1")


def test_errors() -> None:
    assert isinstance(restarted("k"), StreamRestartedError)
    assert isinstance(no_stream("k"), DeliveryError)
    assert "k" in str(restarted("k"))


BOUNDS = st.builds(
    ItemBounds,
    keep_items=st.one_of(st.none(), st.integers(1, 20)),
    keep_bytes=st.integers(1, 200),
)


@given(BOUNDS, st.lists(st.one_of(st.integers(0, 60), st.none()), max_size=200))
def test_window(bounds: ItemBounds, steps: list[int | None]) -> None:
    """No more is kept than may be, nothing goes that nobody has read beyond, and whoever reads all
    that is there makes room. A number is the size of an item; None, that somebody reads on.
    """
    window, sizes, marks, read, gone = Window(bounds), [], set(), 0, 0
    for step in steps:
        if step is None:
            passed = [mark for mark in marks if mark > read]
            if passed:
                read = min(passed)
                window.read(read)
            continue
        if window.full:
            gone = window.make_room()
            if window.full:
                read = len(sizes)
                window.read(read)  # who reads all there is passes the last mark
                assert max(marks) == read
                gone = window.make_room()
        assert not window.full
        assert gone <= read
        sizes.append(step)
        if window.add(step):
            marks.add(len(sizes))
        kept = sizes[gone:]
        assert window.number == len(sizes)
        assert len(kept) <= (bounds.keep_items or len(kept))
        assert sum(kept[:-1]) < bounds.keep_bytes


@given(BOUNDS, st.lists(st.integers(0, 60), max_size=100))
def test_window_that_nobody_reads(bounds: ItemBounds, sizes: list[int]) -> None:
    window, gone = Window(bounds), 0
    for number, size in enumerate(sizes):
        if window.full:
            assert window.make_room() == gone
            gone = window.make_room(unread=True)
        assert not window.full
        window.add(size)
        assert gone <= number


def test_window_of_a_further_attempt() -> None:
    """What is there goes as a whole, once somebody has read all of it."""
    window = Window(ItemBounds(keep_items=4))
    window.begin(10, 4)
    assert window.full
    assert window.make_room() == 0
    window.read(10)
    assert window.make_room() == 10
    assert not window.full
    window.add(1)
    assert window.number == 11
    empty = Window(ItemBounds(keep_items=1))
    empty.begin(0, 0)
    assert not empty.full
