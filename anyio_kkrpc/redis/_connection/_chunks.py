"""What waits to be written, cut into pieces that one write takes. No I/O."""

from __future__ import annotations

from collections import deque
from typing import cast

# Bytes of one write: what one task writes for others at most.
CHUNK = 1024 * 1024
# Bytes from which on a part is a piece by itself: to copy it takes longer than a write more.
ALONE = 256 * 1024


def take_chunk(parts: deque[bytes | memoryview], size: int = CHUNK) -> bytes | memoryview:
    """Take the first bytes of what waits: ``size`` of them, or all, or up to a large part.

    Large parts are neither copied nor joined with others; what is cut of one stays.
    """
    taken: list[bytes | memoryview] = []
    while parts and size:
        if taken and len(parts[0]) >= ALONE:
            break
        part = parts.popleft()
        if len(part) > size:
            view = memoryview(part)
            parts.appendleft(view[size:])
            part = view[:size]
        if len(part) >= ALONE:
            return part
        taken.append(part)
        size -= len(part)
    return taken[0] if len(taken) == 1 else b"".join(taken)


def rest_of(data: bytes | memoryview, sent: int) -> bytes:
    """Return what is behind the first bytes, uncopied: the streams in use take a view as bytes."""
    return cast(bytes, memoryview(data)[sent:])
