"""The destroy signal: another peer ends this one, if that is honored."""

from __future__ import annotations

from collections.abc import Callable

from ..._exceptions import TransportClosedError
from ..._runtime._log import quoted
from ...abc import Envelope
from ...kit._inbound import Inbound
from ...records import Bye

__all__ = ("DESTROYED", "DestroySignals")

DESTROYED = "Redis Streams adapter has been destroyed"


class DestroySignals:
    """Takes them.

    :param honored: whether they end this peer
    :param inbound: has the listener, which is told who leaves
    :param end: ends this peer
    :ivar unsaid: who has sent one that only this peer got; the others are to be told before it is
        taken here
    """

    def __init__(self, honored: bool, inbound: Inbound, end: Callable[[Exception], object]) -> None:
        self._honored = honored
        self._inbound = inbound
        self._end = end
        self.unsaid: str | None = None

    def take(self, sender: str) -> None:
        """Take the signal of a peer that all have got."""
        if self._honored:
            self._inbound.deliver(Envelope(Bye(), sender))
            self._end(TransportClosedError(f"{DESTROYED} by a destroy signal of {quoted(sender)}"))

    def take_alone(self, sender: str) -> None:
        """Note the signal of a peer that a group has given to this one of its workers."""
        if self._honored:
            self.unsaid = sender
