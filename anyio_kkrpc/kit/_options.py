"""The options of a transport, each in one place: name, type, default and rule.

They are the fields of a frozen dataclass whose annotations carry the rules. `takes` makes its
constructor the signature of a transport's, for type checkers and editors as for ``help()``. It is
not ``Unpack`` of a TypedDict, since that has no defaults, which editors then don't show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from inspect import Parameter, Signature, signature
from typing import (
    Annotated,
    Any,
    Concatenate,
    ParamSpec,
    TypeAlias,
    TypeVar,
    get_args,
    get_type_hints,
)

from .._spoken._base import DialectName
from ..abc import Codec
from ..codecs import get_codec
from ._queue import Overflow

P = ParamSpec("P")
G = TypeVar("G")
S = TypeVar("S")
T = TypeVar("T")
Rule: TypeAlias = Callable[[str, Any], Any]


def takes(
    options: Callable[P, G], check: Callable[[G], T]
) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """Give a constructor the signature of a dataclass of options; it is handed them checked.

    :param options: the dataclass
    :param check: returns what the constructor takes: `check`, or what `checked` makes of them
    """
    hints = get_type_hints(options)  # the types without their rules
    hints.pop("return", None)
    own = signature(options)
    own = own.replace(
        parameters=[one.replace(annotation=hints[name]) for name, one in own.parameters.items()],
        return_annotation=None,
    )

    def decorate(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def __init__(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            try:
                own.bind(*args, **kwargs)
            except TypeError as exc:
                raise TypeError(f"{init.__qualname__}() {exc}{_meant(own, kwargs)}") from None
            init(self, check(options(*args, **kwargs)))

        first = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        __init__.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[first, *own.parameters.values()]
        )
        __init__.__annotations__ = {**hints, "return": None}
        __init__.__qualname__, __init__.__module__ = init.__qualname__, init.__module__
        __init__.__doc__ = init.__doc__
        return __init__

    return decorate


def _meant(own: Signature, given: Mapping[str, Any]) -> str:
    """Return what Python adds to its error from 3.13 on."""
    from difflib import get_close_matches

    for name in given:
        if name not in own.parameters:
            for known in get_close_matches(name, own.parameters, 1):
                return f". Did you mean {known!r}?"
            break
    return ""


def check(options: G) -> G:
    """Return options as their rules leave them; raises as `checked`."""
    return replace(options, **checked(options))  # type: ignore[type-var]


def checked(options: Any) -> dict[str, Any]:
    """Return the values by name, each as its rule leaves it.

    :raises ValueError: if one is out of range
    :raises TypeError: if one has the wrong type; either names the option
    """
    values = {}
    for name, rule, optional in _rules(options.__class__):
        value = getattr(options, name)
        if rule is not None and not (optional and value is None):
            value = rule(name, value)
        values[name] = value
    return values


@cache
def _rules(kind: type) -> list[tuple[str, Rule | None, bool]]:
    """Return each option's name, its rule, and whether it may be ``None``."""
    found = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        parts = (hint, *get_args(hint))  # ``Annotated[...]``, or that or ``None``
        rules = [one for part in parts for one in getattr(part, "__metadata__", ())]
        found.append((name, rules[0] if rules else None, type(None) in parts))
    return found


def text(name: str, value: Any) -> str:
    """Take 1 to 256 bytes of text."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: needs a str, not {value!r:.80}")
    if not value or len(value.encode()) > 256:
        raise ValueError(f"{name}: needs 1 to 256 bytes of text")
    return value


def flag(name: str, value: Any) -> bool:
    """Take a bool, and nothing else that is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: needs a bool, not {value!r:.80}")
    return value


def count(name: str, value: Any) -> int:
    """Take an int from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: needs an int, not {value!r:.80}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, not {value}")
    return value


def seconds(least: float = 0.001, most: float = 1e7) -> Rule:
    """Return the rule for seconds from ``least`` to ``most``."""

    def rule(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: needs seconds, not {value!r:.80}")
        if not least <= value <= most:
            hint = "; it is in seconds, not milliseconds" if value > most else ""
            raise ValueError(
                f"{name}: needs between {least} and {most:,.0f} seconds, not {value}{hint}"
            )
        return float(value)

    return rule


def one_of(choices: Any) -> Rule:
    """Return the rule for the values of a ``Literal``."""
    known = get_args(choices)

    def rule(name: str, value: Any) -> Any:
        if value not in known:
            raise ValueError(f"{name}: one of {', '.join(known)}, not {value!r:.80}")
        return value

    return rule


def codec_of(_: str, value: Any) -> Codec:
    """Take a codec or its name."""
    return get_codec(value)


Text: TypeAlias = Annotated[str, text]
Flag: TypeAlias = Annotated[bool, flag]
Count: TypeAlias = Annotated[int, count]
Seconds: TypeAlias = Annotated[float, seconds()]
AnyOverflow: TypeAlias = Annotated[Overflow, one_of(Overflow)]
AnyDialect: TypeAlias = Annotated[DialectName, one_of(DialectName)]
AnyCodec: TypeAlias = Annotated[str | Codec, codec_of]
