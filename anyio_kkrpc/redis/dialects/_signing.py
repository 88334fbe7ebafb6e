"""Signed entries: who has no key can't write one that is accepted, nor repeat one.

An entry gets a last field ``sig``: ``time.nonce.hmac``, where the time is Redis' in milliseconds
and the HMAC (SHA-256) is over the key of the stream, time, nonce, and all other fields. An entry is
refused if the HMAC is wrong, if its id, which is Redis' own time, is farther from the signed time
than the window, or if its nonce came before in another entry. Each peer remembers the nonces that
it has seen itself: within the window, a request of a group may be repeated to another worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from ..._exceptions import ProtocolError

# Seconds between signing and arrival in Redis, at most.
WINDOW = 60.0
# Seconds after which what waits is signed anew before it is written.
FRESH = WINDOW / 6
# Nonces that are remembered at least as long as the window.
_LEAST_REMEMBERED = 100_000
# Of a time in milliseconds.
_MOST_DIGITS = 15


class Signer:
    """Signs what this peer writes, and checks what it reads.

    :param key: the secret that all peers share
    :param now: tells Redis' time in seconds
    :param nonce: makes what no entry had before
    :ivar now: the same
    """

    def __init__(self, key: bytes, now: Callable[[], float], nonce: Callable[[], bytes]) -> None:
        import hmac  # loads OpenSSL's hash functions, which only those need who sign

        self._hmac = partial(hmac.digest, key, digest="sha256")
        self._same = hmac.compare_digest
        self._nonce = nonce
        self.now = now
        self._seen: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()

    def sign(self, stream: bytes, fields: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the fields with their signature."""
        head = b"%d.%s" % (round(self.now() * 1000), self._nonce())
        return (*fields, b"sig", b"%s.%s" % (head, self._digest(stream, head, fields)))

    def check(self, stream: bytes, entry_id: bytes, fields: list[bytes]) -> None:
        """Refuse an entry that isn't signed, was signed for another place or time, or came before.

        :raises ProtocolError: if it is refused
        """
        written, nonce = self.verify(stream, entry_id, fields)
        seen = self._seen
        if seen.setdefault(nonce, (written, entry_id))[1] != entry_id:
            raise ProtocolError("an entry that was written before")
        while len(seen) > _LEAST_REMEMBERED:
            _, (oldest, _) = next(iter(seen.items()))
            if oldest > written - 2 * WINDOW:
                break
            seen.popitem(last=False)

    def seal(self, place: bytes, *parts: bytes) -> bytes:
        """Return what shows that somebody who has the key has put parts in a place."""
        return self._digest(place, b"sealed", parts)

    def is_sealed(self, seal: bytes, place: bytes, *parts: bytes) -> bool:
        """Whether that is what it is."""
        return self._same(seal, self.seal(place, *parts))

    def verify(self, stream: bytes, entry_id: bytes, fields: list[bytes]) -> tuple[float, bytes]:
        """Return when an entry was written, in seconds, and the nonce that it was signed with.

        :raises ProtocolError: if it isn't signed, or was signed for another place or time
        """
        if len(fields) < 2 or fields[-2] != b"sig":
            raise ProtocolError("an entry without a signature")
        head, _, digest = fields[-1].rpartition(b".")
        if not self._same(digest, self._digest(stream, head, fields[:-2])):
            raise ProtocolError("an entry whose signature is wrong")
        time, _, nonce = head.partition(b".")
        if not time.isdigit() or len(time) > _MOST_DIGITS:
            raise ProtocolError("an entry whose signature tells no time")
        written = int(entry_id.partition(b"-")[0]) / 1000
        if abs(written - int(time) / 1000) > WINDOW:
            raise ProtocolError("an entry that was signed long before it was written")
        return written, nonce

    def _digest(self, stream: bytes, head: bytes, fields: tuple[bytes, ...] | list[bytes]) -> bytes:
        # Each part with its length, so that parts can't be shifted.
        text = b"".join(b"%d:%s" % (len(part), part) for part in (stream, head, *fields))
        return self._hmac(text).hex().encode()
