"""What a side knows of each request: of those that it made, and of those that it serves."""

from __future__ import annotations

from typing import Any

from ._exports import CallbackExport
from ._state import CallState, HandlingState
from ._streams import Consumer, Producer


class Call:
    """A request that this side made.

    :ivar result: what it returned, once ``state`` is ``ANSWERED``, unless that is a stream
    :ivar stream: the stream that it returned
    :ivar error: the error as it came, once ``state`` is ``FAILED``
    :ivar overdue: why no answer came in time, if that is known, once ``state`` is ``EXPIRED``
    :ivar lost: why no answer can come, if not because all ends, once ``state`` is ``LOST``
    :ivar driver: the driver's object for it
    :ivar sent: the driver's object for its request
    :ivar dropped: how many invocations of its functions by who answered were thrown away
    :ivar gather: whether it takes the replies of several peers, until it is finished
    """

    __slots__ = (
        "callbacks",
        "driver",
        "dropped",
        "error",
        "gather",
        "id",
        "lost",
        "overdue",
        "producers",
        "recipient",
        "result",
        "sent",
        "state",
        "stream",
    )

    def __init__(self, call_id: str, recipient: str | None) -> None:
        self.id: str = call_id
        self.recipient: str | None = recipient
        self.state: CallState = CallState.WAITING
        self.result: Any = None
        self.stream: Consumer | None = None
        self.error: dict[str, Any] | None = None
        self.overdue: str | None = None
        self.lost: Exception | None = None
        self.driver: Any = None
        self.sent: Any = None
        self.gather: bool = False
        self.dropped: int = 0
        self.callbacks: list[CallbackExport] | None = None
        self.producers: list[Producer] | None = None


class Handling:
    """A request of another peer that this side serves.

    :ivar consumers: streams that came as arguments, if any
    :ivar producer: the stream that is its result, once it has been replied to with one
    :ivar driver: the driver's object for it
    """

    __slots__ = ("consumers", "driver", "id", "producer", "sender", "state")

    def __init__(self, request_id: str, sender: str | None) -> None:
        self.id: str = request_id
        self.sender: str | None = sender
        self.state: HandlingState = HandlingState.RUNNING
        self.driver: Any = None
        self.consumers: list[Consumer] | None = None
        self.producer: Producer | None = None

    @property
    def open(self) -> bool:
        """Whether it can still be replied to: it can't once the link is gone."""
        return self.state is not HandlingState.DONE
