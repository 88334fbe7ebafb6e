"""A pair of transports in one process."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import final

from anyio import AsyncContextManagerMixin, EndOfStream
from anyio.lowlevel import checkpoint

from .._exceptions import TransportClosedError
from ..abc import Capabilities, Codec, Envelope, KeyedCalls, Listener, Transport
from ..codecs import get_codec
from ..codecs._uncoded import uncoded
from ..kit._inbound import Inbound, refusal
from ..kit._queue import BoundedQueue, Overflow, QueueStatistics
from ..records import Record
from ._keyed import MemoryCalls, MemoryKeys

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("MemoryTransport",)


@final
class MemoryTransport(  # type: ignore[misc]  # both bases define __aexit__
    AsyncContextManagerMixin, Transport
):
    """One side of a pair in one process; made by `pair`."""

    def __init__(
        self,
        codec: str | Codec | None = None,
        max_queue_size: int = 1000,
        max_queue_bytes: int = 64 * 1024 * 1024,
        overflow: Overflow = "drop_newest",
    ) -> None:
        self._codec = None if codec is None else get_codec(codec)
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            max_queue_size, max_queue_bytes, overflow, on_drop=self._refuse
        )
        self._inbound = Inbound(self._queue)
        self._other: MemoryTransport | None = None
        self._keys = MemoryKeys()
        self._calls: MemoryCalls | None = None

    @classmethod
    def pair(
        cls,
        *,
        codec: str | Codec | None = None,
        max_queue_size: int = 1000,
        max_queue_bytes: int = 64 * 1024 * 1024,
        overflow: Overflow = "drop_newest",
    ) -> tuple[Self, Self]:
        """Return two connected transports, each to be entered.

        :param codec: ``"json"`` or ``"cbor"`` to encode and decode each record as on a wire; with
            ``None`` records are passed as they are
        """
        a = cls(codec, max_queue_size, max_queue_bytes, overflow)
        b = cls(codec, max_queue_size, max_queue_bytes, overflow)
        a._meet(b)
        b._meet(a)
        return a, b

    def _meet(self, other: Self) -> None:
        self._other = other
        self._calls = MemoryCalls(
            self._keys,
            other._keys,
            send=self.send,
            tell=lambda record: other._inbound.deliver(Envelope(record)),
            cancel=lambda record: self._inbound.deliver(Envelope(record)),
            copy=self._copy,
            size_of=lambda record: 0 if self._codec is None else len(self._codec.encode(record)),
        )
        self.keyed: KeyedCalls | None = self._calls

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        try:
            yield self
        finally:
            self._close()

    async def aclose(self) -> None:
        self._close()
        await checkpoint()

    def _close(self) -> None:
        self._inbound.end(TransportClosedError("the transport has been closed"))
        for one in (self, self._other):
            if one is not None and one._calls is not None:
                one._calls.close()
        if self._other is not None:
            self._other._inbound.end(EndOfStream())

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        self._inbound.listen(listener, serve=serve)

    async def receive(self) -> Envelope:
        calls = self._calls
        while True:
            if calls is None or not calls.later:
                envelope = await self._inbound.receive()
            else:
                envelope = await calls.receive(self._inbound.receive)
            if envelope.key is None or calls is None or calls.begin(envelope):
                return envelope

    async def send(self, item: Envelope) -> None:
        if self._inbound.ended_reason is not None:
            raise TransportClosedError("the transport has been closed")
        other, record, size = self._other, item.record, 0
        assert other is not None
        if self._codec is not None:
            data = self._codec.encode(record)
            record, size = self._codec.decode(data), len(data)
        else:
            record = uncoded(record)
        envelope = Envelope(record)
        if item.key is not None:
            envelope.key, envelope.token = item.key, item.token
        while not other._inbound.deliver(envelope, size):
            await other._queue.wait_room()
        await checkpoint()  # behind it: who is cancelled here has sent it

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        if envelope.key is not None and self._calls is not None:
            self._calls.settle(envelope, reply)
            await checkpoint()
        elif reply is not None:
            await self.send(reply)

    def _copy(self, record: Record) -> Record:
        """Return a record as it is at the other side."""
        return (
            uncoded(record)
            if self._codec is None
            else self._codec.decode(self._codec.encode(record))
        )

    def _refuse(self, envelope: Envelope) -> None:
        reply = refusal(envelope)
        if envelope.key is not None and self._calls is not None:
            self._calls.settle(envelope, None if reply is None else Envelope(reply))
        elif reply is not None and self._other is not None:
            self._other._inbound.deliver(Envelope(reply))

    def statistics(self) -> QueueStatistics:
        """Return what the queue of requests holds and has seen."""
        return self._queue.statistics()
