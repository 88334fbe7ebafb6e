"""Errors that are raised more than once."""

from __future__ import annotations

import copy
from typing import TypeVar

E = TypeVar("E", bound=Exception)


def fresh_copy(exc: E) -> E:
    """Return an exception like ``exc`` to raise: one that is raised again and again would collect
    tracebacks, and tie those who caught it together.
    """
    try:
        new = copy.copy(exc)
    except Exception:  # its constructor takes something else than its args
        return exc.with_traceback(None)
    if type(new) is not type(exc):
        return exc.with_traceback(None)
    new.__cause__ = exc.__cause__
    return new
