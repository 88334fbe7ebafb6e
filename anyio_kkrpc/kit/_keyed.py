"""What transports that keep calls with keys have in common: what comes of which end, and errors."""

from __future__ import annotations

from msgspec import UNSET

from .._exceptions import (
    CallCancelledError,
    CallNotFoundError,
    KeyConflictError,
    OverloadedError,
    RPCTimeoutError,
)
from .._runtime._log import quoted
from .._wire_errors import library_error
from ..records import Reply

__all__ = (
    "BRIEFLY",
    "MOST_WAITS",
    "PAUSE",
    "conflict",
    "ended_state",
    "not_found",
    "ran_too_long",
    "too_many_wait",
    "unfit_state",
    "was_cancelled",
)

# Seconds for which those who wait can still learn of what isn't kept.
BRIEFLY = 10.0
# Peers that wait for one call, at most.
MOST_WAITS = 10_000
# Seconds between two reports of progress.
PAUSE = 0.1


def ended_state(reply: Reply) -> str:
    """Return what a call has come to that was settled with a reply.

    An error of the library's own tells that the handler did not run, but for that of a result that
    doesn't fit, and of a run that took too long.
    """
    error = reply.e
    if error is UNSET:
        return "done"
    code = error.get("rpc_error")
    ran = code in (None, "timeout") or (code == "validation" and error.get("phase") == "output")
    return "failed" if ran else "refused"


def unfit_state(kind: str, keep_errors: float) -> bool:
    """Whether a call that has ended so isn't kept: the next one with its key runs."""
    return kind in ("cancelled", "refused") or (kind == "failed" and keep_errors == 0)


def ran_too_long(seconds: float | None) -> Reply:
    """Return the reply to a call whose handler was cancelled, as it took too long."""
    error = RPCTimeoutError(f"the handler did not end within {seconds} s (run_within)")
    return Reply("", e=library_error(error))


def too_many_wait(key: str) -> OverloadedError:
    """Return the error of who would wait for a call for which so many peers wait."""
    name = quoted(key)
    return OverloadedError(f"{MOST_WAITS} peers wait for the call with the key {name!r} already")


def conflict(key: str) -> KeyConflictError:
    """Return the error of a call whose key another one has."""
    return KeyConflictError(
        f"the key {quoted(key)} belongs to a call of another method, or with other arguments"
    )


def not_found(key: str) -> CallNotFoundError:
    """Return the error of who asks for a call that isn't there."""
    return CallNotFoundError(f"there is no call with the key {quoted(key)}, or not any more")


def was_cancelled(key: str) -> CallCancelledError:
    """Return the error of who waits for a call that was cancelled."""
    return CallCancelledError(f"the call with the key {quoted(key)} was cancelled")
