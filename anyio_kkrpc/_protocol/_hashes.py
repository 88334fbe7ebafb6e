"""Keys that hash alike.

What it takes to make a set or a dict of keys with one hash grows with the square of their number.
Only texts and bytes have hashes that nobody can foresee. Those of numbers, UUIDs, and tuples and
structs of them can be chosen: all multiples of 2**61 - 1 hash alike. So whoever makes sets and
dicts of what came looks at their hashes first.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any

# Different keys with the same hash that one set or dict may have. Honest ones have few: -1 and -2
# hash alike, and so do tuples of them.
MOST_ALIKE = 32


class AlikeError(ValueError):
    """Too many keys hash alike."""


def check_hashes(keys: Collection[Hashable]) -> None:
    """Refuse keys of one set or dict of which too many hash alike.

    :raises AlikeError: if there are more than `MOST_ALIKE` of one hash
    :raises TypeError: if one can't be a key
    """
    if len(keys) <= MOST_ALIKE:
        return
    hashes = [hash(key) for key in keys]
    if len(keys) - len(set(hashes)) < MOST_ALIKE:
        return
    alike: dict[int, list[Any]] = {}
    for number, key in zip(hashes, keys, strict=True):
        others = alike.setdefault(number, [])
        if key not in others:
            others.append(key)
            if len(others) > MOST_ALIKE:
                raise AlikeError(f"more than {MOST_ALIKE} keys with the same hash")
