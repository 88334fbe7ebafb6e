"""What a Redis Streams transport tells of itself."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ..kit._queue import QueueStatistics
from ._lane import Lane
from ._reading._reception import Reception

__all__ = ("RedisStatistics", "statistics_of")


class RedisStatistics(Struct, frozen=True):
    """What a Redis Streams transport has done and holds.

    :ivar queue: of requests that wait for a handler, also beside the queue; its bounds are of each
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: entries that could not be read, and were skipped
    :ivar undeliverable: records that Redis refused, also as dead letters, or whose recipient was
        gone, or that were too many while a shard was away
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
        peer read them; also while it has no room for more. Of several shards: of one of them at
        least.
    :ivar moved: how often new calls went to another shard than before, since one was away or far
        behind, or back again
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
    moved: int = 0


def statistics_of(reception: Reception, lanes: Sequence[Lane], moved: int = 0) -> RedisStatistics:
    """Return what the lanes of a transport have done and hold, together.

    :param reception: of the transport
    :param moved: see `RedisStatistics`
    """
    workers = [lane.worker for lane in lanes]
    addressed = [lane.addressed for lane in lanes]
    calls = [one.open_calls for one in addressed]
    takeovers = [worker.takeover for worker in workers]
    received = sum(one.received for one in addressed) + sum(one.received for one in workers)
    read_again = sum(one.loop.reconnects + one.broadcast.reconnects for one in lanes)
    invalid = sum(one.decoder.invalid + one.arrivals.misplaced for one in lanes)
    inbounds = {id(one): one for one in (reception.inbound, *(x.reception.inbound for x in lanes))}
    return RedisStatistics(
        queue=reception.aside.statistics(),
        sent=sum(one.writer.commands.sent for one in lanes),
        received=received + sum(one.shared.received + one.broadcast.received for one in lanes),
        invalid=invalid + sum(one.misplaced for one in addressed) + reception.invalid,
        undeliverable=sum(
            one.writer.undeliverable + one.writer.waiting.thrown_away for one in lanes
        )
        + sum(one.refused for one in takeovers),
        outstanding=sum(len(worker.held.entries) for worker in workers),
        claimed=sum(one.claimed for one in takeovers),
        dead_lettered=sum(one.dead_lettered for one in takeovers),
        handed_back=sum(worker.held.handed_back for worker in workers),
        lost=sum(worker.held.lost for worker in workers),
        repeated=sum(one.repeats.dropped for one in addressed),
        reconnects=read_again + sum(one.link.reconnects for one in lanes),
        refused=sum(one.outages.refused for one in lanes),
        looked_up=sum(one.looked_up for one in calls),
        sent_again=sum(one.sent_again for one in calls)
        + sum(one.keyed.calls.lost for one in lanes),
        unserved=sum(one.unserved for one in inbounds.values()),
        reading=any(one.loop.flow.going for one in lanes),
        moved=moved,
    )
