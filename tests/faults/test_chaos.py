"""A short run of ``benchmarks/chaos.py``: kills, cuts and a restart, and a ledger that adds up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import BOUND

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_short_run(backend: str) -> None:
    """Every call has its outcome, each result was produced by a run, and no run is unexplained."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.chaos", "--seconds", "8", "--restarts", "1"),
            *("--backend", backend),
        ],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", done.stdout)}
    assert counts["result"] > 100
    assert counts["kills"] >= 2
    assert counts["restarts"] == 1
    assert counts["unanswered"] == counts["invented"] == counts["unexplained"] == 0
