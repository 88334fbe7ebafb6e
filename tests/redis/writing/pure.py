"""What the parts of a writer need of others, without a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hiredis import Reader

from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis._writing._commands import Commands
from anyio_kkrpc.redis.dialects import Dialects
from anyio_kkrpc.redis.dialects._signing import Signer

STREAM = b"s"
KEYS = Keys.of("s")
GROUP = b"workers"
CALLER = "caller"


def dialects(own: str = "native", codec: str = "json", session_id: str = "me") -> Dialects:
    return Dialects(
        own,
        session_id,
        get_codec(codec),
        superjson=True,
        remote_peer_id=None,
        skips_own=False,
        max_queue_size=10,
        max_queue_bytes=1000,
        deliver=lambda record, sender: None,
        now=lambda: 0.0,
        time_of_day=lambda: 1.5,
    )


def commands(
    group: bytes | None = None,
    speaks: Dialects | None = None,
    *,
    max_message_size: int = 1000,
    max_backlog: int | None = None,
    signer: Signer | None = None,
    added: Callable[[int], object] | None = None,
) -> Commands:
    speaks = dialects() if speaks is None else speaks
    sizes = max_message_size, max_backlog
    return Commands(KEYS, speaks, group, b"consumer", *sizes, signer, b"e", added)


def parsed(packed: bytes) -> list[list[bytes]]:
    """Return the commands as Redis reads them."""
    reader = Reader()
    reader.feed(packed)
    found: list[Any] = []
    while (command := reader.gets()) is not False:
        found.append(command)
    return found
