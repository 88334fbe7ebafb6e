"""The field ``call`` of a request that has a key: what its worker must know of it.

``digest keep keep-errors run-within key``: the digest of the call, three times in milliseconds, 0
for none, and the key, which may hold anything. Behind the third time may stand, after commas, how
much is kept of a result that is a stream: items (0 for any number), bytes, ``p``, ``c`` or ``g``
for what is done when nobody reads, and milliseconds.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ..._exceptions import ProtocolError
from ...abc import DEFAULT_BOUNDS, ItemBounds

__all__ = ("CALL", "KEYED_VERSION", "Keyed", "keyed_field", "parse_keyed")

CALL = b"call"
# From which version on it is known. Another worker would run the request and keep nothing.
KEYED_VERSION = 3

DIGEST = 22
_MAX_KEY = 512
_MOST_DIGITS = 14
_BOUNDS = DEFAULT_BOUNDS
_UNREAD: dict[bytes, Any] = {b"p": "pause", b"c": "cancel", b"g": "go on"}


class Keyed(Struct):
    """What is known of the key of a request that was taken.

    :ivar key: as it is on the wire
    :ivar digest: 22 characters
    :ivar keep: milliseconds for which its result is kept
    :ivar keep_errors: the same for what its handler raises
    :ivar run_within: milliseconds that its handler may take, 0 for any number
    :ivar ends: when it is out of time, on AnyIO's clock
    :ivar cancelled: whether it was cancelled while it ran
    :ivar settled: whether it is known what it came to
    :ivar told: how often it has told of progress
    :ivar told_at: when it did last, on AnyIO's clock
    :ivar bounds: of its items
    :ivar items: what writes them, once its result is a stream
    :ivar early: those that were yielded before that
    :ivar opened: whether some may be there, of this attempt
    """

    key: bytes
    digest: bytes
    keep: int
    keep_errors: int
    run_within: int
    ends: float | None = None
    cancelled: bool = False
    settled: bool = False
    told: int = 0
    told_at: float = float("-inf")
    bounds: ItemBounds = _BOUNDS
    items: Any = None
    early: list[tuple[bytes, bytes]] = []
    opened: bool = False

    @property
    def name(self) -> str:
        """The key as text."""
        return self.key.decode()

    def field(self) -> bytes:
        """Return the value of the field."""
        rest = (self.run_within, self.key, self.bounds)
        return keyed_field(self.digest, self.keep, self.keep_errors, *rest)


def keyed_field(
    digest: bytes,
    keep: int,
    keep_errors: int,
    run_within: int,
    key: bytes,
    bounds: ItemBounds = _BOUNDS,
) -> bytes:
    """Return the value of the field; see `Keyed`."""
    more = b"" if bounds is _BOUNDS else _pack_bounds(bounds)
    return b"%b %d %d %d%b %b" % (digest, keep, keep_errors, run_within, more, key)


def parse_keyed(value: bytes) -> Keyed:
    """Return what a field says.

    :raises ProtocolError: if it isn't valid
    """
    parts = value.split(b" ", 4)
    if len(parts) < 5:
        raise ProtocolError("a request with a key that isn't told")
    digest, *times, key = parts
    times[2], _, bounds = times[2].partition(b",")
    valid = len(digest) == DIGEST and all(
        time.isdigit() and len(time) <= _MOST_DIGITS for time in times
    )
    if not valid or not 0 < len(key) <= _MAX_KEY:
        raise ProtocolError("a request with a key that can't be one")
    try:
        key.decode()
    except UnicodeDecodeError:
        raise ProtocolError("a request with a key that isn't text") from None
    keep, keep_errors, run_within = map(int, times)
    keyed = Keyed(key, digest, keep, keep_errors, run_within)
    if bounds:
        keyed.bounds = _parse_bounds(bounds)
    return keyed


def _pack_bounds(bounds: ItemBounds) -> bytes:
    """Return what stands behind the times, nothing for those that most have."""
    if bounds == _BOUNDS:
        return b""
    letter = bounds.when_unread[0].encode()
    numbers = (bounds.keep_items or 0, bounds.keep_bytes)
    return b",%d,%d,%b,%d" % (*numbers, letter, round(bounds.unread_timeout * 1000))


def _parse_bounds(value: bytes) -> ItemBounds:
    """Return what it says.

    :raises ProtocolError: if it isn't valid
    """
    parts = value.split(b",")
    numbers = parts[:2] + parts[3:]
    valid = len(parts) == 4 and parts[2] in _UNREAD
    if not valid or not all(one.isdigit() and len(one) <= _MOST_DIGITS for one in numbers):
        raise ProtocolError("a request with a key that doesn't tell how much is kept")
    items, size, timeout = map(int, numbers)
    return ItemBounds(items or None, max(size, 1), _UNREAD[parts[2]], timeout / 1000)
