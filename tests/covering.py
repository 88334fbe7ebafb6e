"""A pytest plugin: ``--covering`` leaves out what tells nothing that other variants of a test don't.

A test that uses a server has a variant for each event loop and each kind of server. What depends on one of
the two doesn't depend on the other, so each loop and each server is tried with each test, but not each
pair of them: for each loop one server, another one from test to test. Where a test mostly waits for
other processes each of its other parameters is tried on one loop, in turn, and all loops are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import pytest

from tests.measured import Variant, variant_of

# What is tested here runs in processes of its own.
OF_PROCESSES = ("tests/typescript", "tests/wire/test_upgrade.py", "tests/cli")


def chosen(tests: Iterable[str]) -> set[str]:
    """Return those of the tests that are run: ids as pytest has them."""
    variants: dict[str, list[Variant]] = {}
    for one in map(variant_of, tests):
        variants.setdefault(one.name, []).append(one)
    found: set[str] = set()
    for name, ones in variants.items():
        found.update(_some(ones, crc32(name.encode()), name.startswith(OF_PROCESSES)))
    return found


def _some(ones: Sequence[Variant], turn: int, one_loop: bool) -> Iterable[str]:
    """Choose among the variants of one test."""
    cells: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for one in ones:
        cells.setdefault(one.rest, {}).setdefault(one.loop, {})[one.kind] = one.test
    for number, by_loop in enumerate(cells.values()):
        loops = list(by_loop)
        if one_loop and len(cells) >= len(loops):
            loops = [loops[(turn + number) % len(loops)]]
        for place, loop in enumerate(loops):
            kinds = sorted(by_loop[loop])
            if len(loops) * len(cells) < len(kinds):
                yield from by_loop[loop].values()
            else:
                yield by_loop[loop][kinds[(turn + number + place) % len(kinds)]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--covering",
        action="store_true",
        help="try each test on each loop and each server, but not on each pair of them",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--covering"):
        return
    kept = chosen(item.nodeid for item in items)
    left_out = [item for item in items if item.nodeid not in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid in kept]
