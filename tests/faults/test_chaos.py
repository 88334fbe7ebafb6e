"""A short run of ``benchmarks/chaos.py``: all goes wrong, and a ledger that adds up."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.chaos import WRONG, Chaos, One, Writer
from tests.bounds import BOUND, CALL_BOUND
from tests.topologies import SentinelSetup, TopologyError, until

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


def test_what_fails_ends(tmp_path: Path) -> None:
    """A run that can't go on says why: no process and no thread of it keeps the program."""
    with (
        pytest.raises(TopologyError),
        One(str(tmp_path)) as servers,
        Chaos(tmp_path, servers, "group", "asyncio") as chaos,
        Writer(servers) as writer,
    ):
        worker = chaos.spawn("work", str(tmp_path / "run-1"))
        with servers.client() as client:
            until(lambda: client.xlen(writer.KEY), "something is written", BOUND)
        raise TopologyError("there is no other master")
    assert worker.returncode == -signal.SIGKILL
    assert not writer.is_alive()


def test_abandoned_failover() -> None:
    """A failover that the sentinels give up, since no replica answers them, is begun again."""
    with (
        SentinelSetup(down_after=int(BOUND * 1000)) as servers,
        ThreadPoolExecutor() as pool,
    ):
        master, replicas = servers.master(), servers.replicas()

        def failing_over() -> bool:
            return "failover_in_progress" in servers.view(servers.sentinels[0])["flags"]

        def told() -> bool:
            facts = servers.sentinels[0].run("SENTINEL", "REPLICAS", servers.name)
            return all("ok" in fact for fact in facts)  # master-link-status

        until(told, "replicas that can be chosen", BOUND)
        for replica in replicas:
            replica.freeze()
        done = pool.submit(servers.failover)
        until(failing_over, "it begins", BOUND)
        until(lambda: not failing_over(), "it is given up", BOUND)
        for replica in replicas:
            replica.thaw()
        assert done.result(BOUND) in replicas
        assert servers.master() is not master
