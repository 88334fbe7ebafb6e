"""Exception groups at the public context managers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


@contextmanager
def lone_error() -> Iterator[None]:
    """Let an error that is alone in the exception group of a task group arrive as itself.

    One level is taken off: an exception group that the user's own code raised stays one.
    """
    try:
        yield
    except BaseExceptionGroup as several:
        if len(several.exceptions) != 1:
            raise
        error = several.exceptions[0]
    else:
        return
    # Raised here, where that isn't being handled, so that it keeps its own context and cause.
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context
