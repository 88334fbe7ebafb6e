"""References as kkrpc 2.1 has them: anywhere in plain data, used by requests of the op ``ref``.

Here a use is a `CallbackCall` with a path, and values that have references say so; see
`docs/wire.md`. kkrpc counts no references: one release ends all. What somebody has released is told
so at once; what the garbage collector has dropped is told late, since that must not cross what
passes the same object again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Any

from msgspec import UNSET

from .._protocol._values import ARGUMENT, MARK, REFERENCES
from .._references._marking import read_reference
from ..records import CallbackCall, CallbackRelease, Record, Reply, Request, StreamReply
from ._plain import NOT_FOUND

__all__ = (
    "LateReleases",
    "answer_use",
    "as_request",
    "as_use",
    "ids_in",
    "said_at_once",
    "with_references",
    "without_marks",
)

# Releases that wait; the oldest are never told.
_MAX_KNOWN = 100_000
# Nobody waits for what answers them.
_releases = count(1)
_IN_MESSAGES = (MARK.encode(), REFERENCES.encode())


# What comes


def as_use(request: Request) -> CallbackCall:
    """Return what a request of the op ``ref`` does."""
    reference_id, what, *path = [*request.p, "", ""][: max(len(request.p), 2)]
    args = [] if request.a is UNSET else request.a
    if what == "set":
        args = [{ARGUMENT: "value"} if request.v is UNSET else _argument(request.v)]
    return CallbackCall(reference_id, args, r=request.id, p=[what, *path])


def with_references(record: Record, message: bytes | bytearray | memoryview) -> Record:
    """Return a record that came, with its values marked that have references."""
    if not any(one in bytes(message) for one in _IN_MESSAGES):
        return record
    if isinstance(record, CallbackCall) and record.p is not UNSET:
        record.a = [_argument(item) for item in record.a]
    if isinstance(record, Request) and record.a is not UNSET:
        record.a = [_argument(item) for item in record.a]
    if isinstance(record, (Request, Reply, StreamReply)):
        record.v = _value(record.v)
    if isinstance(record, Reply) and record.e is not UNSET:
        record.e = {key: _value(field) for key, field in record.e.items()}
    return record


def _value(value: Any) -> Any:
    if _has_any(value) or (value.__class__ is dict and value.keys() == {REFERENCES}):
        return {REFERENCES: _marked(value)}
    return value


def _argument(item: Any) -> Any:
    value = item
    if item.__class__ is dict and ARGUMENT in item:
        if item[ARGUMENT] != "value":
            return item
        value = item.get("v")
    return {ARGUMENT: "references", "v": _marked(value)} if _has_any(value) else item


def _has_any(value: Any) -> bool:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if item.__class__ is list:
            waiting.extend(item)
        elif item.__class__ is dict:
            if read_reference(item) is not None:
                return True
            waiting.extend(item.values())
    return False


def _marked(value: Any, depth: int = 0) -> Any:
    """Return a value in which what only looks like a reference says so."""
    if depth > 300:
        return value  # it is refused for its depth
    if value.__class__ is list:
        return [_marked(one, depth + 1) for one in value]
    if value.__class__ is not dict or read_reference(value) is not None:
        return value
    made = {key: _marked(one, depth + 1) for key, one in value.items()}
    return {MARK: "data", "v": made} if MARK in value else made


def ids_in(record: Record) -> list[str]:
    """Return the ids of the references that came with a record."""
    waiting: list[Any] = [getattr(record, name, None) for name in ("v", "a", "e")]
    found: list[str] = []
    while waiting:
        item = waiting.pop()
        if item.__class__ is list:
            waiting.extend(item)
        elif item.__class__ is dict:
            reference = read_reference(item)
            if reference is not None:
                found.append(reference.id)
            else:
                waiting.extend(item.values())
    return found


# What goes


def without_marks(value: Any) -> Any:
    """Return a value as kkrpc has it.

    :raises TypeError: if kkrpc would take data in it for a reference
    """
    if isinstance(value, (list, tuple)):
        return [without_marks(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get(MARK) == "data":
        value = value["v"]
        if read_reference(value) is not None:
            raise TypeError(f"kkrpc 2 would take a map with {MARK!r} for a reference")
    return {key: without_marks(one) for key, one in value.items()}


def as_request(use: CallbackCall) -> Request:
    """Return what a peer of kkrpc is asked, to use what it has.

    :raises TypeError: if it can't be asked so
    """
    if use.k is not UNSET and use.k:
        raise TypeError("a kkrpc peer takes no keyword arguments: pass them by position")
    what, *path = use.p or [""]
    request = Request(str(use.r), "ref", [use.id, what, *path])
    args = [_bare(item) for item in use.a]
    if what == "set":
        if args[0] is not None or use.a[0] is None:
            request.v = args[0]
    elif what in ("call", "apply"):
        request.a = args
    return request


def said_at_once(record: Record) -> Record:
    """Return what releases an object that somebody has released; any other record as it is."""
    if isinstance(record, CallbackRelease) and record.times is not UNSET and record.all is True:
        return _release_of(record.ids[0])
    return record


def _release_of(reference_id: str) -> CallbackCall:
    return CallbackCall(reference_id, [], r=f"release-{next(_releases)}", p=["release"])


def _bare(item: Any) -> Any:
    if item.__class__ is not dict or ARGUMENT not in item:
        return item
    if item[ARGUMENT] == "references":
        return without_marks(item["v"])
    return item if "v" in item else None


def answer_use(use: CallbackCall, reply: Reply) -> Reply:
    """Return how kkrpc says that an object has nothing of the kind."""
    error = reply.e
    if error is UNSET or error.get("rpc_error") != NOT_FOUND:
        return reply
    what, *path = use.p or [""]
    name, at = ".".join(path), error.get("at", len(path))
    why = str(error.get("m", ""))
    if why.startswith("a function has no "):
        why = f"Remote reference {use.id} is not an object"
    elif what == "get":
        if at >= len(path) - 1:
            return Reply(reply.id)
        why = f"Cannot access {path[at + 1]} on undefined"
    elif what == "call":
        why = f"{name} is not a function"
    elif what == "apply":
        why = f"Remote reference {use.id} is not a function"
    elif what == "set" and path:
        why = f"Cannot set remote reference property {name}"
        if at < len(path) - 1:
            why = f"Cannot set {name} on undefined"
    elif what == "set":
        why = "Cannot set empty path"
    return Reply(reply.id, e={"n": "Error", "m": why})


class LateReleases:
    """Objects of kkrpc peers that were dropped here, and aren't released yet."""

    def __init__(self) -> None:
        self._gone: OrderedDict[str, tuple[str | None, float]] = OrderedDict()

    @property
    def pending(self) -> bool:
        """Whether `due` will have something to tell."""
        return bool(self._gone)

    def released(self, ids: Iterable[str], owner: str | None, now: float) -> None:
        """Note that nothing that was got of these is left."""
        for reference_id in ids:
            self._gone[reference_id] = owner, now
            if len(self._gone) > _MAX_KNOWN:
                self._gone.popitem(last=False)

    def received(self, ids: Iterable[str]) -> None:
        """Note that references came: they aren't released now."""
        for reference_id in ids:
            self._gone.pop(reference_id, None)

    def due(self, now: float, delay: float) -> list[tuple[Record, str | None]]:
        """Return what is to be said now.

        :param delay: seconds for which nothing of the kind must have come
        """
        due: list[tuple[Record, str | None]] = []
        while self._gone:
            reference_id, (owner, since) = next(iter(self._gone.items()))
            if now - since < delay:
                break
            del self._gone[reference_id]
            due.append((_release_of(reference_id), owner))
        return due
