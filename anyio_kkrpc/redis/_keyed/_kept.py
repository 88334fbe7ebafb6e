"""What is kept of a call, read and written; see `_scripts` for its parts."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct

from ..._exceptions import DeliveryError, ProtocolError
from ...abc import Codec
from ...kit._keyed import was_cancelled
from ...records import Reply
from ..dialects._signing import Signer
from ..dialects.native import NativeDialect

__all__ = ("Kept", "Sealer", "parse_kept", "word_of")

# Where the parts begin, and how long an id is at most.
_DIGEST, _ID, _MOST_ID = 1, 23, 41
_SEAL = 64
ENDED = b"dfxke"
# What hints begin with: that a call has ended, that it is cancelled, that one is to begin later.
CALL_WORD, CANCEL_WORD, LATER_WORD = b"call ", b"call-cancel ", b"call-later"


class Kept(Struct, frozen=True):
    """What is known of a call.

    :ivar state: a letter
    :ivar entry_id: of its request
    :ivar rest: what it came to
    """

    state: bytes
    digest: bytes
    entry_id: bytes
    rest: bytes

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.state in ENDED

    def is_end_of(self, entry_id: bytes | None) -> bool:
        """Whether it is what a request came to."""
        return self.entry_id == entry_id and self.state in ENDED


def parse_kept(value: bytes) -> Kept:
    """Return what is known of a call.

    :raises ProtocolError: if that isn't valid
    """
    end = value.find(b"|", _ID, _ID + _MOST_ID + 1)
    if end < 0:
        raise ProtocolError("what is kept of a call isn't valid")
    return Kept(value[:1], value[_DIGEST:_ID], value[_ID:end], value[end + 1 :])


def is_to_cancel(value: bytes | None, entry_id: bytes) -> bool:
    """Whether what is kept of a call says that this request of it is to be cancelled."""
    try:
        kept = None if value is None else parse_kept(value)
    except ProtocolError:
        return False
    return kept is not None and kept.state == b"c" and kept.entry_id == entry_id


def word_of(key: bytes, value: bytes) -> bytes:
    """Return the hint that tells what a call came to."""
    return b"call %d:%b%b" % (len(key), key, value)


def cancel_word(key: bytes) -> bytes:
    """Return the hint to a worker that a call was cancelled, which it then asks Redis about."""
    return b"%b%d:%b" % (CANCEL_WORD, len(key), key)


def split_word(word: bytes) -> tuple[bytes, bytes]:
    """Return the key that a hint is about, and what is behind it.

    :raises ProtocolError: if it names none
    """
    length, colon, rest = word.partition(b" ")[2].partition(b":")
    if not colon or not length.isdigit() or len(length) > 4:
        raise ProtocolError("a hint about a call without its key")
    return rest[: int(length)], rest[int(length) :]


class Sealer:
    """Writes what a call came to, and reads it, checking who has written it if all sign.

    :param native: knows the codecs
    :param signer: what signs, if anything does
    """

    def __init__(self, native: NativeDialect, signer: Signer | None) -> None:
        self._native = native
        self._signer = signer

    def reply(self, codec: Codec, reply: Reply) -> bytes:
        """Return a reply as it is kept, without a seal.

        :raises TypeError: if it can't be encoded
        """
        return b"%b:%b" % (codec.name.encode(), codec.encode(Reply("", reply.v, reply.e)))

    def seal(self, place: bytes, *parts: bytes) -> bytes:
        """Return the last of some parts of what is kept in a place, sealed if all sign."""
        if self._signer is None:
            return parts[-1]
        return self._signer.seal(place, *parts) + parts[-1]

    def open(self, place: bytes, *parts: bytes) -> bytes:
        """Return the last part without its seal.

        :raises ProtocolError: if it isn't sealed as it must be
        """
        if self._signer is None:
            return parts[-1]
        *others, last = parts
        seal, data = last[:_SEAL], last[_SEAL:]
        if not self._signer.is_sealed(seal, place, *others, data):
            raise ProtocolError("what is kept of a call isn't signed as it must be")
        return data

    def value_of(self, place: bytes, key: str, kept: Kept) -> Reply:
        """Return what a call came to.

        :raises CallCancelledError: if it was cancelled
        :raises DeliveryError: if it was given up
        :raises ProtocolError: if that can't be read
        """
        if kept.state == b"k":
            raise was_cancelled(key)
        if kept.state == b"x":
            raise DeliveryError(kept.rest.decode(errors="replace") or "the call was given up")
        data = self.open(place, kept.state, kept.digest, kept.entry_id, kept.rest)
        name, _, encoded = data.partition(b":")
        reply = self._native.codec_named(name).decode(encoded)
        if not isinstance(reply, Reply):
            raise ProtocolError("what a call came to is no reply")
        return reply

    def progress(self, codec: Codec, value: Any) -> bytes:
        """Return how far a call has come as it is kept.

        :raises TypeError: if it can't be encoded
        """
        return self.reply(codec, Reply("", value))

    def progress_of(self, data: bytes) -> Any:
        """Return how far a call has come."""
        name, _, encoded = data.partition(b":")
        reply = self._native.codec_named(name).decode(encoded)
        value = reply.v if isinstance(reply, Reply) else None
        return None if value is UNSET else value


def pack_fields(fields: tuple[bytes, ...]) -> bytes:
    """Return the fields of an entry as one value."""
    return msgspec.msgpack.encode(fields)


def unpack_fields(data: bytes) -> tuple[bytes, ...]:
    """Return them again.

    :raises ProtocolError: if these are none
    """
    try:
        return msgspec.msgpack.decode(data, type=tuple[bytes, ...])
    except msgspec.DecodeError as exc:
        raise ProtocolError("a call that is to begin later isn't valid") from exc
