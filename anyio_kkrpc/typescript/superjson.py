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
from typing import Any, final

import msgspec
from msgspec import UNSET, Struct

from .._exceptions import ProtocolError, RemoteError, RPCError
from .._log import quoted

__all__ = ("URL", "BigInt", "Map", "dumps", "loads")

# What a number of JavaScript holds exactly.
MAX_SAFE = (1 << 53) - 1
# Values of one document, shared ones counted where they are written.
_MAX_NODES = 10_000_000
_MAX_REGEXP = 1000
_MAX_DATE_LENGTH = 40
_FORBIDDEN_KEYS = frozenset({"__proto__", "constructor", "prototype"})
_TYPECODES = {
    "Int8Array": "b",
    "Int16Array": "h",
    "Uint16Array": "H",
    "Int32Array": "i",
    "Uint32Array": "I",
    "Float32Array": "f",
    "Float64Array": "d",
}
_ARRAYS = {code: name for name, code in _TYPECODES.items()}
_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}
_DIGITS = re.compile(r"-?[0-9]{1,4000}")
_NAMED_GROUP = re.compile(r"\(\?<(?![=!])")
_JSON_TYPES = (bytes, bytearray, datetime)


@final
class BigInt(int):
    """A ``bigint``: what was one in JavaScript, and is sent back as one however small it is."""


@final
class Map(dict[Any, Any]):
    """A ``Map``: sent as one also if all its keys are text."""


@final
class URL(str):
    """A ``URL``, as text."""


class _Source(str):
    """The text of a JavaScript pattern with its flags, of which Python has only some."""

    flags = ""

    def __eq__(self, other: object) -> bool:
        # Python caches compiled patterns by their text, which would lose the flags.
        if isinstance(other, _Source) and other.flags != self.flags:
            return False
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


# Encoding


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
    if isinstance(source, _Source):
        flags = source.flags
    else:
        flags = "".join(letter for letter, flag in _FLAGS.items() if value.flags & flag)
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


def loads(data: bytes | bytearray | memoryview) -> tuple[Any, Any]:
    """Decode a document; return the value and the annotations of it as they stood.

    ``undefined`` is ``None``, a date an aware datetime, a bigint `BigInt`, a ``Map`` `Map` (a list
    of pairs if a key can't be one of a dict), a ``Set`` a set (a list if an item can't be one of a
    set), a ``RegExp`` a compiled pattern (text, if Python can't compile it), a ``URL`` `URL`,
    ``Uint8Array`` and ``Buffer`` bytes, another typed array `array.array`, an ``Error``
    `RemoteError`.

    :raises ProtocolError: if it isn't a valid document, whatever is wrong with it
    """
    try:
        document = msgspec.json.decode(data)
        meta = document.get("meta") or {}
        values, holder = meta.get("values"), [document["json"]]
        decoder = _Decoder(legacy="v" not in meta)
        if values is not None:
            decoder.annotate(values, holder, 0)
        equalities = meta.get("referentialEqualities")
        if equalities is not None:
            budget = 2 * _count(document["json"]) + 1000
            decoder.share(equalities, holder)
            _check_size(holder, budget)
        return holder[0], values
    except RPCError:
        raise
    except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
        text = f"not valid superjson: {type(exc).__name__}: {exc}"
        raise ProtocolError(quoted(text, 250)) from exc


class _Decoder:
    """Applies annotations to plain JSON, in place.

    :param legacy: whether paths are those of superjson 1, in which a backslash stands for itself
    """

    def __init__(self, *, legacy: bool) -> None:
        self._legacy = legacy
        self._keys: dict[int, list[Any]] = {}

    def annotate(self, tree: Any, holder: Any, key: Any) -> None:
        """Apply annotations to ``holder[key]``, the inner ones first."""
        if isinstance(tree, dict):
            self._annotate_below(tree, holder, key)
            return
        kind, *below = tree
        for inner in below[:1]:
            self._annotate_below(inner, holder, key)
        holder[key] = self._restore(kind, holder[key])

    def _annotate_below(self, tree: dict[str, Any], holder: Any, key: Any) -> None:
        for path, inner in tree.items():
            place: Any = holder
            last: Any = key
            for segment in self._split(path):
                place = place[last]
                last = int(segment) if isinstance(place, list) else segment
            self.annotate(inner, place, last)

    def _split(self, path: str) -> list[str]:
        if "\\" not in path:
            return path.split(".")
        segments, current, position = [], "", 0
        while position < len(path):
            pair = path[position : position + 2]
            if pair == "\\." or (pair == "\\\\" and not self._legacy):
                current += pair[1]
                position += 2
                continue
            if pair[0] == "\\" and not self._legacy:
                raise ValueError("a path with a stray backslash")
            if pair[0] == ".":
                segments.append(current)
                current = ""
            else:
                current += pair[0]
            position += 1
        return [*segments, current]

    def _restore(self, kind: Any, value: Any) -> Any:
        if isinstance(kind, list):
            if kind[0] == "typed-array":
                return _typed_array(kind[1], value)
        elif kind == "map":
            return self._map(value)
        elif kind in _RESTORE:
            return _RESTORE[kind](value)
        raise ValueError(f"an annotation of unknown kind {str(kind)[:40]}")

    def _map(self, pairs: list[list[Any]]) -> Any:
        try:
            keys = [_hashable(key) for key, _ in pairs]
            restored = Map(zip(keys, (item for _, item in pairs), strict=True))
        except TypeError:
            return pairs
        if len(restored) < len(keys):
            return pairs  # 1 and true, say, which are one key in Python
        self._keys[id(restored)] = keys
        return restored

    # Equalities

    def share(self, equalities: Any, holder: list[Any]) -> None:
        """Put the same object wherever one was before it was written."""
        of_root: Any = []
        if isinstance(equalities, list):
            of_root, *rest = equalities
            equalities = rest[0] if rest else {}
        for path in of_root:
            self._put(holder, path, holder[0])
        for source, others in equalities.items():
            value = self._get(holder, source)
            for path in others:
                self._put(holder, path, value)

    def _get(self, holder: list[Any], path: str) -> Any:
        value = holder[0]
        for segment in self._walk(holder, path):
            value = segment
        return value

    def _walk(self, holder: list[Any], path: str) -> Iterator[Any]:
        value = holder[0]
        segments = iter(self._split(path))
        for segment in segments:
            if isinstance(value, Map) and id(value) in self._keys:
                pair_key = self._keys[id(value)][int(segment)]
                value = pair_key if next(segments) == "0" else value[pair_key]
            else:
                value = _item(value, segment)
            yield value

    def _put(self, holder: list[Any], path: str, value: Any) -> None:
        *above, last = self._split(path)
        if not above:
            _set_item(holder[0], last, value)
            return
        places = [holder[0], *self._walk(holder, path)]
        if isinstance(places[-2], Map) and id(places[-2]) in self._keys:
            if last == "1":  # a key that is shared stays what it is
                places[-2][self._keys[id(places[-2])][int(above[-1])]] = value
            return
        _set_item(places[-2], last, value)


def _item(value: Any, segment: str) -> Any:
    if isinstance(value, (list, tuple)):
        return value[int(segment)]
    if isinstance(value, dict):
        return value[segment]
    if isinstance(value, RemoteError) and segment == "cause":
        return value.__cause__
    if isinstance(value, set):
        return None
    raise ValueError("a path into a value that has no parts")


def _set_item(place: Any, segment: str, value: Any) -> None:
    if isinstance(place, list):
        place[int(segment)] = value
    elif isinstance(place, dict):
        place[segment] = value
    elif isinstance(place, RemoteError) and isinstance(value, RemoteError):
        place.__cause__ = value


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value


def _set(items: list[Any]) -> Any:
    try:
        restored = {_hashable(item) for item in items}
    except TypeError:
        return items
    return restored if len(restored) == len(items) else items


def _date(text: str) -> Any:
    if len(text) > _MAX_DATE_LENGTH:
        raise ValueError("a date that is too long")
    try:
        moment = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        return text  # a year that Python doesn't have
    return text if moment.tzinfo is None else moment


def _regexp(text: str) -> Any:
    body, slash, letters = text.rpartition("/")
    if not body.startswith("/") or not slash:
        raise ValueError("a RegExp without slashes")
    if len(body) > _MAX_REGEXP:
        return text
    source = _Source(_NAMED_GROUP.sub("(?P<", body[1:]))
    source.flags = letters
    flags = 0
    for letter in letters:
        flags |= _FLAGS.get(letter, 0)
    try:
        return re.compile(source, flags)
    except (re.error, RecursionError, OverflowError):
        return text  # what JavaScript understands and Python doesn't


def _bigint(text: Any) -> BigInt:
    if not isinstance(text, str) or not _DIGITS.fullmatch(text):
        raise ValueError("a bigint that is no integer")
    return BigInt(text)


def _typed_array(name: str, items: list[Any]) -> Any:
    numbers = [0 if item is None else item for item in items]
    if name in ("Uint8Array", "Uint8ClampedArray", "Buffer"):
        return bytes(numbers)
    return array(_TYPECODES[name], numbers)


def _error(plain: dict[str, Any]) -> RemoteError:
    cause = plain.get("cause")
    error = RemoteError(str(plain.get("name", "Error"))[:200], str(plain.get("message", "")))
    if isinstance(cause, RemoteError):
        error.__cause__ = cause
    elif cause is not None:
        error.data["cause"] = cause
    return error


_RESTORE: dict[str, Any] = {
    "undefined": lambda value: None,
    "bigint": _bigint,
    "Date": _date,
    "number": float,
    "set": _set,
    "regexp": _regexp,
    "URL": URL,
    "Error": _error,
}


def _count(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(_count, value))
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    return 1


def _check_size(value: Any, budget: int) -> None:
    """Refuse objects shared so often that to walk them would take for ever."""
    above: set[int] = set()
    left = budget

    def visit(item: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("referential equalities that multiply")
        if not isinstance(item, (list, dict)) or id(item) in above:
            return
        above.add(id(item))
        for part in item.values() if isinstance(item, dict) else item:
            visit(part)
        above.discard(id(item))

    visit(value)
