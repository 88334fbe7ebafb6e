"""What becomes of the sources that other peers read when their channel is left."""

from __future__ import annotations

from anyio import move_on_after

from .._exceptions import DeliveryError
from .._wire_errors import library_error
from ._core import Core
from ._pump import Pump

ENDED = "the peer that has its source ended while the stream was open"


class Sources:
    """The sources of one channel that others read."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def drain(self, seconds: float) -> None:
        """Wait so long at most until all of them have come to their ends and were closed."""
        producers = self._core.conversation.producers
        with move_on_after(seconds, shield=True):
            while producers:
                pump: Pump = next(iter(producers.values())).driver
                await pump.over()

    def cut(self) -> None:
        """Close those that are still open, and tell their readers."""
        core, lost = self._core, DeliveryError(ENDED)
        error = library_error(lost)
        addressing = core.transport.capabilities.addressing
        for producer in list(core.conversation.producers.values()):
            if not producer.open:
                continue  # its end is on its way, or its reader has left
            end = core.conversation.end_production(producer, error)
            if producer.consumer is not None or not addressing:
                core.post(end, producer.consumer)
            pump: Pump = producer.driver
            pump.stop(None, lost)
