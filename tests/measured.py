"""A pytest plugin: coverage is measured where it may tell something new.

A test takes two to three times as long while it is measured, which made half of a run. What the library
does hardly depends on event loop and server, so of the variants of a test those on one of each are
measured; the coverage of what depends on them is told by tests that have one variant.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable

import coverage
import pytest

# By preference: the first of these that a test runs on. Tracing costs least on uvloop.
LOOPS = ("uvloop", "asyncio", "trio")
KINDS = ("valkey8", "redis7")
# What depends on the loop, and is measured on each.
MEASURED_ON_ALL = ("tests/runtime",)
# These look at sources, or run processes through what other tests measure in one.
NOT_MEASURED = (
    *("tests/docs", "tests/guards", "tests/faults/test_chaos.py", "tests/wire/test_upgrade.py"),
    *("tests/test_packaging.py", "tests/test_promises.py"),
)
# Where coverage.py leaves what it does for the processes that are started.
INHERITED = "COVERAGE_PROCESS_CONFIG"


def chosen(tests: Iterable[str]) -> set[str]:
    """Return those of the tests that are measured."""
    variants: dict[tuple[str, ...], list[str]] = {}
    for test in tests:
        if not test.startswith(NOT_MEASURED):
            variants.setdefault(_but_for_kinds(test), []).append(test)
    found: set[str] = set()
    for (name, *_), ids in variants.items():
        for preferred in () if name.startswith(MEASURED_ON_ALL) else (LOOPS, KINDS):
            ids = _of_one_kind(ids, preferred)
        found.update(ids)
    return found


def _but_for_kinds(test: str) -> tuple[str, ...]:
    """Return the name of a test and its parameters but for loop and server."""
    name, _, parameters = test.partition("[")
    parts = parameters.rstrip("]").split("-")
    return name, *(part for part in parts if part not in (*LOOPS, *KINDS))


def _of_one_kind(ids: list[str], preferred: tuple[str, ...]) -> list[str]:
    """Leave out what runs on a kind that is less preferred than another one that there is."""
    parts = {test: set(test.partition("[")[2].rstrip("]").split("-")) for test in ids}
    there = [kind for kind in preferred if any(kind in found for found in parts.values())]
    return [test for test in ids if parts[test].isdisjoint(there[1:])]


class Measured:
    """Lets the coverage of this process, and of those that it starts, rest meanwhile."""

    def __init__(self, running: coverage.Coverage) -> None:
        self._coverage = running
        self._inherited = os.environ[INHERITED]
        self._runs = True
        self._chosen: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._chosen = chosen(item.nodeid for item in session.items)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._switch(item.nodeid in self._chosen)
        return (yield)

    def _switch(self, on: bool) -> None:
        if on and not self._runs:
            os.environ[INHERITED] = self._inherited
            self._coverage.start()
        elif self._runs and not on:
            self._coverage.stop()
            os.environ.pop(INHERITED, None)
        self._runs = on


def pytest_configure(config: pytest.Config) -> None:
    running = coverage.Coverage.current()
    # In a process that xdist has started: there it was started by what is inherited.
    if running is not None and hasattr(config, "workerinput") and INHERITED in os.environ:
        config.pluginmanager.register(Measured(running))
