"""The messages of kkrpc 2, one JSON object each.

They are this library's own records without its additions; each argument stands in an envelope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import msgspec
from msgspec import UNSET

from .._exceptions import ProtocolError
from .._protocol._values import ARGUMENT, REFERENCES
from .._runtime._log import quoted
from .._values._pydantic import plain
from .._values._undefined import UndefinedInsideError, defined_record
from .._wire_errors import Fields, is_bare
from ..abc import Codec
from ..records import (
    Bye,
    CallbackCall,
    CallbackProgress,
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from ._plain import (
    NO_CONSTRUCTOR,
    NOT_FOUND,
    OURS,
    check_numbers,
    mark_kind,
    thrown_error,
    unknown_segment,
)
from ._references import as_request, as_use, with_references, without_marks

__all__ = ("CompactCodec",)

_encoder = msgspec.json.Encoder(enc_hook=plain)
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
UNMARKED = "RPCEncodeError: Unmarked function values require proxy() with kkrpc/remote-refs"
UNKNOWN_STREAM = "Unknown RPC stream "


@final
class CompactCodec(Codec):
    """Encodes records as kkrpc 2's messages.

    Values travel as in `JSONCodec`: bytes as base64 text, NaN and the infinities as null. Deadlines
    stay behind; cancels and destroy signals aren't sent at all.
    """

    name = "kkrpc-2"

    def encode(self, record: Record) -> bytes:
        """Encode a record as one line, without the newline; what kkrpc 2 lacks becomes nothing.

        :raises TypeError: if kkrpc 2 can't carry it: keyword arguments, large integers
        """
        plain = plain_record(record)
        if plain is None:
            return b""
        return encode_json(plain)

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            record = _decoder.decode(data)
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            raise ProtocolError(f"not a valid message: {quoted(exc, 200)}") from exc
        return with_references(received(record), data)


def encode_json(message: Any) -> bytes:
    """Return what kkrpc 2 is told, as JSON.

    :raises TypeError: if it can't be encoded, or JavaScript would round a number in it
    """
    try:
        try:
            text = _encoder.encode(message)
        except UndefinedInsideError:
            text = _encoder.encode(defined_record(message))
        check_numbers(text)
    except (RecursionError, ValueError) as exc:
        raise TypeError(f"can't be encoded as JSON: {quoted(exc)}") from exc
    return text


def plain_record(record: Record) -> Record | None:
    """Return the record without what kkrpc 2 lacks; ``None`` if it lacks all of it.

    :raises TypeError: if it has keyword arguments
    """
    change = _PLAIN.get(record.__class__)
    return record if change is None else change(record)


def _request(record: Request) -> Request:
    if record.k is not UNSET and record.k:
        raise TypeError("a kkrpc peer takes no keyword arguments: pass them by position")
    plain = Request(record.id, record.op, record.p, v=_value(record.v), meta=record.meta)
    if record.op in ("call", "new"):
        plain.a = _arguments([] if record.a is UNSET else record.a)
    return plain


def _arguments(items: list[Any]) -> list[Any]:
    return [_argument(item) for item in items]


def _argument(item: Any) -> Any:
    if item.__class__ is not dict or ARGUMENT not in item:
        return {ARGUMENT: "value", "v": item}
    return without_marks(item["v"]) if item[ARGUMENT] == "references" else item


def _value(value: Any) -> Any:
    """Return a value as kkrpc has it: there references stand among other data."""
    if isinstance(value, dict) and REFERENCES in value and len(value) == 1:
        return without_marks(value[REFERENCES])
    return value


def _callback_call(record: CallbackCall) -> CallbackCall | Request:
    if record.p is not UNSET:
        return as_request(record)
    if record.k is not UNSET and record.k:
        raise TypeError("a callback of a kkrpc peer takes no keyword arguments")
    return CallbackCall(record.id, _arguments(record.a))


def _reply(record: Reply) -> Reply:
    if record.e is UNSET:
        value = _value(record.v)
        return record if value is record.v else Reply(record.id, value)
    error = {key: _value(value) for key, value in record.e.items() if key not in OURS}
    if isinstance(record.e, Fields) and record.e.has_function:
        text = f"{error['n']}: {error['m']} (error custom field encoding failed: {UNMARKED})"
        error = {"n": "Error", "m": text}
    elif error.get("n") == "MethodNotFoundError":
        error["n"] = "Error"
    elif record.e.get("rpc_error") == "delivery":
        text = str(error.get("m", ""))
        if text.startswith(("Unknown remote reference", "Missing remote reference")):
            error["n"] = "Error"
        elif text.startswith("RPC remote reference "):
            error["n"] = "RPCRemoteReferenceReleasedError"
    return Reply(record.id, e=error)


def _stream_reply(record: StreamReply) -> StreamReply:
    plain = StreamReply(record.id, record.sid, d=record.d, v=_value(record.v))
    if record.e is not UNSET:
        name, message = str(record.e.get("n", "Error")), str(record.e.get("m", ""))
        if not is_bare(record.e) and not message.startswith(UNKNOWN_STREAM):
            message = f"{name}: {message}" if message else name
        plain.e = {"n": "Error", "m": message}
    return plain


def _stream_request(record: StreamRequest) -> StreamRequest:
    value = record.v
    if record.e is not UNSET and not is_bare(record.e):  # itself, it would be {} there
        value = ": ".join(filter(None, (str(record.e.get("n", "")), str(record.e.get("m", "")))))
    return StreamRequest(record.id, record.sid, record.op, n=record.n, v=value)


_PLAIN: dict[type, Callable[[Any], Record | None]] = {
    Request: _request,
    CallbackCall: _callback_call,
    Reply: _reply,
    StreamReply: _stream_reply,
    StreamRequest: _stream_request,
    CallbackRelease: lambda record: CallbackRelease(record.ids),
    CallbackProgress: lambda record: None,
    Cancel: lambda record: None,
    Bye: lambda record: None,
}


def received(record: Record) -> Record:
    """Return what a message of kkrpc 2 means here.

    :raises ProtocolError: if kkrpc 2 has no such message
    """
    if isinstance(record, (CallbackProgress, Cancel, Bye)):
        raise ProtocolError("not a message of kkrpc 2")
    if isinstance(record, Request):
        record.k = record.d = record.o = record.cw = record.cr = UNSET
        return as_use(record) if record.op == "ref" else record
    if isinstance(record, Reply):
        if record.e is not UNSET:
            mark_kind(record.e)
    elif isinstance(record, CallbackCall):
        record.k = record.f = record.i = record.r = record.d = record.p = UNSET
    elif isinstance(record, CallbackRelease):
        record.all, record.times = True, UNSET
    elif isinstance(record, StreamReply):
        record.i = record.w = UNSET
    elif isinstance(record, StreamRequest):
        record.b = UNSET
        if record.op == "throw":
            record.e = thrown_error(record.v)
    return record


def answer_unknown(request: Request, reply: Reply) -> Reply:
    """Return how kkrpc 2 answers a request for a name that isn't there."""
    error, path = reply.e, request.p
    if error is UNSET or error.get("rpc_error") != NOT_FOUND or not path:
        return reply
    at = unknown_segment(path, error)
    if at < len(path) - 1:
        return Reply(reply.id, e={"n": "Error", "m": f"Cannot access {path[at + 1]} on undefined"})
    if request.op == "get":
        return Reply(reply.id)
    if request.op == "new":
        return Reply(reply.id, e={"n": "TypeError", "m": NO_CONSTRUCTOR})
    if request.op == "call":
        return Reply(reply.id, e={"n": "Error", "m": f"{path[-1]} is not a function"})
    return Reply(reply.id, e={"n": "Error", "m": str(error.get("m", ""))})
