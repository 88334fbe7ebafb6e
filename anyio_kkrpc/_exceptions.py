"""Every public exception: when it is raised, and what to do about it."""

from __future__ import annotations

from typing import Any

from anyio import BrokenResourceError, ClosedResourceError

from ._protocol._errors import ProtocolError, RPCError

__all__ = (
    "CallCancelledError",
    "CallNotFoundError",
    "DeliveryError",
    "ItemsLostError",
    "KeyConflictError",
    "KeyNotAllowedError",
    "MethodNotFoundError",
    "OverloadedError",
    "ProtocolError",
    "RPCError",
    "RPCTimeoutError",
    "RPCValidationError",
    "RemoteError",
    "StreamRestartedError",
    "TransportClosedError",
    "TransportConnectionError",
)


class RemoteError(RPCError):
    """The other side's handler, property, constructor or stream raised an exception.

    :ivar name: class name of the exception there, such as ``"ValueError"``
    :ivar message: its text
    :ivar data: its public attributes that the codec could carry
    :ivar traceback: its traceback as text, where the exposing side sends tracebacks, else ``None``
    """

    def __init__(
        self,
        name: str,
        message: str,
        data: dict[str, Any] | None = None,
        traceback: str | None = None,
    ) -> None:
        super().__init__(name, message)
        self.name = name
        self.message = message
        self.data: dict[str, Any] = {} if data is None else data
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.message else self.name


class RPCTimeoutError(RPCError, TimeoutError):
    """No answer came within the call's timeout. Whether the handler ran is not known.

    :ivar reason: what was found out about it shortly before, such as ``"no worker has taken it: the
        group 'jobs' has no workers"``; ``None`` if nothing
    """

    reason: str | None = None


class RPCValidationError(RPCError):
    """Arguments, a result or a value don't fit the annotation of what was called.

    :ivar phase: ``"input"`` or ``"output"``
    :ivar method: dotted name of what was called
    :ivar issues: one text for each wrong value, with its path
    """

    def __init__(self, phase: str, method: str, issues: list[str]) -> None:
        super().__init__(phase, method, issues)
        self.phase = phase
        self.method = method
        self.issues = issues

    def __str__(self) -> str:
        return f"{self.method}: invalid {self.phase}: {'; '.join(self.issues)}"


class MethodNotFoundError(RPCError):
    """The other side exposes nothing callable, readable or writable under that name."""


class OverloadedError(RPCError):
    """The request was refused or dropped because a queue or backlog was full. It did not run."""


class DeliveryError(RPCError):
    """The request could not be delivered to a handler that finishes it, and was given up."""


class KeyConflictError(RPCError):
    """The key of a call belongs to another one: to another method, or to other arguments."""


class KeyNotAllowedError(RPCError, PermissionError):
    """The ``key_guard`` of this channel doesn't allow that with the key. Nothing was sent."""


class CallNotFoundError(RPCError, LookupError):
    """Nothing is known of a call with that key: none was made, or it isn't kept any more."""


class CallCancelledError(RPCError):
    """The call with that key was cancelled. Its key is free: the next call with it runs."""


class StreamRestartedError(RPCError):
    """The stream of a call with a key was begun anew, by another attempt or another call, and what
    was read of it until now isn't part of it. Read it from the beginning, without a position.
    """


class ItemsLostError(RPCError):
    """Items of the stream of a call with a key are not kept any more: they were read too late.

    :ivar wanted: the number of the first one that is lost
    :ivar first: the number of the first one that is kept
    :ivar position: where to go on, with that one
    """

    def __init__(self, wanted: int, first: int, position: str) -> None:
        super().__init__(wanted, first, position)
        self.wanted: int = wanted
        self.first: int = first
        self.position: str = position

    def __str__(self) -> str:
        return f"items {self.wanted} to {self.first - 1} of the stream are not kept any more"


class TransportClosedError(RPCError, ClosedResourceError):
    """The channel or transport was closed by this side, or ended by its peer."""


class TransportConnectionError(RPCError, BrokenResourceError):
    """The connection could not be made, or was lost. ``__cause__`` holds the reason."""
