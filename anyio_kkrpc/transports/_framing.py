"""Frames in a stream of bytes: lines for JSON, length prefixes for CBOR. No I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

_LENGTH_BYTES = 4


class Framing(ABC):
    """Cuts what is received into frames, of at most ``max_size`` bytes each.

    A larger frame is skipped as its bytes come, without being kept.

    :ivar oversized: frames that were skipped
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self.oversized = 0

    @abstractmethod
    def wrap(self, payload: bytes) -> bytes:
        """Return the frame that holds ``payload``."""

    @abstractmethod
    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take received bytes; yield the payload of each frame that they complete."""

    @property
    @abstractmethod
    def buffered(self) -> int:
        """Bytes kept of a frame that isn't complete."""


class LineFraming(Framing):
    """A frame is a line that ends in ``\\\\n``, as on kkrpc's stdio; empty lines are skipped."""

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self._parts: list[bytes] = []
        self._size = 0
        self._skipping = False

    def wrap(self, payload: bytes) -> bytes:
        return payload + b"\n"

    @property
    def buffered(self) -> int:
        return self._size

    def feed(self, data: bytes) -> Iterator[bytes]:
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            line = self._complete(data[start:end])
            start = end + 1
            if line:
                yield line
        self._keep(data[start:])

    def _keep(self, part: bytes) -> None:
        if self._skipping or not part:
            return
        self._size += len(part)
        self._parts.append(part)
        if self._size > self._max_size + 1:  # one more for a carriage return
            self._skip()

    def _skip(self) -> None:
        self.oversized += 1
        self._skipping = True
        self._parts.clear()
        self._size = 0

    def _complete(self, part: bytes) -> bytes | None:
        self._keep(part)
        if self._skipping:
            self._skipping = False
            return None
        line = b"".join(self._parts) if len(self._parts) != 1 else self._parts[0]
        self._parts.clear()
        self._size = 0
        line = line.removesuffix(b"\r")
        if len(line) > self._max_size:
            self.oversized += 1
            return None
        return line


class LengthFraming(Framing):
    """A frame is its length, as four bytes with the highest first, and then that many bytes."""

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self._head = bytearray()
        self._parts: list[bytes] = []
        self._missing = 0
        self._skipping = False

    def wrap(self, payload: bytes) -> bytes:
        return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload

    @property
    def buffered(self) -> int:
        return len(self._head) + sum(map(len, self._parts))

    def feed(self, data: bytes) -> Iterator[bytes]:
        start = 0
        while start < len(data):
            if len(self._head) < _LENGTH_BYTES:
                take = _LENGTH_BYTES - len(self._head)
                self._head += data[start : start + take]
                start += take
                if len(self._head) < _LENGTH_BYTES:
                    return
                self._missing = int.from_bytes(self._head, "big")
                self._skipping = self._missing > self._max_size
                self.oversized += self._skipping
            part = data[start : start + self._missing]
            start += len(part)
            self._missing -= len(part)
            if part and not self._skipping:
                self._parts.append(part)
            if not self._missing:
                payload = b"".join(self._parts) if len(self._parts) != 1 else self._parts[0]
                skipped = self._skipping
                self._head.clear()
                self._parts.clear()
                self._skipping = False
                if payload and not skipped:
                    yield payload
