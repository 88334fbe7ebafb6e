"""What items in CBOR begin with, and whether there are large integers among them."""

from __future__ import annotations

import re

# Items of a container that says at its end where that is.
ENDLESS = 1 << 62
_BYTES, _TEXT = 2, 3
# How a large integer begins; other bytes may look so, too.
_TAGS = (0xC2, 0xC3)
_LENGTHS = (0x59, 0x5A, 0x5B)
_LARGE = re.compile(rb"[\xc2\xc3][\x59-\x5b]")
# Bytes of a record that are looked through sooner than items are looked at, and how many items are
# looked at in one that has more.
_SHORT = 4096
_LOOKS = 1024


def head(data: bytes, position: int, first: int) -> tuple[int, int, int]:
    """Return kind and length that an item begins with, and where its content begins."""
    kind, info = first >> 5, first & 0x1F
    begin = position + 1
    if info < 24:
        return kind, info, begin
    if info < 28:
        end = begin + (1 << (info - 24))
        data[end - 1]  # or it ends too early
        return kind, int.from_bytes(data[begin:end], "big"), end
    if info == 31 and 2 <= kind <= 5:
        return kind, ENDLESS, begin
    raise ValueError("not well-formed")


def may_have_large_integers(data: bytes) -> bool:
    """Whether an integer of more than 255 bytes may be in a record that was encoded here.

    Long texts and bytes are skipped: they would take longer to look through than to encode, and
    most bytes have somewhere what looks like an integer.
    """
    if b"\xc2" not in data and b"\xc3" not in data:
        return False
    if len(data) > _SHORT:
        position = 0
        for _ in range(_LOOKS):
            if position >= len(data):
                return False
            first = data[position]
            if first in _TAGS and data[position + 1] in _LENGTHS:
                return True
            kind, length, position = head(data, position, first)
            if kind in (_BYTES, _TEXT):
                position += length
    return _LARGE.search(data) is not None
