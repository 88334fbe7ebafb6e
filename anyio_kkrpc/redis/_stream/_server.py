"""What kind of server this is."""

from __future__ import annotations

import logging
import re

from redis.exceptions import ResponseError

from .._connection._command import Execute
from .._connection._target import Target

logger = logging.getLogger("anyio_kkrpc")

# What has consumer groups as they are needed here, and a thing or two more.
_MODERN = (6, 2)


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
