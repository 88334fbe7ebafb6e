"""How many entries are asked for, after reads that were cut off and after those that were not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.redis._portion import Portion


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
