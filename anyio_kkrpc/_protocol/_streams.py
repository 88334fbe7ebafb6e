"""The two ends of a stream with credits: who may send how much, in what order, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import UNSET, UnsetType

from ._budget import BUDGET, WEIGHTLESS, weight_of
from ._records import MAX_NUMBER, StreamReply, StreamRequest
from ._state import (
    CONSUMER,
    PRODUCER,
    ConsumerInput,
    ConsumerState,
    ProducerInput,
    ProducerState,
    advance,
)
from ._values import is_envelope

# Items that the source may be ahead, to begin with and at most; a pull asks for half as many.
FIRST_CREDIT = 32
MAX_WINDOW = 256
# Errors raised in a source that nobody waits for any more, of which the answers are told apart.
MOST_LATE = 16
# Items for each time that the reader waits, from which on they come in bursts.
_BURST = 4
# A credit is a permission, not a buffer; the bound keeps a hostile number from growing without end.
MAX_CREDIT = 1 << 31

# Found more quickly than in their classes. An item changes neither of these states.
_OPEN, _READY = ConsumerState.OPEN, ProducerState.READY
_HALF = BUDGET // 2
_READABLE = (ConsumerState.IDLE, ConsumerState.OPEN)
_FINISHED = (ConsumerState.ENDED, ConsumerState.FAILED)


class Consumer:
    """The reading end of a stream.

    It grants items and what they may weigh, both ahead of what its reader has taken. A source that
    doesn't say what its items weigh heeds the items only: it is granted fewer of them, as many as
    may weigh that.

    :ivar id: id of the stream
    :ivar producer: id of the peer that has the source
    :ivar driver: the driver's object for it
    :ivar asked: id of the ``throw`` or ``return`` whose answer somebody waits for
    :ivar doubted: whether what was sent to the source, or came from it, may be lost
    """

    __slots__ = (
        "_delivered",
        "_granted",
        "_heaviest",
        "_heavy",
        "_judged",
        "_late",
        "_new_id",
        "_received",
        "_room",
        "_spare",
        "_value",
        "_waits",
        "_weighs",
        "_window",
        "asked",
        "call_id",
        "doubted",
        "driver",
        "id",
        "producer",
        "state",
    )

    def __init__(
        self, stream_id: str, producer: str | None, call_id: str, new_id: Callable[[], str]
    ) -> None:
        self.id: str = stream_id
        self.producer: str | None = producer
        self.call_id: str = call_id
        self.driver: Any = None
        self.asked: str | None = None
        self._value: Any = UNSET
        self.state: ConsumerState = ConsumerState.IDLE
        self._new_id = new_id
        self._window = FIRST_CREDIT
        self._judged = 0
        self._waits = 0
        self._granted = 0
        self._received = 0
        self._delivered = 0
        # What may be sent beyond what was delivered, by weight.
        self._room = 0
        # Index and weight of those that aren't small and wait for the reader.
        self._heavy: deque[tuple[int, int]] = deque()
        # Whether what was sent to the source, or came from it, may be lost.
        self.doubted: bool = False
        # Items that were granted, and taken for lost.
        self._spare = 0
        # Whether this side has to weigh them, and what the heaviest of late was then.
        self._weighs = False
        self._heaviest = 0
        # Errors that were raised in the source, whose answers nobody waits for any more.
        self._late: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether items may still come."""
        return self.state in _READABLE

    @property
    def received(self) -> int:
        """How many items came."""
        return self._received

    @property
    def finished(self) -> bool:
        """Whether nothing will come any more, not even the answer to having left."""
        return self.state in _FINISHED

    def wait(self) -> StreamRequest | None:
        """Note that the reader waits for an item; return the first pull if it is the first time."""
        self._waits += 1
        return self._pull(FIRST_CREDIT) if self.state is ConsumerState.IDLE else None

    def delivered(self) -> StreamRequest | None:
        """Note that an item went to the user; return the pull that this calls for, if any."""
        small = not self._heavy or self._heavy[0][0] != self._delivered
        if not small:
            self._room -= self._heavy.popleft()[1]
        self._delivered = delivered = self._delivered + 1
        ahead, window = self._granted - delivered, self._window
        if self._heaviest:
            window = max(min(window, BUDGET // self._heaviest), 1)
        if ahead > window // 2 and (ahead >= window or self._room > _HALF):
            return None
        if self.state is not _OPEN:
            return None
        if window == self._window < MAX_WINDOW:
            self._widen(small)
            window = self._window
        return self._pull(window - ahead)

    def _widen(self, small: bool) -> None:
        """Let the source run further ahead if items come in bursts, for which the reader waits.

        It doesn't where items are large, so that the bound on memory stays of use.
        """
        taken = self._delivered - self._judged
        if taken >= self._window:
            if 0 < self._waits * _BURST <= taken and small:
                self._window *= 2
            self._judged, self._waits = self._delivered, 0

    def leave(self, value: Any = UNSET, *, ask: bool = False) -> StreamRequest | None:
        """End it early; return what tells the producer, ``None`` if it has ended already.

        :param value: goes along
        :param ask: whether somebody waits for the answer
        """
        if not self.readable:
            return None
        self.state = advance(CONSUMER, self.state, ConsumerInput.LEAVE)
        self._value = value
        return self._return(ask=ask)

    def _return(self, *, ask: bool) -> StreamRequest:
        record = StreamRequest(id=self._new_id(), sid=self.id, op="return", v=self._value)
        self.asked = record.id if ask else None
        return record

    def throw(self, error: dict[str, Any]) -> StreamRequest:
        """Return what raises an error in the source; somebody waits for the answer.

        :raises ProtocolError: if it can't be read any more
        """
        self.state = advance(CONSUMER, self.state, ConsumerInput.ANSWER)
        record = StreamRequest(id=self._new_id(), sid=self.id, op="throw", e=error)
        if self.asked is not None:
            self._late = (*self._late, self.asked)[-MOST_LATE:]
        self.asked = record.id
        return record

    def ask_again(self) -> StreamRequest | None:
        """Note that what was sent, or was to come, may be lost; return what makes the source go on.

        What was allowed before is taken for lost, and counts again as far as it is made use of.
        """
        if self.state is ConsumerState.IDLE or self.finished:
            return None
        self.doubted = True
        if self.state is ConsumerState.LEAVING:
            return self._return(ask=self.asked is not None)
        self.state = advance(CONSUMER, self.state, ConsumerInput.PULL)
        window = self._window
        if self._heaviest:
            window = max(min(window, BUDGET // self._heaviest), 1)
        self._spare += max(self._granted - self._received, 0)
        self._granted, self._room = self._received + window, BUDGET
        return StreamRequest(id=self._new_id(), sid=self.id, op="pull", n=window, b=BUDGET)

    def lose(self) -> None:
        """Note that the link to the producer is gone."""
        if not self.finished:
            self.state = advance(CONSUMER, self.state, ConsumerInput.LOSE)

    def _is_late(self, record: StreamReply) -> bool:
        """Whether that is the item that an error was answered with, and nobody waits for."""
        if record.id not in self._late:
            return False
        self._late = tuple(one for one in self._late if one != record.id)
        return record.e is UNSET and record.d is not True

    def take(self, record: StreamReply) -> bool:
        """Take a record if it is the next item of a stream of which nothing else is expected, as
        most are. If not, return false: it is for `receive`.
        """
        index = self._received
        if (
            record.i != index
            or record.d is not False
            or self.state is not _OPEN
            or index == self._granted
            or self.asked is not None
            or self._late
            or record.e is not UNSET
        ):
            return False
        self._add(record)
        return True

    def _add(self, record: StreamReply) -> None:
        """Count an item that may be read."""
        index, weight = self._received, record.w
        if weight is UNSET:
            if self._weighs or not index:
                self._weigh(record.v)
        elif weight:
            self._heavy.append((index, weight))
        self._received = index + 1

    def receive(self, record: StreamReply) -> ConsumerInput | None:
        """Take a record; return which input it was, ``None`` if it is to be ignored.

        :raises ProtocolError: if it isn't legal now
        """
        if self.asked is not None and record.id == self.asked:
            return self._receive_answer(record)
        if self._late and self._is_late(record):
            return None
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
            if self.asked is None or step is ConsumerInput.ITEM:
                return None
            self.asked = None  # it ended by itself before it heard of that
            return ConsumerInput.ANSWER
        if step is ConsumerInput.ITEM:
            if self._received == self._granted:
                if not self._spare:
                    self.state = advance(CONSUMER, self.state, ConsumerInput.LOSE)
                    return ConsumerInput.LOSE
                self._spare -= 1
                self._granted += 1
            self._add(record)
        return step

    def _receive_answer(self, record: StreamReply) -> ConsumerInput:
        """Take what the source makes of a ``throw`` or ``return``; an item is beside the others."""
        step = ConsumerInput.ANSWER
        if record.e is not UNSET:
            step = ConsumerInput.ERROR
        elif record.d is True:
            step = ConsumerInput.END
        self.state = advance(CONSUMER, self.state, step)
        self.asked = None
        return ConsumerInput.ANSWER

    def _weigh(self, item: Any) -> None:
        """Weigh an item of a source that doesn't do so, as its first item shows."""
        self._weighs = True
        weight = BUDGET if is_envelope(item) else weight_of(item)
        if weight:
            self._heavy.append((self._received, weight))
        self._heaviest = max(weight, self._heaviest - self._heaviest // FIRST_CREDIT - 1, 0)

    def _pull(self, credit: int) -> StreamRequest:
        self.state = advance(CONSUMER, self.state, ConsumerInput.PULL)
        self._granted += credit
        more = min(BUDGET - self._room, MAX_NUMBER)
        self._room += more
        return StreamRequest(id=self._new_id(), sid=self.id, op="pull", n=credit, b=more)


class Producer:
    """The end of a stream that has the source.

    It sends an item as long as it has credit and what it has sent weighs less than it was granted,
    so that one item may weigh more than that.

    :ivar id: id of the stream
    :ivar consumer: id of the peer that reads it; ``None`` until the first pull if not known before
    :ivar source: the driver's object for it
    :ivar credit: items that may be sent now, as far as their weight allows
    :ivar last: the record of its end, or of the error that it ended with
    :ivar room: what they may weigh, ``None`` if their reader doesn't bound it
    :ivar sent: items that were sent
    :ivar shared: the peers that had it before, if it is an argument of a call that is still open
        and that the workers of a group run one after the other; otherwise ``None``
    """

    __slots__ = (
        "_new_id",
        "consumer",
        "credit",
        "driver",
        "id",
        "last",
        "room",
        "sent",
        "shared",
        "source",
        "state",
    )

    def __init__(
        self, stream_id: str, consumer: str | None, source: Any, new_id: Callable[[], str]
    ) -> None:
        self.id: str = stream_id
        self.consumer: str | None = consumer
        self.source: Any = source
        self.driver: Any = None
        self.state: ProducerState = ProducerState.PAUSED
        self.credit: int = 0
        self.room: int | None = None
        self.sent: int = 0
        self.last: StreamReply | None = None
        self.shared: list[str] | None = None
        self._new_id = new_id

    def pull(self, n: Any, weight: int | UnsetType = UNSET) -> None:
        """Take a pull.

        :param n: items; what is missing or odd counts as 1, as in kkrpc
        :param weight: what they may weigh; without it that is no longer bounded
        """
        wanted = 1
        if n.__class__ in (int, float) and n > 1:
            wanted = int(min(n, MAX_CREDIT))
        self.credit = min(self.credit + wanted, MAX_CREDIT)
        self.room = None if weight is UNSET else min((self.room or 0) + weight, MAX_NUMBER)
        paused = self.state is ProducerState.PAUSED
        if not paused or self.room is None or self.room > 0:
            self.state = advance(PRODUCER, self.state, ProducerInput.PULL)

    def hand_over(self, peer: str | None) -> bool:
        """Take it from its consumer, so that another one can read it from its start.

        :param peer: who wants it, ``None`` if nobody yet. Who had it before doesn't get it again.
        :return: whether that can be
        """
        if self.shared is None or self.sent or not self.open or peer in self.shared:
            return False
        if self.consumer is not None:
            self.shared.append(self.consumer)
        self.state = advance(PRODUCER, self.state, ProducerInput.HAND_OVER)
        self.credit, self.room = 0, None
        return True

    def item(self, value: Any, weight: int | None = None) -> StreamReply:
        """Spend a credit on an item; return its record.

        :param weight: what it weighs, where the value doesn't tell
        :raises ProtocolError: without credit, or after the end
        """
        sent, room = self.sent, self.room
        record = StreamReply(self._new_id(), self.id, False, value, UNSET, sent)
        last = self.credit == 1
        if room is not None:
            if weight is None:
                weight = 0 if value.__class__ in WEIGHTLESS else weight_of(value)
            if weight or not sent:
                record.w = weight
                last = last or weight >= room
                room -= weight
        if last or self.state is not _READY:
            step = ProducerInput.LAST_ITEM if last else ProducerInput.ITEM
            self.state = advance(PRODUCER, self.state, step)
        self.room = room
        self.credit -= 1
        self.sent = sent + 1
        return record

    def end(self) -> StreamReply:
        """End it; return the record that says so."""
        self.state = advance(PRODUCER, self.state, ProducerInput.END)
        self.last = StreamReply(id=self._new_id(), sid=self.id, d=True, i=self.sent)
        return self.last

    def fail(self, error: dict[str, Any]) -> StreamReply:
        """End it with an error; return the record that says so."""
        self.state = advance(PRODUCER, self.state, ProducerInput.ERROR)
        self.last = StreamReply(id=self._new_id(), sid=self.id, e=error)
        return self.last

    def leave(self) -> None:
        """Note that the consumer has left; the source must be closed, then that is answered."""
        self.state = advance(PRODUCER, self.state, ProducerInput.LEAVE)

    def lose(self) -> None:
        """Note that the link to the consumer is gone."""
        if self.state is not ProducerState.DONE:
            self.state = advance(PRODUCER, self.state, ProducerInput.LOSE)

    @property
    def paused(self) -> bool:
        """Whether an item has to wait for a pull."""
        return self.state is ProducerState.PAUSED

    @property
    def open(self) -> bool:
        """Whether items or the end may still be sent."""
        return self.state is ProducerState.PAUSED or self.state is ProducerState.READY

    @property
    def done(self) -> bool:
        """Whether its end is on its way to the consumer, or need not be."""
        return self.state is ProducerState.DONE
