"""Result types of a typed proxy, read from the `typing.Protocol` that describes the remote API."""

from __future__ import annotations

import inspect
from typing import Any

from .._driver._inflow import RemoteStream, leave
from .._exceptions import RPCValidationError
from .._values._callbacks import PassedCallbacks
from .._values._conversion import (
    AWAITABLES,
    StreamKind,
    annotations_of,
    checkable,
    convert_value,
    hints_of,
    result_of,
    stream_kind,
    unwrap,
)


class TypesOf:
    """What a Protocol class says about the names below one path, or nothing.

    :ivar callbacks: parameters that take functions, if what is there is a method with such
    """

    __slots__ = ("_children", "_hints", "_protocol", "_result", "_value", "callbacks")

    def __init__(self, protocol: type | None = None, annotation: Any = None) -> None:
        self._protocol = protocol
        self._hints: dict[str, Any] | None = None
        self._children: dict[str, TypesOf] = {}
        self._result: Any = Any
        self._value: Any = Any
        self.callbacks: PassedCallbacks | None = None
        if annotation is not None:
            self._value = checkable(unwrap(annotation, AWAITABLES))

    @classmethod
    def _method(cls, function: Any, *, bound: bool) -> TypesOf:
        types, hints = cls(), hints_of(function)
        types.callbacks = PassedCallbacks(function, hints, bound=bound) or None
        result, _ = result_of(hints)
        if result is not type(None):
            types._result = result
        return types

    @classmethod
    def returning(cls, annotation: Any) -> TypesOf:
        """Return what is known of a method of whose result only the annotation is."""
        types = cls()
        types._result = stream_kind(annotation) or checkable(annotation)
        return types

    def child(self, name: str) -> TypesOf:
        """Return what is known of a name below."""
        protocol = self._protocol
        if protocol is None:
            return NO_TYPES
        types = self._children.get(name)
        if types is None:
            types = self._children[name] = self._resolve(protocol, name)
        return types

    def _resolve(self, protocol: type, name: str) -> TypesOf:
        member = getattr(protocol, name, None)
        if isinstance(member, property):
            annotation = annotations_of(member.fget).get("return", Any)
        elif callable(member) and not isinstance(member, type):
            static = inspect.getattr_static(protocol, name)
            return self._method(member, bound=isinstance(static, (staticmethod, classmethod)))
        else:
            if self._hints is None:
                self._hints = annotations_of(protocol)
            annotation = self._hints.get(name, Any)
        if isinstance(annotation, type) and getattr(annotation, "_is_protocol", False):
            return TypesOf(annotation)
        return TypesOf(None, annotation)

    def convert_result(self, value: Any, path: tuple[str, ...]) -> Any:
        """Convert what a call returned.

        :raises RPCValidationError: if it doesn't fit the Protocol
        """
        if self._result is Any:
            return value
        try:
            return convert_value(value, self._result, ".".join(path), "output")
        except RPCValidationError:
            if isinstance(value, RemoteStream):
                leave(value)
            raise

    def convert_item(self, value: Any, path: tuple[str, ...]) -> Any:
        """Convert an item of a stream that a call returned.

        :raises RPCValidationError: if it doesn't fit the Protocol
        """
        kind = self._result.item if isinstance(self._result, StreamKind) else Any
        return convert_value(value, kind, ".".join(path), "output")

    def convert_value(self, value: Any, path: tuple[str, ...]) -> Any:
        """Convert the value of a property.

        :raises RPCValidationError: if it doesn't fit the Protocol
        """
        return convert_value(value, self._value, ".".join(path), "output")


NO_TYPES = TypesOf()
