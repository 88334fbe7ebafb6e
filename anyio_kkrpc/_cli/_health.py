"""What ``serve --http`` tells: whether the service lives, whether it takes calls, and figures.

The figures of the workers come from themselves, through their supervisor; those of the stream and
its group come from Redis, for all workers of the group, wherever they run.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import anyio
from anyio import CapacityLimiter, Lock, create_task_group, current_time, move_on_after
from msgspec import Struct
from redis.exceptions import RedisError

from .._channel import ChannelStatistics, MethodStatistics
from .._exceptions import RPCError
from ..kit._queue import QueueStatistics
from ..redis import RedisStatistics
from ..redis._stream._places import name_of_shard
from ._asking import Servers
from ._http import Answer
from ._top_look import GroupLook, StreamLook, look
from ._worker import Options, Report

# Seconds that Redis has for each answer and for all of them, and for which one look is good.
LOOK_TIMEOUT = 1.0
LOOK_WITHIN = 2.0
LOOK_AGE = 0.5
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# What is as it is now; everything else counts up.
_GAUGES = {
    *("calls", "handlers", "callbacks", "incoming_streams", "outgoing_streams", "outstanding"),
    *("current_items", "current_bytes", "high_water_items", "high_water_bytes"),
    *("max_items", "max_bytes", "waiting_receivers", "waiting_senders", "reading"),
}


class WorkerState(Struct, frozen=True):
    """One worker's place.

    :ivar number: its number, from 1
    :ivar started: processes that were started for it
    :ivar report: what the present one told; ``None`` if there is none, or it doesn't answer
    """

    number: int
    started: int
    report: Report | None


class Health:
    """Answers for one service.

    :param ask: asks all workers
    """

    def __init__(self, options: Options, ask: Callable[[], Awaitable[list[WorkerState]]]) -> None:
        self._stream, self._group = options.stream, options.group
        self._names = [name_of_shard(options.stream, shard) for shard in range(options.shards)]
        self._ask = ask
        self._servers = Servers(options.url, LOOK_TIMEOUT)
        self._limiter, self._lock = CapacityLimiter(1), Lock()
        self._looks: dict[str, StreamLook] = {}
        self._away: set[str] = set()
        self._looked_at = float("-inf")

    async def respond(self, path: str) -> Answer:
        """Answer a path."""
        if path == "/healthz":
            return Answer(200, "the supervisor runs\n")
        if path == "/readyz":
            return _readiness(await self._ask())
        if path == "/metrics":
            return await self._metrics()
        return Answer(404, "there are /healthz, /readyz and /metrics\n")

    async def _metrics(self) -> Answer:
        states: list[WorkerState] = []

        async def ask() -> None:
            states.extend(await self._ask())

        async with create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(self._look_at_redis)
        where = {"stream": self._stream}
        if self._group is not None:
            where["group"] = self._group
        page = Page()
        for state in states:
            _write_worker(page, state, {**where, "worker": str(state.number)})
        for shard, name in enumerate(self._names):
            labels = {"stream": self._stream}
            if len(self._names) > 1:
                labels["shard"] = str(shard)
            _write_stream(page, self._looks.get(name), labels)
        return Answer(200, page.text(), _METRICS_TYPE)

    async def _look_at_redis(self) -> None:
        """Look at the stream, unless that was a moment ago."""
        async with self._lock:
            if current_time() - self._looked_at < LOOK_AGE:
                return
            looks = self._looks = {}
            with move_on_after(LOOK_WITHIN):
                await anyio.to_thread.run_sync(
                    self._ask_redis, looks, limiter=self._limiter, abandon_on_cancel=True
                )
            self._looked_at = current_time()

    def _ask_redis(self, looks: dict[str, StreamLook]) -> None:
        """Look at each shard, those first that told last time: one that is away takes its time."""
        for name in sorted(self._names, key=self._away.__contains__):
            self._away.add(name)
            with suppress(RedisError, OSError, RPCError):
                (looks[name],) = look(self._servers.of(name), [name])
                self._away.discard(name)


def _readiness(states: list[WorkerState]) -> Answer:
    """Ready is who has a worker that takes calls."""
    ready = [state.report is not None and state.report.ready for state in states]
    lines = [
        f"worker {state.number} {'takes calls' if one else _why_not(state)}\n"
        for state, one in zip(states, ready, strict=True)
    ]
    return Answer(200 if any(ready) else 503, "".join(lines))


def _why_not(state: WorkerState) -> str:
    return "doesn't answer" if state.report is None else "doesn't take calls yet, or no more"


# Prometheus' text format


class Page:
    """Metrics, each with its help, its type and its samples together, in the order of writing."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(
        self, name: str, value: float | None, labels: dict[str, str], *, counter: bool, about: str
    ) -> None:
        """Add a sample; none where there is no value."""
        if value is None:
            return
        name = f"anyio_kkrpc_{name}{'_total' if counter else ''}"
        lines = self._families.setdefault(name, [])
        if not lines:
            lines.append(f"# HELP {name} {about}")
            lines.append(f"# TYPE {name} {'counter' if counter else 'gauge'}")
        shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{shown}}} {value:.15g}")

    def text(self) -> str:
        """Return the page."""
        return "".join(f"{line}\n" for lines in self._families.values() for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _write_worker(page: Page, state: WorkerState, labels: dict[str, str]) -> None:
    report = state.report
    about = "Whether the worker takes calls."
    ready = report is not None and report.ready
    page.add("worker_ready", ready, labels, counter=False, about=about)
    about = "Processes that were started for it."
    page.add("worker_starts", state.started, labels, counter=True, about=about)
    if report is None:
        return
    about = "Resident memory of its process."
    page.add("worker_memory_bytes", report.memory, labels, counter=False, about=about)
    for prefix, told in (("channel", report.channel), ("transport", report.transport)):
        for kind, name, value in _flat(prefix, told):
            counter, about = name not in _GAUGES, _ABOUT.get((kind, name), "")
            page.add(f"{kind}_{name}", value, labels, counter=counter, about=about)
    for method, numbers in report.channel.get("methods", {}).items():
        of_it = {**labels, "method": method}
        for name, value in numbers.items():
            about = _ABOUT.get(("method", name), "")
            page.add(f"method_{name}", value, of_it, counter=True, about=about)


def _flat(kind: str, told: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    for name, value in told.items():
        if isinstance(value, (int, float)):
            yield kind, name, value
        elif name == "queue":
            yield from _flat("queue", value)


def _write_stream(page: Page, found: StreamLook | None, where: dict[str, str]) -> None:
    def add(name: str, value: float | None, about: str, group: GroupLook | None = None) -> None:
        labels = where if group is None else {**where, "group": group.name}
        page.add(name, value, labels, counter=False, about=about)

    readable = found is not None and found.error is None
    add("redis_up", readable, "Whether Redis tells about the stream.")
    if found is None or not readable:
        return
    add("stream_length", found.length, "Entries in the stream.")
    add("stream_dead_letters", found.dead, "Dead letters.")
    for group in found.groups:
        add("group_waiting", group.waiting, "Requests that no worker has taken.", group)
        add("group_pending", group.running, "Requests that workers have taken.", group)
        oldest = 0.0 if group.oldest is None else group.oldest
        add("group_oldest_seconds", oldest, "Age of the oldest unfinished request.", group)
        add("group_workers", len(group.workers), "Workers of the group.", group)


def _about(kind: str, struct: type) -> Iterable[tuple[tuple[str, str], str]]:
    """Return what the documentation of a Struct says about each of its fields."""
    for name, text in re.findall(r":ivar (\w+): ((?:.|\n(?! *:))+)", struct.__doc__ or ""):
        yield (kind, name), " ".join(text.split()).capitalize() + "."


_ABOUT = dict(
    item
    for kind, struct in (
        ("channel", ChannelStatistics),
        ("method", MethodStatistics),
        ("transport", RedisStatistics),
        ("queue", QueueStatistics),
    )
    for item in _about(kind, struct)
)
