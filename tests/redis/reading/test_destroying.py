"""A destroy signal: it ends this peer, or it doesn't."""

from __future__ import annotations

import pytest

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import Bye
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.kit._inbound import Inbound
from anyio_kkrpc.kit._queue import BoundedQueue
from anyio_kkrpc.redis._reading._destroying import DestroySignals


class Ear(Listener):
    def __init__(self) -> None:
        self.heard: list[Envelope] = []

    def received(self, envelope: Envelope) -> None:
        self.heard.append(envelope)

    def ended(self, reason: Exception) -> None:
        raise AssertionError


@pytest.mark.parametrize("honored", [True, False])
def test_signals(honored: bool) -> None:
    """The listener learns who leaves before the end; what one worker got is told others first."""
    ear, ends = Ear(), list[Exception]()
    inbound = Inbound(BoundedQueue(3))
    inbound.listen(ear)
    signals = DestroySignals(honored, inbound, ends.append)
    signals.take_alone("it")
    assert signals.unsaid == ("it" if honored else None)
    assert (ear.heard, ends) == ([], [])
    signals.take("it")
    if not honored:
        assert (ear.heard, ends) == ([], [])
        return
    assert [(type(one.record), one.sender) for one in ear.heard] == [(Bye, "it")]
    assert isinstance(ends[0], TransportClosedError)
    assert "by a destroy signal of it" in str(ends[0])
