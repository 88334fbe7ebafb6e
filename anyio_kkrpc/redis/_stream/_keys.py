"""The names of a stream's keys, all in one Cluster slot."""

from __future__ import annotations

from binascii import crc_hqx
from functools import lru_cache
from itertools import count

from msgspec import Struct

_SLOTS = 16384

# Consumers of each group that are no workers: who owns what is there for any worker to take, and
# who what was delivered more than once and is not to be delivered yet.
HANDED_BACK = b"kkrpc-handed-back"
DELAYED = b"kkrpc-delayed"
# Entries of the control stream. Cancels in a broadcast are of interest for moments, but as many as
# that may come in one; all together they take some 2 MB.
CONTROL_LENGTH = b"20000"
CONTROL_TTL_MS = b"3600000"


class Keys(Struct, frozen=True):
    """The keys that belong to one stream.

    :ivar stream: requests
    :ivar control: cancels and destroy signals, read by every peer
    :ivar dead: dead letters
    :ivar due: keys of calls that are to begin later, by when
    """

    stream: bytes
    control: bytes
    dead: bytes
    due: bytes
    _inbox: bytes
    _claimer: bytes
    _worker: bytes
    _alive: bytes
    _call: bytes
    _waits: bytes
    _progress: bytes
    _turns: bytes
    _items: bytes
    _wake: bytes

    @classmethod
    def of(cls, stream: str) -> Keys:
        """Return the keys of a stream. A name that has a hash tag keeps it.

        Where braces in the name keep it from being one itself, the tag is the least number that is
        in the same slot: `a}b` has `{20658}a}b:control`.
        """
        name = stream.encode()
        base = b"{%b}" % name if _hashed(name) == name else name
        if hash_slot(base) != hash_slot(name):
            base = b"{%d}%b" % (_number_in(hash_slot(name)), name)
        kinds: list[bytes] = [b":control", b":dead", b":due", b":inbox:", b":claimer:", b":worker:"]
        kinds += [b":alive:", b":call:", b":waits:", b":progress:", b":turns:", b":items:"]
        kinds += [b":wake:"]
        return cls(name, *(base + kind for kind in kinds))

    def inbox(self, session_id: str) -> bytes:
        """Return the key of what is addressed to one peer."""
        return self._inbox + session_id.encode()

    def claimer(self, group: bytes) -> bytes:
        """Return the key that says which worker of a group looks for what was lost."""
        return self._claimer + group

    def turns(self, group: bytes) -> bytes:
        """Return the key that says which workers of a group wait at the stream, and which rest."""
        return self._turns + group

    def worker(self, group: bytes, consumer: bytes) -> bytes:
        """Return the key that tells whose a consumer is, if its name doesn't."""
        return b"%b%b:%b" % (self._worker, group, consumer) if group else self._worker

    def alive(self, session_id: str) -> bytes:
        """Return the key that says that a peer is there, from which others read streams."""
        return self._alive + session_id.encode()

    def call(self, key: bytes) -> bytes:
        """Return the key of what is kept of a call that has a key."""
        return self._call + key

    def waits(self, key: bytes) -> bytes:
        """Return the key of who waits for such a call."""
        return self._waits + key

    def progress(self, key: bytes) -> bytes:
        """Return the key of how far such a call has come."""
        return self._progress + key

    def items(self, key: bytes) -> bytes:
        """Return the key of what such a call has yielded."""
        return self._items + key

    def wake(self, session_id: str) -> bytes:
        """Return the key of what ends one peer's blocking read of items."""
        return self._wake + session_id.encode()


def stream_of(base: str) -> str:
    """Return the name of the stream whose other keys begin so."""
    tag, _, rest = base.partition("}")
    name = rest if tag[1:].isdigit() and rest else tag[1:]
    return name if Keys.of(name).control == b"%b:control" % base.encode() else base


def hash_slot(key: bytes) -> int:
    """Return the slot that Redis Cluster keeps a key in."""
    return crc_hqx(_hashed(key), 0) % _SLOTS


def _hashed(key: bytes) -> bytes:
    """Return what is hashed of a key: what is within its first braces, unless that is nothing."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return key[start + 1 : end] if end > start + 1 else key


@lru_cache
def _number_in(slot: int) -> int:
    """Return the least number whose decimal digits are in a slot. None is above 109,757."""
    return next(number for number in count() if crc_hqx(b"%d" % number, 0) % _SLOTS == slot)
