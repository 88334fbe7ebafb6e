"""Values that came over the wire, converted to the annotations of a function.

msgspec does it, and pydantic where an annotation holds one of its models.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import inspect
import logging
import re
import sys
import types
import typing
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .._exceptions import RPCValidationError
from .._protocol._values import PLAIN, is_stream
from ._alike import KeyGuard
from ._pydantic import ModelKind, Unfit, decode, mentions_model, plain
from ._undefined import UndefinedInsideError, defined

AWAITABLES = (Awaitable, Coroutine)
_NATIVE = (
    bytes, bytearray, datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
    uuid.UUID, decimal.Decimal,
)  # fmt: skip
# The end of a message of msgspec's, and whether it is about a key of a dict.
_PATH = re.compile(r"(.*) - at (`key` in )?`\$(.*)`", re.DOTALL)
logger = logging.getLogger("anyio_kkrpc")
UNIONS = (typing.Union, types.UnionType)


class UnfitResultError(RPCValidationError):
    """What this side's own code made doesn't fit its annotation."""


class StreamKind:
    """Takes streams only, whose items are converted as they are read.

    :ivar item: what is checked of the items
    """

    __slots__ = ("_optional", "item")

    def __init__(self, annotation: Any, *, optional: bool = False) -> None:
        self.item = _item_of(annotation)
        self._optional = optional

    def check(self, value: Any) -> bool:
        """Whether it is a stream, and not the None that stands for none.

        :raises Unfit: if it is something else
        """
        if is_stream(value):
            return True
        if value is None and self._optional:
            return False
        raise Unfit([("", f"Expected a stream, got `{type(value).__name__}`")])

    def convert(self, value: Any, name: str, phase: str) -> Any:
        """Return a stream that came, or None; raises as `check`."""
        if self.check(value):
            convert_items(value, self.item, name, phase)
        return value


@functools.singledispatch
def convert_items(stream: Any, kind: Any, name: str, phase: str) -> None:
    """Have the items of a stream that came converted as they are read.

    Who makes streams of what comes registers here how that is done; others are left as they are.

    :param name: for errors, as ``phase``
    """


class GuardedKind:
    """Takes what may have many keys that hash alike, and looks at them first.

    :ivar kind: what it is converted to then
    """

    __slots__ = ("_guard", "kind")

    def __init__(self, kind: Any, guard: KeyGuard) -> None:
        self.kind = kind
        self._guard = guard

    def convert(self, value: Any, name: str, phase: str) -> Any:
        """Return the value as annotated.

        :raises Unfit: if it doesn't fit
        """
        self._guard.check(value)
        return convert(value, self.kind, name, phase)


def stream_kind(annotation: Any) -> StreamKind | None:
    """Return what a stream is checked by, ``None`` for an annotation of something else."""
    origin = typing.get_origin(annotation)
    if origin in UNIONS:
        members = [one for one in typing.get_args(annotation) if one is not type(None)]
        if len(members) == 1 and stream_kind(members[0]) is not None:
            return StreamKind(members[0], optional=True)
        return None
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, AsyncIterable):
        return StreamKind(annotation)
    return None


def _item_of(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return kind_of(arguments[0]) if arguments else Any


def kind_of(annotation: Any) -> Any:
    """Return what is checked of a value that may be a stream; `Any` if nothing can be checked."""
    return stream_kind(annotation) or checkable(annotation)


def checkable(annotation: Any) -> Any:
    """Return what `convert_value` takes for an annotation; `Any` if nothing can be checked."""
    kind = _kind_of(annotation)
    guard = None if kind is Any else KeyGuard.of(annotation)
    return kind if guard is None else GuardedKind(kind, guard)


def _kind_of(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty or annotation is Any:
        return Any
    try:
        if mentions_model(annotation):
            return ModelKind(annotation)
        msgspec.json.Decoder(annotation)
        msgspec.convert(None, annotation)
    except msgspec.ValidationError:
        return annotation
    except Exception as exc:  # whatever they make of an annotation that isn't a type
        if "pydantic" in sys.modules:  # it knows unions that msgspec can't tell apart
            try:
                return ModelKind(annotation)
            except Exception:  # nor does pydantic know it
                pass
        logger.warning("%s isn't checked: %s", annotation, exc)
        return Any
    return annotation


def annotations_of(thing: Any, *, quiet: bool = False) -> dict[str, Any]:
    """Return the resolved annotations of a function or class.

    One that doesn't resolve, as of a name that is there for type checkers only, is left out, with
    a warning: what isn't known can't be checked.

    :param quiet: whether nothing is said, as of functions that are made anew for each call
    """
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except Exception:  # whatever evaluating them raises
        return _resolve_each(thing, quiet=quiet)


def _resolve_each(thing: Any, *, quiet: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for owner in reversed(thing.__mro__) if isinstance(thing, type) else (inspect.unwrap(thing),):
        module = sys.modules.get(getattr(owner, "__module__", ""))
        try:
            raw = inspect.get_annotations(owner)
        except Exception:  # on Python 3.14 this evaluates them
            raw = {}
        for name, annotation in raw.items():
            one = types.SimpleNamespace(__annotations__={name: annotation})
            names = getattr(owner, "__globals__", None) or vars(module or types)
            try:
                found |= typing.get_type_hints(one, names, include_extras=True)
            except Exception as exc:
                if not quiet:
                    where = getattr(owner, "__qualname__", owner)
                    logger.warning("%s: %s isn't checked: %s", where, name, exc)
    return found


def _annotated(function: Any) -> Any:
    """Return what the annotations of something callable stand at."""
    if isinstance(function, functools.partial):
        return _annotated(function.func)
    if isinstance(function, type):
        # A Struct's constructor is made by msgspec and tells nothing.
        return function if issubclass(function, Struct) else function.__init__
    if inspect.isroutine(function):
        return getattr(function, "__func__", function)
    return type(function).__call__


def unwrap(annotation: Any, origins: tuple[Any, ...]) -> Any:
    """Return what an annotation such as ``Awaitable[T]`` holds, or itself."""
    if typing.get_origin(annotation) in origins:
        return typing.get_args(annotation)[-1]
    return annotation


def hints_of(function: Any, *, quiet: bool = False) -> dict[str, Any]:
    """Return the resolved annotations of something that can be called, see `annotations_of`."""
    return annotations_of(_annotated(function), quiet=quiet)


def result_of(hints: dict[str, Any]) -> tuple[Any, Any]:
    """Return what can be checked of a function's results, and of the items if it is a stream."""
    result = unwrap(hints.get("return", Any), AWAITABLES)
    if typing.get_origin(result) is AbstractAsyncContextManager:
        result = typing.get_args(result)[0]  # a Protocol's way to say that a stream is closed
    stream = stream_kind(result)
    return (checkable(result), Any) if stream is None else (stream, stream.item)


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature, or ``None`` for builtins that don't tell it."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def convert_value(value: Any, kind: Any, name: str, phase: str) -> Any:
    """Return one value as annotated.

    :raises RPCValidationError: if it doesn't fit
    """
    if kind is Any:
        return value
    try:
        return convert(value, kind, name, phase)
    except Unfit as exc:
        raise RPCValidationError(phase, name, _issues(exc)) from None
    except Exception as exc:  # a validator of the user's that fails in a way of its own
        raise RPCValidationError(phase, name, [f"{type(exc).__name__}: {exc}"]) from exc


def check_own(value: Any, kind: Any, name: str) -> Any:
    """Return a value that goes out: itself if it fits the annotation, or what a model makes of it.

    :raises UnfitResultError: if it doesn't fit
    """
    if kind is Any or (value.__class__ is kind and kind in PLAIN):
        return value
    try:
        return fit_own(value, kind, name, "output")
    except Unfit as exc:
        raise UnfitResultError("output", name, _issues(exc)) from None


def fit_own(value: Any, kind: Any, name: str, phase: str) -> Any:
    """Return a value that goes out, as `check_own` does.

    :raises Unfit: if it doesn't fit
    """
    if isinstance(kind, GuardedKind):
        kind = kind.kind  # this side has made its own sets and dicts already
    if isinstance(kind, ModelKind):
        return kind.dump(value)
    if isinstance(kind, StreamKind):
        kind.check(value)
        return value
    try:
        # As the other side will see it: msgspec takes an instance of the right class unseen.
        seen = msgspec.to_builtins(value, builtin_types=_NATIVE, enc_hook=plain)
    except UndefinedInsideError:
        seen = defined(value)
    except (TypeError, ValueError, RecursionError):
        seen = value  # whether it can be sent is for the codec to say
    convert(seen, kind, name, phase)
    return value


def convert(value: Any, kind: Any, name: str, phase: str) -> Any:
    """Return a value as annotated; without what is undefined in it, where that doesn't fit.

    :raises Unfit: if it doesn't fit
    """
    try:
        if isinstance(kind, ModelKind):
            return kind.convert(value)
        if isinstance(kind, (StreamKind, GuardedKind)):
            return kind.convert(value, name, phase)
        if is_stream(value) and kind is not object:
            raise Unfit([("", "Expected a value, got a stream")])
        try:
            return by_msgspec(value, kind)
        except msgspec.ValidationError as exc:
            message, path = split(exc)
            raise Unfit([(path, message)]) from None
    except Unfit:
        if value is UNSET and UnsetType in typing.get_args(kind):
            return value
        plainer = defined(value)
        if plainer is value:
            raise
    return convert(plainer, kind, name, phase)


def by_msgspec(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        # Keys that JSON made text of, and models in fields, take more than twice the time.
        return msgspec.convert(value, kind, dec_hook=decode, str_keys=True)


def split(exc: msgspec.ValidationError) -> tuple[str, str]:
    """Return the message without its path, and the path, such as ``[0].x``.

    A message may hold the wrong value, which may look like a path: the real one is the last.
    """
    found = _PATH.fullmatch(str(exc))
    if found is None:
        return str(exc), ""
    return (f"{found[1]} as a key" if found[2] else found[1]), found[3]


def _issues(exc: Unfit) -> list[str]:
    return [located(f"${path}", message) for path, message in exc.args[0]]


def located(path: str, message: str) -> str:
    return message if path == "$" else f"{message} - at `{path}`"


def is_module(value: object) -> bool:
    """Whether the value is a module."""
    return isinstance(value, types.ModuleType)
