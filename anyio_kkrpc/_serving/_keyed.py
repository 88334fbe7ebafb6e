"""What is different for the handler of a call that has a key."""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec.structs import replace

from .._driver._context import CallInfo
from .._references._marking import USE, has_references
from ..abc import Envelope, KeyedCalls

__all__ = ("refuse_stream", "with_key")


def with_key(info: CallInfo, envelope: Envelope, keeps: KeyedCalls | None) -> CallInfo:
    """Return what a handler can learn of its call, with the key, and a way to tell of progress."""
    report = None if keeps is None else partial(keeps.report, envelope)
    return replace(info, key=envelope.key, _report=report)


def refuse_stream(value: Any) -> None:
    """Refuse a stream or references as the result: they would end with this process, and the key
    would not.

    :raises TypeError: if it is or has one
    """
    if hasattr(type(value), "__aiter__"):
        raise TypeError("a call with a key can't return a stream")
    if USE.begun and has_references(value):
        raise TypeError("a call with a key can't return references")
