"""What came: requests wait, the rest doesn't, and everybody learns of the end."""

from __future__ import annotations

import pytest
from anyio import EndOfStream

from anyio_kkrpc import BoundedQueue, TransportClosedError
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.kit import Inbound
from anyio_kkrpc.records import Record, Reply, Request

pytestmark = pytest.mark.anyio


class Kept(Listener):
    def __init__(self, *, fails: bool = False) -> None:
        self.records: list[Record] = []
        self.reasons: list[Exception] = []
        self._fails = fails

    def received(self, envelope: Envelope) -> None:
        self.records.append(envelope.record)
        if self._fails:
            raise ValueError

    def ended(self, reason: Exception) -> None:
        self.reasons.append(reason)


def request(number: int) -> Request:
    return Request(str(number), "call", ["f"])


def inbound() -> Inbound:
    queue: BoundedQueue[Envelope] = BoundedQueue(10)
    return Inbound(queue)


async def test_requests_wait_and_the_rest_does_not() -> None:
    """Also what came before there was a listener."""
    box, listener = inbound(), Kept()
    for record in (request(1), Reply("a"), request(2)):
        assert box.deliver(Envelope(record))
    box.listen(listener, serve=1)
    assert listener.records == [Reply("a")]
    box.deliver(Envelope(Reply("b")))
    assert listener.records == [Reply("a"), Reply("b")]
    assert [(await box.receive()).record for _ in range(2)] == [request(1), request(2)]


async def test_who_serves_nothing_gets_no_requests() -> None:
    """They are counted; those of this side that come back are for the listener."""
    box, listener = inbound(), Kept()
    box.deliver(Envelope(request(1)))
    box.listen(listener)
    box.deliver(Envelope(request(2)))
    back = Envelope(request(3), error=TransportClosedError("gone"))
    box.deliver(back)
    assert (box.unserved, listener.records) == (2, [request(3)])


async def test_a_listener_that_fails_ends_no_reader() -> None:
    """It is counted."""
    box = inbound()
    box.listen(Kept(fails=True))
    for name in "ab":
        assert box.deliver(Envelope(Reply(name)))
    assert box.listener_errors == 2


@pytest.mark.parametrize("clean", [True, False])
async def test_end(clean: bool) -> None:
    """After a clean end what waits is received; the first reason counts, for late listeners too."""
    box, listener = inbound(), Kept()
    box.listen(listener, serve=1)
    box.deliver(Envelope(request(1)))
    reason = EndOfStream() if clean else TransportClosedError("closed")
    box.end(reason)
    box.end(ValueError("late"))
    assert box.deliver(Envelope(request(2)))  # thrown away
    if clean:
        assert (await box.receive()).record == request(1)
    with pytest.raises(type(reason)):
        await box.receive()
    late = Kept()
    box.listen(late)
    assert [type(one) for one in listener.reasons + late.reasons] == [type(reason)] * 2
    assert box.ended_reason is reason
