"""The names of a stream's keys, all in one Cluster slot."""

from __future__ import annotations

from msgspec import Struct


class Keys(Struct, frozen=True):
    """The keys that belong to one stream.

    :ivar stream: requests
    :ivar control: cancels and destroy signals, read by every peer
    :ivar dead: dead letters
    """

    stream: bytes
    control: bytes
    dead: bytes
    _inbox: bytes

    @classmethod
    def of(cls, stream: str) -> Keys:
        """Return the keys of a stream. A name that has a hash tag keeps it."""
        start = stream.find("{")
        tagged = stream if start >= 0 and stream.find("}", start + 2) > 0 else f"{{{stream}}}"
        base = tagged.encode()
        return cls(stream.encode(), base + b":control", base + b":dead", base + b":inbox:")

    def inbox(self, session_id: str) -> bytes:
        """Return the key of what is addressed to one peer."""
        return self._inbox + session_id.encode()
