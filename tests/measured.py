"""A pytest plugin: coverage is measured where it may tell something new.

A test takes two to three times as long while it is measured, which made half of a run. What the library
does hardly depends on event loop and server, so of the variants of a test those on one of each are
measured; the coverage of what depends on them is told by tests that have one variant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

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
    variants: dict[tuple[str, ...], list[Variant]] = {}
    for one in map(variant_of, tests):
        if not one.name.startswith(NOT_MEASURED):
            variants.setdefault((one.name, *one.rest), []).append(one)
    found: set[str] = set()
    for (name, *_), ones in variants.items():
        if not name.startswith(MEASURED_ON_ALL):
            ones = _preferred(ones, lambda one: one.loop, LOOPS)
            ones = _preferred(ones, lambda one: one.kind, KINDS)
        found.update(one.test for one in ones)
    return found


class Variant(NamedTuple):
    """One of the variants of a test.

    :ivar test: its id, as pytest has it
    :ivar name: the test's
    :ivar loop: its event loop, if it has one
    :ivar kind: of its server, if it has one
    :ivar rest: its other parameters
    """

    test: str
    name: str
    loop: str
    kind: str
    rest: tuple[str, ...]


def variant_of(test: str) -> Variant:
    """Return what an id tells."""
    name, _, parameters = test.partition("[")
    parts = parameters.rstrip("]").split("-")
    loop = next((part for part in parts if part in LOOPS), "")
    kind = next((part for part in parts if part in KINDS), "")
    return Variant(
        test, name, loop, kind, tuple(part for part in parts if part not in (loop, kind))
    )


def _preferred(
    ones: list[Variant], where: Callable[[Variant], str], preferred: tuple[str, ...]
) -> list[Variant]:
    """Leave out what runs on a kind that is less preferred than another one that there is."""
    there = [kind for kind in preferred if any(where(one) == kind for one in ones)]
    return [one for one in ones if where(one) not in there[1:]]


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
