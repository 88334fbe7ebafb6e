"""What one shard has of the reception that all shards share, and what it is told by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy

from ...abc import Envelope, Listener, Role
from ...kit._inbound import Inbound
from .._reading._reception import Reception

__all__ = ("PartListener", "part_of")


def part_of(reception: Reception) -> Reception:
    """Return what a shard has of a reception: the same queue and the same place beside it, but a
    listener and answers of its own.
    """
    part = copy(reception)
    part.inbound, part.answers = Inbound(reception.queue), deque()
    return part


class PartListener(Listener):
    """Tells a listener what one shard has to tell, and that shard what concerns it.

    :param concerns: whether a request of this side was sent by it
    """

    def __init__(self, listener: Listener, concerns: Callable[[Envelope], bool]) -> None:
        self._listener = listener
        self._concerns = concerns
        self._received = listener.received

    def received(self, envelope: Envelope) -> None:
        """Hand it on."""
        self._received(envelope)

    def ended(self, reason: Exception) -> None:
        """Leave it to the reception, which ends once for all shards."""

    def peer_gone(self, peer: str, role: Role, error: Exception) -> None:
        """Hand it on."""
        self._listener.peer_gone(peer, role, error)

    def expects(self) -> bool:
        """Return whether anything may be on the way, in any shard."""
        return self._listener.expects()

    def waiting(self) -> Sequence[Envelope]:
        """Return the requests that wait for a reply from this shard."""
        return [one for one in self._listener.waiting() if self._concerns(one)]

    def lost(self, reason: Exception) -> None:
        """Hand it on. Nothing tells which streams are this shard's."""
        self._listener.lost(reason)

    def doubted(self) -> None:
        """Hand it on."""
        self._listener.doubted()
