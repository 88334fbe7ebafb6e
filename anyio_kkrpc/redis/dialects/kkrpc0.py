"""kkrpc 0.x: fields ``data``, one message and a newline, and ``sessionId``, the sender's id.

``data`` may also be ``__DESTROY__``, without a newline: the destroy signal. ``sessionId`` may be
absent. An entry without the newline would swallow the next one at a TypeScript peer; here it is
read like others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from ..._exceptions import ProtocolError
from ..._spoken._kkrpc0 import ClassicSpoken
from ...records import Bye, Record, Reply, Request
from ...typescript._streams import ClassicStreams
from ...typescript.classic import DESTROY
from ._base import Dialect, Entry, SharedPeer
from .native import peer_id

__all__ = ("ClassicDialect",)

# Items that all sources together send in 20 ms. A TypeScript peer drops the oldest when more than
# 1,000 messages come between two of its reads.
_ITEMS_PER_TICK = 50


@final
class ClassicDialect(Dialect):
    """Entries of kkrpc 0.x in one serialization; see `ClassicDialect.pair`."""

    shared = True

    def __init__(self, session_id: str, spoken: ClassicSpoken, *, skips_own: bool) -> None:
        self._session_id = session_id.encode()
        self._skips_own = skips_own
        self._spoken = spoken
        self.streams: ClassicStreams = spoken.streams
        self._other: ClassicDialect = self

    @classmethod
    def pair(
        cls,
        session_id: str,
        deliver: Callable[[Record, str | None], object],
        *,
        max_items: int,
        max_bytes: int,
        skips_own: bool,
    ) -> tuple[ClassicDialect, ClassicDialect]:
        """Return the dialect in JSON and in superjson; either reads both.

        :param deliver: hands a record to the core as if the peer had sent it
        :param max_items: items of one stream that wait here to be read
        :param max_bytes: their size together
        :param skips_own: whether this peer has no interest in what it wrote itself
        """
        both = ClassicSpoken.pair(
            deliver, items_per_tick=_ITEMS_PER_TICK, max_items=max_items, max_bytes=max_bytes
        )
        plain, rich = (cls(session_id, spoken, skips_own=skips_own) for spoken in both)
        plain._other, rich._other = rich, plain
        return plain, rich

    def encode(self, record: Record, recipient: str | None) -> tuple[bytes, ...] | None:
        if isinstance(record, Bye):
            return (b"data", DESTROY, b"sessionId", self._session_id)
        data = self._spoken.encode(record, recipient)
        return None if data is None else (b"data", data + b"\n", b"sessionId", self._session_id)

    def decode(self, fields: list[bytes]) -> Entry | None:
        members = dict(zip(fields[::2], fields[1::2], strict=True))
        data = members[b"data"]
        session_id = members.get(b"sessionId")
        if self._skips_own and session_id == self._session_id:
            return None
        sender = "" if not session_id else peer_id(session_id)
        if data == DESTROY:
            return Entry(Bye(), SharedPeer.of(sender, self), len(data))
        line = data.strip()
        if b"\n" in line:
            raise ProtocolError("an entry of more than one line")
        record = self._spoken.decode(line)
        dialect = self if self._spoken.as_in(line) is self._spoken else self._other
        return Entry(record, SharedPeer.of(sender, dialect), len(data))

    def take(self, record: Record, sender: str, size: int) -> Record | None:
        return self._spoken.take(record, sender, size)

    def answer(self, request: Request, reply: Reply) -> Reply:
        return self._spoken.answer(request, reply)
