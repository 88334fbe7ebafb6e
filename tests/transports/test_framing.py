"""Frames in bytes, without I/O."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.transports._framing import Framing, LengthFraming, LineFraming

KINDS = pytest.mark.parametrize("kind", [LineFraming, LengthFraming])
LIMIT = 50
_payloads = st.lists(
    st.binary(min_size=1, max_size=2 * LIMIT).map(
        lambda b: b.replace(b"\n", b"-").rstrip(b"\r") or b"."
    ),
    max_size=8,
)


@KINDS
@given(payloads=_payloads, cuts=st.lists(st.integers(0, 400), max_size=20))
def test_any_split(kind: type[Framing], payloads: list[bytes], cuts: list[int]) -> None:
    """However the bytes are cut, the same frames come out; too large ones are counted instead, and
    never kept."""
    wire = b"".join(kind(1 << 30).wrap(payload) for payload in payloads)
    framing = kind(LIMIT)
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    got = []
    for start, end in pairwise(edges):
        got += list(framing.feed(wire[start:end]))
        assert framing.buffered <= LIMIT + 4
    assert got == [payload for payload in payloads if len(payload) <= LIMIT]
    assert framing.oversized == sum(len(payload) > LIMIT for payload in payloads)
    assert framing.buffered == 0


@KINDS
def test_byte_by_byte(kind: type[Framing]) -> None:
    """A frame fed byte by byte is the frame, and what follows begins the next one."""
    framing = kind(LIMIT)
    wire = framing.wrap(b"one") + framing.wrap(b"two") + framing.wrap(b"three")[:-1]
    got = [frame for byte in wire for frame in framing.feed(bytes([byte]))]
    assert got == [b"one", b"two"]
    assert framing.buffered


def test_lines() -> None:
    """Empty lines are skipped, and a carriage return before the newline isn't part of it."""
    framing = LineFraming(5)
    assert list(framing.feed(b"\n\r\na\r\n12345\r\n\nb")) == [b"a", b"12345"]
    assert list(framing.feed(b"\n123456\nc\n")) == [b"b", b"c"]
    assert framing.oversized == 1


def test_empty_frames_are_skipped() -> None:
    """A length of zero holds nothing."""
    framing = LengthFraming(5)
    assert list(framing.feed(bytes(8) + b"\0\0\0\1x")) == [b"x"]


@KINDS
def test_a_huge_frame_costs_no_memory(kind: type[Framing]) -> None:
    """A frame of 100 MB is skipped as it comes, and the next one is read."""
    framing = kind(1000)
    chunk = b"x" * 1_000_000
    head = (100_000_000).to_bytes(4, "big") if kind is LengthFraming else b""
    assert list(framing.feed(head)) == []
    for _ in range(100):
        assert list(framing.feed(chunk)) == []
        assert framing.buffered <= 1004
    tail = b"\n" if kind is LineFraming else b""
    assert list(framing.feed(tail + framing.wrap(b"next"))) == [b"next"]
    assert framing.oversized == 1
