"""What a message weighs once it is decoded: many times its bytes, if it is made of small values.

Estimates, within a factor of two: an empty list in JSON is three bytes with its comma, and 64 in
memory; an empty array in CBOR is one byte.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from .._protocol._budget import marks_in

# Bytes of a message from which on it is weighed.
LARGE = 4096
# What a value takes besides its bytes, and a block of memory that Python hands out.
_VALUE = 48
_BLOCK = 64
# Python implementations that don't count their blocks: as much as JSON can weigh, by its bytes.
_WORST = 25

_blocks: Callable[[], int] | None = getattr(sys, "getallocatedblocks", None)


def weight_of_json(data: bytes) -> int:
    """Return what JSON weighs decoded."""
    return len(data) + _VALUE * marks_in(data)


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
