"""Exception groups at the public context managers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


@contextmanager
def lone_error() -> Iterator[None]:
    """Let an error that is alone in the group of a task group arrive as itself.

    One level is taken off: a group that the user's own code raised stays a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        error = group.exceptions[0]
    else:
        return
    # Raised here, where the group isn't being handled, so that it keeps its own context and cause.
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context
