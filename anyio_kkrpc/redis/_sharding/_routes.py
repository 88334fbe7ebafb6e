"""Which shard each record takes."""

from __future__ import annotations

from ...abc import Envelope, KeyedCalls
from ...records import Request
from .._group._held import HeldEntry
from .._lane import Lane
from .._options import Options
from .._stream._places import shard_of, shard_of_key
from .._writing._writer import Writer
from ._home import Home
from ._lanes import Lanes

__all__ = ("Routes",)

# Calls in succession that go to one shard with `route="spread"`, and so are written together.
_TOGETHER = 16


class Routes:
    """Finds the lane for it.

    :param home: knows where calls go that may go anywhere
    """

    def __init__(self, options: Options, lanes: Lanes, home: Home) -> None:
        self._lanes = lanes
        self._home = home
        self._count = options.shards
        self._first = options.home
        self._spreads = options.route == "spread"
        self._sent = 0

    def take(self, envelope: Envelope) -> Lane:
        """Return the lane that takes a record of ours; a request remembers it."""
        recipient, route = envelope.recipient, envelope.route
        if recipient is not None:
            return self.toward(recipient)
        if envelope.record.__class__ is Request:
            shard = envelope.route = self._choose(route)
        else:
            shard = route if route.__class__ is int else self._home.shard
        return self._lanes.open(shard)

    def _choose(self, shard_key: str | None) -> int:
        """Return the shard for a request to whoever serves."""
        if shard_key is not None:
            return shard_of_key(shard_key, self._count)
        if not self._spreads:
            return self._home.shard
        self._sent += 1
        shard = (self._first + self._sent // _TOGETHER) % self._count
        self._lanes.open(shard)
        return shard if self._lanes.connected(shard) else self._home.shard

    def back(self, received: Envelope) -> tuple[Writer, dict[bytes, HeldEntry]]:
        """Return what writes to where a request came from, and what is held there."""
        lane = self._lane_of(received)
        return lane.writer, lane.worker.held.entries

    def _lane_of(self, received: Envelope) -> Lane:
        """Return the lane that a request came from, also once it is settled and has no token."""
        held: HeldEntry | None = received.token
        return self.toward(received.sender) if held is None else self._lanes.of(held)

    def toward(self, peer: object) -> Lane:
        """Return the lane that a peer is in. TypeScript peers know shard 0, the stream itself."""
        return self._lanes.open(shard_of(peer, self._count) if isinstance(peer, str) else 0)

    def tell(self, peer: str | None, key: str | None) -> int | None:
        """Return the shard for calls to a peer, or with a key, or for others now; ``None`` if these
        go to all in turn.
        """
        if peer is not None:
            return shard_of(peer, self._count)
        if key is not None:
            return shard_of_key(key, self._count)
        return None if self._spreads else self._home.shard

    def place(self, request: Envelope) -> int | None:
        """Return the shard in which a request of ours was sent, or would be if it has a key; else
        ``None`` if it wasn't sent.
        """
        if request.recipient is not None:
            return shard_of(request.recipient, self._count)
        route: int | str | None = request.route
        return shard_of_key(route, self._count) if isinstance(route, str) else route

    def calls_of(self, key: str) -> KeyedCalls:
        """Return what keeps the calls of the shard that a key is in."""
        return self._lanes.open(shard_of_key(key, self._count)).keyed.calls

    def all_calls(self) -> list[KeyedCalls]:
        """Return what keeps the calls of all shards that are open or have been."""
        return [lane.keyed.calls for lane in self._lanes.made]

    def calls_with(self, received: Envelope) -> KeyedCalls:
        """Return what keeps the call that a request is."""
        return self._lane_of(received).keyed.calls
