"""What becomes of what is open once the link, or a peer, is gone."""

from __future__ import annotations

from .._protocol._events import Lost
from ._asking import Answering
from ._core import Core


def end_lost(core: Core, lost: Lost) -> None:
    """Tell those who wait, and end what runs for the other side; without awaiting.

    Handlers of requests are the crew's to cancel. What runs for a callback or a reference is here:
    its caller, who might cancel it, is gone, and it may have no deadline.
    """
    for call in lost.calls:
        call.driver.set()
    for consumer in lost.consumers:
        if consumer.driver is not None:
            consumer.driver.finish(core.closed_error())
    for ahead in lost.ahead:
        ahead.driver.fail(core.closed_error())
    for producer in lost.producers:
        if producer.driver is not None:
            producer.driver.stop(None)
    for handling in lost.handlings:
        if isinstance(handling.driver, Answering):
            handling.driver.cancel(handling)


def end_uses(core: Core, peer: str | None) -> None:
    """End what runs for a callback or a reference that a peer has used which is gone."""
    for (sender, _), handling in [*core.conversation.handlings.items()]:
        if sender == peer and isinstance(handling.driver, Answering):
            handling.driver.cancel(handling)
