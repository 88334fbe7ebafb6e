"""Exceptions as they travel, and back.

On the wire an error is ``n`` (name), ``m`` (message), ``s`` (traceback, only if asked for) and the
exception's own public fields beside them, as in kkrpc. Ours adds ``cause`` (such an error again)
and ``rpc_error``, which marks errors that the library itself raised at the other side.
"""

from __future__ import annotations

import traceback as traceback_module
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
)

_RESERVED = frozenset({"n", "m", "s", "cause", "rpc_error"})
_MAX_CAUSES = 8
_MAX_NAME = 200

_CODES: dict[str, type[RPCError]] = {
    "method_not_found": MethodNotFoundError,
    "overloaded": OverloadedError,
    "delivery": DeliveryError,
    "timeout": RPCTimeoutError,
}


def handler_error(exc: BaseException, *, traceback: bool = False) -> dict[str, Any]:
    """Return what travels for an exception that a handler raised."""
    error = _one(exc)
    if traceback:
        error["s"] = "".join(traceback_module.format_exception(exc))
    inner, target = exc.__cause__, error
    for _ in range(_MAX_CAUSES):
        if inner is None:
            break
        target["cause"] = target = _one(inner)
        inner = inner.__cause__
    return error


def brief_error(error: dict[str, Any]) -> dict[str, Any]:
    """Return the least of an error that still tells what it was, for one that can't be sent."""
    brief: dict[str, Any] = {"n": _plain(error["n"]), "m": _plain(error["m"])}
    if "rpc_error" in error:
        brief["rpc_error"] = error["rpc_error"]
    return brief


def _plain(text: str) -> str:
    text = text[:_MAX_NAME]
    return text.encode(errors="backslashreplace").decode()


def _one(exc: BaseException) -> dict[str, Any]:
    if isinstance(exc, RemoteError):
        fields = {"n": exc.name, "m": exc.message}
        own = exc.data
    else:
        fields = {"n": type(exc).__name__, "m": _text(exc)}
        own = {key: value for key, value in vars(exc).items() if not key.startswith("_")}
    for key, value in own.items():
        if key not in _RESERVED:
            try:
                fields[key] = msgspec.json.decode(msgspec.json.encode(value))
            except Exception:  # a field that can't travel stays behind
                continue
    return fields


def _text(exc: BaseException) -> str:
    if type(exc) is KeyError and len(exc.args) == 1 and isinstance(exc.args[0], str):
        return exc.args[0]  # str() of it would show the repr of the key
    try:
        text = str(exc)
        # A lone surrogate has no bytes on the wire.
        return text if text.isascii() else text.encode(errors="backslashreplace").decode()
    except Exception:  # a broken __str__ must not hide the error itself
        return f"<{type(exc).__name__} whose text can't be made>"


def library_error(exc: RPCError) -> dict[str, Any]:
    """Return what travels for an error that this library raised in place of a handler's."""
    if isinstance(exc, RPCValidationError):
        return {
            "n": "RPCValidationError",
            "m": str(exc),
            "rpc_error": "validation",
            "phase": exc.phase,
            "method": exc.method,
            "issues": exc.issues,
        }
    for code, cls in _CODES.items():
        if isinstance(exc, cls):
            return {"n": cls.__name__, "m": str(exc), "rpc_error": code}
    return {"n": type(exc).__name__, "m": str(exc)}


def error_from_wire(error: dict[str, Any]) -> RPCError:
    """Return the exception that a received error stands for."""
    code = error.get("rpc_error")
    message = _string(error.get("m"), "")
    if code == "validation":
        issues = error.get("issues")
        return RPCValidationError(
            _string(error.get("phase"), "input"),
            _string(error.get("method"), ""),
            [str(issue) for issue in issues] if isinstance(issues, list) else [message],
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


def _string(value: Any, default: str) -> str:
    return value if isinstance(value, str) else default
