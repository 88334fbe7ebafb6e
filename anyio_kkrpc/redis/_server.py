"""What kind of server this is."""

from __future__ import annotations

import re

from redis.exceptions import ResponseError

from ._connection import Execute


async def look_at_server(execute: Execute) -> tuple[tuple[int, ...], str]:
    """Return version and eviction policy; of a server that hides them, modern guesses."""
    try:
        text = await execute(b"INFO")
    except ResponseError:
        return (6, 2), ""
    facts = dict(
        line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line
    )
    found = re.match(r"(\d{1,5})\.(\d{1,5})", facts.get("redis_version", ""))
    version = (6, 2) if found is None else (int(found[1]), int(found[2]))
    return version, facts.get("maxmemory_policy", "")
