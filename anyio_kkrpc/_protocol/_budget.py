"""What the items of a stream weigh, so that few large ones wait for a reader, and many small ones.

Estimates: characters, bytes, and 8 for each value. They tell kilobytes from megabytes, take less
time than to encode an item does, and don't look at all of its values.
"""

from __future__ import annotations

from itertools import islice
from math import isqrt
from typing import Any

import msgspec
from msgspec import UnsetType

# What items may weigh that are on their way or wait for their reader, beside one more. A link of
# 100 MB/s carries it in 10 ms, so more of it would make few readers quicker.
BUDGET = 1 << 20
# What weighs no more is small, and counts as nothing here, since items are counted as well: as
# many as may be ahead weigh a quarter of the budget.
SMALL = 1024
_VALUE = 8
# Values that are looked at: of each container at least, and in all; and how deep.
_FEW = 256
_LOOKS = 4096
_DEPTH = 50

# What stands before or behind each value in JSON.
_MARKS = b",:[{"

_encode = msgspec.json.Encoder().encode
# Types whose values weigh nothing, whatever they are.
WEIGHTLESS = frozenset({int, float, bool, type(None), UnsetType})
# Modules whose values are small, though nobody can look into them.
_SCALARS = frozenset({"datetime", "decimal"})
_TEXT = (str, bytes, bytearray)


def marks_in(data: bytes) -> int:
    """Return about how many values there are in JSON."""
    return len(data) - len(data.translate(None, _MARKS))


def weight_of(item: Any) -> int:
    """Return what an item weighs, `BUDGET` at most, and 0 if it is small."""
    kind = item.__class__
    if kind in WEIGHTLESS:
        return 0
    if kind is str or kind is bytes:
        weight = len(item)
    else:
        weight = _weigh_as_json(item)
        if weight < 0:
            weight = _weigh(item, _LOOKS, _DEPTH)
    return 0 if weight <= SMALL else min(weight, BUDGET)


def _weigh_as_json(item: Any) -> int:
    """Weigh it by its JSON, which is quick; return -1 if it is too large for that, or has none."""
    if isinstance(item, (bytearray, memoryview)):
        return -1
    if isinstance(item, (dict, list, tuple)):
        if len(item) > _LOOKS:
            return -1
        for value in item.values() if isinstance(item, dict) else item:
            kind = value.__class__
            if (kind is str or kind is bytes) and len(value) > _LOOKS:
                return -1
    try:
        text = _encode(item)
    except Exception:  # whatever it is, the codec will say so
        return -1
    if len(text) <= SMALL // 2:
        return 0
    return len(text) + (_VALUE - 2) * marks_in(text)


def _weigh(item: Any, looks: int, depth: int) -> int:
    """Return what is in an item beside its own 8.

    :param looks: how many values to look into; what is left is taken to be alike
    :param depth: how many levels to go down; what lies deeper weighs as much as may be
    """
    if isinstance(item, _TEXT):
        return len(item)
    if isinstance(item, memoryview):
        return item.nbytes
    values = _values(item)
    if values is None:
        return 0 if item.__class__.__module__ in _SCALARS else SMALL + 1
    count = len(values)
    weight = count * _VALUE
    if isinstance(item, dict):
        weight += count * _VALUE + _text_of_keys(item)
    if not count or weight >= BUDGET:
        return weight
    if not depth:
        return BUDGET
    most = max(looks, _FEW)
    if count > most:
        values = list(values)[:: count // most + 1]
    text, others = 0, []
    for value in values:
        if value.__class__ is str or value.__class__ is bytes:
            text += len(value)
        elif value.__class__ not in WEIGHTLESS:
            others.append(value)
    weight += text * count // len(values)
    if not others or weight >= BUDGET:
        return weight
    width = isqrt(looks) // 2 or 1
    some = others[:: (len(others) - 1) // width + 1]
    share, inside = looks // len(some), 0
    for value in some:
        inside += _weigh(value, max(share, 1), depth - 1)
        if inside >= BUDGET:
            return inside
    return weight + inside * len(others) // len(some) * count // len(values)


def _values(item: Any) -> Any:
    """Return the values in a container, or in another object that a codec may know, if any."""
    if isinstance(item, (list, tuple, set, frozenset)):
        return item
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, type):
        return None
    found: list[Any] = []
    try:  # a Struct, a dataclass, a model
        names: Any = getattr(item, "__struct_fields__", None) or getattr(item, "__slots__", ())
        found += [getattr(item, name, None) for name in names]
        found += getattr(item, "__dict__", {}).values()
    except Exception:  # whatever it is, the codec will say so
        return None
    return found or None


def _text_of_keys(item: dict[Any, Any]) -> int:
    if len(item) * _VALUE >= BUDGET:
        return 0  # more than enough without
    try:
        return sum(map(len, item))
    except TypeError:
        return sum(len(key) for key in islice(item, _LOOKS) if isinstance(key, _TEXT))
