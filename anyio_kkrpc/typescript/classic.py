"""The messages of kkrpc 0.x, one line each, in JSON or in superjson.

================  ==============================================================================
type              record
================  ==============================================================================
request           `Request` ``call``; ``method`` is the path, joined by dots
get, set          `Request` with ``path``
construct         `Request` ``new``
response          `Reply`; ``args`` has ``result`` or ``error``; ``{"__stream": true}`` is a stream
callback          `CallbackCall`; ``method`` is the callback's id
stream-chunk      `StreamReply`; streams have the id of the request whose result they are
stream-end        `StreamReply`, the end
stream-error      `StreamReply`, an error
stream-cancel     `StreamRequest` ``return``
================  ==============================================================================

There are no credits and nothing answers a cancel: `ClassicStreams` makes up for that.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from itertools import count
from typing import Any, final

import msgspec
from msgspec import UNSET

from .._exceptions import ProtocolError, RemoteError, RPCError
from .._protocol._records import (
    MAX_ID,
    CallbackCall,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from .._protocol._values import (
    ARGUMENT,
    callback_envelope,
    is_envelope,
    pack_argument,
    stream_envelope,
)
from .._runtime._log import quoted
from .._values._pydantic import plain
from ..abc import Codec
from . import superjson
from ._plain import NOT_FOUND, OURS, check_numbers, is_not_found, mark_kind, unknown_segment
from ._restoring import Map
from .superjson import MAX_SAFE

__all__ = ("ClassicCodec",)

CALLBACK = "__callback__"
DESTROY = b"__DESTROY__"
SUPERJSON = b'{"json":'
_STREAM_RESULT = {"__stream": True}
# Ids may be integers there; here they are text that no text of a peer can be.
_INTEGER = "\x00"
_BYTES_KEYS = {"type", "data"}
_UNDEFINED = UNSET
# A message that invokes a callback has an id, too, which nothing answers.
_callbacks = count(1)
_RESERVED = frozenset({"name", "message", "stack", "n", "m", "s"}) | OURS


@final
class ClassicCodec(Codec):
    """Encodes records as kkrpc 0.x's messages; reads both serializations.

    :param superjson: whether it writes superjson; if not, JSON
    """

    def __init__(self, *, superjson: bool = True) -> None:
        self.superjson = superjson
        self.name = "kkrpc-0"

    def encode(self, record: Record) -> bytes:
        """Encode a record as one line, without the newline; what kkrpc 0.x lacks becomes nothing.

        :raises TypeError: if kkrpc 0.x can't carry it: keyword arguments, streams as arguments,
            names with dots, text that starts with ``__callback__`` as an argument
        """
        make = _MAKE.get(record.__class__)
        message = None if make is None else make(record, self.superjson)
        if message is None:
            return b""
        message["version"] = "superjson" if self.superjson else "json"
        if self.superjson:
            return superjson.dumps(message)
        try:
            text = msgspec.json.encode(_plain(message))
            check_numbers(text)
        except (RecursionError, ValueError) as exc:
            raise TypeError(f"can't be encoded as JSON: {quoted(exc)}") from exc
        return text

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        line = bytes(data)
        try:
            if line.startswith(SUPERJSON):
                message = superjson.loads(line)
            else:
                message = msgspec.json.decode(line)
                if b'"Uint8Array"' in line:
                    message = _revive(message)
            return _TAKE[message["type"]](message)
        except RPCError:
            raise
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            text = f"not a valid message: {type(exc).__name__}: {quoted(exc, 200)}"
            raise ProtocolError(text) from exc


# Encoding


def _id(text: str) -> str | int:
    return int(text[1:]) if text.startswith(_INTEGER) else text


def _request(record: Request, rich: bool) -> dict[str, Any]:
    if record.k is not UNSET and record.k:
        raise TypeError("a kkrpc peer takes no keyword arguments: pass them by position")
    identifier = _id(record.id)
    if record.op in ("get", "set"):
        message: dict[str, Any] = {"id": identifier, "method": "", "args": {}}
        message.update(type=record.op, path=record.p)
        if record.op == "set":
            if is_envelope(record.v):
                raise TypeError("kkrpc 0.x takes no streams as values of properties")
            if rich or record.v is not UNSET:
                message["value"] = record.v
            if rich:
                message["transferSlots"] = _UNDEFINED
        return message
    for segment in record.p:
        if "." in segment:
            raise TypeError(f"kkrpc 0.x can't carry a name with a dot: {segment!r:.80}")
    callbacks: list[str] = []
    message = {
        "id": identifier,
        "method": ".".join(record.p),
        "args": [_argument(item, callbacks) for item in record.a or ()],
        "type": "construct" if record.op == "new" else "request",
    }
    if callbacks or rich:
        message["callbackIds"] = callbacks or _UNDEFINED
    if rich:
        message["transferSlots"] = _UNDEFINED
    return message


def _argument(item: Any, callbacks: list[str]) -> Any:
    if item.__class__ is dict and ARGUMENT in item:
        if item[ARGUMENT] == "callback":
            callbacks.append(item["id"])
            return CALLBACK + item["id"]
        item = item.get("v", UNSET)
        if is_envelope(item):
            raise TypeError("kkrpc 0.x takes no streams as arguments")
    elif isinstance(item, str) and item.startswith(CALLBACK):
        raise TypeError(f"kkrpc 0.x would take text that starts with {CALLBACK!r} for a callback")
    return item


def _reply(record: Reply, rich: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"id": _id(record.id), "method": ""}
    if record.e is not UNSET:
        return {**message, "args": {"error": _error_message(record.e, rich)}, "type": "response"}
    value = record.v
    if is_envelope(value):
        value = _STREAM_RESULT
    args = {"result": value} if rich or value is not UNSET else {}
    message.update(args=args, type="response")
    if rich:
        message["transferSlots"] = _UNDEFINED
    return message


def _error_message(error: dict[str, Any], rich: bool) -> Any:
    """An object with a name and a message, neither of them empty; text if kkrpc itself says so."""
    if error.get("rpc_error") == NOT_FOUND:
        return str(error.get("m", ""))
    return _error_object(error, rich)


def _error_object(error: dict[str, Any], rich: bool) -> dict[str, Any]:
    name = str(error.get("n") or "Error")
    plain: dict[str, Any] = {"name": name, "message": str(error.get("m") or name)}
    if "s" in error:
        plain["stack"] = error["s"]
    plain.update((key, value) for key, value in error.items() if key not in _RESERVED)
    cause = error.get("cause")
    if isinstance(cause, dict):
        inner = _error_object(cause, rich)
        plain["cause"] = RemoteError(inner["name"], inner["message"]) if rich else inner
    return plain


def _callback(record: CallbackCall, rich: bool) -> dict[str, Any]:
    if record.k is not UNSET and record.k:
        raise TypeError("a callback of a kkrpc peer takes no keyword arguments")
    message: dict[str, Any] = {
        "id": f"callback-{next(_callbacks)}",
        "method": record.id,
        "args": [_argument(item, []) for item in record.a],
        "type": "callback",
    }
    if rich:
        message["transferSlots"] = _UNDEFINED
    return message


def _stream_reply(record: StreamReply, rich: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"id": _id(record.sid), "method": ""}
    if record.e is not UNSET:
        return {**message, "args": {"error": _error_object(record.e, rich)}, "type": "stream-error"}
    if record.d is True:
        return {**message, "args": {}, "type": "stream-end"}
    if is_envelope(record.v):
        raise TypeError("kkrpc 0.x takes no streams as items of streams")
    message.update(args={"value": record.v}, type="stream-chunk")
    if rich:
        message["transferSlots"] = _UNDEFINED
    return message


def _stream_request(record: StreamRequest, rich: bool) -> dict[str, Any] | None:
    if record.op == "pull":
        return None
    return {"id": _id(record.sid), "method": "", "args": {}, "type": "stream-cancel"}


_MAKE: dict[type, Callable[[Any, bool], dict[str, Any] | None]] = {
    Request: _request,
    Reply: _reply,
    CallbackCall: _callback,
    StreamReply: _stream_reply,
    StreamRequest: _stream_request,
}


def _plain(value: Any) -> Any:
    """Return a value as JSON.stringify makes it, as far as Python's types have a counterpart."""
    cls = value.__class__
    if value is None or cls in (str, int, float, bool):
        return value
    if value is UNSET:
        return None
    if cls is dict:
        return {key: _plain(item) for key, item in value.items() if item is not UNSET}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"type": "Uint8Array", "data": list(bytes(value))}
    if isinstance(value, datetime):
        return superjson.date_text(value)
    result = msgspec.to_builtins(
        value, builtin_types=(bytes, bytearray, datetime, date), str_keys=True, enc_hook=plain
    )
    return result if result is value or isinstance(value, date) else _plain(result)


# Decoding


def _take_id(value: Any) -> str:
    if isinstance(value, str):
        # Here the first would be an integer.
        if value.startswith(_INTEGER) or len(value) > MAX_ID:
            raise ProtocolError("a message with an id that can't be one")
        return value
    if value.__class__ is int and -MAX_SAFE <= value <= MAX_SAFE:
        return f"{_INTEGER}{value}"
    raise ProtocolError("a message without an id")


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    raise ProtocolError(f"a message whose {what} is no text")


def _no_callback(value: Any) -> None:
    """Values that came are never exported again."""


def _take_argument(value: Any) -> Any:
    if value.__class__ is str and value.startswith(CALLBACK):
        return callback_envelope(value[len(CALLBACK) :])
    return pack_argument(value, _no_callback)


def _take_arguments(message: dict[str, Any]) -> list[Any]:
    args = message["args"]
    if not isinstance(args, list):
        raise ProtocolError("a request whose args are no list")
    return [_take_argument(value) for value in args]


def _take_call(message: dict[str, Any]) -> Record:
    path = _text(message["method"], "method").split(".")
    return Request(_take_id(message["id"]), "call", path, _take_arguments(message))


def _take_construct(message: dict[str, Any]) -> Record:
    path = _text(message["method"], "method").split(".")
    return Request(_take_id(message["id"]), "new", path, _take_arguments(message))


def _path(message: dict[str, Any]) -> list[str]:
    path = message["path"]
    if not isinstance(path, list):
        raise ProtocolError("a message whose path is no list")
    return [_text(segment, "path") for segment in path]


def _take_get(message: dict[str, Any]) -> Record:
    return Request(_take_id(message["id"]), "get", _path(message))


def _take_set(message: dict[str, Any]) -> Record:
    value = _plain_value(message.get("value", UNSET))
    return Request(_take_id(message["id"]), "set", _path(message), v=value)


def _take_response(message: dict[str, Any]) -> Record:
    identifier, args = _take_id(message["id"]), message["args"]
    if not isinstance(args, dict):
        raise ProtocolError("a response whose args are no object")
    if "error" in args:
        return Reply(identifier, e=_take_error(args["error"]))
    value = args.get("result", UNSET)
    value = stream_envelope(identifier) if value == _STREAM_RESULT else _plain_value(value)
    return Reply(identifier, v=value)


def _take_error(error: Any) -> dict[str, Any]:
    if isinstance(error, RemoteError):
        taken: dict[str, Any] = {"n": error.name, "m": error.message}
        cause = error.__cause__ or error.data.get("cause")
    elif isinstance(error, dict):
        taken = {key: value for key, value in error.items() if key not in _RESERVED}
        taken["n"] = str(error.get("name") or "Error")
        taken["m"] = str(error.get("message", ""))
        if isinstance(error.get("stack"), str):
            taken["s"] = error["stack"]
        if taken["n"] == "RPCValidationError":
            mark_kind(taken)
        cause = error.get("cause")
    elif isinstance(error, str) and is_not_found(error):
        return {"n": "MethodNotFoundError", "m": error, "rpc_error": NOT_FOUND}
    else:
        return {"n": "Error", "m": "undefined" if error is UNSET else str(error)}
    if isinstance(cause, (RemoteError, str)) or (isinstance(cause, dict) and cause.get("name")):
        taken["cause"] = _take_error(cause)
    return taken


def _take_callback(message: dict[str, Any]) -> Record:
    args = message["args"]
    if not isinstance(args, list):
        raise ProtocolError("a callback whose args are no list")
    packed = [pack_argument(value, _no_callback) for value in args]
    callback_id = _text(message["method"], "method")
    if len(callback_id) > MAX_ID:
        raise ProtocolError("a callback with an id that can't be one")
    return CallbackCall(callback_id, packed)


def _stream_record(message: dict[str, Any]) -> StreamReply:
    identifier = _take_id(message["id"])
    return StreamReply(identifier, identifier)


def _take_chunk(message: dict[str, Any]) -> Record:
    record = _stream_record(message)
    record.d = False
    record.v = _plain_value(message["args"].get("value", UNSET))
    return record


def _plain_value(value: Any) -> Any:
    """Return a value as one that stands for no stream, though in kkrpc 2 it would."""
    return Map(value) if is_envelope(value) else value


def _take_end(message: dict[str, Any]) -> Record:
    record = _stream_record(message)
    record.d = True
    return record


def _take_stream_error(message: dict[str, Any]) -> Record:
    record = _stream_record(message)
    record.e = _take_error(message["args"].get("error"))
    return record


def _take_cancel(message: dict[str, Any]) -> Record:
    identifier = _take_id(message["id"])
    return StreamRequest(identifier, identifier, "return")


_TAKE: dict[str, Callable[[dict[str, Any]], Record]] = {
    "request": _take_call,
    "construct": _take_construct,
    "get": _take_get,
    "set": _take_set,
    "response": _take_response,
    "callback": _take_callback,
    "stream-chunk": _take_chunk,
    "stream-end": _take_end,
    "stream-error": _take_stream_error,
    "stream-cancel": _take_cancel,
}


def _revive(value: Any) -> Any:
    if value.__class__ is list:
        return [_revive(item) for item in value]
    if value.__class__ is dict:
        if value.get("type") == "Uint8Array" and value.keys() == _BYTES_KEYS:
            return bytes(value["data"])
        return {key: _revive(item) for key, item in value.items()}
    return value


def answer_unknown(request: Request, reply: Reply) -> Reply:
    """Return how kkrpc 0.x answers a request for a name that isn't there."""
    error, path = reply.e, request.p
    if error is UNSET or error.get("rpc_error") != NOT_FOUND or not path:
        return reply
    at, name = unknown_segment(path, error), ".".join(path)
    if request.op in ("get", "set"):
        text = f"Property path {name} not found at {path[at]}"
        if request.op == "set" and "at" not in error:
            text = str(error.get("m", ""))
    elif at < len(path) - 1:
        what = "Method" if request.op == "call" else "Constructor"
        text = f"{what} path {name} not found at {path[at]}"
    elif request.op == "call":
        text = f"Method {name} is not a function"
    else:
        text = f"{name} is not a constructor function"
    return Reply(reply.id, e={"n": "Error", "m": text, "rpc_error": NOT_FOUND})
