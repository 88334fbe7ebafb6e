"""What a dialect is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat
from typing import final

from msgspec import UNSET, Struct

from ..._exceptions import OverloadedError
from ...records import Record, Reply, Request
from ._keyed import Keyed

# Digits of a count.
_MAX_COUNT = 18
# Bytes that nothing has.
ANY_SIZE = 1 << 62


class Entry(Struct):
    """A decoded stream entry.

    :ivar record: the record
    :ivar sender: id of the peer that wrote it; a `SharedPeer` where answers go to the stream
    :ivar size: bytes of the encoded record
    :ivar number: the writer's own count of what it wrote, by which a repetition is recognized
    :ivar recipient: id of the peer that it is for, where the entry itself says so
    :ivar fields: the entry as it was, where it has a recipient
    :ivar again: how often its sender has written this request before, as far as it says so
    :ivar keyed: what is to be known of its key, if it has one
    """

    record: Record
    sender: str
    size: int
    number: bytes | None = None
    recipient: str | None = None
    fields: list[bytes] | None = None
    again: int = 0
    keyed: Keyed | None = None


class LargeEntry(Entry):
    """A large request whose arguments were left out.

    :ivar left_out: the entry as it was
    :ivar weight: what the request weighs decoded, in bytes
    """

    left_out: list[bytes] = []
    weight: int = 0


class Several(Entry):
    """An entry of several records. Its own record is the first that can be read, its size that of
    all of them.

    :ivar entries: each record as if it stood alone, in their order, without its number
    :ivar refused: why others can't be read, and their places among all, from 0
    """

    entries: list[Entry] = []
    refused: list[tuple[Exception, int]] = []

    def number_each(self) -> list[bytes]:
        """Give each entry its number, which only what isn't in order needs; return those of what
        can't be read.
        """
        assert self.number is not None
        numbers = [*numbers_of(self.number, len(self.entries) + len(self.refused))]
        refused = [numbers[place] for _, place in self.refused]
        for _, place in reversed(self.refused):
            del numbers[place]
        for entry, number in zip(self.entries, numbers, strict=True):
            entry.number = number
        return refused


def numbers_of(number: bytes, count: int) -> Iterator[bytes]:
    """Return the numbers of an entry's records, each greater than the one before by 1.

    :param number: the first one's
    """
    epoch, _, text = number.partition(b".")
    if not text.isdigit() or len(text) > _MAX_COUNT:
        return repeat(number, count)
    return (b"%s.%d" % (epoch, one) for one in range(int(text), int(text) + count))


def check_size(size: int, most: int) -> None:
    """Refuse to write what nobody would read.

    :param size: bytes of an encoded record
    :raises OverloadedError: if these are too many
    """
    if size > most:
        raise OverloadedError(f"a message of {size} bytes exceeds max_message_size ({most} bytes)")


def leave_out(entry: Entry, fields: list[bytes], weight: int) -> Entry:
    """Return an entry without its arguments, if it is a request; they come when it begins."""
    record = entry.record
    if not isinstance(record, Request):
        return entry
    record.a = record.k = record.meta = UNSET
    record.v = UNSET
    large = LargeEntry(
        record, entry.sender, entry.size, entry.number, entry.recipient, entry.fields
    )
    large.left_out, large.weight = fields, weight
    return large


class Dialect(ABC):
    """Turns records into the fields of a stream entry and back. It does no I/O.

    :ivar shared: whether everything travels on the one stream, which every peer reads; if not,
        what is for one peer goes to its inbox
    """

    shared: bool
    # Whether a broadcast request for an unknown name is answered, too.
    answers_unknown: bool = False
    # Seconds after which a request that tells no deadline was certainly given up by its caller.
    stale_after: float = float("inf")

    @abstractmethod
    def encode(self, record: Record, recipient: str | None) -> tuple[bytes, ...] | None:
        """Return the fields of an entry: names and values in turn.

        :param recipient: the peer that the record is for, ``None`` for whoever serves the stream
        :return: ``None`` if the dialect has nothing of the kind, and peers do without
        :raises TypeError: if the dialect can't carry it
        """

    @abstractmethod
    def decode(self, fields: list[bytes]) -> Entry | None:
        """Return what an entry of this dialect holds; ``None`` if it is none of this peer's affair.

        :raises ProtocolError: if it isn't valid
        """

    def begin(self, request: Request, sender: str) -> None:  # noqa: B027 - few have to
        """Note a request that is about to be served."""

    def take(self, record: Record, sender: str, size: int) -> Record | None:
        """Return what the core is to get for a record that isn't a request, if anything."""
        return record

    def answer(self, request: Request, reply: Reply) -> Reply:
        """Return the reply as peers of this dialect expect it."""
        return reply


@final
class SharedPeer(str):
    """Id of a peer that is answered on the stream, in the dialect that it spoke.

    Peers of different dialects may have the same id, and one may speak in two ways, so the dialect
    belongs to the id as it came.
    """

    dialect: Dialect

    @classmethod
    def of(cls, peer: str, dialect: Dialect) -> SharedPeer:
        """Return the id with its dialect."""
        shared = cls(peer)
        shared.dialect = dialect
        return shared
