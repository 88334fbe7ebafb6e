"""Values that came over the wire, converted to the annotations of a function.

msgspec does it, and pydantic where an annotation holds one of its models.
"""

from __future__ import annotations

import datetime
import decimal
import inspect
import re
import types
import typing
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import astuple

from ._exceptions import RPCValidationError
from ._models import ModelKind, Unfit, mentions_model, plain
from ._protocol._values import PLAIN, is_stream

AWAITABLES = (Awaitable, Coroutine)
_NATIVE = (
    bytes, bytearray, datetime.datetime, datetime.date, datetime.time, datetime.timedelta,
    uuid.UUID, decimal.Decimal,
)  # fmt: skip
_INDEX = re.compile(r"\$\[(\d+)\]")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class StreamKind:
    """Takes streams only, whose items are converted as they are read."""

    __slots__ = ("_item",)

    def __init__(self, annotation: Any) -> None:
        self._item = _item_of(annotation)

    def convert(self, value: Any, name: str) -> Any:
        """Return the stream.

        :raises Unfit: if it isn't one
        """
        if not is_stream(value):
            raise Unfit([("", f"Expected a stream, got `{type(value).__name__}`")])
        value._inflow.convert_items(self._item, name, "input")
        return value


def _is_stream_type(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, AsyncIterable)


def _item_of(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return checkable(arguments[0]) if arguments else Any


def checkable(annotation: Any) -> Any:
    """Return what `convert_value` takes for an annotation; `Any` if nothing can be checked."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return Any
    try:
        if mentions_model(annotation):
            return ModelKind(annotation)
        msgspec.json.Decoder(annotation)
        msgspec.convert(None, annotation)
    except msgspec.ValidationError:
        return annotation
    except Exception:  # whatever they make of an annotation that isn't a type
        return Any
    return annotation


def annotations_of(thing: Any) -> dict[str, Any]:
    """Return the resolved annotations of a function or class; none if they don't resolve."""
    try:
        return typing.get_type_hints(thing, include_extras=True)
    except Exception:  # a name that exists for type checkers only, say
        return {}


def unwrap(annotation: Any, origins: tuple[Any, ...]) -> Any:
    """Return what an annotation such as ``Awaitable[T]`` holds, or itself."""
    if typing.get_origin(annotation) in origins:
        return typing.get_args(annotation)[-1]
    return annotation


def result_of(function: Any) -> tuple[Any, Any]:
    """Return what can be checked of a function's results, and of the items if it is a stream."""
    result = unwrap(annotations_of(function).get("return", Any), AWAITABLES)
    if typing.get_origin(result) is AbstractAsyncContextManager:
        result = typing.get_args(result)[0]  # a Protocol's way to say that a stream is closed
    if _is_stream_type(result):
        return Any, _item_of(result)
    return checkable(result), Any


def _argument_kind(annotation: Any) -> Any:
    return StreamKind(annotation) if _is_stream_type(annotation) else checkable(annotation)


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
        "_rest",
        "_signature",
        "_types",
    )

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        signature = self._signature = signature_of(function)
        target = function
        if isinstance(function, type):
            target = function.__init__  # type: ignore[misc]
        hints = annotations_of(getattr(target, "__func__", target))
        parameters = [] if signature is None else list(signature.parameters.values())
        checked = {p.name: _argument_kind(hints.get(p.name, Any)) for p in parameters}
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._names = [p.name for p in positional]
        self._types = [checked[p.name] for p in positional]
        self._rest: Any = None
        for p in parameters:
            if p.kind is inspect.Parameter.VAR_POSITIONAL:
                self._rest = checked[p.name]
        self._keywords = checked
        required = [p for p in positional if p.default is inspect.Parameter.empty]
        self._minimum = len(required)
        self._maximum = len(positional)
        if signature is None or any(
            p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty
            for p in parameters
        ):
            self._maximum = -1  # never the short way
        if any(isinstance(kind, (ModelKind, StreamKind)) for kind in self._types):
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
                return astuple(msgspec.convert(args, kind)), kwargs
            except msgspec.ValidationError as exc:
                raise self._error(self._locate(str(exc))) from None
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
                if isinstance(kind, StreamKind):
                    return kind.convert(value, self._name)
                return value if kind is Any else _convert(value, kind)
            except Unfit as exc:
                issues.extend(_at(name + path, message) for path, message in exc.args[0])

        variadic = next(
            (p.name for p in self._signature.parameters.values() if p.kind is p.VAR_KEYWORD), ""
        )
        args = [
            one(name, value, kind) for name, value, kind in zip(names, args, types_, strict=False)
        ]
        kwargs = {
            name: one(name, value, self._keywords.get(name, self._keywords.get(variadic, Any)))
            for name, value in kwargs.items()
        }
        if issues:
            raise self._error(*issues)
        return args, kwargs

    def _locate(self, text: str) -> str:
        return _INDEX.sub(lambda match: self._names[int(match[1])], text, count=1)

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
        return _convert(value, kind)
    except Unfit as exc:
        issues = [_at(f"${path}", message) for path, message in exc.args[0]]
        raise RPCValidationError(phase, name, issues) from None


def check_own(value: Any, kind: Any, name: str) -> Any:
    """Return a value that goes out: itself if it fits the annotation, or what pydantic makes of it.

    :raises RPCValidationError: if it doesn't fit
    """
    if kind is Any or (value.__class__ is kind and kind in PLAIN):
        return value
    if isinstance(kind, ModelKind):
        return convert_value(value, kind, name, "output")
    try:
        # As the other side will see it: msgspec takes an instance of the right class unseen.
        seen = msgspec.to_builtins(value, builtin_types=_NATIVE, enc_hook=plain)
    except (TypeError, ValueError, RecursionError):
        seen = value  # whether it can be sent is for the codec to say
    convert_value(seen, kind, name, "output")
    return value


def _convert(value: Any, kind: Any) -> Any:
    if isinstance(kind, ModelKind):
        return kind.convert(value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        message, _, path = str(exc).partition(" - at `$")
        raise Unfit([(path.rstrip("`"), message)]) from None


def _at(path: str, message: str) -> str:
    return message if path == "$" else f"{message} - at `{path}`"


def is_module(value: object) -> bool:
    """Whether the value is a module."""
    return isinstance(value, types.ModuleType)
