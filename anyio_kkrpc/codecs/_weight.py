"""What a message weighs once it is decoded: many times its bytes, if it is made of small values.

Estimates, within a factor of two: an empty list in JSON is three bytes with its comma, and 64 in
memory; an empty array in CBOR is one byte.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

from .._protocol._budget import marks_in

# Bytes of a message from which on it is weighed.
LARGE = 4096
# What a value takes besides its bytes, and a block of memory that Python hands out.
_VALUE = 48
_BLOCK = 64
# Python implementations that don't count their blocks: as much as JSON can weigh, by its bytes.
_WORST = 25

# Bytes of a text that is worth being skipped, and quotes that are looked at to find such.
_LONG = 16 * 1024
_LOOKS = 256
_BACKSLASH = 0x5C

_blocks: Callable[[], int] | None = getattr(sys, "getallocatedblocks", None)


def weight_of_json(data: bytes) -> int:
    """Return what JSON weighs decoded."""
    marks = begin = 0
    for start, end in _long_texts(data):
        marks += marks_in(data[begin:start])
        begin = end
    return len(data) + _VALUE * (marks + marks_in(data[begin:]))


def _long_texts(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the first long texts in JSON are: to look for values in them takes longer than to
    decode them.
    """
    begin, at = -1, -1
    for _ in range(_LOOKS if len(data) > _LONG else 0):
        at = data.find(b'"', at + 1)
        if at < 0:
            return
        if begin < 0:
            begin = at
        elif data[at - 1] != _BACKSLASH:
            if at - begin > _LONG:
                yield begin, at
            begin = -1
        elif data[at - 2] == _BACKSLASH:
            return  # whether the text ends here isn't worth the search


class Scales:
    """Weighs what is decoded in its ``with`` block, whatever it is made of.

    No garbage is collected meanwhile: what that frees is others', and would make it lighter.
    """

    __slots__ = ("_before", "_collects", "_made")

    def __enter__(self) -> Scales:
        self._collects = gc.isenabled()
        gc.disable()
        self._before = self._made = 0 if _blocks is None else _blocks()
        return self

    def __exit__(self, *exc: object) -> None:
        self._made = 0 if _blocks is None else _blocks() - self._before
        if self._collects:
            gc.enable()

    def weight(self, size: int) -> int:
        """Return what was decoded of ``size`` bytes weighs."""
        if _blocks is None:
            return size * _WORST
        return size + _BLOCK * max(self._made, 0)
