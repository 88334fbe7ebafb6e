"""How calls through a proxy are made."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from msgspec import UNSET, Struct

from ._keyed import KeyOptions

logger = logging.getLogger("anyio_kkrpc")

# Seconds. What travels is milliseconds, whose bound is far beyond.
MAX_TIMEOUT = 1_000_000_000


class CallOptions(Struct, frozen=True):
    """How calls through a proxy are made.

    :ivar to: id of the peer that is to serve it, ``None`` for any
    :ivar timeout: seconds, ``None`` for none; the default is the channel's
    :ivar reply: whether a reply is wanted
    :ivar metadata: travels with the request
    :ivar deadline: on AnyIO's clock, if it doesn't follow from the timeout
    :ivar fail_fast: whether it fails at once if nobody serves it; the default is the channel's
    :ivar keyed: how it is kept, if it has a key
    :ivar undefined: whether the result is told from None if it is JavaScript's undefined
    :ivar passed: what it passes by reference, `PassedArguments`, once that is known
    :ivar shard_key: calls that have the same go to the same shard; ``None`` for any
    """

    to: str | None = None
    timeout: Any = UNSET
    reply: bool = True
    metadata: dict[str, Any] | None = None
    idempotent: bool = False
    deadline: float | None = None
    fail_fast: Any = UNSET
    keyed: KeyOptions | None = None
    undefined: bool = False
    passed: Any = None
    shard_key: str | None = None


def check_timeout(timeout: Any) -> None:
    """Refuse a timeout that is neither positive, ``None`` nor unset."""
    if timeout is UNSET or timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout: seconds or None, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: must be positive, not {timeout!r}")
    if timeout > MAX_TIMEOUT:
        raise ValueError(f"timeout: at most {MAX_TIMEOUT:,} s; None waits for ever")


def check_metadata(metadata: Any) -> None:
    """Refuse what can't travel as metadata."""
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata: needs a dict, not {metadata!r:.80}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: needs a bool, not {value!r:.80}")


def check_shard_key(shard_key: Any, to: str | None, keyed: KeyOptions | None) -> None:
    """Refuse what can't say which shard a call goes to.

    :param to: the peer that it is for
    :param keyed: how it is kept, if it has a key
    """
    if not isinstance(shard_key, str):
        raise TypeError(f"shard_key: needs a str, not {shard_key!r:.80}")
    if to is not None:
        raise ValueError("shard_key: a call to one peer goes to the shard which that is in")
    if keyed is not None:
        raise ValueError("shard_key: a call with a key goes to the shard of its key")


@lru_cache(maxsize=100)
def check_takeover(timeout: float | None, takeover: float | None) -> None:
    """Warn, once for the same numbers, if nobody could save the call of a peer that is gone.

    :param timeout: of calls
    :param takeover: see `Capabilities.takeover`
    """
    if timeout is not None and takeover is not None and timeout <= takeover:
        logger.warning(
            "calls made here are given up after %g s (timeout), and what a worker had that was "
            "killed is taken over by another one after %g s: such calls fail",
            timeout,
            takeover,
        )
