"""What becomes of an entry: in the queue, waiting for it, aside, to the listener, or nowhere."""

from __future__ import annotations

import pytest

from anyio_kkrpc._protocol._records import Cancel, Record, Reply, Request
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.redis.dialects import Entry, SharedPeer
from tests.redis.parts import ME, Parts, Server, id_of

pytestmark = pytest.mark.anyio


class Ear(Listener):
    def __init__(self) -> None:
        self.heard: list[Record] = []

    def received(self, envelope: Envelope) -> None:
        self.heard.append(envelope.record)

    def ended(self, reason: Exception) -> None:
        raise AssertionError


def entry(record: Record, sender: str = "other") -> Entry:
    return Entry(record, sender, 1)


def ask(name: str) -> Entry:
    return entry(Request(name, "call", ["f"]))


async def test_requests() -> None:
    """What comes behind what waits for room waits, too, so that all is served in order."""
    parts = Parts(Server(), "g", overflow="block")
    arrivals = parts.common.arrivals
    for number in range(1, 6):
        assert arrivals.deliver(ask(str(number)), b"5000-0", None, b"t", 2)
    assert [id_of(item) for item, _ in arrivals.intake.waiting] == ["4", "5"]
    first = parts.reception.queue.get_nowait()
    assert (first.attempt, first.token, first.sender) == (2, b"t", "other")
    assert first.sent_at == 5.0  # its id, on this peer's clock
    assert arrivals.deliver(ask("6"), b"5000-0", None, b"t")
    assert parts.queued() == ["2", "3"]
    await arrivals.intake.wait()
    assert parts.queued() == ["4", "5", "6"]


async def test_for_this_peer_alone() -> None:
    """It takes nobody's room."""
    parts = Parts(Server())
    arrivals, reception = parts.common.arrivals, parts.reception
    for name in "123":
        arrivals.deliver(ask(name), b"1-0", None, None)
    arrivals.deliver_addressed(b"1-0", ask("mine"))
    assert reception.aside.waiting
    assert id_of(await reception.aside.receive()) == "mine"
    assert parts.queued() == ["1", "2", "3"]


def test_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    """Among those for everybody they have no business, which is counted and logged."""
    parts, ear = Parts(Server()), Ear()
    parts.reception.inbound.listen(ear)
    arrivals = parts.common.arrivals
    assert not arrivals.deliver(entry(Reply("1", v=1)), b"1-0", None, None)
    assert not arrivals.deliver(entry(Cancel("1")), b"1-0", None, b"t")
    assert (arrivals.misplaced, ear.heard) == (2, [])
    assert caplog.text.count("among the requests") == 2
    reply = Reply("1", v=1)
    arrivals.deliver_addressed(b"1-0", entry(reply))
    assert ear.heard == [reply]


@pytest.mark.parametrize("group", [None, "g"])
def test_forwarded(group: str | None) -> None:
    """What TypeScript peers wrote comes to an inbox from a worker; in a broadcast it was read."""
    parts, ear = Parts(Server(), group), Ear()
    parts.reception.inbound.listen(ear, serve=1)
    sender = SharedPeer.of("ts", parts.dialects.compact)
    asked = entry(Request("1", "call", ["f"]), sender)
    parts.common.arrivals.deliver_addressed(b"1-0", asked)
    assert parts.reception.aside.waiting is (group is not None)
    assert sender != ME


def test_once_more() -> None:
    """What comes once more is run once, also if it has waited for room in the queue."""
    parts = Parts(Server(), overflow="block")
    arrivals = parts.common.arrivals

    def waiting() -> list[str]:
        return parts.queued() + [id_of(one) for one, _ in arrivals.intake.waiting]

    for name in "12345":
        arrivals.deliver(ask(name), b"1-0", None, None)
    assert arrivals.intake.waiting
    for name in "24":
        (forgotten,) = arrivals.forget(ask(name))
        assert id_of(forgotten) == name
        assert arrivals.forget(ask(name)) == []
    assert waiting() == [*"135"]
