"""The two exceptions that the protocol core itself raises; the rest stand in ``_exceptions``."""

from __future__ import annotations


class RPCError(Exception):
    """Base of every error that this library raises on purpose."""


class ProtocolError(RPCError):
    """A record or an action that the protocol doesn't allow in the present state.

    Raised for what a peer sent (the frame is counted, logged and skipped; the reader goes on) and
    for misuse of the library's own parts.
    """
