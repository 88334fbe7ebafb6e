"""How fast calls are, beside the limit and what people would use instead.

Client and worker are processes of their own and share one Redis, which this starts by itself.
Rounds of all cases are interleaved, so that a noisy machine is noisy for each of them; the
figures are medians. What isn't installed or fails is left out, and said so. ``pip install -e
".[bench]"`` has all but arq, whose redis-py is older than others': ``--python arq=PATH`` names a
Python that has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anyio_kkrpc.testing._server import RedisServer, find_server

from ._ours import Found, report
from ._processes import LOOPS, Failed, Plan, Round, measure
from .cases import IN_FLIGHT, NAMES, PAYLOAD, load, missing

Key = tuple[str, str, str]
COLUMNS = (
    "case",
    "backend",
    "p50 ms",
    "x limit",
    "p99 ms",
    f"{IN_FLIGHT} in flight /s",
    "range",
    "of limit",
    "client",
    "worker",
    "server",
)


def cases(names: Iterable[str], backends: Iterable[str], pythons: Mapping[str, str]) -> list[Key]:
    """Return what can be measured here; say what can't.

    :param pythons: cases whose packages another Python has, so that they aren't looked for here
    """
    found: list[Key] = []
    for name in names:
        case = load(name)
        if name not in pythons and (absent := missing(case)):
            print(f"{name} is left out: {', '.join(absent)} not installed")
            continue
        wanted = [backend for backend in case.BACKENDS if backend in backends]
        found += [(name, backend, kind) for backend in wanted for kind in case.KINDS]
    return found


def table(results: dict[Key, list[Round]]) -> str:
    """Return the medians as a Markdown table; ratios are to the limit of the same backend."""
    rows = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    medians = {key: median(rounds) for key, rounds in results.items()}
    for (name, backend, kind), found in medians.items():
        limit = medians.get(("limit", backend, ""))
        speeds = [one.in_flight for one in results[name, backend, kind]]
        row = (
            f"{name} {kind}".strip(),
            backend,
            f"{found.p50 * 1e3:.3f}",
            f"{found.p50 / limit.p50:.2f}" if limit else "",
            f"{found.p99 * 1e3:.3f}",
            f"{found.in_flight:,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}",
            f"{found.in_flight / limit.in_flight:.2f}" if limit else "",
            *(f"{seconds:.2f}" for seconds in (found.client, found.worker, found.server)),
        )
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def median(rounds: list[Round]) -> Round:
    """Return the median of each figure."""
    return Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def calls(
    keys: list[Key], server: RedisServer, plan: Plan, pythons: Mapping[str, str]
) -> dict[Key, list[Round]]:
    """Measure the cases in turn, as often as there are rounds.

    One that fails is left out from then on, and said: others' packages change, and the rounds of
    all others took their time.
    """
    results: dict[Key, list[Round]] = {key: [] for key in keys}
    for _ in range(plan.rounds):
        for case, backend, kind in list(results):
            redis, name = (server.port, server.pid), f"bench-{uuid.uuid4().hex[:8]}"
            python = pythons.get(case, sys.executable)
            try:
                found = measure(case, backend, kind, redis, plan, name, python)
            except Failed as error:
                print(f"{case} on {backend} is left out: {error}", flush=True)
                del results[case, backend, kind]
            else:
                results[case, backend, kind].append(found)
    return results


def _other_python(text: str) -> tuple[str, str]:
    case, _, path = text.partition("=")
    if case not in NAMES or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not CASE=PATH with one of {NAMES}")
    return case, path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of each case")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--backend", choices=LOOPS, action="append", help="default: all")
    parser.add_argument("--only", choices=("calls", "ours"), help="default: both, in this order")
    parser.add_argument("--case", choices=NAMES, action="append", help="of calls; default: all")
    parser.add_argument(
        "--python",
        type=_other_python,
        action="append",
        default=[],
        metavar="CASE=PATH",
        help="a Python for this case, where its packages don't go with the others'",
    )
    parser.add_argument("--json", type=Path, help="file to write the medians to")
    parser.add_argument("--plot", type=Path, help="PNG file to draw calls in; needs matplotlib")
    return parser.parse_args()


def main() -> None:
    """Measure, and print what was found."""
    arguments = _arguments()
    plan = Plan(1, 0.3, 0.4, 100) if arguments.quick else Plan(5, 0.6, 1.0, 200)
    plan = plan._replace(rounds=arguments.rounds or plan.rounds)
    backends = arguments.backend or list(LOOPS)
    if importlib.util.find_spec("uvloop") is None:
        print("uvloop is left out: not installed")
        backends = [backend for backend in backends if backend != "uvloop"]
    named = [] if arguments.only == "ours" else arguments.case or NAMES
    pythons = dict(arguments.python)
    keys = cases(named, backends, pythons)
    more = arguments.only != "calls"
    ours: dict[str, Found] = {}
    started = time.perf_counter()
    with RedisServer(find_server()) as server:
        results = calls(keys, server, plan, pythons)
        if results:
            print(
                f"\nEcho of {len(PAYLOAD)} bytes; client, worker, server: CPU s per 10,000 calls.\n"
                f"\n{table(results)}\n",
                flush=True,
            )
        for what, figures in report(backends, server, plan.rounds) if more else ():
            ours[what] = figures
            text = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
            print(f"{what}: {text}", flush=True)
        version = server.version
    about: dict[str, Any] = {
        "server": version,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "rounds": plan.rounds,
        "seconds": round(time.perf_counter() - started),
    }
    print("\n" + ", ".join(f"{what}: {value}" for what, value in about.items()))
    if arguments.json is not None:
        medians = [
            {"case": case, "backend": backend, "kind": kind, **median(rounds)._asdict()}
            for (case, backend, kind), rounds in results.items()
        ]
        text = json.dumps({**about, "calls": medians, "ours": ours}, indent=1)
        arguments.json.write_text(text + "\n")
    if arguments.plot is not None:
        from ._plot import plot

        plot({key: median(rounds) for key, rounds in results.items()}, arguments.plot)
    if len(results) < len(keys):
        sys.exit("some cases failed")


if __name__ == "__main__":
    main()
