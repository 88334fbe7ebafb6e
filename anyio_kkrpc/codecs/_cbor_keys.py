"""Looks at the keys of maps and sets in CBOR before anybody makes dicts and sets of them.

cbor2 makes a dict as it reads, and takes only texts and bytes as keys if it is told so. What has
other keys is walked through here first: those of which many may hash alike (integers of more than
64 bits, decimals, UUIDs, arrays) are looked at, map by map. Of numbers of 64 bits some dozens do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .._protocol._hashes import MOST_ALIKE, check_hashes
from ._cbor_heads import ENDLESS, head

_MAP, _TAG, _SET = 5, 6, 258
_BREAK = 0xFF
# Bytes of a record for each container in it, at least, besides the first ones. (A text of which the
# head isn't shorter than it could be has more.)
_BYTES_EACH = 4
_FREE = 1000
# How deep they may be in each other: more than any decoder here takes, tags included.
_DEPTH = 256
# Scalars that are walked through one by one before it is tried to take many at once.
_PATIENCE = 4

# Bytes of an item, by its first byte: of numbers, simple values, short texts, and what is empty.
# Others have 0.
_WIDTHS = [0] * 256
for _kind in (0x00, 0x20, 0xE0):
    _WIDTHS[_kind : _kind + 0x18] = [1] * 0x18
    _WIDTHS[_kind + 0x18 : _kind + 0x1C] = [2, 3, 5, 9]
for _kind in (0x40, 0x60):
    _WIDTHS[_kind : _kind + 0x18] = range(1, 0x19)
_WIDTHS[0x80] = _WIDTHS[0xA0] = 1


def _run(count: int) -> re.Pattern[bytes]:
    """Return what matches so many scalars in a row."""
    by_width: dict[int, list[int]] = {}
    for first, width in enumerate(_WIDTHS):
        by_width.setdefault(width, []).append(first)
    del by_width[0]
    kinds = [
        b"[%s]" % b"".join(b"\\x%02x" % first for first in firsts) + b".{%d}" % (width - 1)
        for width, firsts in by_width.items()
    ]
    return re.compile(b"(?:%s){%d}" % (b"|".join(kinds), count), re.DOTALL)


_RUNS = [(count, _run(count)) for count in (1024, 128, 16)]


def check_keys(data: bytes, decode: Callable[[bytes], Any]) -> None:
    """Refuse a record with a map or set of which too many keys hash alike.

    :param decode: decodes an item, as a key
    :raises ValueError: if there is one, if it isn't well-formed or nested too deeply, or if it has
        far more containers than bytes in them
    """
    try:
        for places in _keys(data):
            if len(places) > MOST_ALIKE:
                keys = b"".join(data[begin:end] for begin, end in places)
                check_hashes(decode(b"\x9a%s%s" % (len(places).to_bytes(4, "big"), keys)))
    except IndexError:
        raise ValueError("it ends too early") from None


def _keys(data: bytes) -> Iterator[list[tuple[int, int]]]:
    """Walk through one item; yield, of each map and set in it, where those keys are that are to be
    looked at. Those of a key's own maps come before it.
    """
    position, streak, is_set = 0, 0, False
    containers = _FREE + len(data) // _BYTES_EACH
    # Of the container that is read: how many items are left, whether each of them is a key (1), or
    # every other one (2), and where those keys are. Then the same of those that it is in.
    left, step = 1, 0
    keys: list[tuple[int, int]] = []
    above: list[tuple[int, int, list[tuple[int, int]], bool, int]] = []
    while True:
        if left == 0 or (left > ENDLESS // 2 and data[position] == _BREAK):
            position += left != 0
            yield keys
            if not above:
                return
            left, step, keys, is_key, begin = above.pop()
            if is_key:
                keys.append((begin, position))
            continue
        first = data[position]
        width = _WIDTHS[first]
        if width:
            position += width
            left -= 1
            streak += 1
            if streak == _PATIENCE:
                before = left
                left, position = _skip_run(data, position, left)
                streak = 0 if left < before else _PATIENCE - 32
            continue
        begin = position
        kind, length, position = head(data, position, first)
        containers -= 1
        if not containers or len(above) == _DEPTH:
            raise ValueError("too many or too deep containers beside keys that are not text")
        if kind in (2, 3) and length < ENDLESS:
            position += length
            left -= 1
            continue
        is_key = step == 1 or (step == 2 and left % 2 == 0)
        above.append((left - 1, step, keys, is_key, begin))
        keys = []
        if kind == _TAG:
            left, step, is_set = 1, 0, length == _SET
        else:
            left = length * 2 if kind == _MAP and length < ENDLESS else length
            step = 2 if kind == _MAP else int(is_set)
            is_set = False


def _skip_run(data: bytes, position: int, left: int) -> tuple[int, int]:
    """Skip scalars in a row; return how many items are left, and where they begin."""
    for count, run in _RUNS:
        while left >= count:
            found = run.match(data, position)
            if found is None:
                break
            position = found.end()
            left -= count
    return left, position
