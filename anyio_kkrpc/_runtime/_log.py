"""Texts that come from elsewhere, in the log and in errors: they stay one line, and are only text.

What other peers and servers write may hold newlines, after which it would look like a line of the
log of its own, and escape sequences, which a terminal obeys. `quoted` is the one way to quote them.
Whatever is given to the library's logger is quoted by `QuotingFilter`, so no place that logs has to
know where its texts come from.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

# Characters that a text in the log or in an error may have.
LIMIT = 1000
_INDENT = "    "


def quoted(value: object, limit: int = LIMIT) -> str:
    """Return the beginning of a text, with escapes in place of what can't be printed.

    :param limit: characters of the text that are shown
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit} more characters)"
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class _Quoted:
    """An argument of a log record, quoted once it is formatted."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return quoted(self._value)

    def __repr__(self) -> str:
        return quoted(repr(self._value))


class QuotingFilter(logging.Filter):
    """Quotes all that a log record shows; where nothing is to be quoted, nothing changes."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = quoted(record.msg)
        if isinstance(record.args, Mapping):
            record.args = {key: _wrapped(value) for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(map(_wrapped, record.args))
        exc = record.exc_info[1] if record.exc_info else None
        if exc is not None and not _is_plain(exc, set()):
            lines = "".join(traceback.format_exception(exc)).rstrip("\n").split("\n")
            # Indented, so that each line is seen to belong to this record.
            record.exc_text = "\n".join(_INDENT + quoted(line) for line in lines)
        return True


def _wrapped(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float)) else _Quoted(value)


def _is_plain(exc: BaseException | None, seen: set[int]) -> bool:
    """Whether an exception, and those that are told with it, have texts of one line."""
    if exc is None or id(exc) in seen:
        return True
    seen.add(id(exc))
    texts = traceback.format_exception_only(exc)
    inner = getattr(exc, "exceptions", ())
    others = (exc.__cause__, exc.__context__, *inner)
    # One text ends in its only newline, and so does each note.
    return "".join(text.removesuffix("\n") for text in texts).isprintable() and all(
        _is_plain(other, seen) for other in others
    )
