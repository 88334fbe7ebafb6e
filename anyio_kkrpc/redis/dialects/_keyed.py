"""The field ``call`` of a request that has a key: what its worker must know of it.

``digest keep keep-errors run-within key``: the digest of the call, three times in milliseconds, 0
for none, and the key, which may hold anything.
"""

from __future__ import annotations

from msgspec import Struct

from ..._exceptions import ProtocolError

__all__ = ("CALL", "KEYED_VERSION", "Keyed", "keyed_field", "parse_keyed")

CALL = b"call"
# From which version on it is known. Another worker would run the request and keep nothing.
KEYED_VERSION = 3

DIGEST = 22
_MAX_KEY = 512
_MOST_DIGITS = 14


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

    @property
    def name(self) -> str:
        """The key as text."""
        return self.key.decode()

    def field(self) -> bytes:
        """Return the value of the field."""
        return keyed_field(self.digest, self.keep, self.keep_errors, self.run_within, self.key)


def keyed_field(digest: bytes, keep: int, keep_errors: int, run_within: int, key: bytes) -> bytes:
    """Return the value of the field; see `Keyed`."""
    return b"%b %d %d %d %b" % (digest, keep, keep_errors, run_within, key)


def parse_keyed(value: bytes) -> Keyed:
    """Return what a field says.

    :raises ProtocolError: if it isn't valid
    """
    parts = value.split(b" ", 4)
    if len(parts) < 5:
        raise ProtocolError("a request with a key that isn't told")
    digest, *times, key = parts
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
    return Keyed(key, digest, keep, keep_errors, run_within)
