"""What is used through this side, though another peer has it: the objects that pass a relay."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._driver._asking import RefusedError
from .._driver._remote_object import RemoteMember, RemoteReference, root_of
from .._exceptions import (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RPCError,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)

Path = tuple[str, ...]

MOST_SEGMENTS = 16
# Members that every object of JavaScript has; as names they pass only if they are listed.
INHERITED = frozenset({"constructor", "prototype", "then", "toString", "valueOf"})
# What became of the call, and not of its handler.
_OF_THE_CALL = (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RPCTimeoutError,
    RPCValidationError,
)


def is_clean(path: Path) -> bool:
    """Whether a path is told by its dotted name, and has nothing that hides."""
    return len(path) <= MOST_SEGMENTS and all(
        part and part[0] != "_" and "." not in part for part in path
    )


async def pass_on(question: Awaitable[Any], refused: Callable[[RPCError], Exception]) -> Any:
    """Ask the other side of a relay; what became of the call is told as that, and not as a
    handler's error.

    :param refused: makes what is raised then
    """
    try:
        return await question
    except _OF_THE_CALL as exc:
        raise refused(exc) from None
    except (TransportClosedError, TransportConnectionError) as exc:
        error = DeliveryError("the other side of the relay is gone; whether it ran isn't known")
        error.__cause__ = exc
        raise refused(error) from None


def relayed(reference: RemoteReference, what: str, path: Path) -> Callable[..., Any]:
    """Return what does something to an object that passed, and that its owner does.

    :raises RefusedError: if that may not pass
    """
    if not is_clean(path) or INHERITED.intersection(path) or (what == "apply" and path):
        raise _refused(what, path)
    root, above = root_of(reference)
    if what == "member" or (what == "get" and not path):
        return lambda: RemoteMember(root, (*above, *path)) if path else reference
    whole = (*above, *path)
    if what not in ("apply", "call", "get", "set") or (what == "call" and not path):
        raise _refused(what, path)
    what = "call" if what == "apply" and whole else what

    async def use(*args: Any, **kwargs: Any) -> Any:
        asked = root.holder.ask(root, what, whole, args, kwargs, undefined=True)
        return await pass_on(asked, RefusedError)

    return use


def _refused(what: str, path: Path) -> RefusedError:
    name = ".".join(path)[:200] or "the object itself"
    return RefusedError(MethodNotFoundError(f"{name} can't be reached by {what[:40]!r}"), 0)
