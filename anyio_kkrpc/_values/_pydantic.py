"""Models of pydantic as annotations and values. It isn't imported unless the program has done so.

A model travels as the JSON that pydantic makes of it, by its aliases. What comes for an annotation
with a model in it is validated by pydantic, as JSON where it holds nothing that JSON lacks: so a
strict model takes the text of a date, and ``bytes`` are read as the model's configuration says.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterable
from typing import Any

from msgspec import UNSET

from ._undefined import UndefinedInsideError

# Wrong values that are told one by one.
MOST_ISSUES = 100
_VENDORS = ("pydantic", "annotated_types")
# What dataclasses, TypedDicts (also those of typing_extensions) and NamedTuples are known by.
_FIELDS = ("__dataclass_fields__", "__total__", "_fields")


class Unfit(Exception):
    """A value doesn't fit; the argument is a list of ``(path, message)``."""


class ModelKind:
    """Validates values by pydantic; made once for an annotation."""

    __slots__ = ("_adapter",)

    def __init__(self, annotation: Any) -> None:
        from pydantic import TypeAdapter

        self._adapter: Any = TypeAdapter(annotation)

    def convert(self, value: Any) -> Any:
        """Return the value as annotated.

        :raises Unfit: if it doesn't fit
        """
        from pydantic import ValidationError

        try:
            if is_model(value):
                return self._adapter.validate_python(value)
            try:
                text = json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                return self._adapter.validate_python(value)
            return self._adapter.validate_json(text)
        except ValidationError as exc:
            if exc.error_count() > MOST_ISSUES:
                raise Unfit([("", f"{exc.error_count()} values don't fit")]) from None
            errors = exc.errors(include_url=False, include_context=False, include_input=False)
            raise Unfit([(_path(error["loc"]), error["msg"]) for error in errors]) from None

    def dump(self, value: Any) -> Any:
        """Return what stands for a value on the wire, of the fields of the annotated type only.

        :raises Unfit: if it doesn't fit
        """
        from pydantic_core import PydanticSerializationError

        try:
            made = self.convert(value)
            # An error is also a model that was changed, or made without validation, and is wrong.
            return self._adapter.dump_python(made, mode="json", by_alias=True, warnings="error")
        except (PydanticSerializationError, UnicodeDecodeError) as exc:
            raise Unfit([("", str(exc))]) from None


def mentions_model(annotation: Any) -> bool:
    """Whether an annotation holds a model of pydantic or a constraint that pydantic checks."""
    return "pydantic" in sys.modules and _mentions(annotation, set())


def is_model(value: object) -> bool:
    """Whether a value is an instance of a model."""
    return hasattr(type(value), "__pydantic_serializer__")


def decode(kind: type, value: Any) -> Any:
    """Return a model that a field of a dataclass or Struct holds, for msgspec; others as they are.

    :raises ValueError: if it doesn't fit
    """
    if not hasattr(kind, "__pydantic_validator__"):
        return value
    try:
        return ModelKind(kind).convert(value)
    except Unfit as exc:
        issues = [f"{path.lstrip('.')}: {message}" for path, message in exc.args[0]]
        raise ValueError("; ".join(issues)) from None


def plain(value: Any) -> Any:
    """Return what stands for what msgspec refuses: a model, or a subclass of text or numbers.

    :raises TypeError: for values of other types
    """
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if is_model(value):
        return dump(value)
    if value is UNSET:
        raise UndefinedInsideError("undefined can't be encoded within a value of a class")
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def dump(value: Any) -> Any:
    """Return what stands for an instance of a model on the wire.

    :raises TypeError: if pydantic can't make JSON of it
    """
    from pydantic_core import PydanticSerializationError

    try:
        return value.__pydantic_serializer__.to_python(value, mode="json", by_alias=True)
    except (PydanticSerializationError, UnicodeDecodeError) as exc:
        raise TypeError(f"{type(value).__name__} can't be encoded: {exc}") from exc


def _mentions(annotation: Any, seen: set[int]) -> bool:
    if id(annotation) in seen:
        return False
    seen.add(id(annotation))
    if hasattr(annotation, "__pydantic_core_schema__"):
        return True
    inner: Iterable[Any] = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        metadata = annotation.__metadata__
        if any(type(one).__module__.partition(".")[0] in _VENDORS for one in metadata):
            return True
        inner = (annotation.__origin__,)
    elif any(hasattr(annotation, mark) for mark in _FIELDS):
        try:
            inner = typing.get_type_hints(annotation, include_extras=True).values()
        except Exception:  # a name that exists for type checkers only
            return False
    return any(_mentions(one, seen) for one in inner)


def _path(location: tuple[int | str, ...]) -> str:
    """Return ``items[0].name`` for ``("items", 0, "name")``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts)
