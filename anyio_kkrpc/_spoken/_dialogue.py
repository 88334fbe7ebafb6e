"""How the one peer of a link is spoken to: as this side begins, until it is spoken to otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from .._exceptions import ProtocolError
from ..abc import Codec
from ..records import Record, Request
from ..typescript._streams import Deliver
from ._base import DialectName, Spoken
from ._kkrpc0 import ClassicSpoken
from ._kkrpc2 import CompactSpoken
from ._native import NativeSpoken

# Items that all streams to a kkrpc 0.x peer may send in 20 ms. Over a link of two the other side
# can slow us down, so this is only so that one stream doesn't hold up everything else.
_ITEMS_PER_TICK = 1000


@final
class Dialogue:
    """Speaks to the one peer of a link.

    A peer of kkrpc 0.x that begins is recognized by its messages, where the codec is JSON.

    :param dialect: how this side begins
    :param codec: of what it says in the native dialect
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param deliver: hands a record to the core as if the peer had sent it
    :param now: tells the time in seconds, on the clock of `Spoken.due`
    :param max_items: items of one stream of kkrpc 0.x that wait here to be read
    :param max_bytes: their size together
    :ivar spoken: how the peer is spoken to now
    :raises ValueError: if the dialect has another codec
    """

    def __init__(
        self,
        dialect: DialectName,
        codec: Codec,
        *,
        superjson: bool,
        deliver: Deliver,
        now: Callable[[], float],
        max_items: int,
        max_bytes: int,
    ) -> None:
        if dialect != "native" and codec.name != "json":
            raise ValueError(f"codec: peers of dialect {dialect!r} have JSON only")
        plain, rich = ClassicSpoken.pair(
            deliver, items_per_tick=_ITEMS_PER_TICK, max_items=max_items, max_bytes=max_bytes
        )
        self._classic = rich if superjson else plain
        self._recognizes = codec.name == "json"
        self.spoken: Spoken = self._classic
        if dialect == "native":
            self.spoken = NativeSpoken(codec)
        elif dialect == "kkrpc-2":
            self.spoken = CompactSpoken(now)

    def decode(self, message: bytes) -> Record:
        """Return what a message says; of a request, note in which way it was said.

        :raises ProtocolError: if it isn't valid
        """
        if not isinstance(self.spoken, ClassicSpoken):
            try:
                return self.spoken.decode(message)
            except ProtocolError:
                if not self._recognizes or b'"type"' not in message:
                    raise
        record = self._classic.decode(message)
        if isinstance(record, Request):
            self.spoken = self._classic = self._classic.as_in(message)
        return record
