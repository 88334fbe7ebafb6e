"""The streams of one side: those that it reads, and those whose source it has.

The source of a stream that is an argument may see several readers, since several workers may run
the call: all peers in a broadcast, or the next worker of a group once the one before is gone. It
has one reader at a time, and can be read from its start only as long as nothing of it was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from msgspec import UNSET

from ._dependencies import Dependencies, Role
from ._errors import ProtocolError
from ._events import (
    Answer,
    Event,
    PeerGone,
    StreamAnswered,
    StreamEnded,
    StreamFailed,
    StreamItem,
    StreamLeft,
    StreamPulled,
    StreamsClosed,
    StreamThrown,
)
from ._records import StreamReply, StreamRequest
from ._state import ConsumerInput, ConsumerState
from ._streams import Consumer, Producer
from ._values import STREAM, unpack_result

# Readers that were gone and are remembered; the oldest are forgotten first.
_MAX_GIVEN_UP = 10_000


class Streams:
    """The tables of both kinds.

    :param new_id: makes ids
    :param dependencies: counts the peers at their other ends
    :param late: gets values of items that nobody reads, and who has sent them
    :ivar consumers: streams that this side reads, by the peer that has the source, and their ids
    :ivar producers: streams whose source this side has, by their ids
    :ivar ignored: records that came too late to matter
    """

    def __init__(
        self,
        new_id: Callable[[], str],
        dependencies: Dependencies,
        late: Callable[[Any, str | None], object] = lambda value, sender: None,
    ) -> None:
        self._new_id = new_id
        self._late = late
        self._dependencies = dependencies
        self.consumers: dict[tuple[str | None, str], Consumer] = {}
        self.producers: dict[str, Producer] = {}
        # Those that have ended while the call that they belong to may still run once more.
        self._spent: dict[str, Producer] = {}
        # The readers of streams that were closed since these were gone, should they come back.
        self._given_up: dict[str, str] = {}
        self.ignored = 0

    # Opening and ending

    def produce(self, source: Any, consumer: str | None) -> Producer:
        """Enter a stream whose source this side has.

        :param consumer: the peer that will read it, ``None`` if it isn't known
        """
        producer = Producer(self._new_id(), consumer, source, self._new_id)
        self.producers[producer.id] = producer
        self._dependencies.add(consumer, "reader", producer)
        return producer

    def consume(self, stream_id: str, producer: str | None, call_id: str) -> Consumer:
        """Enter a stream that this side reads.

        :raises ProtocolError: if it is there already
        """
        key = (producer, stream_id)
        if key in self.consumers:
            raise ProtocolError(f"stream {stream_id[:80]!r} was passed twice")
        consumer = self.consumers[key] = Consumer(stream_id, producer, call_id, self._new_id)
        self._dependencies.add(producer, "source", consumer)
        return consumer

    def leave(
        self, consumer: Consumer, value: Any = UNSET, *, ask: bool = False
    ) -> StreamRequest | None:
        """End a stream early at the reading side; return what tells the producer, if any.

        :param value: see `Consumer.leave`, as for ``ask``
        """
        record = consumer.leave(value, ask=ask)
        if record is None:
            self._drop(consumer)
        return record

    def forget(self, producer: Producer) -> None:
        """Drop a stream: its end was sent, or its consumer has left or is gone."""
        if self.producers.pop(producer.id, None) is not None:
            self._dependencies.remove(producer.consumer, "reader", producer)
            if producer.shared is not None:
                self._spent[producer.id] = producer
        producer.lose()

    def _drop(self, consumer: Consumer) -> None:
        if self.consumers.pop((consumer.producer, consumer.id), None) is not None:
            self._dependencies.remove(consumer.producer, "source", consumer)

    def _give(self, producer: Producer, peer: str | None) -> None:
        """Let a peer read a stream from now on."""
        if producer.consumer != peer:
            self._dependencies.add(peer, "reader", producer)
            self._dependencies.remove(producer.consumer, "reader", producer)
            producer.consumer = peer

    # The end of the call that a stream is an argument of

    def take_back(self, producers: Iterable[Producer]) -> StreamsClosed:
        """Note that nobody waits for a call any more: its streams end."""
        closed = StreamsClosed([], [])
        for producer in producers:
            closed.told += self._end_sharing(producer)
            if producer.open:
                closed.producers.append(producer)
                self.forget(producer)
        return closed

    def finish(
        self, producers: Iterable[Producer], worker: str | None, *, failed: bool
    ) -> StreamsClosed:
        """Note that a worker of a group has answered a call: the others' part in it is over.

        It may read on what it has begun to read. Whatever else is open ends.
        """
        closed = StreamsClosed([], [])
        for producer in producers:
            closed.told += self._end_sharing(producer)
            if not producer.open or producer.consumer == worker:
                continue
            if producer.consumer is None and not failed:
                self._give(producer, worker)
                continue
            if producer.consumer is not None:
                closed.told.append(self._tell(producer, producer.consumer))
            closed.producers.append(producer)
            self.forget(producer)
        return closed

    def _end_sharing(self, producer: Producer) -> list[Answer]:
        former = producer.shared or ()
        producer.shared = None
        self._spent.pop(producer.id, None)
        return [self._tell(producer, peer) for peer in former if peer != producer.consumer]

    def _tell(self, producer: Producer, peer: str) -> Answer:
        why = "the call that the stream is for was answered by another worker, or is over"
        record = StreamReply(id=self._new_id(), sid=producer.id, e=_delivery(why))
        return Answer(record, peer)

    # What comes in

    def receive_request(self, record: StreamRequest, sender: str | None) -> Event | None:
        """Take what the reader of a stream wants."""
        producer = self.producers.get(record.sid)
        if producer is None:
            return self._refuse(record, sender, self._spent.get(record.sid))
        if producer.consumer is not None and producer.consumer != sender:
            if record.op != "pull" or not producer.hand_over(sender):
                return self._refuse(record, sender, producer)
        elif producer.done:
            self.ignored += 1
            return None
        if record.op == "pull":
            producer.pull(record.n, record.b)
            self._give(producer, sender)
            return StreamPulled(producer)
        if record.op == "throw" and producer.open:
            self._give(producer, sender)
            error = {"n": "Error", "m": ""} if record.e is UNSET else record.e
            return StreamThrown(producer, record.id, error)
        producer.leave()
        self._give(producer, sender)
        return StreamLeft(producer, StreamReply(id=record.id, sid=record.sid, d=True, v=record.v))

    def _refuse(
        self, record: StreamRequest, sender: str | None, producer: Producer | None
    ) -> Answer:
        answer = StreamReply(id=record.id, sid=record.sid)
        if record.op == "return":
            answer.d = True
            answer.v = record.v
        elif sender is not None and self._given_up.get(record.sid) == sender:
            answer.e = _delivery("the stream was closed: its reader was silent, and taken for gone")
        elif producer is None:
            answer.e = _unknown(record.sid)
        elif producer.shared is None:
            answer.e = _delivery("the stream is read by another peer that got the same request")
        elif producer.last is not None and not producer.sent:
            last = producer.last
            answer.d, answer.e, answer.i = last.d, last.e, last.i
        else:
            how = f"has had {producer.sent} items of it" if producer.sent else "has closed it"
            who = "another worker of the group, which had the request before,"
            if producer.consumer == sender:  # the server has lost what it had finished
                who = "this peer, which runs the request once more,"
            answer.e = _delivery(f"the stream can't be read from its start: {who} {how}")
        return Answer(answer, sender)

    def receive_reply(self, record: StreamReply, sender: str | None) -> Event | None:
        """Take what the source of a stream has sent."""
        consumer = self.consumers.get((sender, record.sid))
        if consumer is None:
            self._ignore(record, sender)
            return None
        if consumer.take(record):
            value = record.v
            if value.__class__ is dict and STREAM in value:
                value = self._inner(consumer, value)
            return StreamItem(consumer, value)
        expected, leaving = consumer.received, consumer.state is ConsumerState.LEAVING
        step = consumer.receive(record)
        if consumer.finished:
            self._drop(consumer)
        value = record.v
        is_stream = value.__class__ is dict and STREAM in value and record.d is False
        if step is None:
            if is_stream:
                self.ignored += 1
                return self._refuse_inner(consumer, record)
            if leaving or record.i is UNSET or record.i >= expected:
                self._ignore(record, sender)
            else:
                self.ignored += 1  # doubled: what it has of references was given once
            return None
        if step is ConsumerInput.LOSE and record.d is not True:
            self._late(unpack_result(value, _unread), sender)  # nobody gets it
        elif is_stream:
            record.v = value = self._inner(consumer, value)
        if step is ConsumerInput.ITEM:
            return StreamItem(consumer, value)
        if step is ConsumerInput.ANSWER:
            return StreamAnswered(consumer, record)
        if step is ConsumerInput.END:
            return StreamEnded(consumer)
        if step is ConsumerInput.ERROR:
            error = None if record.e is UNSET else record.e
            if consumer.doubted and error == _unknown(record.sid):
                error = _delivery(f"what came behind {expected} items of the stream was lost")
            return StreamFailed(consumer, error)
        left = None
        if record.d is not True:
            left = StreamRequest(id=self._new_id(), sid=record.sid, op="return")
        if record.i is UNSET or record.i <= expected:
            return StreamFailed(consumer, None, left)
        lost = f"item {expected} of the stream was lost"
        if record.i > expected + 1:
            lost = f"items {expected} to {record.i - 1} of the stream were lost"
        return StreamFailed(consumer, _delivery(lost), left)

    def _inner(self, consumer: Consumer, value: Any) -> Any:
        """Return the stream that an item stands for, if it does, entered to be read."""
        producer, call_id = consumer.producer, consumer.call_id
        return unpack_result(value, lambda inner: self.consume(inner, producer, call_id))

    def _refuse_inner(self, consumer: Consumer, record: StreamReply) -> Event | None:
        """Return what ends a stream that nobody will read; one of a doubled item may be read."""
        if consumer.state is not ConsumerState.LEAVING and record.i is not UNSET:
            return None
        late: list[str] = []
        unpack_result(record.v, late.append)
        if not late or (consumer.producer, late[0]) in self.consumers:
            return None
        left = StreamRequest(id=self._new_id(), sid=late[0], op="return")
        return Answer(left, consumer.producer)

    def _ignore(self, record: StreamReply, sender: str | None) -> None:
        self.ignored += 1
        if record.v.__class__ is dict:
            self._late(unpack_result(record.v, _unread), sender)

    def ask_again(self) -> list[Answer]:
        """Note that records of streams may be lost; return what makes their sources go on."""
        asked = ((one.ask_again(), one.producer) for one in self.consumers.values())
        return [Answer(record, producer) for record, producer in asked if record is not None]

    # Peers that are gone

    def lose_peer(self, peer: str, role: Role) -> PeerGone:
        """End what is open with a peer that is gone, or is of no more use as ``role``.

        What it reads of a call that another worker may still run waits for that one, if it can be
        read from its start. Should a source only have been silent, it is told that nobody reads any
        more what it sends.
        """
        gone = PeerGone([], [], [])
        for consumer in self._dependencies.of(peer, "source") if role == "source" else ():
            if not isinstance(consumer, Consumer):
                continue  # objects of it are held here
            asked, record = consumer.asked, consumer.leave()
            if record is not None or asked is not None:
                gone.consumers.append(consumer)
            if record is not None:
                gone.told.append(Answer(record, peer))
            consumer.lose()
            self._drop(consumer)
        for producer in self._dependencies.of(peer, "reader") if role == "reader" else ():
            if not isinstance(producer, Producer):
                continue  # it has a function that is called here, or holds objects
            if producer.hand_over(None):
                self._give(producer, None)
            else:
                gone.producers.append(producer)
                self.forget(producer)
                self._given_up[producer.id] = peer
        while len(self._given_up) > _MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        return gone

    def lose(self) -> tuple[list[Consumer], list[Producer]]:
        """End all, because the link is gone; return what was open."""
        consumers, producers = list(self.consumers.values()), list(self.producers.values())
        for consumer in consumers:
            consumer.lose()
            self._drop(consumer)
        for producer in producers:
            producer.shared = None
            self.forget(producer)
        self._spent.clear()
        return consumers, producers


def _unread(stream_id: str) -> None:
    """Nobody will read a stream that is an item of one."""


def _unknown(stream_id: str) -> dict[str, Any]:
    return {"n": "Error", "m": f"Unknown RPC stream {stream_id[:80]}"}


def _delivery(why: str) -> dict[str, Any]:
    return {"n": "DeliveryError", "m": why, "rpc_error": "delivery"}
