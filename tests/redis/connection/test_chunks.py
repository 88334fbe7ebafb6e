"""What waits to be written, cut into pieces."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.redis._connection._chunks import ALONE, take_chunk


@given(st.lists(st.binary(max_size=20)), st.integers(1, 50))
def test_pieces_make_the_whole(parts: list[bytes], size: int) -> None:
    """Each piece but the last is full, nothing is lost, and all is in its order."""
    waiting: deque[bytes | memoryview] = deque(parts)
    pieces = []
    while waiting:
        pieces.append(take_chunk(waiting, size))
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(len(piece) <= size for piece in pieces)


def test_what_is_cut_is_not_copied() -> None:
    """A large part is looked at piece by piece."""
    large = bytes(1000)
    waiting: deque[bytes | memoryview] = deque([large])
    assert len(take_chunk(waiting, 300)) == 300
    (rest,) = waiting
    assert isinstance(rest, memoryview)
    assert rest.obj is large
    assert len(rest) == 700


def test_large_parts_are_not_copied() -> None:
    """They stand alone, and so do the pieces of what is larger than a write."""
    small, large, larger = b"ab", bytes(ALONE), bytes(ALONE * 9)
    waiting: deque[bytes | memoryview] = deque([small, small, large, small, larger, small])
    pieces = []
    while waiting:
        pieces.append(take_chunk(waiting, ALONE * 4))
    assert b"".join(pieces) == small * 2 + large + small + larger + small
    assert pieces[:3] == [small * 2, large, small]
    assert pieces[1] is large
    assert [len(piece) for piece in pieces[3:]] == [ALONE * 4, ALONE * 4, ALONE, 2]
    assert all(isinstance(piece, memoryview) and piece.obj is larger for piece in pieces[3:6])
