"""Functions that one side passes to the other, and what the arguments of their calls have to be.

Both sides check them: who calls, against the annotation of the handler that has got the function,
and who has passed it, against that of the Protocol or else against the function's own.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .._exceptions import RPCValidationError
from .._protocol._values import is_callback
from ._conversion import (
    AWAITABLES,
    UNIONS,
    UnfitResultError,
    checkable,
    convert,
    fit_own,
    hints_of,
    located,
    signature_of,
    stream_kind,
)
from ._pydantic import Unfit

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

# Of functions whose results nobody waits for.
NO_RESULT: Any = object()


class _Way(NamedTuple):
    """How values that come, or go out, are made to fit.

    :ivar fit: returns one as annotated, or raises `Unfit`
    :ivar error: raised for all that don't fit
    """

    fit: Callable[[Any, Any, str, str], Any]
    phase: str
    error: type[RPCValidationError]


_COMES = _Way(convert, "input", RPCValidationError)
_GOES = _Way(fit_own, "output", UnfitResultError)


class CallbackArguments:
    """What the arguments of a function are checked against.

    :param kinds: of those that are given by their place, with what they are called in errors
    :param named: of those that are given by name
    :param rest: of all further ones
    :param others: of all further ones that are given by name
    :param exact: whether there may be no more and no fewer
    """

    __slots__ = ("_exact", "_kinds", "_named", "_others", "_rest")

    def __init__(
        self,
        kinds: Sequence[tuple[str, Any]],
        named: Mapping[str, Any],
        rest: Any = Any,
        others: Any = Any,
        *,
        exact: bool = False,
    ) -> None:
        self._kinds = kinds
        self._named = named
        self._rest = rest
        self._others = others
        self._exact = exact

    @property
    def of_use(self) -> bool:
        """Whether anything is checked."""
        kinds = (*(kind for _, kind in self._kinds), *self._named.values())
        return self._exact or any(kind is not Any for kind in (*kinds, self._rest, self._others))

    def converted(
        self, args: Sequence[Any], kwargs: dict[str, Any], name: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments that came as annotated.

        :raises RPCValidationError: if they don't fit
        """
        return self._each(args, kwargs, name, _COMES)

    def checked(
        self, args: Sequence[Any], kwargs: dict[str, Any], name: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments that go out.

        :raises UnfitResultError: if they don't fit
        """
        return self._each(args, kwargs, name, _GOES)

    def _miscounted(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
        expected, found = len(self._kinds), len(args)
        if not self._exact or (found == expected and not kwargs):
            return []
        more = f" and {len(kwargs)} by name" if kwargs else ""
        return [f"Expected {expected} arguments, got {found}{more}"]

    def _each(
        self, args: Sequence[Any], kwargs: dict[str, Any], name: str, way: _Way
    ) -> tuple[list[Any], dict[str, Any]]:
        issues, fit, phase = self._miscounted(args, kwargs), way.fit, way.phase

        def one(label: str, value: Any, kind: Any) -> Any:
            if kind is Any:
                return value
            try:
                return fit(value, kind, name, phase)
            except Unfit as exc:
                issues.extend(located(label + path, message) for path, message in exc.args[0])

        kinds, named = self._kinds, self._named
        made = [
            one(*_labelled(index, value, *kinds[index]))
            if index < len(kinds)
            else one(f"[{index}]", value, self._rest)
            for index, value in enumerate(args)
        ]
        by_name = {
            key: one(key, value, named.get(key, self._others)) for key, value in kwargs.items()
        }
        if issues:
            raise way.error(phase, name, issues)
        return made, by_name


def _labelled(index: int, value: Any, label: str, kind: Any) -> tuple[str, Any, Any]:
    return label or f"[{index}]", value, kind


class CallbackKind:
    """Takes functions only, and has what they are called with checked.

    :ivar arguments: against which, if at all
    :param result: of them, if they have one that is waited for
    :param parameter: which takes them, for errors
    """

    __slots__ = ("_optional", "_parameter", "_result", "arguments")

    def __init__(
        self, arguments: CallbackArguments | None, result: Any, parameter: str, *, optional: bool
    ) -> None:
        self.arguments: CallbackArguments | None = arguments
        self._result = result
        self._parameter = parameter
        self._optional = optional

    def convert(self, value: Any, name: str) -> Any:
        """Return a function that came, or None.

        :param name: of what is called with it
        :raises Unfit: if it is something else
        """
        if value is None and self._optional:
            return None
        if not is_callback(value):
            raise Unfit([("", f"Expected a function, got `{type(value).__name__}`")])
        if self.arguments is None and self._result is NO_RESULT:
            return value
        return check_calls(value, self.arguments, self._result, f"{name}.{self._parameter}")

    def bound(self, value: Any, name: str) -> Any:
        """Return a function that goes out, which converts what it is called with."""
        if self.arguments is None or not is_callback(value):
            return value
        return CheckedCallback(value, self.arguments, f"{name}.{self._parameter}")


@functools.singledispatch
def check_calls(
    callback: Any, arguments: CallbackArguments | None, result: Any, name: str
) -> Callable[..., Any]:
    """Return a function that came, with the arguments checked with which it is called.

    Who makes functions of what comes registers here how that is done; others are left as they are.

    :param result: what is waited for, `NO_RESULT` if nothing is
    :param name: for errors
    """
    function: Callable[..., Any] = callback
    return function


class CheckedCallback:
    """A function whose arguments are converted as they come."""

    __slots__ = ("_arguments", "_function", "_name")

    def __init__(
        self, function: Callable[..., Any], arguments: CallbackArguments, name: str
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        :raises RPCValidationError: if an argument doesn't fit
        """
        args_, kwargs = self._arguments.converted(args, kwargs, self._name)
        return self._function(*args_, **kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CheckedCallback):
            return NotImplemented
        return self._function == other._function and self._arguments is other._arguments

    def __hash__(self) -> int:
        return hash((self._function, id(self._arguments)))

    def __repr__(self) -> str:
        return repr(self._function)


def callback_kind(annotation: Any, parameter: str) -> CallbackKind | None:
    """Return what functions of an annotation are checked by, ``None`` if it tells nothing of what
    they are called with.
    """
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    members = [annotation]
    if typing.get_origin(annotation) in UNIONS:
        members = [*typing.get_args(annotation)]
    functions = [one for one in members if one is not type(None)]
    told = [told_by(one) for one in functions]
    if not told or told[0] is None or None in told:
        return None
    if len(functions) > 1 and len({str(_parameters(one)) for one in functions}) > 1:
        return None  # which one it is can't be seen
    arguments = told[0]
    results = [result_told_by(one) for one in functions]
    result = results[0] if results.count(results[0]) == len(results) else NO_RESULT
    if not arguments.of_use and result is NO_RESULT:
        return None
    checked = arguments if arguments.of_use else None
    return CallbackKind(checked, result, parameter, optional=len(functions) < len(members))


def _parameters(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return arguments[0] if arguments else annotation


def told_by(annotation: Any) -> CallbackArguments | None:
    """Return what a ``Callable[[...], ...]`` or a Protocol with ``__call__`` tells."""
    if typing.get_origin(annotation) is Callable:
        parameters = typing.get_args(annotation)[0]
        if not isinstance(parameters, list):  # any, or not known
            return None if result_told_by(annotation) is NO_RESULT else CallbackArguments([], {})
        return CallbackArguments([("", checkable(one)) for one in parameters], {}, exact=True)
    if getattr(annotation, "_is_protocol", False) and inspect.isfunction(
        getattr(annotation, "__call__", None)  # noqa: B004  # what is looked for is the function
    ):
        return _by_signature(annotation.__call__, skipped=1)
    return None


def result_told_by(annotation: Any) -> Any:
    """Return what a function of an annotation gives whoever awaits it, as ``bool`` of
    ``Callable[[...], Awaitable[bool]]``; `NO_RESULT` if that is nothing, or could be anything.
    """
    if typing.get_origin(annotation) is Callable:
        returned = typing.get_args(annotation)[1]
    else:
        call = getattr(annotation, "__call__", None)  # noqa: B004  # as above
        returned = hints_of(call, quiet=True).get("return") if inspect.isfunction(call) else None
        if inspect.iscoroutinefunction(call):
            returned = Awaitable[returned]  # type: ignore[valid-type]
    if typing.get_origin(returned) not in AWAITABLES:
        return NO_RESULT
    result = typing.get_args(returned)[-1]
    if result in (None, type(None), Any, object):
        return NO_RESULT
    return stream_kind(result) or checkable(result)


def arguments_of(function: Callable[..., Any]) -> CallbackArguments | None:
    """Return what a function says itself of its arguments, if anything."""
    if isinstance(function, CheckedCallback):
        return None
    own = function
    while isinstance(own, functools.partial):
        own = own.func
    if not inspect.isroutine(own):
        own = type(own).__call__
    if not getattr(own, "__annotations__", None):
        return None  # the usual thing: a lambda, or a method of something built in
    told = _by_signature(function)
    return told if told is not None and told.of_use else None


def _by_signature(function: Callable[..., Any], *, skipped: int = 0) -> CallbackArguments | None:
    signature = signature_of(function)
    if signature is None:
        return None
    hints = hints_of(function, quiet=True)
    parameters = [*signature.parameters.values()][skipped:]
    kinds = {one.name: checkable(hints.get(one.name, Any)) for one in parameters}
    by_kind = {one.kind: kinds[one.name] for one in parameters}
    return CallbackArguments(
        [(one.name, kinds[one.name]) for one in parameters if one.kind in _BY_PLACE],
        {one.name: kinds[one.name] for one in parameters if one.kind in _BY_NAME},
        by_kind.get(inspect.Parameter.VAR_POSITIONAL, Any),
        by_kind.get(inspect.Parameter.VAR_KEYWORD, Any),
    )


class PassedCallbacks:
    """The parameters of a method of a Protocol that take functions."""

    __slots__ = ("_by_name", "_by_place")

    def __init__(self, function: Callable[..., Any], hints: dict[str, Any], *, bound: bool) -> None:
        signature = signature_of(function)
        parameters = [] if signature is None else [*signature.parameters.values()]
        self._by_place: dict[int, CallbackKind] = {}
        self._by_name: dict[str, CallbackKind] = {}
        for index, one in enumerate(parameters if bound else parameters[1:]):
            kind = callback_kind(hints.get(one.name, Any), one.name)
            if kind is not None and one.kind in _BY_PLACE:
                self._by_place[index] = kind
            if kind is not None and one.kind in _BY_NAME:
                self._by_name[one.name] = kind

    def __bool__(self) -> bool:
        return bool(self._by_place or self._by_name)

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments whose functions convert what they are called with."""
        places, names = self._by_place, self._by_name
        changed = tuple(
            places[index].bound(value, name) if index in places else value
            for index, value in enumerate(args)
        )
        return changed, {
            key: names[key].bound(value, name) if key in names else value
            for key, value in kwargs.items()
        }
