"""A short run of ``benchmarks/chaos.py``: all goes wrong, and a ledger that adds up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos import WRONG
from tests.bounds import CALL_BOUND

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.server, pytest.mark.slow]


# What is lost is late by more than this; a busy machine is not.
SLACK = 6


@pytest.mark.parametrize(
    ("backend", "mode", "topology"),
    [
        ("trio", "group", "one"),
        ("asyncio", "group", "sentinel"),
        ("asyncio", "broadcast", "cluster"),
    ],
)
def test_short_run(backend: str, mode: str, topology: str) -> None:
    """Every call has its outcome in time, and no handler runs on for one that was cancelled."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.chaos", "--seconds", "8", "--restarts", "1"),
            *("--backend", backend, "--mode", mode, "--slack", str(SLACK)),
            *("--topology", topology),
        ],
        capture_output=True,
        text=True,
        timeout=CALL_BOUND,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", done.stdout)}
    assert counts["result"] > 20
    assert counts["cancelled"] > 5
    if topology == "one":
        assert counts["kills"] >= 1
        assert counts["terms"] >= 1
        assert counts["restarts"] == 1
    else:  # with several servers all of it takes its time
        assert counts["failovers"] + counts["restarts"] >= 1
        assert counts["written"] > 0
    assert {kind: counts[kind] for kind in WRONG} == dict.fromkeys(WRONG, 0)
