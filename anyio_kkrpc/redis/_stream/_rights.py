"""What a worker must be allowed, found out before it takes anything.

Its scripts need rights too, and Redis 7.0 doesn't tell which one a script lacks; others are needed
only once something went wrong. So each is tried once, on nothing.
"""

from __future__ import annotations

from .._connection._command import Argument, ExecuteMany
from .._connection._errors import Meaning, ResponseError, meaning_of, named
from ._keys import Keys

# An id that no entry has: nothing is acknowledged, claimed or added under it.
_NOTHING = b"0-0"


async def check_rights(
    execute_many: ExecuteMany, keys: Keys, group: bytes, consumer: bytes
) -> None:
    """Raise if the user lacks rights that a worker needs; the error names each, and its key.

    :raises ResponseError: if so
    """
    stream = keys.stream
    entry = (_NOTHING, b"hint", b"")
    commands: list[tuple[Argument, ...]] = [
        (b"EVAL", b"return 0", b"1", stream),
        (b"XPENDING", stream, group, _NOTHING, _NOTHING, b"1"),
        (b"XCLAIM", stream, group, consumer, b"0", _NOTHING, b"JUSTID"),
        (b"XRANGE", stream, _NOTHING, _NOTHING),
        (b"XACK", stream, group, _NOTHING),
        (b"XADD", keys.inbox("nobody"), *entry),
        (b"XADD", keys.control, *entry),
        (b"XADD", keys.dead, *entry),
    ]
    replies = await execute_many(commands)
    refused = [
        named(reply, command)
        for command, reply in zip(commands, replies, strict=True)
        if isinstance(reply, Exception) and meaning_of(reply) is Meaning.RIGHTS
    ]
    if refused:
        raise ResponseError("; ".join(map(str, refused)))
