"""Each test that docs/delivery.md names has run, and was not skipped.

``python -m tests.promises DIRECTORY`` looks at what a run with ``--outcomes DIRECTORY`` wrote, and
fails with a line for each promise that was not shown: on each event loop, if a test runs on one of
them, and on each server, if it needs one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.outcomes import Outcome, read
from tests.servers import SERVERS, program_of

PAGE = Path(__file__).parents[1] / "docs" / "delivery.md"
LOOPS = ("asyncio", "uvloop", "trio")
# These start a loop of their own, for which asyncio is asyncio.
WITHOUT_UVLOOP = (
    "tests/serving/test_crew.py::test_any_order",
    "tests/runtime/test_entrance.py::test_made_before_a_fork",
    "tests/faults/test_chaos.py::test_short_run",
    "tests/faults/test_model.py::test_against_the_model",
    # Processes of two versions, whose entries don't depend on it.
    "tests/wire/test_upgrade.py",
)
# What it counts is this library's: its memory, and the keys that it doesn't make.
ON_ONE_SERVER = ("tests/faults/test_memory.py::test_abandoned_clients",)


class Named(NamedTuple):
    """A test, or a whole file if there is no name."""

    file: str
    name: str


def named_tests(text: str) -> list[Named]:
    """Return what a page names: `file::name`, `file`, or `name` in the file before."""
    found: list[Named] = []
    for file, name, alone in re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`|`(test_\w+)`", text):
        found.append(Named(file or found[-1].file, name or alone))
    return found


def complaints(
    named: Iterable[Named], outcomes: Iterable[Outcome], servers: Sequence[str] = SERVERS
) -> list[str]:
    """Return what is missing, one line for each test."""
    ran: dict[Named, list[Outcome]] = {}
    for outcome in outcomes:
        path = outcome.test.partition("[")[0]
        file, *_, name = path.split("::")
        for key in (Named(file, name), Named(file, "")):
            ran.setdefault(key, []).append(outcome)
    return [
        line for one in dict.fromkeys(named) for line in _complain(one, ran.get(one, []), servers)
    ]


def _complain(named: Named, ran: list[Outcome], servers: Sequence[str]) -> Iterable[str]:
    text = "::".join(filter(None, named))
    if not ran:
        yield f"{text}: has not run"
    yield from (f"{one.test}: {one.outcome}" for one in ran if one.outcome != "passed")
    for test in dict.fromkeys(one.test.partition("[")[0] for one in ran):
        parts: set[str] = set()
        for one in ran:
            path, _, parameters = one.test.partition("[")
            if path == test:
                parts.update(parameters.rstrip("]").split("-"))
        without = test in WITHOUT_UVLOOP or test.partition("::")[0] in WITHOUT_UVLOOP
        loops = [loop for loop in LOOPS if loop != "uvloop" or not without]
        for kinds in (loops, () if test in ON_ONE_SERVER else servers):
            if missing := _missing(kinds, parts):
                yield f"{test}: has not run on {', '.join(missing)}"


def _missing(kinds: Collection[str], parts: set[str]) -> list[str]:
    """Return the kinds that aren't there, if any is."""
    missing = [kind for kind in kinds if kind not in parts]
    return missing if len(missing) < len(kinds) else []


def absent_servers() -> list[str]:
    """Return the kinds of server that this machine lacks, unless it must have them, as CI must."""
    if os.environ.get("ANYIO_KKRPC_REQUIRE_SERVERS"):
        return []
    return [kind for kind in SERVERS if program_of(kind) is None]


def main(directory: str) -> int:
    """Print what is missing, and what the run cost; return the exit code."""
    absent = absent_servers()
    outcomes = [
        one for one in read(Path(directory)) if not any(kind in one.test for kind in absent)
    ]
    named = named_tests(PAGE.read_text())
    missing = complaints(named, outcomes, [kind for kind in SERVERS if kind not in absent])
    sys.stdout.write("".join(f"there is no {kind} on this machine\n" for kind in absent))
    sys.stdout.write("".join(f"{line}\n" for line in missing))
    cpu = sum(outcome.cpu for outcome in outcomes)
    sys.stdout.write(
        f"{PAGE.name} names {len(named)} tests and files, {len(missing)} complaints; "
        f"{len(outcomes)} tests took {cpu:.0f} s of CPU time\n"
    )
    return 1 if missing or not named else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
