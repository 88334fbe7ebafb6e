"""What came before, against the set of all that came."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.redis import _repeats
from anyio_kkrpc.redis._repeats import Repeats

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
    repeats, seen = Repeats(), set()
    for entry in entries:
        assert came(repeats, *entry) is (entry in seen)
        seen.add(entry)
    assert repeats.dropped == len(entries) - len(seen)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_version_before(counts: list[int]) -> None:
    """What counts with gaps comes in order: what isn't greater than the last came before."""
    repeats, last = Repeats(), 0
    for count in counts:
        assert came(repeats, "old", b"x", count) is (count <= last)
        last = max(last, count)


def test_no_number() -> None:
    """What isn't a number says nothing."""
    repeats = Repeats()
    for number in (b"", b"x", b"x.", b"x.-1", b"x.1.2", b"x.%d" % 10**18, b"x.\xb2"):
        assert not repeats.came_before(KEY, "a", number)
        assert not repeats.came_before(KEY, "a", number)


def test_a_sender_turns_to_another_epoch_and_back() -> None:
    """It has forgotten the inbox and opened it again, while something of before waited still."""
    repeats = Repeats()
    assert not came(repeats, "a", b"x+1", 1)
    assert not came(repeats, "a", b"x+1", 3)
    assert not came(repeats, "a", b"x+2", 1)
    assert not came(repeats, "a", b"x+1", 2)
    assert came(repeats, "a", b"x+1", 3)
    assert came(repeats, "a", b"x+2", 1)


def test_bounds(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Senders and gaps are remembered up to a number; the latest are."""
    monkeypatch.setattr(_repeats, "_SENDERS", 3)
    monkeypatch.setattr(_repeats, "_GAPS_OF_ONE", 4)
    monkeypatch.setattr(_repeats, "_GAPS", 6)
    repeats = Repeats()
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
