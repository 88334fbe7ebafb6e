"""Arguments that would become sets and dicts of keys that hash alike: see `_protocol._hashes`.

msgspec and pydantic make such a set while they convert, so what they are given is looked at before:
each list and each mapping in it that is long enough, as each kind of key that the annotation has.
Annotations without such keys, which are most, cost nothing.
"""

from __future__ import annotations

import collections
import collections.abc
import datetime
import enum
import types
import typing
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import msgspec

from .._protocol._hashes import MOST_ALIKE, AlikeError, check_hashes
from ._pydantic import Unfit, decode, mentions_model

_SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_MAPPINGS = (
    dict, collections.OrderedDict, collections.defaultdict, collections.Counter,
    collections.abc.Mapping, collections.abc.MutableMapping,
)  # fmt: skip
# Keys whose hashes can't be chosen, or of which there are too few that hash alike.
_HARMLESS = (
    str, bytes, bool, float, type(None), enum.Enum,
    datetime.date, datetime.time, datetime.timedelta,
)  # fmt: skip
# What classes with fields that can be converted are known by.
_FIELDS = (
    "__struct_fields__", "__dataclass_fields__", "__attrs_attrs__", "__pydantic_validator__",
    "__total__", "_fields",
)  # fmt: skip
_CONTAINERS = (list, tuple, dict, set, frozenset)


class KeyGuard:
    """Looks at what is about to be converted to one annotation."""

    __slots__ = ("_items", "_names")

    def __init__(self, items: list[_KeyKind], names: list[_KeyKind]) -> None:
        self._items = items
        self._names = names

    @classmethod
    def of(cls, annotation: Any) -> KeyGuard | None:
        """Return the guard of an annotation, ``None`` for one that needs none."""
        items: list[_KeyKind] = []
        names: list[_KeyKind] = []
        for is_set, key, of_model in _key_kinds(annotation, mentions_model(annotation), {}):
            (items if is_set else names).append(_KeyKind(key, of_model=of_model))
        return cls(items, names) if items or names else None

    def check(self, value: Any) -> None:
        """Refuse a value with too many keys that hash alike.

        :raises Unfit: if it has
        """
        seen: set[int] = set()
        parts: list[Any] = [value]
        while parts:
            part = parts.pop()
            if id(part) in seen or not isinstance(part, _CONTAINERS):
                continue
            seen.add(id(part))
            kinds = self._items
            inner: Collection[Any] = part
            if isinstance(part, dict):
                kinds, inner = self._names, part.values()
            if len(part) > MOST_ALIKE:
                for kind in kinds:
                    kind.check(part)
            parts += [item for item in inner if isinstance(item, _CONTAINERS)]


class _KeyKind:
    """One kind of key, and how it is made of what came.

    :param of_model: whether it is pydantic that makes it, which takes more for a number
    """

    __slots__ = ("_convert", "_convert_all")

    def __init__(self, key: Any, *, of_model: bool) -> None:
        if of_model:
            from pydantic import TypeAdapter

            self._convert: Callable[[Any], Any] = TypeAdapter(key).validate_python
            self._convert_all: Callable[[Any], Any] = TypeAdapter(
                list[key]  # pyright: ignore[reportInvalidTypeForm]
            ).validate_python
        else:
            convert = partial(msgspec.convert, strict=False, dec_hook=decode)
            self._convert = partial(convert, type=key)
            self._convert_all = partial(convert, type=list[key])

    def check(self, parts: Collection[Any]) -> None:
        """Refuse parts that are too many keys of this kind that hash alike.

        :raises Unfit: if they are
        """
        try:
            check_hashes(self._convert_all(list(parts)))
        except AlikeError as exc:
            raise Unfit([("", str(exc))]) from None
        except Exception:  # one that doesn't fit saves no other
            self._check_fitting(parts)

    def _check_fitting(self, parts: Collection[Any]) -> None:
        try:
            check_hashes(list(self._fitting(parts)))
        except AlikeError as exc:
            raise Unfit([("", str(exc))]) from None

    def _fitting(self, parts: Collection[Any]) -> Iterator[Any]:
        for part in parts:
            try:
                key = self._convert(part)
                hash(key)
            except Exception:  # whatever a validator raises, or a key that can't be one
                continue
            yield key


def _key_kinds(
    annotation: Any, of_model: bool, seen: dict[tuple[int, bool], Any]
) -> Iterator[tuple[bool, Any, bool]]:
    """Yield the kinds of keys in an annotation that can be made to hash alike.

    :param seen: annotations that were looked at, kept so that no other one gets their place
    :return: whether it is the kind of a set's items, the kind, and whether pydantic makes it
    """
    if (id(annotation), of_model) in seen:
        return
    seen[id(annotation), of_model] = annotation
    origin = typing.get_origin(annotation) or annotation
    arguments = typing.get_args(annotation)
    if origin in _SETS:
        key = arguments[0] if arguments else Any
        if not _is_harmless(key):
            yield True, key, of_model
    elif origin in _MAPPINGS and arguments and not _is_harmless(arguments[0]):
        yield False, arguments[0], of_model
    of_model = of_model or hasattr(origin, "__pydantic_validator__")
    for inner in (*arguments, *_inner(origin)):
        yield from _key_kinds(inner, of_model, seen)


def _inner(kind: Any) -> Iterator[Any]:
    """Yield what a class with annotated fields, an alias or a new type is made of."""
    for name in ("__value__", "__supertype__", "__origin__", "__bound__"):
        inner = getattr(kind, name, None)
        if inner is not None:
            yield inner
    if isinstance(kind, type) and any(hasattr(kind, mark) for mark in _FIELDS):
        try:
            yield from typing.get_type_hints(kind, include_extras=True).values()
        except Exception:  # what doesn't resolve isn't converted, either
            return


def _is_harmless(key: Any) -> bool:
    origin = typing.get_origin(key)
    if origin is typing.Literal:
        return True
    if origin is typing.Annotated:
        return _is_harmless(typing.get_args(key)[0])
    if origin in (typing.Union, types.UnionType):
        return all(map(_is_harmless, typing.get_args(key)))
    return isinstance(key, type) and issubclass(key, _HARMLESS)
