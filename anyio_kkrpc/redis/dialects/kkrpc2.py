"""kkrpc 2: a field ``data``, the JSON envelope ``kkrpc.bus.v1`` around a message.

The envelope has ``protocol``, ``transportId``, ``from``, ``to`` (only if it is for one peer),
``correlationId`` (the message's id, absent for ``cbr``), ``sentAt`` (milliseconds) and ``message``.
Members that are optional must be absent, not null. A newline follows: without it, the entry would
destroy the next message at a kkrpc 0.x peer on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from ..._exceptions import ProtocolError
from ..._protocol._records import Id, Number
from ..._runtime._log import quoted
from ..._spoken._kkrpc2 import CompactSpoken
from ...records import CallbackCall, CallbackRelease, Record, Reply, Request
from ...typescript._references import said_at_once
from ._base import Dialect, Entry, SharedPeer
from .native import peer_id

__all__ = ("CompactDialect",)

MARK = b'"kkrpc.bus.v1"'
_NOTHING_EXPOSED = "No API exposed"


class BusEnvelope(Struct):
    """What kkrpc 2 writes around a message; other members are ignored."""

    protocol: Literal["kkrpc.bus.v1"]
    transport_id: str = field(name="transportId")
    sender: str = field(name="from")
    message: Raw
    to: Id | UnsetType = UNSET
    correlation_id: str | UnsetType = field(default=UNSET, name="correlationId")
    sent_at: Number | UnsetType = field(default=UNSET, name="sentAt")
    sequence: Number | UnsetType = UNSET


_envelope_decoder = msgspec.json.Decoder(BusEnvelope)


@final
class CompactDialect(Dialect):
    """Entries of kkrpc 2.

    :param session_id: this peer's id
    :param remote_peer_id: the peer that requests are for, unless they are addressed; any if not
        given
    :param skips_own: whether this peer has no interest in what it wrote itself
    :param now: tells the time in seconds, on the clock of ``due``
    :param time_of_day: tells the time in seconds since the epoch, for ``sentAt``
    :ivar due: returns what is to be said now of what was dropped here, and to whom
    """

    shared = True
    answers_unknown: bool = True
    stale_after: float = 60.0  # twice kkrpc 2's default timeout

    def __init__(
        self,
        session_id: str,
        remote_peer_id: str | None,
        *,
        skips_own: bool,
        now: Callable[[], float],
        time_of_day: Callable[[], float],
    ) -> None:
        self._session_id = session_id
        self._skips_own = skips_own
        self._remote_peer_id = remote_peer_id
        self._time_of_day = time_of_day
        self._spoken = CompactSpoken(now)
        self.due: Callable[[float], Iterable[tuple[Record, str | None]]] = self._spoken.due

    def begin(self, request: Request, sender: str) -> None:
        self._spoken.begin(request, sender)

    def encode(self, record: Record, recipient: str | None) -> tuple[bytes, ...] | None:
        record = said_at_once(record)
        message = self._spoken.encode(record, recipient)
        if message is None:
            return None
        if recipient is None:
            recipient = self._remote_peer_id
        envelope: dict[str, Any] = {
            "protocol": "kkrpc.bus.v1",
            "transportId": "redis-streams",
            "from": self._session_id,
        }
        if recipient:
            envelope["to"] = str(recipient)
        if not isinstance(record, CallbackRelease):
            envelope["correlationId"] = _correlation(record)
        envelope["sentAt"] = int(self._time_of_day() * 1000)
        envelope["message"] = Raw(message)
        return (b"data", msgspec.json.encode(envelope) + b"\n")

    def decode(self, fields: list[bytes]) -> Entry | None:
        data = dict(zip(fields[::2], fields[1::2], strict=True))[b"data"]
        try:
            envelope = _envelope_decoder.decode(data)
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            raise ProtocolError(f"not a valid message: {quoted(exc, 200)}") from exc
        if self._skips_own and envelope.sender == self._session_id:
            return None
        record = self._spoken.decode(bytes(envelope.message))
        if isinstance(record, Reply) and self._is_of_nobody(record):
            return None
        sender = SharedPeer.of(peer_id(envelope.sender.encode()), self)
        if envelope.to is UNSET or not envelope.to:
            return Entry(record, sender, len(data))
        return Entry(record, sender, len(data), recipient=envelope.to, fields=fields)

    def _is_of_nobody(self, reply: Reply) -> bool:
        """Whether a peer that exposes nothing answered what was for anybody who does."""
        if reply.e is UNSET or self._remote_peer_id is not None:
            return False
        return bool(reply.e.get("m") == _NOTHING_EXPOSED)

    def answer(self, request: Request, reply: Reply) -> Reply:
        return self._spoken.answer(request, reply)


def _correlation(record: Record) -> Any:
    """Return the id of the message that a record becomes."""
    if isinstance(record, CallbackCall) and record.p is not UNSET:
        return record.r
    return record.id  # type: ignore[union-attr]
