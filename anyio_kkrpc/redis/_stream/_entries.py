"""Entries of a stream: what orders their ids, and how they are asked for page by page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._connection._command import Command

# Entries fetched by one XRANGE.
PAGE = 500


def order(entry_id: bytes) -> tuple[int, int]:
    """Return what orders ids of entries. A time alone is before all ids of it."""
    ms, _, seq = entry_id.partition(b"-")
    return int(ms), int(seq or 0)


def after(entry_id: bytes) -> bytes:
    """Return the smallest id that is greater."""
    ms, _, seq = entry_id.partition(b"-")
    number = int(seq) + 1
    return b"%d-0" % (int(ms) + 1) if number == 2**64 else b"%s-%d" % (ms, number)


def pages(*command: bytes, most: int = PAGE) -> Callable[[int], Command]:
    """Return what makes a command ask for so many entries, but not more than ``most``."""
    return lambda count: (*command, b"COUNT", b"%d" % min(count, most))


def pairs(flat: list[Any]) -> dict[bytes, Any]:
    """Return the mapping that RESP2 sends as a flat list."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
