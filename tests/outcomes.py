"""A pytest plugin: ``--outcomes DIRECTORY`` writes down what became of each test.

With pytest-xdist no process knows all outcomes, so each one that runs tests writes a file of its own.
A line is ``{"test": ..., "outcome": "passed" | "failed" | "skipped", "cpu": seconds}``; the processes
that a test starts and waits for count as its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Outcome(NamedTuple):
    """What became of a test."""

    test: str
    outcome: str
    cpu: float


class Recorder:
    """Writes the file of one process."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # By lines: on a slow machine xdist may end its workers before they have ended themselves.
        self._file = (directory / f"{os.getpid()}.jsonl").open("w", buffering=1)
        self._begun = 0.0
        self._outcome = "passed"

    def pytest_runtest_logstart(self) -> None:
        self._begun = _cpu()
        self._outcome = "passed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcome = "failed"
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = Outcome(nodeid, self._outcome, round(_cpu() - self._begun, 3))
        self._file.write(json.dumps(outcome._asdict()) + "\n")

    def pytest_unconfigure(self) -> None:
        self._file.close()


def _cpu() -> float:
    return sum(os.times()[:4])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="DIRECTORY", help="write down what became of each test")


def pytest_configure(config: pytest.Config) -> None:
    directory = config.getoption("--outcomes")
    distributes = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if directory and not distributes:
        config.pluginmanager.register(Recorder(Path(directory)))


def read(directory: Path) -> Iterator[Outcome]:
    """Return what all processes of a run wrote."""
    for file in sorted(directory.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            yield Outcome(**json.loads(line))
