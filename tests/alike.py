"""Keys that were chosen to hash alike."""

from __future__ import annotations

MODULUS = (1 << 61) - 1
"""Numbers hash by what is left of them, divided by this."""

_P1, _P2, _P5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_ALL = (1 << 64) - 1


def _rotated(number: int, bits: int) -> int:
    return (number << bits | number >> (64 - bits)) & _ALL


def pairs(count: int) -> list[tuple[int, int]]:
    """Return pairs of integers of 61 bits whose hashes are the same: a tuple's can be turned round."""
    found: list[tuple[int, int]] = []
    first = 0
    wanted = _rotated(pow(_P1, -1, 1 << 64) * 12345 & _ALL, 33)
    while len(found) < count:
        first += 1
        before = _rotated(_P5 + first * _P2 & _ALL, 31) * _P1 & _ALL
        second = (wanted - before) * pow(_P2, -1, 1 << 64) & _ALL
        if second < MODULUS:
            found.append((first, second))
    assert len({hash(pair) for pair in found}) == 1
    return found
