"""JavaScript's ``undefined``, which is ``msgspec.UNSET`` here, where Python or JSON have nothing of
the kind.
"""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec import UNSET, Struct

S = TypeVar("S", bound=Struct)


class UndefinedInsideError(TypeError):
    """A value that is to be encoded has ``undefined`` in it, for which the codec has no word."""


def defined(value: Any) -> Any:
    """Return a value as JSON has it: members that are ``undefined`` are left out, and what is so
    otherwise is ``None``.

    :return: the same object if there is nothing of the kind in its lists and dicts
    """
    if value is UNSET:
        return None
    if isinstance(value, dict):
        return _of_dict(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [defined(item) for item in value]
        if all(item is old for item, old in zip(items, value, strict=True)):
            return value
        return items
    return value


def _of_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    made = {key: defined(item) for key, item in value.items() if item is not UNSET}
    if len(made) == len(value) and all(made[key] is item for key, item in value.items()):
        return value
    return made


def defined_record(record: S) -> S:
    """Return a record whose members have no ``undefined`` in them."""
    members = {name: getattr(record, name) for name in record.__struct_fields__}
    return type(record)(
        **{name: UNSET if item is UNSET else defined(item) for name, item in members.items()}
    )
