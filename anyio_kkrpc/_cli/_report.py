"""What a command says when it fails: one line and an exit code."""

from __future__ import annotations

import re
import sys

from .._exceptions import (
    CallCancelledError,
    CallNotFoundError,
    DeliveryError,
    KeyConflictError,
    MethodNotFoundError,
    OverloadedError,
    RemoteError,
    RPCError,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from .._runtime._log import quoted

# Exit codes beside 0, 2 (wrong usage) and 130 (interrupted).
EXIT_CODES: dict[type[Exception], int] = {
    RemoteError: 1,
    MethodNotFoundError: 3,
    RPCValidationError: 3,
    OverloadedError: 3,
    RPCTimeoutError: 4,
    TransportConnectionError: 5,
    TransportClosedError: 5,
    DeliveryError: 5,
    CallNotFoundError: 2,
    CallCancelledError: 3,
    KeyConflictError: 3,
}


class WorkerError(Exception):
    """Workers can't be started."""


class NotReadyError(Exception):
    """Workers don't take calls."""


def report(exc: Exception) -> int:
    """Write one line about an error; return the exit code."""
    text, code = str(exc), 1
    usage = getattr(exc, "format_message", None)  # typer's errors have no public base class
    if usage is not None:
        text, code = f"{usage()} (--help tells more)", 2
        if re.search(r"No such option: -\.?\d", text):
            text = text.replace("--help", "put -- before what begins with a dash; --help")
        if type(exc).__name__ == "NoArgsIsHelpError":  # the help has been printed
            return 2
    elif isinstance(exc, RPCError):
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(exc, kind)), 1)
    elif isinstance(exc, (ValueError, TypeError, LookupError, ImportError)):
        code = 2
    elif not isinstance(exc, (OSError, WorkerError, NotReadyError)):
        from ..testing import ServerError

        if not isinstance(exc, ServerError):
            text = f"{type(exc).__name__}: {text} (--debug shows where)"
    line = quoted(" ".join(text.split()))
    sys.stderr.write(f"anyio-kkrpc: {line}\n")
    return code
