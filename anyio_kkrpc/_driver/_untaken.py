"""What is told of references that can't be taken."""

from __future__ import annotations

from .._exceptions import DeliveryError, RPCError
from .._references._given import ReleasedReferenceError, UnknownReferenceError
from .._wire_errors import in_place_of
from ._asking import RefusedError


def why_wrong(exc: Exception) -> RPCError:
    """Return what is told of a reference that could not be taken; what it has raised is read where
    records are, and belongs to who sent them.
    """
    if isinstance(exc, RefusedError):
        return exc.error
    return exc.with_traceback(None) if isinstance(exc, RPCError) else in_place_of(exc)


def unknown(reference_id: str, exc: UnknownReferenceError) -> RPCError:
    """Return why a reference of this side means nothing to who has sent it."""
    if not reference_id:
        return DeliveryError("Missing remote reference id")
    if isinstance(exc, ReleasedReferenceError):
        return DeliveryError(f"RPC remote reference {reference_id[:80]} has been released")
    return DeliveryError(f"Unknown remote reference {reference_id[:80]}")
