"""The arguments of a call, converted to the annotations of the function that it is for."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import astuple

from .._exceptions import RPCValidationError
from ._callbacks import CallbackKind, callback_kind
from ._conversion import (
    GuardedKind,
    StreamKind,
    by_msgspec,
    checkable,
    convert,
    located,
    signature_of,
    split,
    stream_kind,
)
from ._pydantic import MOST_ISSUES, ModelKind, Unfit
from ._undefined import defined

# What msgspec takes as it is if it is asked for, and makes of nothing else.
_EXACT = frozenset((str, int, float, bool, bytes))
_INDEX = re.compile(r"\[(\d+)\](.*)", re.DOTALL)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class ArgumentConverter:
    """Checks and converts the arguments of one function; made once, when it is exposed.

    :ivar exact: by the number of arguments given by place, the classes that make them what was
        asked for as they are, where there are such
    """

    __slots__ = (
        "_by_count",
        "_defaults",
        "_keywords",
        "_maximum",
        "_minimum",
        "_name",
        "_names",
        "_others",
        "_rest",
        "_signature",
        "_types",
        "exact",
    )

    def __init__(self, name: str, function: Callable[..., Any], hints: dict[str, Any]) -> None:
        self._name = name
        signature = self._signature = signature_of(function)
        parameters = [] if signature is None else list(signature.parameters.values())
        annotations = {p.name: hints.get(p.name, Any) for p in parameters}
        checked = {
            name: stream_kind(annotation)
            or callback_kind(annotation, name)
            or checkable(annotation)
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
        empty = inspect.Parameter.empty
        self._defaults = {p.name: p.default for p in parameters if p.default is not empty}
        required = [p for p in positional if p.default is empty]
        self._minimum = len(required)
        self._maximum = len(positional)
        if signature is None or any(
            p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is empty for p in parameters
        ):
            self._maximum = -1  # never the short way
        if any(
            isinstance(kind, (ModelKind, StreamKind, GuardedKind, CallbackKind))
            for kind in self._types
        ):
            self._maximum = -1
        # What a number of arguments is converted to; None where nothing is to be checked.
        self._by_count: dict[int, type[Struct] | None] = {
            n: _struct_of(self._types[:n]) for n in range(self._minimum, self._maximum + 1)
        }
        self.exact: dict[int, list[Any]] = {
            n: self._types[:n] for n in self._by_count if all(map(_is_exact, self._types[:n]))
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
            if kind is None or [*map(type, args)] == self.exact.get(count):
                return args, kwargs
            try:
                return astuple(by_msgspec(args, kind)), kwargs
            except msgspec.ValidationError as exc:
                if defined(args) is args:
                    raise self._error(self._locate(*split(exc))) from None
        return self._convert_each(args, kwargs)

    def without_undefined(
        self, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments without those that are undefined and have a default, as in JavaScript.

        Those behind one that is left out are given by name, as far as they have one.
        """
        names, defaults = self._names, self._defaults
        kept = {name: v for name, v in kwargs.items() if v is not UNSET or name not in defaults}
        for index, name in enumerate(names[: len(args)]):
            if args[index] is not UNSET or name not in defaults:
                continue
            later = names[index + 1 :]
            if len(args) > len(names) or not all(one in self._keywords for one in later):
                args = [*args[:index], defaults[name], *args[index + 1 :]]
                continue
            by_name = dict(zip(later, args[index + 1 :], strict=False))
            return self.without_undefined(args[:index], {**by_name, **kept})
        return args, kept

    def trust_callbacks(self) -> None:
        """Don't check what functions that come are called with."""
        for kind in (*self._types, *self._keywords.values(), self._rest, self._others):
            if isinstance(kind, CallbackKind):
                kind.arguments = None

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
                if isinstance(kind, CallbackKind):
                    return kind.convert(value, self._name)
                return value if kind is Any else convert(value, kind, self._name, "input")
            except Unfit as exc:
                issues.extend(located(name + path, message) for path, message in exc.args[0])
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
        return message if found is None else located(self._names[int(found[1])] + found[2], message)

    def _error(self, *issues: str) -> RPCValidationError:
        return RPCValidationError("input", self._name, list(issues))


def _is_exact(kind: Any) -> bool:
    return isinstance(kind, type) and kind in _EXACT


def _struct_of(types_: list[Any]) -> type[Struct] | None:
    # A class and not a tuple type: msgspec keeps what it learns of classes only.
    if all(kind is Any for kind in types_):
        return None
    fields = [(f"argument{n}", kind) for n, kind in enumerate(types_)]
    return msgspec.defstruct("Arguments", fields, array_like=True)
