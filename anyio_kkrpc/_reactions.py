"""What becomes of what a channel receives: each event goes to the part that it is for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ._calling._calls import Calls, dropped_callbacks
from ._driver._callbacks import CallbackRunner, Turns
from ._driver._core import Core
from ._driver._endings import close_streams, close_unopened
from ._driver._inflow import Inflow, RemoteStream, stream_error
from ._driver._losing import end_uses
from ._driver._pump import Pump
from ._exceptions import DeliveryError, ProtocolError, TransportClosedError
from ._protocol._calls import Call
from ._protocol._dependencies import Role
from ._protocol._events import (
    Answer,
    CallbackInvoked,
    CallbackRan,
    CallbacksReleased,
    CallFinished,
    HandlingCancelled,
    PeerLeft,
    PeerReplied,
    ReferencesReleased,
    ReferenceUsed,
    StreamAnswered,
    StreamEnded,
    StreamFailed,
    StreamItem,
    StreamLeft,
    StreamPulled,
    StreamsClosed,
    StreamThrown,
)
from ._protocol._records import CallbackCall, Reply, Request, StreamReply
from ._protocol._state import ConsumerState
from ._protocol._streams import Consumer, Producer
from ._wire_errors import library_error
from .abc import Envelope, Listener

logger = logging.getLogger("anyio_kkrpc")


class Reactions(Listener):
    """Takes what a transport received, for one channel.

    :param end: ends the channel
    :ivar undelivered: records of this side that the transport gave back
    :ivar lost_streams: streams that ended because the other peer is gone
    """

    def __init__(self, core: Core, calls: Calls, end: Callable[[Exception], None]) -> None:
        self._core = core
        self._calls = calls
        self._end = end
        self._receivers = core.conversation.receivers  # asked for each record
        self.undelivered = self.lost_streams = 0

    def received(self, envelope: Envelope) -> None:
        """Take what the transport received. Called by the transport."""
        if envelope.error is not None:
            self._returned(envelope, envelope.error)
            return
        record, sender = envelope.record, envelope.sender
        try:
            if sender is not None and envelope.recipient is None:
                event = self._core.conversation.overhear(record, sender)
            else:
                event = self._receivers[record.__class__](record, sender)
        except ProtocolError as exc:
            self._core.refuse(exc)
            return
        if event is not None:
            try:
                _REACT[event.__class__](self, event)
            except KeyboardInterrupt:
                raise
            except BaseException:  # the transport's reader is not to end by it
                logger.exception("what came of a %s failed", type(record).__name__)

    def ended(self, reason: Exception) -> None:
        """Learn that the transport ended. Called by the transport."""
        self._end(reason)

    def peer_gone(self, peer: str, role: Role, error: Exception) -> None:
        """End what a peer that is gone was needed for. Called by the transport."""
        core = self._core
        gone = core.conversation.lose_peer(peer, role)
        core.references.peer_gone(peer, role)
        for consumer in gone.consumers:
            if consumer.driver is not None:
                consumer.driver.finish(DeliveryError(f"the source of the stream is lost: {error}"))
        close_streams(core, StreamsClosed(gone.producers, gone.told))
        count = len(gone.consumers) + len(gone.producers)
        if count:
            self.lost_streams += count
            logger.warning("%s; streams that end with it: %d", error, count)
        if role == "reader":
            self._end_callbacks(peer, error)
            end_uses(core, peer)

    def expects(self) -> bool:
        """Return whether a call, or a stream at either end, waits for the other side."""
        known = self._core.conversation
        return bool(known.calls or known.consumers or known.producers)

    def waiting(self) -> list[Envelope]:
        """Return the requests that wait for their reply; not those to all peers, however many."""
        calls = self._core.conversation.calls.values()
        return [call.sent for call in calls if call.sent is not None and not call.gather]

    def lost(self, reason: Exception) -> None:
        """End the streams of which items, pulls or their end may have been lost."""
        core = self._core
        self._end_asked(core.conversation.functions.all_asked(), DeliveryError(str(reason)))
        for consumer in [*core.conversation.consumers.values()]:
            waited_for = consumer.state is ConsumerState.OPEN or consumer.asked is not None
            if waited_for and consumer.driver is not None:
                left = core.conversation.leave(consumer)
                if left is not None:
                    core.post(left, consumer.producer)
                consumer.driver.finish(DeliveryError(str(reason)))
        for producer in [*core.conversation.producers.values()]:
            if producer.driver is not None and producer.consumer is not None:
                self._end_source(producer, DeliveryError(str(reason)))
        for call in [*core.conversation.calls.values()]:
            if any(one.open and one.consumer is None for one in call.producers or ()):
                # Nobody knows who wanted to read it.
                self._calls.lose(call, DeliveryError(str(reason)))
                self._calls.cancel(call)

    def doubted(self) -> None:
        """Let nothing wait for a record that may be lost, and isn't sent again by itself."""
        core = self._core
        for consumer in core.conversation.consumers.values():
            if consumer.driver is not None:
                consumer.driver.doubt()
        for asked in core.conversation.ask_again():
            core.post(asked.record, asked.recipient)
        for ahead in core.conversation.doubt_callbacks():
            turns: Turns = ahead.driver
            turns.go_on()
        lost = DeliveryError("whether the function ran isn't known")
        self._end_asked(core.conversation.functions.all_asked(), lost)

    def _returned(self, envelope: Envelope, error: Exception) -> None:
        """A record of ours could not be delivered, or its reply was lost."""
        self.undelivered += 1
        record = envelope.record
        if isinstance(record, Request):
            call = self._core.conversation.calls.get(record.id)
            if call is not None:
                self._calls.lose(call, error)
                if envelope.token is not None:  # it was sent, and may run
                    self._calls.cancel(call)
                return
        elif isinstance(record, Reply):
            close_unopened(self._core, record, envelope.recipient)
        elif isinstance(record, StreamReply):
            close_unopened(self._core, record, envelope.recipient)
            self._end_stream(record, error)
        elif isinstance(record, CallbackCall):
            self._end_callbacks(envelope.recipient, error)
        logger.info("a %s could not be delivered: %s", type(record).__name__, error)

    def _end_stream(self, record: StreamReply, error: Exception) -> None:
        """End a stream of which something could not be delivered."""
        producer = self._core.conversation.producers.get(record.sid)
        if producer is not None:
            lost = DeliveryError(f"an item could not be delivered: {error}")
            self._end_source(producer, lost)

    def _end_source(self, producer: Producer, error: DeliveryError) -> None:
        """Close the source of a stream and tell its reader why, unless it has ended."""
        if producer.open:
            pump: Pump = producer.driver
            answer = self._core.conversation.end_production(producer, library_error(error))
            pump.stop(answer, error)

    def _end_callbacks(self, owner: str | None, error: Exception) -> None:
        """Let nobody wait for a peer that has functions which are called here."""
        lost = DeliveryError(f"a callback could not be delivered: {error}")
        for ahead in self._core.conversation.called_of(owner):
            turns: Turns = ahead.driver
            turns.fail(lost)
        self._end_asked(self._core.conversation.functions.asked_of(owner), lost)

    def _end_asked(self, asked: list[Call], error: DeliveryError) -> None:
        """Let nobody wait for results of functions that may be lost: they aren't sent again."""
        for call in asked:
            self._calls.give_up_on(call, error)

    def _on_call_finished(self, event: CallFinished) -> None:
        call = event.call
        if event.closed is not None:
            close_streams(self._core, event.closed)
        if call.stream is not None:
            Inflow(self._core, call.stream, self._core.timeout)
        call.driver.set()

    def _on_peer_replied(self, event: PeerReplied) -> None:
        if event.error is None and event.call.dropped:
            event.error = library_error(dropped_callbacks(event.call))
            if isinstance(event.value, Consumer):
                self._core.abandon(event.value)
                event.value = None
        wanted = event.call.driver.add(event.sender, event.value, event.error)
        if not wanted and isinstance(event.value, Consumer):
            self._core.abandon(event.value)

    def _on_cancelled(self, event: HandlingCancelled) -> None:
        event.handling.driver.cancel(event.handling)

    def _on_callback(self, event: CallbackInvoked) -> None:
        export = event.export
        if export.driver is None:
            export.driver = CallbackRunner(self._core, export)
        runner: CallbackRunner = export.driver
        if runner.invoke(event):
            self._core.start_standing(runner.run, "callback")

    def _on_reference(self, event: ReferenceUsed | ReferencesReleased) -> None:
        if isinstance(event, ReferenceUsed):
            self._core.references.use(event)
        else:
            self._core.references.released(event.record, event.sender)

    def _on_callback_ran(self, event: CallbackRan) -> None:
        turns: Turns = event.ahead.driver
        if event.gone:
            turns.fail(DeliveryError("the function isn't there any more, and does not run"))
        else:
            turns.go_on()

    def _on_released(self, event: CallbacksReleased) -> None:
        """Nothing to do: the table dropped the functions, and their runners end by themselves."""

    def _on_item(self, event: StreamItem) -> None:
        value = event.value
        event.consumer.driver.add(self._opened(value) if value.__class__ is Consumer else value)

    def _opened(self, consumer: Consumer) -> RemoteStream[Any]:
        return RemoteStream(Inflow(self._core, consumer, self._core.timeout))

    def _on_stream_end(self, event: StreamEnded) -> None:
        if event.consumer.driver is not None:  # of a reply that nobody wanted
            event.consumer.driver.finish(StopAsyncIteration())

    def _on_stream_error(self, event: StreamFailed) -> None:
        if event.left is not None:
            self._core.post(event.left, event.consumer.producer)
        if event.consumer.driver is not None:
            event.consumer.driver.finish(stream_error(event.error))

    def _on_stream_answer(self, event: StreamAnswered) -> None:
        reply = event.reply
        if reply.v.__class__ is Consumer:
            reply.v = self._opened(reply.v)
        event.consumer.driver.answered(reply)

    def _on_throw(self, event: StreamThrown) -> None:
        pump: Pump = event.producer.driver
        pump.throw(event.answer_id, event.error)

    def _on_pull(self, event: StreamPulled) -> None:
        pump: Pump = event.producer.driver
        pump.wake()

    def _on_left(self, event: StreamLeft) -> None:
        pump: Pump = event.producer.driver
        pump.stop(event.answer)

    def _on_answer(self, event: Answer) -> None:
        self._core.owe(event.record, event.recipient)

    def _on_peer_left(self, event: PeerLeft) -> None:
        self._end(TransportClosedError("the peer sent a destroy signal"))


_REACT: dict[type, Callable[[Reactions, Any], None]] = {
    CallFinished: Reactions._on_call_finished,
    PeerReplied: Reactions._on_peer_replied,
    HandlingCancelled: Reactions._on_cancelled,
    CallbackInvoked: Reactions._on_callback,
    CallbackRan: Reactions._on_callback_ran,
    ReferenceUsed: Reactions._on_reference,
    ReferencesReleased: Reactions._on_reference,
    CallbacksReleased: Reactions._on_released,
    StreamItem: Reactions._on_item,
    StreamEnded: Reactions._on_stream_end,
    StreamFailed: Reactions._on_stream_error,
    StreamAnswered: Reactions._on_stream_answer,
    StreamThrown: Reactions._on_throw,
    StreamPulled: Reactions._on_pull,
    StreamLeft: Reactions._on_left,
    Answer: Reactions._on_answer,
    PeerLeft: Reactions._on_peer_left,
}
