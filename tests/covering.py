"""A pytest plugin: ``--covering`` leaves out what tells nothing that other variants of a test don't.

A test has a variant for each event loop, each kind of server and each of its other parameters. What
depends on one of them hardly depends on another one, so each loop, each server and each of the others
is tried with each test, but not each combination of them. Which ones meet changes from test to
test, so that each codec, dialect or link meets each loop and each server in some tests.

``--covering-once`` doesn't even try each loop with each test, only each of the other parameters, on
one loop or another: for a Python of which the other tests tell what depends on the loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from zlib import crc32

import pytest

from tests.measured import Variant, variant_of

# What is about tasks and sockets, where loops differ most: each other parameter on each of them.
OF_LOOPS = (
    *("tests/runtime", "tests/core", "tests/transports", "tests/redis/connection"),
    "tests/conformance/test_contract.py",
)


def chosen(tests: Iterable[str], once: bool = False) -> set[str]:
    """Return those of the tests that are run: ids as pytest has them."""
    variants: dict[str, list[Variant]] = {}
    for one in map(variant_of, tests):
        variants.setdefault(one.name, []).append(one)
    found: set[str] = set()
    for name, ones in variants.items():
        found.update(one.test for one in _some(ones, crc32(name.encode()), once))
    return found


def _some(ones: Sequence[Variant], turn: int, once: bool) -> Iterable[Variant]:
    """Choose among the variants of one test."""
    cells: dict[tuple[str, ...], list[Variant]] = {}
    for one in ones:
        key = (*one.rest, one.loop) if one.name.startswith(OF_LOOPS) else one.rest
        cells.setdefault(key, []).append(one)
    chooser = _Chooser(ones, turn)
    for cell in cells.values():
        yield chooser.choose(cell)
    if once:
        return
    for part in chooser.parts:
        if not chooser.used[part]:
            yield chooser.choose([one for one in ones if part in (one.loop, one.kind)])


class _Chooser:
    """Chooses variants of a test, each time one on a loop and a server that were chosen least."""

    def __init__(self, ones: Sequence[Variant], turn: int) -> None:
        loops = _turned({one.loop for one in ones}, turn)
        kinds = _turned({one.kind for one in ones}, turn // 7)
        self.parts = (*loops, *kinds)
        self.used: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()

    def choose(self, cell: Iterable[Variant]) -> Variant:
        found = min(cell, key=self._rank)
        self.used.update({found.loop, found.kind})
        self._pairs[found.loop, found.kind] += 1
        return found

    def _rank(self, one: Variant) -> tuple[int, int, int]:
        used, place = self.used, self.parts.index
        return (
            used[one.loop] + used[one.kind],
            self._pairs[one.loop, one.kind],
            place(one.loop) * len(self.parts) + place(one.kind),
        )


def _turned(parts: set[str], turn: int) -> list[str]:
    """Return them with another one first from test to test."""
    ordered = sorted(parts)
    first = turn % len(ordered)
    return ordered[first:] + ordered[:first]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--covering",
        action="store_const",
        const="each",
        help="try each test on each loop and each server, but not in each combination",
    )
    parser.addoption(
        "--covering-once",
        dest="covering",
        action="store_const",
        const="once",
        help="try each test with each of its other parameters, on one loop or another",
    )


@pytest.hookimpl(trylast=True)  # of what `-k` and `-m` have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    how = config.getoption("--covering")
    if not how:
        return
    kept = chosen((item.nodeid for item in items), how == "once")
    left_out = [item for item in items if item.nodeid not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid in kept]
