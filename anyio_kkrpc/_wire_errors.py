"""Exceptions as they travel, and back.

On the wire an error is ``n`` (name), ``m`` (message), ``s`` (traceback, only if asked for) and the
exception's own public fields beside them, as in kkrpc. Ours adds ``cause`` (such an error again)
and ``rpc_error``, which marks errors that the library itself raised at the other side.
"""

from __future__ import annotations

import traceback as traceback_module
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from ._exceptions import (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RemoteError,
    RPCError,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from ._protocol._values import is_callback, pack_result

# Marks a value that was raised in a generator: there, any can be.
BARE = "bare"
_RESERVED = frozenset({"n", "m", "s", "cause", "rpc_error"})
_MAX_CAUSES = 8
_MAX_NAME = 200
# Characters of text that are tried one after the other for an error that is too large to be sent.
_LENGTHS = (64 * 1024, 1024, 64, 16)

_CODES: dict[str, type[RPCError]] = {
    "method_not_found": MethodNotFoundError,
    "overloaded": OverloadedError,
    "delivery": DeliveryError,
    "timeout": RPCTimeoutError,
}
_CODE_OF = {cls: code for code, cls in _CODES.items()}


class Fields(dict[str, Any]):
    """An exception as it travels.

    :ivar has_function: whether a field that stays behind is a function: kkrpc 2 says so
    """

    has_function = False


def as_it_is(value: Any) -> Any:
    """Return what has no references."""
    return value


def handler_error(
    exc: BaseException,
    *,
    traceback: bool = False,
    give: Callable[[Any], Any] = as_it_is,
) -> Fields:
    """Return what travels for an exception that a handler raised.

    It arrives as a `RemoteError`, even if it is one of the library's own: those tell what became of
    the call, as "it did not run", which is not for a handler to say. See `library_error`.

    :param give: returns a field as it travels, if it has references; any other one as it is
    """
    error = _one(exc, give)
    if traceback:
        error["s"] = _encodable("".join(traceback_module.format_exception(exc)))
    inner, target = exc.__cause__, error
    for _ in range(_MAX_CAUSES):
        if inner is None:
            break
        target["cause"] = target = _one(inner)
        inner = inner.__cause__
    return error


def in_place_of(exc: BaseException) -> RPCError:
    """Return what a caller gets for an exception of somebody's code, raised at this side."""
    return error_from_wire(handler_error(exc))


def _one(exc: BaseException, give: Callable[[Any], Any] = as_it_is) -> Fields:
    if isinstance(exc, RemoteError):
        fields = Fields(n=_encodable(str(exc.name)), m=_encodable(str(exc.message)))
        own = exc.data
    else:
        fields = Fields(n=_encodable(type(exc).__name__), m=_text(exc))
        own = {key: value for key, value in vars(exc).items() if not key.startswith("_")}
    for key, value in own.items():
        if key not in _RESERVED:
            try:
                given = give(value)
                if given is value:
                    given = pack_result(_plain(value), lambda _: None)
                fields[key] = given
            except Exception:  # a field that can't travel stays behind
                fields.has_function |= is_callback(value)
    return fields


def _plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def _text(exc: BaseException) -> str:
    if type(exc) is KeyError and len(exc.args) == 1 and isinstance(exc.args[0], str):
        return _encodable(exc.args[0])  # str() of it would show the repr of the key
    try:
        return _encodable(str(exc))
    except Exception:  # a broken __str__ must not hide the error itself
        return f"<{type(exc).__name__} whose text can't be made>"


def _encodable(text: str) -> str:
    """Return text without lone surrogates, which have no bytes on the wire."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


async def send_shortened(
    error: dict[str, Any], send: Callable[[dict[str, Any]], Awaitable[object]]
) -> None:
    """Send an error that can't be sent as it is, with as much of its text as can be.

    :param send: sends it
    :raises RPCError: what the shortest one met with
    """
    for length in _LENGTHS[:-1]:
        try:
            await send(_shortened(error, length))
        except (TransportClosedError, TransportConnectionError):
            raise
        except Exception:  # whatever a transport refuses it with
            continue
        return
    await send(_shortened(error, _LENGTHS[-1]))


def _shortened(error: dict[str, Any], length: int) -> dict[str, Any]:
    """Return the beginning of an error that travels: its name, and so many characters of its text.

    What the library's own errors are known by is kept; the exception's fields, its traceback and
    its causes are not.
    """
    name_length = min(length, _MAX_NAME)
    short: dict[str, Any] = {"n": error["n"][:name_length], "m": _beginning(error["m"], length)}
    if "rpc_error" in error:
        short.update((key, error[key]) for key in ("rpc_error", "at", "phase") if key in error)
    if error.get("rpc_error") == "validation":
        short["method"] = error["method"][:name_length]
        short["issues"] = [_beginning("; ".join(error["issues"]), length)]
    return short


def _beginning(text: str, length: int) -> str:
    more = len(text) - length
    return text if more <= 0 else f"{text[:length]} ... ({more} more characters)"


def library_error(exc: RPCError) -> dict[str, Any]:
    """Return what travels for an error that this library raised in place of a handler's.

    What somebody's code raised where a value was read travels as if it were a handler's.
    """
    if isinstance(exc, RemoteError):
        return handler_error(exc)
    if isinstance(exc, RPCValidationError):
        return {
            "n": "RPCValidationError",
            "m": str(exc),
            "rpc_error": "validation",
            "phase": exc.phase,
            "method": exc.method,
            "issues": exc.issues,
        }
    for cls in type(exc).__mro__:
        if cls in _CODE_OF:
            return {"n": cls.__name__, "m": str(exc), "rpc_error": _CODE_OF[cls]}
    return {"n": type(exc).__name__, "m": str(exc)}


def is_bare(error: dict[str, Any]) -> bool:
    """Whether an error stands for a value that a reader of kkrpc raised, and that is no error."""
    return error.get("rpc_error") == BARE


def unraised(error: dict[str, Any]) -> dict[str, Any]:
    """Return what tells a reader that its error could not be raised in a source that isn't a
    generator.
    """
    if not is_bare(error):
        return error
    return {"n": "Error", "m": f"Error: {error.get('m')}", "rpc_error": BARE}


def error_from_wire(error: dict[str, Any]) -> RPCError:
    """Return the exception that a received error stands for."""
    code = error.get("rpc_error")
    message = _string(error.get("m"), "")
    if code == "validation":
        issues = error.get("issues")
        return RPCValidationError(
            _string(error.get("phase"), "input"),
            _string(error.get("method"), ""),
            [_issue(issue) for issue in issues] if isinstance(issues, list) else [message],
        )
    if isinstance(code, str) and code in _CODES:
        return _CODES[code](message)
    top = _remote(error)
    exc: RemoteError = top
    for _ in range(_MAX_CAUSES):
        cause = error.get("cause")
        if not isinstance(cause, dict) or not isinstance(cause.get("n"), str):
            break
        exc.__cause__ = inner = _remote(cause)
        error, exc = cause, inner
    return top


def _remote(error: dict[str, Any]) -> RemoteError:
    data = {key: value for key, value in error.items() if key not in _RESERVED}
    trace = error.get("s")
    return RemoteError(
        _string(error.get("n"), "Error")[:_MAX_NAME],
        _string(error.get("m"), ""),
        data,
        trace if isinstance(trace, str) else None,
    )


def _issue(value: Any) -> str:
    """Return an issue as text. TypeScript peers have objects."""
    try:
        return str(value)
    except Exception:  # too many digits, or nested too deep
        return f"<{type(value).__name__}>"


def _string(value: Any, default: str) -> str:
    return value if isinstance(value, str) else default
