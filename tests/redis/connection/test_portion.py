"""How many entries are asked for, after reads that were cut off and after those that were not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.redis._connection._portion import MANY_BYTES, MOST_BYTES, Portion, ReadPortion


def test_halves(caplog: pytest.LogCaptureFixture) -> None:
    """Down to one entry, and there it says what may be wrong."""
    portion, sizes = Portion(100), []
    while not portion.is_least:
        portion.cut("requests")
        sizes.append(portion.size)
    assert sizes == [50, 25, 12, 6, 3, 1]
    assert caplog.text == ""
    portion.cut("requests")
    assert portion.size == 1
    assert "client-output-buffer-limit" in caplog.text


def test_grows_again() -> None:
    """Slowly while all comes that is asked for, quickly once that is over."""
    portion = Portion(100)
    portion.cut("")
    grown = []
    while portion.size < 60:
        portion.came(portion.size)
        grown.append(portion.size)
    assert grown == [50, 56, 56, 63]
    portion.cut("")
    portion.came(0)
    assert portion.size == 62
    portion.came(61)
    assert portion.size == 100


@given(
    most=st.integers(1, 200),
    fits=st.integers(1, 200),
    waiting=st.integers(0, 2000),
)
def test_all_is_read(most: int, fits: int, waiting: int) -> None:
    """Whatever fits into a reply, all is read, and few reads are in vain."""
    portion, cuts, reads = Portion(most), 0, 0
    while waiting:
        asked = min(portion.size, waiting)
        if asked > fits:
            portion.cut("")
            cuts += 1
            continue
        waiting -= asked
        reads += 1
        portion.came(asked)
    assert cuts <= 2 * most.bit_length() + reads / 16


@given(
    largest=st.integers(1, 1 << 30),
    replies=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 1 << 30), st.booleans())),
)
def test_reads_are_no_floods(largest: int, replies: list[tuple[int, int, bool]]) -> None:
    """Whatever came before, a read asks for no more than may be; after a flood for few at once."""
    portion = ReadPortion(largest)
    assert portion.size <= 8
    for waiting, size, is_cut in replies:
        assert portion.size >= 1
        assert portion.size == 1 or portion.size * largest <= MOST_BYTES
        asked = portion.size
        if is_cut:
            portion.cut("")
            assert portion.size == max(asked // 2, 1)
            continue
        count, received = min(waiting, asked), min(waiting, asked) * min(size, largest)
        if portion.wary or not portion.few < count < portion.many or received > MANY_BYTES:
            portion.took(count, received)
        if received > MANY_BYTES:
            assert portion.size == 1 or portion.size * received <= MANY_BYTES * count
        else:
            assert portion.size >= asked or (count <= 1 and portion.size >= 8)


def test_reads_of_small_entries() -> None:
    """They soon come many at a time, and go on so; after large ones it takes longer."""
    portion, sizes = ReadPortion(1 << 20), []
    for _ in range(6):
        portion.took(portion.size, portion.size * 100)
        sizes.append(portion.size)
    assert sizes == [16, 32, 64, 100, 100, 100]
    assert not portion.wary
    for _ in range(5):
        for _ in range(8):
            portion.took(portion.few, 1000)
        sizes.append(portion.size)
    assert sizes[6:] == [50, 25, 12, 8, 8]
    while portion.size < 100:
        portion.took(portion.size, 1000)
    portion.took(100, 100 << 20)
    assert portion.size == 4
    assert portion.wary
    reads = 0
    while portion.wary:
        portion.took(portion.size, portion.size * 100)
        reads += 1
    assert reads > 40
    assert portion.size == 100
