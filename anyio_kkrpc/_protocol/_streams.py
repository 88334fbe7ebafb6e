"""The two ends of a stream with credits: who may send how much, in what order, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from ._records import StreamReply, StreamRequest
from ._state import (
    CONSUMER,
    PRODUCER,
    ConsumerInput,
    ConsumerState,
    ProducerInput,
    ProducerState,
    advance,
)

FIRST_CREDIT = 32
NEXT_CREDIT = 16
# A credit is a permission, not a buffer; the bound keeps a hostile number from growing without end.
MAX_CREDIT = 1 << 31

_READABLE = (ConsumerState.IDLE, ConsumerState.OPEN)
_FINISHED = (ConsumerState.ENDED, ConsumerState.FAILED)


class Consumer:
    """The reading end of a stream.

    :ivar id: id of the stream
    :ivar producer: id of the peer that has the source
    :ivar handle: the driver's object for it
    """

    __slots__ = (
        "_delivered",
        "_granted",
        "_new_id",
        "_received",
        "call_id",
        "handle",
        "id",
        "producer",
        "state",
    )

    def __init__(
        self, stream_id: str, producer: str | None, call_id: str, new_id: Callable[[], str]
    ) -> None:
        self.id = stream_id
        self.producer = producer
        self.call_id = call_id
        self.handle: Any = None
        self.state = ConsumerState.IDLE
        self._new_id = new_id
        self._granted = 0
        self._received = 0
        self._delivered = 0

    @property
    def readable(self) -> bool:
        """Whether items may still come."""
        return self.state in _READABLE

    @property
    def finished(self) -> bool:
        """Whether nothing will come any more, not even the answer to having left."""
        return self.state in _FINISHED

    def start(self) -> StreamRequest | None:
        """Return the first pull, which the first wish for an item sends; ``None`` afterwards."""
        return self._pull(FIRST_CREDIT) if self.state is ConsumerState.IDLE else None

    def delivered(self) -> StreamRequest | None:
        """Note that an item went to the user; return the pull that this calls for, if any."""
        self._delivered += 1
        if self._delivered % NEXT_CREDIT or self.state is not ConsumerState.OPEN:
            return None
        return self._pull(NEXT_CREDIT)

    def leave(self) -> StreamRequest | None:
        """End it early; return what tells the producer, ``None`` if it has ended already."""
        if not self.readable:
            return None
        self.state = advance(CONSUMER, self.state, ConsumerInput.LEAVE)
        return StreamRequest(id=self._new_id(), sid=self.id, op="return")

    def lose(self) -> None:
        """Note that the link to the producer is gone."""
        if not self.finished:
            self.state = advance(CONSUMER, self.state, ConsumerInput.LOSE)

    def receive(self, record: StreamReply) -> ConsumerInput | None:
        """Take a record; return which input it was, ``None`` if it is to be ignored.

        :raises ProtocolError: if it isn't legal now
        """
        if record.e is not UNSET:
            step = ConsumerInput.ERROR
        elif record.d is True:
            step = ConsumerInput.END
        else:
            step = ConsumerInput.ITEM
        leaving = self.state is ConsumerState.LEAVING
        if not leaving and record.i is not UNSET and step is not ConsumerInput.ERROR:
            if record.i < self._received:
                return None  # a doubled item
            if record.i > self._received:
                self.state = advance(CONSUMER, self.state, ConsumerInput.LOSE)
                return ConsumerInput.LOSE
        self.state = advance(CONSUMER, self.state, step)
        if leaving:
            return None
        if step is ConsumerInput.ITEM:
            self._received += 1
            if self._received > self._granted:
                self.state = advance(CONSUMER, self.state, ConsumerInput.LOSE)
                return ConsumerInput.LOSE
        return step

    def _pull(self, credit: int) -> StreamRequest:
        self.state = advance(CONSUMER, self.state, ConsumerInput.PULL)
        self._granted += credit
        return StreamRequest(id=self._new_id(), sid=self.id, op="pull", n=credit)


class Producer:
    """The end of a stream that has the source.

    :ivar id: id of the stream
    :ivar consumer: id of the peer that reads it; ``None`` until the first pull if not known before
    :ivar source: the driver's object for it
    :ivar credit: items that may be sent now
    """

    __slots__ = ("_new_id", "_sent", "consumer", "credit", "handle", "id", "source", "state")

    def __init__(
        self, stream_id: str, consumer: str | None, source: Any, new_id: Callable[[], str]
    ) -> None:
        self.id = stream_id
        self.consumer = consumer
        self.source = source
        self.handle: Any = None
        self.state = ProducerState.PAUSED
        self.credit = 0
        self._new_id = new_id
        self._sent = 0

    def pull(self, n: Any) -> None:
        """Take a pull of ``n`` items; a missing or odd number counts as 1, as in kkrpc."""
        self.state = advance(PRODUCER, self.state, ProducerInput.PULL)
        wanted = n if n.__class__ is int and n > 0 else 1
        self.credit = min(self.credit + wanted, MAX_CREDIT)

    def item(self, value: Any) -> StreamReply:
        """Spend a credit on an item; return its record.

        :raises ProtocolError: without credit, or after the end
        """
        step = ProducerInput.LAST_ITEM if self.credit == 1 else ProducerInput.ITEM
        self.state = advance(PRODUCER, self.state, step)
        self.credit -= 1
        record = StreamReply(id=self._new_id(), sid=self.id, d=False, v=value, i=self._sent)
        self._sent += 1
        return record

    def end(self) -> StreamReply:
        """End it; return the record that says so."""
        self.state = advance(PRODUCER, self.state, ProducerInput.END)
        return StreamReply(id=self._new_id(), sid=self.id, d=True, i=self._sent)

    def fail(self, error: dict[str, Any]) -> StreamReply:
        """End it with an error; return the record that says so."""
        self.state = advance(PRODUCER, self.state, ProducerInput.ERROR)
        return StreamReply(id=self._new_id(), sid=self.id, e=error)

    def leave(self) -> None:
        """Note that the consumer has left; the source must be closed, then `left` answers."""
        self.state = advance(PRODUCER, self.state, ProducerInput.LEAVE)

    def lose(self) -> None:
        """Note that the link to the consumer is gone."""
        if self.state is not ProducerState.DONE:
            self.state = advance(PRODUCER, self.state, ProducerInput.LOSE)

    @property
    def open(self) -> bool:
        """Whether items or the end may still be sent."""
        return self.state is ProducerState.PAUSED or self.state is ProducerState.READY

    @property
    def done(self) -> bool:
        """Whether its end is on its way to the consumer, or needs not be."""
        return self.state is ProducerState.DONE
