"""RPC over any byte stream: TCP, TLS, Unix sockets, pipes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import final

from anyio.abc import AnyByteStream
from msgspec import Struct

from ..codecs import get_codec
from ..kit._carrying import CarryingOptions
from ..kit._messages import Messages, MessageTransport
from ..kit._options import check, takes
from ..kit._queue import QueueStatistics
from ._framing import Framing, LengthFraming, LineFraming

__all__ = ("ByteStreamStatistics", "ByteStreamTransport")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

READ_SIZE = 64 * 1024


class ByteStreamStatistics(Struct, frozen=True):
    """What a `ByteStreamTransport` has done and holds.

    :ivar queue: of requests that wait for a handler
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: frames that held no valid record, and were skipped
    :ivar oversized: frames larger than ``max_message_size``, which were skipped unread
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int
    oversized: int


@dataclass(frozen=True, kw_only=True, repr=False)
class ByteStreamOptions(CarryingOptions):
    """All that `ByteStreamTransport` takes."""

    stream: AnyByteStream = field(kw_only=False)


@final
class ByteStreamTransport(MessageTransport):
    """Carries records over a byte stream: JSON in lines, as kkrpc's stdio, or CBOR with lengths.

    It is an async context manager that owns the stream. Reading goes on while requests wait, so
    that replies behind them aren't held up; a request that finds no room is answered with
    `OverloadedError`.

    :param stream: any AnyIO byte stream
    :param codec: ``"json"``, ``"cbor"`` or a `Codec`; both sides need the same
    :param dialect: how this side begins: ``"native"``, or as a TypeScript peer does: ``"kkrpc-2"``,
        ``"kkrpc-0"``. To a peer of kkrpc 0.x that begins, this side speaks as it does.
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param max_message_size: bytes of one encoded record, sent or received
    :param max_queue_size: requests that may wait for a handler
    :param max_queue_bytes: their size together, in bytes; of one over 4 KiB, what it weighs decoded
    :param overflow: which request is refused when the queue is full: ``"drop_newest"`` or
        ``"drop_oldest"``
    :param write_timeout: seconds that the other side may take no data before this one gives up
    :raises ValueError: if an option is out of range; the text names it
    :raises TypeError: if an option has the wrong type
    """

    @takes(ByteStreamOptions, check)
    def __init__(self, options: ByteStreamOptions) -> None:
        self._stream = options.stream
        self._max_size = options.max_message_size
        carrying = options.carrying()
        super().__init__(Messages(self._write, self._close, name="ByteStreamTransport", **carrying))
        kind = LineFraming if get_codec(options.codec).name == "json" else LengthFraming
        self._framing: Framing = kind(options.max_message_size)

    def statistics(self) -> ByteStreamStatistics:
        """Return what it has done and holds."""
        counts = self._messages.statistics()
        return ByteStreamStatistics(
            queue=counts.queue,
            sent=counts.sent,
            received=counts.received,
            invalid=counts.invalid,
            oversized=self._framing.oversized,
        )

    async def aclose(self) -> None:
        """Write what waits, as far as that is quick, and close the stream. Idempotent."""
        await self._messages.aclose()

    async def _read(self) -> None:
        framing, take = self._framing, self._messages.take
        while True:
            data = await self._stream.receive(READ_SIZE)  # type: ignore[call-arg]
            before = framing.oversized
            for payload in framing.feed(data):
                take(payload)
            if framing.oversized > before:
                logger.warning(
                    "skipped a message larger than max_message_size (%d bytes)", self._max_size
                )

    async def _write(self, messages: list[bytes]) -> None:
        await self._stream.send(b"".join(map(self._framing.wrap, messages)))

    async def _close(self) -> None:
        await self._stream.aclose()
