"""Arguments and results on the wire: kkrpc's envelopes for values, callbacks and streams.

A value travels bare. It is wrapped in an envelope only if it is a callback or a stream, or if it is
a mapping that a receiver would take for an envelope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from msgspec import UNSET

from ._errors import ProtocolError
from ._records import MAX_ID

ARGUMENT = "__kkrpc_next_arg__"
STREAM = "__kkrpc_next_stream__"
REFERENCES = "__kkrpc_next_refs__"
# Stands for a reference in a value that has any.
MARK = "__kkrpc_ref__"
# Levels of a value with references.
MAX_DEPTH = 256
# Types whose values travel as they are.
PLAIN = frozenset({str, int, float, bool, bytes, type(None)})


class Packed(dict[str, Any]):
    """What stands for a value with references in it, on its way out or in."""


Export = Callable[[Any], "dict[str, Any] | None"]


def is_stream(value: Any) -> bool:
    """Whether the value is sent as a stream: any asynchronous iterable."""
    return hasattr(type(value), "__aiter__")


def is_callback(value: Any) -> bool:
    """Whether the value is sent as a callback: anything callable but a class."""
    return callable(value) and not isinstance(value, type)


def callback_envelope(callback_id: str) -> dict[str, Any]:
    """The envelope of a callback argument."""
    return {ARGUMENT: "callback", "id": callback_id}


def stream_envelope(stream_id: str) -> dict[str, Any]:
    """The envelope of a stream, as a result or within a value envelope."""
    return {STREAM: "async-iterable", "id": stream_id}


def is_envelope(value: Any) -> bool:
    """Whether the value stands for a stream, as a result or an item."""
    return (
        value.__class__ is dict
        and value.get(STREAM) == "async-iterable"
        and len(value) == 2
        and _is_id(value.get("id"))
    )


def pack_argument(value: Any, export: Export) -> Any:
    """Return what stands for ``value`` in a list of arguments.

    :param export: returns the envelope of a callback or stream, and ``None`` for other values
    """
    if value.__class__ in PLAIN:
        return value
    if isinstance(value, dict):
        if value.__class__ is Packed:
            return {ARGUMENT: "references", "v": value[REFERENCES]}
        return {ARGUMENT: "value", "v": value} if ARGUMENT in value or STREAM in value else value
    if value is UNSET:
        return {ARGUMENT: "value"}
    envelope = export(value)
    if envelope is None:
        return value
    return {ARGUMENT: "value", "v": envelope} if STREAM in envelope else envelope


def unpack_argument(item: Any, callback: Callable[[str], Any], stream: Callable[[str], Any]) -> Any:
    """Return the value that ``item`` in a list of arguments stands for, ``UNSET`` for undefined.

    :param callback: returns the callable for a callback id
    :param stream: returns the asynchronous iterator for a stream id
    :raises ProtocolError: if it is a malformed envelope
    """
    if item.__class__ is not dict or ARGUMENT not in item:
        return item
    kind = item[ARGUMENT]
    if kind == "value":
        value = item.get("v", UNSET)
        return unpack_result(value, stream) if value.__class__ is dict else value
    if kind == "callback":
        callback_id = item.get("id")
        if _is_id(callback_id):
            return callback(callback_id)
        raise ProtocolError("a callback argument without an id")
    if kind == "references":
        return Packed({REFERENCES: item.get("v")})
    what = kind[:40] if isinstance(kind, str) else type(kind).__name__
    raise ProtocolError(f"an argument of unknown kind {what!r}")


def pack_result(value: Any, export: Export) -> Any:
    """Return what stands for ``value`` as the result of a request or an item of a stream."""
    if value.__class__ in PLAIN or value is UNSET:
        return value
    if isinstance(value, dict):
        if REFERENCES in value and len(value) == 1 and value.__class__ is not Packed:
            return {REFERENCES: _escaped(value, 0)}
        return value
    envelope = export(value)
    return value if envelope is None else envelope


def unpack_result(value: Any, stream: Callable[[str], Any]) -> Any:
    """Return the value that a result stands for: itself, or the iterator of a stream.

    A mapping that merely resembles a stream envelope is a plain value.
    """
    if value is UNSET:
        return None
    if is_envelope(value):
        return stream(value["id"])
    if value.__class__ is dict and REFERENCES in value and len(value) == 1:
        return Packed(value)
    return value


def _escaped(value: Any, depth: int) -> Any:
    """Return what stands for plain data that looks like a value with references."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, dict):
        made = {key: _escaped(one, depth + 1) for key, one in value.items()}
        return {MARK: "data", "v": made} if MARK in value else made
    return [_escaped(one, depth + 1) for one in value] if isinstance(value, list) else value


def _is_id(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= MAX_ID
