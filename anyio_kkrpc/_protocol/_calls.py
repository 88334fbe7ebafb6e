"""What a side knows of each request: of those that it made, and of those that it serves."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ._exports import CallbackExport
from ._state import CallState, HandlingState
from ._streams import Consumer, Producer


class Call(Struct, eq=False):
    """A request that this side made.

    :ivar result: what it returned, once ``state`` is ``ANSWERED``, unless that is a stream
    :ivar undefined: whether that is JavaScript's undefined
    :ivar stream: the stream that it returned
    :ivar error: the error as it came, once ``state`` is ``FAILED``
    :ivar overdue: why no answer came in time, if that is known, once ``state`` is ``EXPIRED``
    :ivar lost: why no answer can come, if not because all ends, once ``state`` is ``LOST``
    :ivar driver: the driver's object for it
    :ivar sent: the driver's object for its request
    :ivar passed: the driver's object for what it passes by reference, which is told who has
        answered; ``callbacks`` are not ``None`` then
    :ivar dropped: how many invocations of its functions by who answered were thrown away
    :ivar gather: whether it takes the replies of several peers, until it is finished
    """

    id: str
    recipient: str | None
    state: CallState = CallState.WAITING
    result: Any = None
    stream: Consumer | None = None
    error: dict[str, Any] | None = None
    overdue: str | None = None
    lost: Exception | None = None
    driver: Any = None
    sent: Any = None
    gather: bool = False
    dropped: int = 0
    callbacks: list[CallbackExport] | None = None
    producers: list[Producer] | None = None
    undefined: bool = False
    passed: Any = None

    def is_read_elsewhere(self, sender: str | None) -> bool:
        """Whether another one of the peers that run it reads a stream of its arguments.

        Only one can; that the others fail is no answer.
        """
        return self.recipient is None and any(
            producer.consumer not in (None, sender) for producer in self.producers or ()
        )

    def passes(self, passed: Any) -> None:
        """Note what it passes by reference."""
        self.passed = passed
        if self.callbacks is None:
            self.callbacks = []


class Handling(Struct, eq=False):
    """A request of another peer that this side serves.

    :ivar consumers: streams that came as arguments, if any
    :ivar producer: the stream that is its result, once it has been replied to with one
    :ivar driver: the driver's object for it
    """

    id: str
    sender: str | None
    driver: Any = None
    state: HandlingState = HandlingState.RUNNING
    consumers: list[Consumer] | None = None
    producer: Producer | None = None

    @property
    def open(self) -> bool:
        """Whether it can still be replied to: it can't once the link is gone."""
        return self.state is not HandlingState.DONE
