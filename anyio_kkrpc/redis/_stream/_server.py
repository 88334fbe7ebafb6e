"""What kind of server this is, and which one."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from .._connection._command import Argument, Execute
from .._connection._errors import ResponseError, named
from .._connection._resp import Connection
from .._connection._target import Target

logger = logging.getLogger("anyio_kkrpc")

# What has consumer groups as they are needed here, and a thing or two more.
_MODERN = (6, 2)

# What tells which server it is. One section each: older ones don't take two at a time.
WHO = ((b"INFO", b"server"), (b"INFO", b"replication"))
# The first changes with each start of a server, the second with each promotion of a replica.
_IDS = re.compile(rb"^(?:run_id|master_replid):(\w+)", re.MULTILINE)


async def check_server(execute: Execute, target: Target, *, groups: bool) -> bool:
    """Warn of a server that may lose data; return whether it is 6.2 or later.

    :raises TransportConnectionError: if it isn't, and ``groups`` are to be used
    """
    version, policy = await look_at_server(execute)
    if policy not in ("noeviction", ""):
        logger.warning(
            "maxmemory-policy of Redis is %s: it may evict streams and inboxes; set noeviction",
            policy,
        )
    if groups and version < _MODERN:
        raise target.too_old(version)
    return version >= _MODERN


async def look_at_server(execute: Execute) -> tuple[tuple[int, ...], str]:
    """Return version and eviction policy; of a server that hides them, modern guesses."""
    try:
        text = await execute(b"INFO")
    except ResponseError:
        return _MODERN, ""
    facts = dict(
        line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line
    )
    found = re.match(r"(\d{1,5})\.(\d{1,5})", facts.get("redis_version", ""))
    version = _MODERN if found is None else (int(found[1]), int(found[2]))
    return version, facts.get("maxmemory_policy", "")


class Identity:
    """Which server answers. It may be another one than before, with less data: another machine
    behind the same address, a replica that was promoted, or the same one started again.

    :ivar current: that of the one asked last; ``None`` if it doesn't tell
    :ivar is_sure: whether that is known to be another one than before
    """

    def __init__(self) -> None:
        self.current: bytes | None = None
        self.is_sure = False
        self._asked = False

    async def ask(
        self, connection: Connection, along: Callable[[Execute], Awaitable[object]]
    ) -> bool:
        """Ask a server, in one write with something else.

        :param along: sends one command by what it is given
        :return: whether it may be another one than before; so may be each that doesn't tell
        """
        told: list[Any] = []

        async def execute(*command: Argument) -> Any:
            reply, *told[:] = await connection.execute_many([command, *WHO])
            if isinstance(reply, Exception):
                raise named(reply, command)
            return reply

        await along(execute)
        before, self.current = self.current, identity_of(told)
        first, self._asked = not self._asked, True
        self.is_sure = None not in (before, self.current) and self.current != before
        return not first and (self.current is None or self.current != before)


def identity_of(replies: Iterable[Any]) -> bytes | None:
    """Return what tells a server from any other, as it answered `WHO`; ``None`` if it hides it."""
    texts = [reply for reply in replies if isinstance(reply, bytes)]
    return b" ".join(found for text in texts for found in _IDS.findall(text)) or None
