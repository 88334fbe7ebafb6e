"""Requests that aren't run: why, and what their callers are told."""

from __future__ import annotations

from .._exceptions import MethodNotFoundError, ProtocolError, RPCError
from .._protocol._records import Request
from ._table import Exposed, Method, Property

_REMOTE_REFERENCES = "Remote reference operations require kkrpc/remote-refs"
_MISSING = {
    "call": "is not a function",
    "new": "is not a constructor",
    "get": "is not a property",
    "set": "is not a property",
}
_MAX_NAME = 200
# Of a name that a peer made up, so many segments are shown.
MAX_SEGMENTS = 32


class NoReply(Exception):
    """The request isn't answered: it is out of time, or another peer of a broadcast may know it."""


class Expired(NoReply):
    """The request was out of time when it came, and the middleware is to see that."""


class Refused(Exception):
    """The library itself, not a handler, refuses the request with ``error``."""

    def __init__(self, error: RPCError) -> None:
        self.error = error


class Unknown(Refused):
    """The table has no such name; ``at`` is the index of the first segment that it lacks."""

    def __init__(self, error: MethodNotFoundError, at: int) -> None:
        super().__init__(error)
        self.at = at


def name_of(request: Request) -> str:
    """Return the name that a request has, as much as is shown of it."""
    name = ".".join(request.p[:MAX_SEGMENTS])
    more = " ..." if len(request.p) > MAX_SEGMENTS or len(name) > _MAX_NAME else ""
    return f"{name[:_MAX_NAME]}{more}"


def not_found(exposed: Exposed, request: Request, what: str) -> Unknown:
    """Return the refusal of a request whose name isn't there."""
    error = MethodNotFoundError(f"{name_of(request)} {what}")
    return Unknown(error, exposed.depth_of(request.p))


def find(exposed: Exposed, request: Request) -> Method | Property:
    """Return what a request is about.

    :raises Refused: if there is no such thing
    """
    if request.op == "ref":
        raise Refused(ProtocolError(_REMOTE_REFERENCES))
    entry = exposed.entry(request.op, request.p)
    if entry is None:
        raise not_found(exposed, request, _MISSING[request.op])
    return entry
