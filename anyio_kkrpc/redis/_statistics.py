"""What a Redis Streams transport tells of itself."""

from __future__ import annotations

from msgspec import Struct

from ..kit._queue import QueueStatistics

__all__ = ("RedisStatistics",)


class RedisStatistics(Struct, frozen=True):
    """What a Redis Streams transport has done and holds.

    :ivar queue: of requests that wait for a handler, also beside the queue; its bounds are of each
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: entries that could not be read, and were skipped
    :ivar undeliverable: records that Redis refused, also as dead letters, or whose recipient was
        gone
    :ivar outstanding: entries of the group that were taken and not yet acknowledged
    :ivar claimed: entries taken over from workers that are gone
    :ivar dead_lettered: entries that became dead letters here
    :ivar handed_back: entries given back to the group
    :ivar lost: entries that other workers took over from this one, because it stood still, say;
        what it hadn't begun, it didn't run
    :ivar repeated: records that came twice because of a reconnect, and were dropped
    :ivar reconnects: how often a connection was made again
    :ivar refused: how often Redis refused something that is tried again, or can be left out
    :ivar looked_up: requests of this peer that were open when another server answered than before,
        and were looked for
    :ivar sent_again: those of them that it had lost, and that were sent once more
    :ivar unserved: requests that came here and were thrown away, since this peer serves none
    :ivar reading: whether requests are read now: the connection for them is up, and Redis lets this
        peer read them; also while it has no room for more
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int
    undeliverable: int
    outstanding: int
    claimed: int
    dead_lettered: int
    handed_back: int
    lost: int
    repeated: int
    reconnects: int
    refused: int
    looked_up: int
    sent_again: int
    unserved: int
    reading: bool
