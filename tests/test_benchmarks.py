"""The benchmark as its readers run it: what can't be measured is said, and ends nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bounds import BOUND

ROOT = Path(__file__).parents[1]


def test_a_case_that_does_not_start_is_left_out(tmp_path: Path) -> None:
    """Others' packages change: taskiq 0.13 could not be imported by the taskiq-redis that pip
    chose for it, and the figures of all who had been measured were lost.
    """
    figures, false = tmp_path / "figures.json", shutil.which("false")
    arguments = [
        *("--only", "calls", "--quick", "--backend", "asyncio", "--json", str(figures)),
        *("--case", "lists", "--case", "limit", "--case", "ours", "--python", f"lists={false}"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        timeout=BOUND,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert "lists on asyncio is left out: its worker did not start" in done.stdout
    assert done.stderr == "some cases failed\n"
    calls = json.loads(figures.read_text())["calls"]
    assert [(one["case"], one["kind"]) for one in calls] == [
        ("limit", ""),
        ("ours", "broadcast"),
        ("ours", "group"),
    ]
    assert all(one["in_flight"] > 0 and one["p50"] > 0 for one in calls)
