"""The inboxes that a writer adds to: what stands in each command, and how far each is numbered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from typing import Any

from ...abc import Codec
from .._stream._keys import Keys
from ..dialects.native import MARK, MARK_OF_SEVERAL

__all__ = ("PACKED_MARK", "Inbox", "Inboxes", "fields_of", "packed_parts")

# Parts of the script that adds to the stream, before the fields: see `Commands`.
_BEHIND_EVAL = 6
# Peers whose inbox is remembered.
_PEERS = 4096


def packed_parts(*parts: bytes) -> bytes:
    """Return parts of a command, packed."""
    return b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


def fields_of(packed: bytes) -> list[bytes]:
    """Return the fields that a packed command adds: XADD, or the script that does it."""
    parts: list[bytes] = []
    at = packed.find(b"\r\n") + 2
    while at < len(packed):
        begin = packed.index(b"\r\n", at) + 2
        end = begin + int(packed[at + 1 : begin])
        parts.append(packed[begin:end])
        at = end + 2
    if parts[:1] == [b"EVAL"]:
        return parts[_BEHIND_EVAL:]
    return parts[parts.index(b"*", 2) + 1 :] if parts else []


# The end of each native entry, packed.
PACKED_MARK = packed_parts(*MARK)
_MARK_OF_SEVERAL = packed_parts(*MARK_OF_SEVERAL)


class Inbox:
    """Where entries for one peer go.

    :ivar epoch: what the numbers of these entries begin with; the counts behind it have no gaps,
        which the ``+`` in it says
    :ivar last: the count of the last one
    :ivar head: the beginning of the command that adds one, packed
    :ivar length: how many parts that command has beside the records
    :ivar codec: the one that was used last
    :ivar codec_name: its name, packed
    :ivar known: what `NativeDialect.changes` was when its owner was looked at last
    :ivar several: whether its owner reads entries of several records
    :ivar open: what is to leave together for it
    """

    __slots__ = (
        "codec",
        "codec_name",
        "epoch",
        "head",
        "key",
        "known",
        "last",
        "length",
        "open",
        "several",
    )

    def __init__(self, key: bytes, epoch: bytes) -> None:
        self.key = key
        self.epoch = epoch
        self.last, self.known, self.several = 0, -1, False
        self.codec: Codec | None = None
        self.open: list[Any] | None = None
        self.codec_name = self.head = b""
        self.length = 0

    def begin(self, codec: Codec, if_there: tuple[bytes, ...], sender: bytes) -> None:
        """Make the beginning of the command."""
        command = (b"XADD", self.key, *if_there, b"*", b"from", sender)
        self.codec = codec
        self.codec_name = packed_parts(codec.name.encode())
        self.head = packed_parts(*command)
        self.length = len(command) + 4

    def pack(self, number: bytes, count: int, parts: Sequence[bytes]) -> bytes:
        """Return the command that adds so many records under a number.

        :param parts: each record with its codec, packed; if it is one only, in any pieces
        """
        head = b"*%d\r\n%s" % (self.length + 2 * count, self.head)
        tail = b"$1\r\nn\r\n$%d\r\n%s\r\n" % (len(number), number)
        if count == 1:
            return b"".join((head, *parts, tail, PACKED_MARK))
        return b"".join((head, parts[0], tail, _MARK_OF_SEVERAL, *parts[1:]))


class Inboxes:
    """Remembers them.

    :param epoch: what no run of this peer, or of another one, had before
    :ivar by_peer: the inboxes of those that were written to, or asked for, last
    """

    def __init__(self, keys: Keys, epoch: bytes) -> None:
        self._keys = keys
        self._epoch = epoch
        self._epochs = count(1)
        self.by_peer: OrderedDict[str, Inbox] = OrderedDict()

    def of(self, peer: str) -> Inbox:
        """Return the inbox of a peer."""
        inbox = self.by_peer.get(peer)
        if inbox is None:
            if len(self.by_peer) >= _PEERS:
                self.by_peer.popitem(last=False)
            inbox = self.by_peer[peer] = self.open(self._keys.inbox(peer))
        return inbox

    def open(self, key: bytes) -> Inbox:
        """Return an inbox in which nothing is numbered yet."""
        # One that was forgotten and is opened again counts from 1, hence an epoch of its own.
        return Inbox(key, b"%s+%x" % (self._epoch, next(self._epochs)))

    def begin_anew(self) -> None:
        """Have each command's beginning made anew: the server may want another one."""
        for inbox in self.by_peer.values():
            inbox.codec = None

    def forget(self, peer: str) -> None:
        """Count anew for a peer."""
        self.by_peer.pop(peer, None)
