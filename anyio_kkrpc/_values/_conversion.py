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
from msgspec import Struct
from msgspec.structs import astuple

from .._exceptions import RPCValidationError
from .._protocol._values import PLAIN, is_stream
from ._alike import KeyGuard
from ._pydantic import MOST_ISSUES, ModelKind, Unfit, decode, mentions_model, plain

AWAITABLES = (Awaitable, Coroutine)
_NATIVE = (
    bytes, bytearray, datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
    uuid.UUID, decimal.Decimal,
)  # fmt: skip
# The end of a message of msgspec's, and whether it is about a key of a dict.
_PATH = re.compile(r"(.*) - at (`key` in )?`\$(.*)`", re.DOTALL)
_INDEX = re.compile(r"\[(\d+)\](.*)", re.DOTALL)
logger = logging.getLogger("anyio_kkrpc")
_UNIONS = (typing.Union, types.UnionType)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


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
        return _convert(value, self.kind, name, phase)


def _stream_kind(annotation: Any) -> StreamKind | None:
    """Return what a stream is checked by, ``None`` for an annotation of something else."""
    origin = typing.get_origin(annotation)
    if origin in _UNIONS:
        members = [one for one in typing.get_args(annotation) if one is not type(None)]
        if len(members) == 1 and _stream_kind(members[0]) is not None:
            return StreamKind(members[0], optional=True)
        return None
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, AsyncIterable):
        return StreamKind(annotation)
    return None


def _item_of(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return checkable(arguments[0]) if arguments else Any


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


def annotations_of(thing: Any) -> dict[str, Any]:
    """Return the resolved annotations of a function or class.

    One that doesn't resolve, as of a name that is there for type checkers only, is left out, with
    a warning: what isn't known can't be checked.
    """
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except Exception:  # whatever evaluating them raises
        return _resolve_each(thing)


def _resolve_each(thing: Any) -> dict[str, Any]:
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


def hints_of(function: Any) -> dict[str, Any]:
    """Return the resolved annotations of something that can be called, see `annotations_of`."""
    return annotations_of(_annotated(function))


def result_of(hints: dict[str, Any]) -> tuple[Any, Any]:
    """Return what can be checked of a function's results, and of the items if it is a stream."""
    result = unwrap(hints.get("return", Any), AWAITABLES)
    if typing.get_origin(result) is AbstractAsyncContextManager:
        result = typing.get_args(result)[0]  # a Protocol's way to say that a stream is closed
    stream = _stream_kind(result)
    return (checkable(result), Any) if stream is None else (stream, stream.item)


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature, or ``None`` for builtins that don't tell it."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


class ArgumentConverter:
    """Checks and converts the arguments of one function; made once, when it is exposed."""

    __slots__ = (
        "_by_count",
        "_keywords",
        "_maximum",
        "_minimum",
        "_name",
        "_names",
        "_others",
        "_rest",
        "_signature",
        "_types",
    )

    def __init__(self, name: str, function: Callable[..., Any], hints: dict[str, Any]) -> None:
        self._name = name
        signature = self._signature = signature_of(function)
        parameters = [] if signature is None else list(signature.parameters.values())
        annotations = {p.name: hints.get(p.name, Any) for p in parameters}
        checked = {
            name: _stream_kind(annotation) or checkable(annotation)
            for name, annotation in annotations.items()
        }
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._names = [p.name for p in positional]
        self._types = [checked[p.name] for p in positional]
        self._rest: Any = Any
        self._others: Any = Any
        for p in parameters:
            if p.kind is inspect.Parameter.VAR_POSITIONAL:
                self._rest = checked[p.name]
            elif p.kind is inspect.Parameter.VAR_KEYWORD:
                self._others = checked[p.name]
        self._keywords = {p.name: checked[p.name] for p in parameters if p.kind in _BY_NAME}
        required = [p for p in positional if p.default is inspect.Parameter.empty]
        self._minimum = len(required)
        self._maximum = len(positional)
        if signature is None or any(
            p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty
            for p in parameters
        ):
            self._maximum = -1  # never the short way
        if any(isinstance(kind, (ModelKind, StreamKind, GuardedKind)) for kind in self._types):
            self._maximum = -1
        # What a number of arguments is converted to; None where nothing is to be checked.
        self._by_count: dict[int, type[Struct] | None] = {
            n: _struct_of(self._types[:n]) for n in range(self._minimum, self._maximum + 1)
        }

    def convert(
        self, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[typing.Sequence[Any], dict[str, Any]]:
        """Return the arguments as annotated.

        :raises RPCValidationError: if they don't fit the signature or its annotations
        """
        count = len(args)
        if not kwargs and self._minimum <= count <= self._maximum:
            kind = self._by_count[count]
            if kind is None:
                return args, kwargs
            try:
                return astuple(_by_msgspec(args, kind)), kwargs
            except msgspec.ValidationError as exc:
                raise self._error(self._locate(*_split(exc))) from None
        return self._convert_each(args, kwargs)

    def _convert_each(
        self, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        if self._signature is None:
            return args, kwargs
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise self._error(str(exc)) from None
        types_ = self._types + [self._rest] * (len(args) - len(self._types))
        names = self._names + [f"[{n}]" for n in range(len(self._names), len(args))]
        issues: list[str] = []

        def one(name: str, value: Any, kind: Any) -> Any:
            try:
                return value if kind is Any else _convert(value, kind, self._name, "input")
            except Unfit as exc:
                issues.extend(_at(name + path, message) for path, message in exc.args[0])
                if len(issues) > MOST_ISSUES:
                    raise self._error(*issues[:MOST_ISSUES], "...") from None

        args = [
            one(name, value, kind) for name, value, kind in zip(names, args, types_, strict=False)
        ]
        kwargs = {
            name: one(name, value, self._keywords.get(name, self._others))
            for name, value in kwargs.items()
        }
        if issues:
            raise self._error(*issues)
        return args, kwargs

    def _locate(self, message: str, path: str) -> str:
        """Return the message with the argument that a path such as ``[0].x`` begins with."""
        found = _INDEX.fullmatch(path)
        return message if found is None else _at(self._names[int(found[1])] + found[2], message)

    def _error(self, *issues: str) -> RPCValidationError:
        return RPCValidationError("input", self._name, list(issues))


def _struct_of(types_: list[Any]) -> type[Struct] | None:
    # A class and not a tuple type: msgspec keeps what it learns of classes only.
    if all(kind is Any for kind in types_):
        return None
    fields = [(f"argument{n}", kind) for n, kind in enumerate(types_)]
    return msgspec.defstruct("Arguments", fields, array_like=True)


def convert_value(value: Any, kind: Any, name: str, phase: str) -> Any:
    """Return one value as annotated.

    :raises RPCValidationError: if it doesn't fit
    """
    if kind is Any:
        return value
    try:
        return _convert(value, kind, name, phase)
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
        except (TypeError, ValueError, RecursionError):
            seen = value  # whether it can be sent is for the codec to say
        _convert(seen, kind, name, "output")
    except Unfit as exc:
        raise UnfitResultError("output", name, _issues(exc)) from None
    return value


def _convert(value: Any, kind: Any, name: str, phase: str) -> Any:
    if isinstance(kind, ModelKind):
        return kind.convert(value)
    if isinstance(kind, (StreamKind, GuardedKind)):
        return kind.convert(value, name, phase)
    if is_stream(value) and kind is not object:
        raise Unfit([("", "Expected a value, got a stream")])
    try:
        return _by_msgspec(value, kind)
    except msgspec.ValidationError as exc:
        message, path = _split(exc)
        raise Unfit([(path, message)]) from None


def _by_msgspec(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        # Keys that JSON made text of, and models in fields, take more than twice the time.
        return msgspec.convert(value, kind, dec_hook=decode, str_keys=True)


def _split(exc: msgspec.ValidationError) -> tuple[str, str]:
    """Return the message without its path, and the path, such as ``[0].x``.

    A message may hold the wrong value, which may look like a path: the real one is the last.
    """
    found = _PATH.fullmatch(str(exc))
    if found is None:
        return str(exc), ""
    return (f"{found[1]} as a key" if found[2] else found[1]), found[3]


def _issues(exc: Unfit) -> list[str]:
    return [_at(f"${path}", message) for path, message in exc.args[0]]


def _at(path: str, message: str) -> str:
    return message if path == "$" else f"{message} - at `{path}`"


def is_module(value: object) -> bool:
    """Whether the value is a module."""
    return isinstance(value, types.ModuleType)
