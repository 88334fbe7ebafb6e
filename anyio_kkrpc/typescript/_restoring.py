"""Applies the annotations of a superjson document to its plain JSON.

Whoever writes a document chooses the annotations. So what they cost together is bounded by the
document's size: one value may be annotated more than once, by paths that are written in different
ways, sets and maps may have keys that hash alike, and a regular expression takes time to compile.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any, final

import msgspec
from msgspec import UNSET

from .._exceptions import RemoteError
from .._protocol._hashes import check_hashes

_MAX_DATE_LENGTH = 40
_MAX_REGEXP = 1000
# What all regular expressions of a document may cost: characters, and code points in ranges of
# characters, of which some hundred take as long as one. What is beyond stays text.
_MAX_REGEXPS = 5000
_CODE_POINTS = 100
TYPECODES = {
    "Int8Array": "b",
    "Int16Array": "h",
    "Uint16Array": "H",
    "Int32Array": "i",
    "Uint32Array": "I",
    "Float32Array": "f",
    "Float64Array": "d",
}
FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}
_DIGITS = re.compile(r"-?[0-9]{1,4000}")
_NAMED_GROUP = re.compile(r"\(\?<(?![=!])")
# Two characters with a dash between them, as in a class of characters; found where they overlap.
_END = r"(\\(?:u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|x[0-9A-Fa-f]{2}|N\{[^}]*\}|[0-7]{1,3}|.)|[^\\])"
_RANGE = re.compile(f"(?={_END}-{_END})", re.DOTALL)
# What paths are made of, and those of superjson 1.
_TOKEN = re.compile(r"\\.|\\|\.|[^\\.]+", re.DOTALL)
_LEGACY_TOKEN = re.compile(r"\\\.|\\|\.|[^\\.]+", re.DOTALL)


@final
class BigInt(int):
    """A ``bigint``: what was one in JavaScript, and is sent back as one however small it is."""


@final
class Map(dict[Any, Any]):
    """A ``Map``: sent as one also if all its keys are text."""


@final
class URL(str):
    """A ``URL``, as text."""


class Source(str):
    """The text of a JavaScript pattern with its flags, of which Python has only some."""

    flags = ""

    def __eq__(self, other: object) -> bool:
        # Python caches compiled patterns by their text, which would lose the flags.
        if isinstance(other, Source) and other.flags != self.flags:
            return False
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def restore(holder: list[Any], meta: dict[str, Any], size: int) -> None:
    """Restore the value in ``holder``, a list of it alone.

    :param meta: what stands beside it
    :param size: bytes of the document
    :raises ValueError: if that would take more time than a document of that size may; it raises
        whatever else for one that isn't valid
    """
    values, equalities = meta.get("values"), meta.get("referentialEqualities")
    decoder = _Decoder(legacy="v" not in meta, budget=size)
    count = 0 if equalities is None else _count(holder)
    if values is not None:
        decoder.annotate(values, holder, 0)
    if equalities is not None:
        decoder.share(equalities, holder)
        _check_size(holder, 2 * count + 1000)


class _Decoder:
    """Applies annotations to plain JSON, in place.

    :param legacy: whether paths are those of superjson 1, in which a backslash stands for itself
    :param budget: characters and items that it may walk through
    """

    def __init__(self, *, legacy: bool, budget: int) -> None:
        self._legacy = legacy
        self._budget = budget
        self._regexps = _MAX_REGEXPS
        self._keys: dict[int, list[Any]] = {}

    def annotate(self, tree: Any, holder: Any, key: Any) -> None:
        """Apply annotations to ``holder[key]``, the inner ones first."""
        if isinstance(tree, dict):
            self._annotate_below(tree, holder, key)
            return
        kind, *below = tree
        for inner in below[:1]:
            self._annotate_below(inner, holder, key)
        value = holder[key]
        if isinstance(value, (str, list, dict, set, bytes, array)):
            self._budget -= len(value)
            if self._budget < 0:
                raise ValueError("annotations of the same values, again and again")
        holder[key] = self._restore(kind, value)

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
        segments: list[str] = []
        parts: list[str] = []
        for token in (_LEGACY_TOKEN if self._legacy else _TOKEN).findall(path):
            if token == ".":
                segments.append("".join(parts))
                parts = []
            elif token[0] != "\\" or (token == "\\" and self._legacy):
                parts.append(token)
            elif token in ("\\.", "\\\\"):
                parts.append(token[1])
            else:
                raise ValueError("a path with a stray backslash")
        return [*segments, "".join(parts)]

    def _restore(self, kind: Any, value: Any) -> Any:
        if isinstance(kind, list):
            if kind[0] == "typed-array":
                return _typed_array(kind[1], value)
        elif kind == "map":
            return self._map(value)
        elif kind == "regexp":
            return self._regexp(value)
        elif kind in _RESTORE:
            return _RESTORE[kind](value)
        raise ValueError(f"an annotation of unknown kind {str(kind)[:40]}")

    def _map(self, pairs: list[list[Any]]) -> Any:
        try:
            keys = [_hashable(key) for key, _ in pairs]
            check_hashes(keys)
            restored = Map(zip(keys, (item for _, item in pairs), strict=True))
        except TypeError:
            return pairs
        if len(restored) < len(keys):
            return pairs  # 1 and true, say, which are one key in Python
        self._keys[id(restored)] = keys
        return restored

    def _regexp(self, text: str) -> Any:
        body, slash, letters = text.rpartition("/")
        if not body.startswith("/") or not slash:
            raise ValueError("a RegExp without slashes")
        if len(body) > min(_MAX_REGEXP, self._regexps):
            return text
        source = Source(_NAMED_GROUP.sub("(?P<", body[1:]))
        source.flags = letters
        cost = _cost(source)
        if cost > self._regexps:
            return text
        self._regexps -= cost
        flags = 0
        for letter in letters:
            flags |= FLAGS.get(letter, 0)
        try:
            return re.compile(source, flags)
        except (re.error, RecursionError, OverflowError, Warning):
            return text  # what JavaScript understands and Python doesn't

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
        keys = [_hashable(item) for item in items]
        check_hashes(keys)
        restored = set(keys)
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


def _cost(source: str) -> int:
    """Return about how long a regular expression takes to compile, in characters."""
    width = sum(
        max(_code_point(last, 0) - _code_point(first, 1), 0)
        for first, last in _RANGE.findall(source)
    )
    return len(source) + width // _CODE_POINTS


def _code_point(end: str, of_first: int) -> int:
    """Return the number of a character, or of its escape; of others, what makes more of a range."""
    if end[0] != "\\":
        return ord(end)
    if end[1] in "uUx" and len(end) > 2:
        return int(end[2:], 16)
    if end[1] in "01234567":
        return int(end[1:], 8)
    if of_first:
        return 0
    return 0x10FFFF if end[1] == "N" else ord(end[1])


def _bigint(text: Any) -> BigInt:
    if not isinstance(text, str) or not _DIGITS.fullmatch(text):
        raise ValueError("a bigint that is no integer")
    return BigInt(text)


def _typed_array(name: str, items: list[Any]) -> Any:
    numbers = [0 if item is None else item for item in items]
    if name in ("Uint8Array", "Uint8ClampedArray", "Buffer"):
        return bytes(numbers)
    return array(TYPECODES[name], numbers)


def _error(plain: dict[str, Any]) -> RemoteError:
    cause = plain.get("cause")
    error = RemoteError(str(plain.get("name", "Error"))[:200], str(plain.get("message", "")))
    if isinstance(cause, RemoteError):
        error.__cause__ = cause
    elif cause is not None:
        error.data["cause"] = cause
    return error


_RESTORE: dict[str, Any] = {
    "undefined": lambda value: UNSET,
    "bigint": _bigint,
    "Date": _date,
    "number": float,
    "set": _set,
    "URL": URL,
    "Error": _error,
}


def _count(value: Any) -> int:
    """Return how many values a plain value is made of."""
    parts = _parts(value)
    return 1 if parts is None else 1 + len(parts) + sum(map(_count, _containers(parts)))


def _parts(value: Any) -> Collection[Any] | None:
    if isinstance(value, list):
        return value
    return value.values() if isinstance(value, dict) else None


def _containers(parts: Collection[Any]) -> list[Any]:
    return [part for part in parts if isinstance(part, (list, dict))]


def _check_size(value: Any, budget: int) -> None:
    """Refuse objects shared so often that to walk them would take for ever."""
    above: set[int] = set()
    left = budget

    def visit(item: Any) -> None:
        nonlocal left
        parts = _parts(item)
        if parts is None or id(item) in above:
            return
        left -= 1 + len(parts)
        if left < 0:
            raise ValueError("referential equalities that multiply")
        above.add(id(item))
        for part in _containers(parts):
            visit(part)
        above.discard(id(item))

    visit(value)
