"""superjson 2: JSON with annotations beside it that tell what JSON can't.

A document is ``{"json": <plain JSON>, "meta": {"values", "referentialEqualities", "v": 1}}``.
``values`` maps a path to an annotation such as ``["Date"]``; where a container is annotated itself,
the annotations below it stand within its own: ``["map", {"0.1": ["Date"]}]``. The segments of a
path are joined by dots; a dot in a key is ``\\.``, and a backslash ``\\\\``.
``referentialEqualities`` maps the path of an object to the other paths where the same object is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from array import array
from collections.abc import Iterator
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from .._exceptions import ProtocolError, RemoteError, RPCError
from .._runtime._log import quoted
from ._restoring import FLAGS, TYPECODES, URL, BigInt, Map, Source, restore

__all__ = ("URL", "BigInt", "Map", "dumps", "loads")

# What a number of JavaScript holds exactly.
MAX_SAFE = (1 << 53) - 1
# Values of one document, shared ones counted where they are written.
_MAX_NODES = 10_000_000
_FORBIDDEN_KEYS = frozenset({"__proto__", "constructor", "prototype"})
_ARRAYS = {code: name for name, code in TYPECODES.items()}
_JSON_TYPES = (bytes, bytearray, datetime)


def dumps(value: Any) -> bytes:
    """Encode a value.

    ``msgspec.UNSET`` is ``undefined``. Aware datetimes are dates (in milliseconds), integers beyond
    2**53 - 1 and `BigInt` bigints, bytes ``Uint8Array``, `array.array` the typed array of its kind,
    compiled patterns ``RegExp``, sets ``Set``, dicts with other keys than text ``Map``, exceptions
    ``Error``. What msgspec knows besides (dataclasses, enums, UUIDs, ...) travels as in JSON.

    :raises TypeError: if something in it has no counterpart
    """
    encoder = _Encoder()
    try:
        plain, values = encoder.walk(value)
        document: dict[str, Any] = {"json": plain}
        meta: dict[str, Any] = {}
        if values is not None:
            meta["values"] = values
        equalities = encoder.equalities()
        if equalities is not None:
            meta["referentialEqualities"] = equalities
        if meta:
            meta["v"] = 1
            document["meta"] = meta
        return msgspec.json.encode(document)
    except (RecursionError, UnicodeEncodeError, ValueError) as exc:
        raise TypeError(f"can't be encoded as superjson: {quoted(exc)}") from exc


class _Encoder:
    def __init__(self) -> None:
        self._path: list[str] = []
        self._above: set[int] = set()
        self._places: dict[int, list[tuple[str, ...]]] = {}
        self._seen: dict[int, tuple[Any, Any, int]] = {}
        self._nodes = 0

    def walk(self, value: Any) -> tuple[Any, Any]:
        """Return plain JSON and its annotation: a list, a dict of paths, or ``None``."""
        self._nodes += 1
        cls = value.__class__
        if value is None or cls is str or cls is bool:
            return value, None
        if cls is int:
            if -MAX_SAFE <= value <= MAX_SAFE:
                return value, None
            return str(value), ["bigint"]
        if cls is float:
            return _number(value)
        if value is UNSET:
            return None, ["undefined"]
        if isinstance(value, (list, dict, set)) or _is_record(value):
            return self._walk_shared(value)
        if isinstance(value, (tuple, frozenset)):
            return self._walk_container(value)
        return self._walk_leaf(value)

    def _walk_shared(self, value: Any) -> tuple[Any, Any]:
        """Something that has an identity, and may be in more than one place."""
        key = id(value)
        self._places.setdefault(key, []).append(tuple(self._path))
        seen = self._seen.get(key)
        if seen is not None:
            self._nodes += seen[2]
            if self._nodes > _MAX_NODES:
                raise TypeError("can't be encoded as superjson: too many values")
            return seen[0], seen[1]
        if key in self._above:
            return None, None
        self._above.add(key)
        before = self._nodes
        plain, annotation = self._walk_container(value)
        self._above.discard(key)
        self._seen[key] = (plain, annotation, self._nodes - before)
        return plain, annotation

    def _walk_container(self, value: Any) -> tuple[Any, Any]:
        if isinstance(value, (list, tuple)):
            return self._walk_items(value)
        if isinstance(value, (set, frozenset)):
            plain, inner = self._walk_items(value)
            return plain, ["set"] if inner is None else ["set", inner]
        if not isinstance(value, dict):
            return self._walk_members(_fields(value))
        if value.__class__ is not Map and all(isinstance(key, str) for key in value):
            return self._walk_members(value.items())
        pairs, inner = self._walk_items([(key, item) for key, item in value.items()])
        return pairs, ["map"] if inner is None else ["map", inner]

    def _walk_items(self, items: Any) -> tuple[list[Any], Any]:
        plain: list[Any] = []
        inner: dict[str, Any] = {}
        for number, item in enumerate(items):
            self._path.append(str(number))
            result, annotation = self.walk(item)
            self._path.pop()
            plain.append(result)
            if annotation is not None:
                _add(inner, str(number), annotation)
        return plain, inner or None

    def _walk_members(self, members: Any) -> tuple[dict[str, Any], Any]:
        plain: dict[str, Any] = {}
        inner: dict[str, Any] = {}
        for key, item in members:
            if key in _FORBIDDEN_KEYS:
                raise TypeError(f"superjson can't carry the key {key!r}")
            escaped = key.replace("\\", "\\\\").replace(".", "\\.")
            self._path.append(escaped)
            result, annotation = self.walk(item)
            self._path.pop()
            plain[str(key)] = result
            if annotation is not None:
                _add(inner, escaped, annotation)
        return plain, inner or None

    def _walk_leaf(self, value: Any) -> tuple[Any, Any]:
        if isinstance(value, BigInt):
            return str(int(value)), ["bigint"]
        if isinstance(value, URL):
            return str(value), ["URL"]
        if isinstance(value, datetime):
            return date_text(value), ["Date"]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return list(bytes(value)), [["typed-array", "Uint8Array"]]
        if isinstance(value, array):
            return _array_items(value)
        if isinstance(value, re.Pattern):
            return _regexp_text(value), ["regexp"]
        if isinstance(value, BaseException):
            return self._walk_error(value)
        if isinstance(value, Enum):
            return self.walk(value.value)
        for base in (str, int, float):
            if isinstance(value, base):
                return self.walk(base(value))
        plain = msgspec.to_builtins(value, builtin_types=_JSON_TYPES)
        if plain.__class__ is value.__class__:
            raise TypeError(f"can't be encoded as superjson: {type(value).__name__}")
        return self.walk(plain)

    def _walk_error(self, exc: BaseException) -> tuple[Any, Any]:
        plain: dict[str, Any] = {"name": type(exc).__name__, "message": str(exc)}
        cause: Any = exc.__cause__
        if isinstance(exc, RemoteError):
            plain = {"name": exc.name, "message": exc.message}
            cause = exc.data.get("cause") if cause is None else cause
        if cause is None:
            return plain, ["Error"]
        plain["cause"], inner = self.walk(cause)
        if inner is None:
            return plain, ["Error"]
        below: dict[str, Any] = {}
        _add(below, "cause", inner)
        return plain, ["Error", below]

    def equalities(self) -> Any:
        """Return what tells which paths hold the same object, or ``None``."""
        of_root: list[str] | None = None
        others: dict[str, list[str]] = {}
        for places in self._places.values():
            if len(places) < 2:
                continue
            first, *rest = sorted(places, key=len)
            same = [".".join(path) for path in rest]
            if first:
                others[".".join(first)] = same
            else:
                of_root = same
        if of_root is not None:
            return [of_root, others] if others else [of_root]
        return others or None


def _add(inner: dict[str, Any], key: str, annotation: Any) -> None:
    if isinstance(annotation, dict):
        for path, below in annotation.items():
            inner[f"{key}.{path}"] = below
    else:
        inner[key] = annotation


def _number(value: float) -> tuple[Any, Any]:
    if math.isfinite(value):
        return (value, None) if value or math.copysign(1, value) > 0 else ("-0", ["number"])
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity", ["number"]


def date_text(value: datetime) -> str:
    """Return what a date of JavaScript becomes in JSON: UTC, in milliseconds.

    :raises TypeError: if it is naive
    """
    if value.tzinfo is None:
        raise TypeError("a naive datetime tells no moment: give it a time zone")
    text = value.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _array_items(value: array[Any]) -> tuple[Any, Any]:
    name = _ARRAYS.get(value.typecode)
    if name is None:
        if value.typecode == "B":
            return value.tolist(), [["typed-array", "Uint8Array"]]
        raise TypeError(f"superjson has no typed array for array.array({value.typecode!r})")
    items = [item if item.__class__ is int or math.isfinite(item) else None for item in value]
    return items, [["typed-array", name]]


def _regexp_text(value: re.Pattern[Any]) -> str:
    source = value.pattern
    if not isinstance(source, str):
        raise TypeError("superjson carries patterns of text, not of bytes")
    if isinstance(source, Source):
        flags = source.flags
    else:
        flags = "".join(letter for letter, flag in FLAGS.items() if value.flags & flag)
    return f"/{source.replace('(?P<', '(?<')}/{flags}"


def _is_record(value: Any) -> bool:
    if isinstance(value, Struct):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, BaseException))


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Struct):
        config = type(value).__struct_config__
        if config.tag is not None:
            yield config.tag_field or "type", config.tag
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        for name, attribute in names:
            item = getattr(value, attribute)
            if item is not UNSET:
                yield name, item
    else:
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name)


# Decoding


def loads(data: bytes | bytearray | memoryview) -> Any:
    """Decode a document.

    ``undefined`` is ``msgspec.UNSET``, a date an aware datetime, a bigint `BigInt`, a ``Map`` `Map`
    (a list of pairs if a key can't be one of a dict), a ``Set`` a set (a list if an item can't be
    one of a set), a ``RegExp`` a compiled pattern (text, if Python can't compile it), a ``URL``
    `URL`, ``Uint8Array`` and ``Buffer`` bytes, another typed array `array.array`, an ``Error``
    `RemoteError`.

    :raises ProtocolError: if it isn't a valid document, whatever is wrong with it
    """
    try:
        document = msgspec.json.decode(data)
        meta = document.get("meta") or {}
        holder = [document["json"]]
        restore(holder, meta, len(data))
        return holder[0]
    except RPCError:
        raise
    except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
        text = f"not valid superjson: {type(exc).__name__}: {exc}"
        raise ProtocolError(quoted(text, 250)) from exc
