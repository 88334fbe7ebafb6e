"""What a record that came means to the driver."""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct

from ._ahead import Ahead
from ._calls import Call, Handling
from ._exports import CallbackExport
from ._records import (
    CallbackCall,
    CallbackProgress,
    CallbackRelease,
    Record,
    StreamReply,
    StreamRequest,
)
from ._streams import Consumer, Producer


class Answer(Struct):
    """Nothing for the driver but a record to send."""

    record: Record
    recipient: str | None


class StreamsClosed(Struct):
    """Streams ended with the call that passed them.

    :ivar producers: their sources must be closed
    :ivar told: tells the other workers that had the call
    """

    producers: list[Producer]
    told: list[Answer]


class CallFinished(Struct):
    """A call has its result or error.

    :ivar closed: what of the streams that it passed ended with it
    """

    call: Call
    closed: StreamsClosed | None = None


class PeerReplied(Struct):
    """One of several peers answered a call; ``value`` is a `Consumer` for a stream."""

    call: Call
    sender: str | None
    value: Any
    error: dict[str, Any] | None


class HandlingCancelled(Struct):
    """The caller has stopped waiting for a request that runs here."""

    handling: Handling


class CallbackInvoked(Struct):
    """The other side calls a function that was passed to it.

    :ivar progress: to be sent to the sender when this has run, if it asks for that
    :ivar asked: id of the reply that is to have the result, if the sender asks for that
    :ivar budget: milliseconds that the sender waits for it
    :ivar driver: the driver's object for one that has a reply
    """

    export: CallbackExport
    args: list[Any]
    kwargs: dict[str, Any]
    sender: str | None
    progress: CallbackProgress | None
    asked: str | None = None
    budget: float | None = None
    driver: Any = None


class ReferenceUsed(Struct):
    """The other side does something to an object that it holds by reference."""

    record: CallbackCall
    args: list[Any]
    kwargs: dict[str, Any]
    sender: str | None


class ReferencesReleased(Struct):
    """The other side needs objects no more that it held by reference."""

    record: CallbackRelease
    sender: str | None


class CallbackRan(Struct):
    """Invocations by this side of a function have run, or the function is ``gone``."""

    ahead: Ahead
    gone: bool


class CallbacksReleased(Struct):
    """The other side will not call these functions again."""

    exports: list[CallbackExport]


class StreamItem(Struct):
    """A stream has a new item."""

    consumer: Consumer
    value: Any


class StreamEnded(Struct):
    """A stream came to its end."""

    consumer: Consumer


class StreamFailed(Struct):
    """A stream ended with an error of its source, or because items are missing or came unasked for.

    :ivar error: ``None`` if they came unasked for
    :ivar left: to be sent to the source, if that hasn't ended
    """

    consumer: Consumer
    error: dict[str, Any] | None
    left: StreamRequest | None = None


class StreamAnswered(Struct):
    """The source of a stream has answered what somebody waits for, a ``throw`` or ``return``."""

    consumer: Consumer
    reply: StreamReply


class StreamThrown(Struct):
    """The consumer raises an error in the source, which is to answer with this id."""

    producer: Producer
    answer_id: str
    error: dict[str, Any]


class StreamPulled(Struct):
    """The consumer allows more items."""

    producer: Producer


class StreamLeft(Struct):
    """The consumer has left: close the source, then send ``answer``."""

    producer: Producer
    answer: StreamReply


class PeerLeft(Struct):
    """A destroy signal came."""


Event: TypeAlias = (
    CallFinished
    | PeerReplied
    | HandlingCancelled
    | CallbackInvoked
    | CallbackRan
    | ReferenceUsed
    | ReferencesReleased
    | CallbacksReleased
    | StreamItem
    | StreamEnded
    | StreamFailed
    | StreamAnswered
    | StreamThrown
    | StreamPulled
    | StreamLeft
    | Answer
    | PeerLeft
)


class PeerGone(Struct):
    """What was open with a peer that is gone: all of it has been moved to its final state.

    :ivar told: tells it, should it have been silent only
    """

    consumers: list[Consumer]
    producers: list[Producer]
    told: list[Answer]


class Lost(Struct):
    """What was open when the link went: all of it has been moved to its final state."""

    calls: list[Call]
    handlings: list[Handling]
    callbacks: list[CallbackExport]
    ahead: list[Ahead]
    consumers: list[Consumer]
    producers: list[Producer]
