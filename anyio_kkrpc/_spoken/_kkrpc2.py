"""The way of kkrpc 2: compact messages; callbacks are released late, and once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import final

from ..records import CallbackRelease, Record, Reply, Request
from ..typescript import _releases
from ..typescript._plain import refuse_references
from ..typescript.compact import CompactCodec, answer_unknown
from ._base import DialectName, Spoken

_codec = CompactCodec()


@final
class CompactSpoken(Spoken):
    """Speaks to peers of kkrpc 2.

    :param now: tells the time in seconds, on the clock of `due`
    :ivar releases: callbacks that were dropped here
    """

    dialect: DialectName = "kkrpc-2"

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.releases: _releases.Releases = _releases.Releases()
        self.pause: float = _releases.DELAY / 10

    @property
    def busy(self) -> bool:
        return self.releases.pending

    def encode(self, record: Record, recipient: str | None) -> bytes | None:
        refuse_references(record, "peers of kkrpc 2")
        if isinstance(record, CallbackRelease) and record.all is not True:
            self.releases.released(record.ids, recipient, self._now())
            return None
        return _codec.encode(record) or None

    def decode(self, message: bytes) -> Record:
        return _codec.decode(message)

    def begin(self, request: Request, sender: str | None) -> None:
        self.releases.received(request, sender)

    def answer(self, request: Request, reply: Reply) -> Reply:
        return answer_unknown(request, reply)

    def due(self, now: float) -> Iterable[tuple[Record, str | None]]:
        due = self.releases.due(now)
        return [(CallbackRelease(ids, all=True), peer) for peer, ids in due.items()]
