"""Values that came over the wire, converted to the annotations of a function by msgspec."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from ._exceptions import RPCValidationError

_INDEX = re.compile(r"\$\[(\d+)\]")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def checkable(annotation: Any) -> Any:
    """Return the annotation, or `Any` if msgspec can't check values against it."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return Any
    try:
        msgspec.json.Decoder(annotation)
        msgspec.convert(None, annotation)
    except msgspec.ValidationError:
        return annotation
    except Exception:  # whatever msgspec makes of an annotation that isn't a type
        return Any
    return annotation


def annotations_of(thing: Any) -> dict[str, Any]:
    """Return the resolved annotations of a function or class; none if they don't resolve."""
    try:
        return typing.get_type_hints(thing)
    except Exception:  # a name that exists for type checkers only, say
        return {}


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
        checked = {p.name: checkable(hints.get(p.name, Any)) for p in parameters}
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
        # For each number of arguments the type of their tuple; None where nothing is to be checked.
        self._by_count: dict[int, Any] = {
            n: tuple[tuple(self._types[:n])]  # type: ignore[misc]
            if any(t is not Any for t in self._types[:n])
            else None
            for n in range(self._minimum, self._maximum + 1)
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
                return msgspec.convert(args, kind), kwargs
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
                return value if kind is Any else msgspec.convert(value, kind)
            except msgspec.ValidationError as exc:
                issues.append(str(exc).replace("`$", f"`{name}") + _at(name, str(exc)))

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


def _at(name: str, text: str) -> str:
    return "" if "`$" in text else f" - at `{name}`"


def convert_value(value: Any, kind: Any, name: str, phase: str) -> Any:
    """Return one value as annotated.

    :raises RPCValidationError: if it doesn't fit
    """
    if kind is Any:
        return value
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise RPCValidationError(phase, name, [str(exc)]) from None


def is_module(value: object) -> bool:
    """Whether the value is a module."""
    return isinstance(value, types.ModuleType)
