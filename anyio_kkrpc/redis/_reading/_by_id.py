"""What Redis knows of many entries of a stream, asked by their ids, so many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from anyio import sleep

from .._connection._errors import RedisError, meaning_of
from .._connection._link import Link

__all__ = ("select_ids",)

# Ids that one script is given, which takes Redis about a quarter of a millisecond.
_CHUNK = 250
# Seconds between two questions, and how many of them are refused before that is final.
_AGAIN = 0.5
_MOST_REFUSALS = 20


async def select_ids(
    link: Link,
    script: bytes,
    stream: bytes,
    what: bytes,
    asked: Sequence[tuple[bytes | str, ...]],
) -> set[bytes]:
    """Return those ids that a script selects. What is refused for now is asked for again.

    :param script: is given the stream's key, then ``what`` and some of what is asked
    :param asked: ids, each with what else the script needs to know of it
    :raises RedisError: if it is refused for good, or for long
    """
    found: set[bytes] = set()
    start = refusals = 0
    while start < len(asked):
        chunk = chain.from_iterable(asked[start : start + _CHUNK])
        try:
            found.update(await link.request(b"EVAL", script, b"1", stream, what, *chunk))
        except RedisError as exc:
            refusals += 1
            if not meaning_of(exc).passes or refusals >= _MOST_REFUSALS:
                raise
            await sleep(_AGAIN)
        else:
            start += _CHUNK
    return found
