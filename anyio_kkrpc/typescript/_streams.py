"""Streams of kkrpc 0.x: how a wire without flow control meets a core that has it. No I/O.

Where this side has the source, pulls are made up, few enough at a time that a reader's queue of
1,000 messages isn't flooded. Where this side reads, items wait here until they are pulled; if too
many come, the stream is cancelled and fails after those that it has.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from msgspec import UNSET, Struct, field

from .._protocol._values import is_envelope
from ..records import (
    Bye,
    CallbackProgress,
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)

# Calls whose answers are remembered to be ours; the oldest are forgotten first.
_MAX_ASKED = 10_000
# Streams that this side reads or writes at a time, of all peers.
_MAX_STREAMS = 10_000
# Seconds between two rounds of pulls.
TICK = 0.02
# What kkrpc 0.x has no word for.
_UNSAID = (Cancel, CallbackProgress, CallbackRelease, Bye)

Deliver = Callable[[Record, "str | None"], object]


class _Source(Struct):
    """A stream that a kkrpc 0.x peer reads from here."""

    sid: str
    request_id: str
    reader: str | None
    granted: int = 0
    sent: int = 0


class _Inflow(Struct):
    """A stream of a kkrpc 0.x peer that is read here."""

    waiting: deque[tuple[StreamReply, int]] = field(default_factory=deque)
    credit: int = 0
    ended: bool = False


class ClassicStreams:
    """Turns the core's stream records into what kkrpc 0.x has, and back.

    :param deliver: hands a record, as from a peer, to the core
    :param items_per_tick: items that all sources together may send in `TICK` seconds
    :param max_items: items of one stream that wait here to be read
    :param max_bytes: size of the items of all streams that wait, in bytes as received
    :ivar to_send: cancels that are to be sent, with their recipients
    """

    def __init__(
        self, deliver: Deliver, *, items_per_tick: int, max_items: int, max_bytes: int
    ) -> None:
        self._deliver = deliver
        self._per_tick = items_per_tick
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._asked: OrderedDict[str, str | None] = OrderedDict()
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._by_request: dict[tuple[str | None, str], _Source] = {}
        self._inflows: dict[tuple[str | None, str], _Inflow] = {}
        self._waiting_bytes = 0
        self.to_send: deque[tuple[Record, str | None]] = deque()

    @property
    def busy(self) -> bool:
        """Whether `tick` must be called."""
        return bool(self._sources)

    # What the core sends

    def outgoing(self, record: Record, recipient: str | None) -> Record | None:
        """Return what goes on the wire for a record of the core, if anything."""
        if isinstance(record, Request):
            self._asked[record.id] = recipient
            if len(self._asked) > _MAX_ASKED:
                self._asked.popitem(last=False)
            return record
        if isinstance(record, Reply):
            self._note_source(record, recipient)
            return record
        if isinstance(record, StreamReply):
            return self._item_out(record)
        if isinstance(record, StreamRequest):
            return self._request_out(record, recipient)
        return None if isinstance(record, _UNSAID) else record

    def _note_source(self, record: Reply, recipient: str | None) -> None:
        sid = _stream_id(record.v)
        if sid is not None:
            source = _Source(sid, record.id, recipient)
            self._sources[sid] = self._by_request[recipient, record.id] = source

    def _item_out(self, record: StreamReply) -> StreamReply | None:
        source = self._sources.get(record.sid)
        if source is None:
            return None  # it was cancelled, which nothing answers
        if record.e is not UNSET or record.d is True:
            self._drop(source)
        source.sent += 1
        return StreamReply(record.id, source.request_id, d=record.d, v=record.v, e=record.e)

    def _drop(self, source: _Source) -> None:
        self._sources.pop(source.sid, None)
        self._by_request.pop((source.reader, source.request_id), None)

    def _request_out(self, record: StreamRequest, producer: str | None) -> StreamRequest | None:
        key = (producer, record.sid)
        inflow = self._inflows.get(key)
        if inflow is None or (record.op == "throw" and record.e is UNSET):
            return record if record.op != "pull" else None
        if record.op == "pull":
            inflow.credit += record.n if record.n.__class__ is int else 1
            self._pass_on(key, inflow)
            return None
        del self._inflows[key]
        self._waiting_bytes -= sum(size for _, size in inflow.waiting)
        # kkrpc 0.x ends its source, and tells nothing of that.
        answer = StreamReply(record.id, record.sid, d=True, v=record.v)
        if record.e is not UNSET:
            answer = StreamReply(record.id, record.sid, e=record.e)
        self._deliver(answer, producer)
        return None if inflow.ended else record

    def was_addressed(self, record: Record) -> bool:
        """Whether a request of this side is meant for one peer, which the wire doesn't tell."""
        return isinstance(record, Request) and self._asked.get(record.id) is not None

    # What comes in

    def incoming(self, record: Record, sender: str | None, size: int) -> Record | None:
        """Return what the core is to get for a record from the wire, if anything."""
        if isinstance(record, Reply):
            return self._reply_in(record, sender)
        if isinstance(record, StreamReply):
            self._item_in(record, sender, size)
            return None
        if isinstance(record, StreamRequest):
            source = self._by_request.get((sender, record.sid))
            if source is None:
                return None  # somebody else's
            self._drop(source)
            return StreamRequest(record.id, source.sid, "return")
        return record

    def _reply_in(self, record: Reply, sender: str | None) -> Reply | None:
        if record.id not in self._asked:
            return None  # somebody else's
        sid = _stream_id(record.v)
        if sid is not None and len(self._inflows) < _MAX_STREAMS:
            self._inflows[sender, sid] = _Inflow()
        return record

    def _item_in(self, record: StreamReply, sender: str | None, size: int) -> None:
        key = (sender, record.sid)
        inflow = self._inflows.get(key)
        if inflow is None or inflow.ended:
            return
        is_item = record.d is not True and record.e is UNSET
        if is_item and (
            len(inflow.waiting) >= self._max_items or self._waiting_bytes + size > self._max_bytes
        ):
            self.to_send.append((StreamRequest(record.id, record.sid, "throw"), sender))
            message = (
                f"the stream was cancelled: {len(inflow.waiting)} of its items waited to be read, "
                "and kkrpc 0.x can't be slowed down"
            )
            error = {"n": "OverloadedError", "m": message, "rpc_error": "overloaded"}
            record, size, is_item = StreamReply(record.id, record.sid, e=error), 0, False
        inflow.ended = not is_item
        inflow.waiting.append((record, size))
        self._waiting_bytes += size
        self._pass_on(key, inflow)

    def _pass_on(self, key: tuple[str | None, str], inflow: _Inflow) -> None:
        while inflow.waiting:
            record, size = inflow.waiting[0]
            is_item = record.d is not True and record.e is UNSET
            if is_item:
                if not inflow.credit:
                    return
                inflow.credit -= 1
            else:
                self._inflows.pop(key, None)
            inflow.waiting.popleft()
            self._waiting_bytes -= size
            self._deliver(record, key[0])

    # Pacing

    def tick(self) -> None:
        """Let the sources send, all together as much as one tick allows."""
        left = self._per_tick
        for sid in list(self._sources)[: self._per_tick]:
            source = self._sources.get(sid)
            if source is None:
                continue
            self._sources.move_to_end(sid)
            share = max(self._per_tick // max(len(self._sources), 1), 1)
            wanted = min(share - (source.granted - source.sent), left)
            if wanted > 0:
                left -= wanted
                source.granted += wanted
                pull = StreamRequest(f"{sid}-{source.granted}", sid, "pull", wanted)
                self._deliver(pull, source.reader)


def _stream_id(value: Any) -> str | None:
    return value["id"] if is_envelope(value) else None
