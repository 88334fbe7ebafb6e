"""What waits to be written, cut into pieces that one write takes. No I/O."""

from __future__ import annotations

from collections import deque

# Bytes of one write: what one task writes for others at most.
CHUNK = 1024 * 1024


def take_chunk(parts: deque[bytes | memoryview], size: int = CHUNK) -> bytes:
    """Take the first bytes of what waits, ``size`` of them or all; what is cut stays, uncopied."""
    taken: list[bytes | memoryview] = []
    while parts and size:
        part = parts.popleft()
        if len(part) > size:
            view = memoryview(part)
            parts.appendleft(view[size:])
            part = view[:size]
        taken.append(part)
        size -= len(part)
    return b"".join(taken)
