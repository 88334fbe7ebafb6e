"""The way of kkrpc 0.x: lines in JSON or superjson; streams have no flow control there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from ..records import Record, Reply, Request
from ..typescript._plain import refuse_references
from ..typescript._streams import TICK, ClassicStreams, Deliver
from ..typescript.classic import SUPERJSON, ClassicCodec, answer_unknown
from ._base import DialectName, Spoken


@final
class ClassicSpoken(Spoken):
    """Speaks to peers of kkrpc 0.x in one serialization; see `pair`.

    :ivar streams: those that such peers read or write
    """

    dialect: DialectName = "kkrpc-0"
    pause = TICK

    def __init__(self, streams: ClassicStreams, codec: ClassicCodec) -> None:
        self.streams: ClassicStreams = streams
        self._codec = codec
        self._other: ClassicSpoken = self

    @classmethod
    def pair(
        cls, deliver: Deliver, *, items_per_tick: int, max_items: int, max_bytes: int
    ) -> tuple[ClassicSpoken, ClassicSpoken]:
        """Return how to speak in JSON and in superjson; either reads both.

        :param deliver: hands a record to the core as if the peer had sent it
        :param items_per_tick: items that all sources together send in 20 ms
        :param max_items: items of one stream that wait here to be read
        :param max_bytes: their size together
        """
        streams = ClassicStreams(
            deliver, items_per_tick=items_per_tick, max_items=max_items, max_bytes=max_bytes
        )
        plain = cls(streams, ClassicCodec(superjson=False))
        rich = cls(streams, ClassicCodec(superjson=True))
        plain._other, rich._other = rich, plain
        return plain, rich

    def as_in(self, message: bytes) -> ClassicSpoken:
        """Return the one that writes as this message was written."""
        writes_superjson = message.startswith(SUPERJSON)
        return self if self._codec.superjson is writes_superjson else self._other

    @property
    def busy(self) -> bool:
        return self.streams.busy

    def encode(self, record: Record, recipient: str | None) -> bytes | None:
        refuse_references(record, "peers of kkrpc 0.x")
        if isinstance(record, Request):
            message = self._codec.encode(record)  # first: what can't be sent isn't waited for
            self.streams.outgoing(record, recipient)
            return message or None
        outgoing = self.streams.outgoing(record, recipient)
        return None if outgoing is None else self._codec.encode(outgoing) or None

    def decode(self, message: bytes) -> Record:
        return self._codec.decode(message)

    def take(self, record: Record, sender: str | None, size: int) -> Record | None:
        return self.streams.incoming(record, sender, size)

    def answer(self, request: Request, reply: Reply) -> Reply:
        return answer_unknown(request, reply)

    def tick(self) -> None:
        self.streams.tick()

    def due(self, now: float) -> Iterable[tuple[Record, str | None]]:
        to_send = self.streams.to_send
        while to_send:
            yield to_send.popleft()
