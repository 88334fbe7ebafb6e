"""The way of kkrpc 2: compact messages; what was dropped is released late, and once for all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import final

from msgspec import UNSET

from ..records import CallbackCall, CallbackRelease, Record, Reply, Request
from ..typescript import _releases
from ..typescript._references import LateReleases, answer_use, ids_in, said_at_once
from ..typescript.compact import CompactCodec, answer_unknown
from ._base import DialectName, Spoken

_codec = CompactCodec()
# Uses of references whose path is remembered until they are answered.
_MAX_USES = 10_000


@final
class CompactSpoken(Spoken):
    """Speaks to peers of kkrpc 2.

    :param now: tells the time in seconds, on the clock of `due`
    :ivar releases: callbacks that were dropped here
    :ivar references: objects that were dropped here
    """

    dialect: DialectName = "kkrpc-2"

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.releases: _releases.Releases = _releases.Releases()
        self.references: LateReleases = LateReleases()
        # Uses of references that wait for their replies.
        self._uses: OrderedDict[str, CallbackCall] = OrderedDict()
        self.pause: float = _releases.DELAY / 10

    @property
    def busy(self) -> bool:
        return self.releases.pending or self.references.pending

    def encode(self, record: Record, recipient: str | None) -> bytes | None:
        record = said_at_once(record)
        if isinstance(record, Reply) and record.id in self._uses:
            record = answer_use(self._uses.pop(record.id), record)
        elif isinstance(record, CallbackRelease) and record.times is not UNSET:
            self.references.released(record.ids, recipient, self._now())
            return None
        elif isinstance(record, CallbackRelease) and record.all is not True:
            self.releases.released(record.ids, recipient, self._now())
            return None
        return _codec.encode(record) or None

    def decode(self, message: bytes) -> Record:
        record = _codec.decode(message)
        if self.references.pending:
            self.references.received(ids_in(record))
        if isinstance(record, CallbackCall) and record.r is not UNSET:
            self._uses[record.r] = record
            if len(self._uses) > _MAX_USES:
                self._uses.popitem(last=False)
        return record

    def begin(self, request: Request, sender: str | None) -> None:
        self.releases.received(request, sender)

    def answer(self, request: Request, reply: Reply) -> Reply:
        return answer_unknown(request, reply)

    def due(self, now: float) -> Iterable[tuple[Record, str | None]]:
        due = self.releases.due(now)
        told = self.references.due(now, _releases.DELAY)
        return [*((CallbackRelease(ids, all=True), peer) for peer, ids in due.items()), *told]
