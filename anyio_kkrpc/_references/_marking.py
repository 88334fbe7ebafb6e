"""Which objects are passed by reference, and where they are in values that travel. No I/O.

A value with references is plain data in which an envelope stands for each of them, as in kkrpc:
``{"__kkrpc_ref__": true, "id": ..., "kind": "object" | "function"}``, with ``p`` for what is
reached through one. A map of the user's that looks like one stands in
``{"__kkrpc_ref__": "data", "v": ...}``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

from msgspec import Struct

from .._protocol._values import MARK, MAX_DEPTH, PLAIN, REFERENCES, Packed

T = TypeVar("T")

BY_REFERENCE = "__anyio_kkrpc_by_reference__"
_ID = 256


class _Use(Struct):
    """Whether this process passes anything by reference: values are looked through only then."""

    begun: bool = False


USE = _Use()


@final
class ByReference:
    """An object that is passed by reference. Made by `by_reference`."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value: Any = value

    def __repr__(self) -> str:
        return f"by_reference({self.value!r:.80})"


def by_reference(value: T) -> T:
    """Pass an object or a function by reference, or all objects of a class if it decorates one.

    The other side gets a `RemoteObject`: what `expose` would make of the object can be called, read
    and written there, and passed back it is the object again. It may be an argument, a result or an
    item of a stream, and stand in their lists and maps.

    :raises TypeError: if ``value`` is plain data, which has nothing to refer to
    """
    if value.__class__ in PLAIN or value.__class__ in (dict, list, tuple):
        raise TypeError(f"by_reference: needs an object or a function, not {value!r:.80}")
    if is_reference(value):
        return value
    USE.begun = True
    if isinstance(value, type):
        setattr(value, BY_REFERENCE, True)
        return value
    return ByReference(value)  # type: ignore[return-value]


def is_reference(value: Any) -> bool:
    """Whether a value is passed by reference, or is one that came."""
    return value.__class__ is ByReference or hasattr(type(value), BY_REFERENCE)


def marked(value: Any) -> Any:
    """Return the object that is passed by reference."""
    return value.value if value.__class__ is ByReference else value


class Reference(Struct):
    """A reference that came.

    :ivar path: what is meant below it
    """

    id: str
    function: bool
    path: tuple[str, ...]

    def envelope(self) -> dict[str, Any]:
        """Return what stands for it."""
        made: dict[str, Any] = {MARK: True, "id": self.id}
        made["kind"] = "function" if self.function else "object"
        if self.path:
            made["p"] = list(self.path)
        return made


def has_references(value: Any) -> bool:
    """Whether there are any in a value, in whichever of its lists and maps."""
    if value.__class__ in PLAIN:
        return False
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if item.__class__ in PLAIN:
            continue
        if is_reference(item):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return False


def packed(value: Any, export: Callable[[Any], Reference]) -> Any:
    """Return a value with envelopes in place of references; the same object if it has none.

    :param export: returns the reference for what is passed by one
    :raises TypeError: if it is nested too deep, or has itself in it
    """
    if not has_references(value):
        return value
    above: set[int] = set()

    def visit(item: Any) -> Any:
        if item.__class__ in PLAIN:
            return item
        if is_reference(item):
            return export(item).envelope()
        if not isinstance(item, (dict, list, tuple)):
            return item
        if id(item) in above:
            raise TypeError("a value with references can't have itself in it")
        if len(above) >= MAX_DEPTH:
            raise TypeError(f"a value with references is nested more than {MAX_DEPTH} levels deep")
        above.add(id(item))
        try:
            if not isinstance(item, dict):
                return [visit(one) for one in item]
            made = {key: visit(one) for key, one in item.items()}
            return {MARK: "data", "v": made} if MARK in item else made
        finally:
            above.discard(id(item))

    return visit(value)


def unpacked(value: Any, take: Callable[[Reference], Any]) -> Any:
    """Return a value that came with what references stand for in place of envelopes.

    :param take: returns that
    """

    def visit(item: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("a value with references that is nested too deep")
        if item.__class__ is list:
            return [visit(one, depth + 1) for one in item]
        if item.__class__ is not dict:
            return item
        if item.get(MARK) == "data" and item.keys() == {MARK, "v"} and isinstance(item["v"], dict):
            item = item["v"]
        elif (reference := read_reference(item)) is not None:
            return take(reference)
        return {key: visit(one, depth + 1) for key, one in item.items()}

    return visit(value, 0)


def references_in(value: Any) -> list[str]:
    """Return the ids that stand in a value as it travels, if it is one with references."""
    found: list[str] = []
    if value.__class__ is Packed:
        unpacked(value[REFERENCES], lambda reference: found.append(reference.id))
    return found


def read_reference(item: dict[str, Any]) -> Reference | None:
    """Return the reference that a map stands for, if it does."""
    if item.get(MARK) is not True or item.get("kind") not in ("object", "function"):
        return None
    reference_id, path = item.get("id"), item.get("p", [])
    if not isinstance(reference_id, str) or len(reference_id) > _ID:
        return None
    if not isinstance(path, list) or not all(isinstance(one, str) for one in path):
        return None
    return Reference(reference_id, item["kind"] == "function", tuple(path))
