"""Keeps the workers of ``anyio-kkrpc serve`` running.

Tasks: one for each worker's process after the other, one for signals, one for changes of the code.
A worker's name in the group is its successor's, so that what it held when it died is done at once.
"""

from __future__ import annotations

import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path

import anyio
from anyio import (
    Event,
    create_task_group,
    current_time,
    move_on_after,
    open_signal_receiver,
)
from anyio.abc import Process, SocketListener, TaskGroup
from msgspec.structs import replace

from . import _http
from ._health import Health, WorkerState
from ._line import Line
from ._report import WorkerError
from ._restarts import End, Restarts, Verdict, Word
from ._worker import ANSWER_WITHIN, Options, Report, say

# Seconds beyond the grace period until a worker that was told to end is killed.
KILL_AFTER = 5.0
# Seconds that a worker has to begin, before the next one is exchanged on SIGHUP.
BEGIN_WITHIN = 30.0
# Seconds that a worker has to tell how it is: more than Redis has to answer it.
ASK_WITHIN = ANSWER_WITHIN + 0.5


class _Slot:
    """One worker's place: its process now, and whether that is to be exchanged."""

    def __init__(self, number: int, options: Options) -> None:
        self.number = number
        self.options = options
        self.process: Process | None = None
        self.line: Line | None = None
        self.started = 0
        # Whether the process ends because it is exchanged.
        self.leaving = False
        # Set when the next process is started, and when the present one serves.
        self.next = Event()
        self.serving = Event()
        self.changed = Event()


class Supervisor:
    """Keeps worker processes running.

    :param workers: how many
    :param reload: whether to start them anew when the code changes
    :ivar error: why they can't be started
    """

    def __init__(self, options: Options, workers: int, *, reload: bool) -> None:
        self._grace = options.grace
        self._reload = reload
        self._restarts = Restarts(workers)
        service = secrets.token_hex(4)
        self._slots = [
            _Slot(
                number,
                options
                if options.group is None
                else replace(options, consumer_name=f"worker-{number}-{service}"),
            )
            for number in range(1, workers + 1)
        ]
        self.error: WorkerError | None = None

    async def run(self, group: TaskGroup) -> None:
        """Keep them running until one was ended by a destroy signal, or none can be started.

        :param group: runs what else there is to do, and is cancelled at the end
        """
        if self._reload:
            group.start_soon(self._watch, group, name="anyio_kkrpc reload")
        async with create_task_group() as kept:
            for slot in self._slots:
                name = f"anyio_kkrpc worker {slot.number}"
                kept.start_soon(self._keep, slot, kept, name=name)
        group.cancel_scope.cancel()

    async def states(self) -> list[WorkerState]:
        """Ask all workers how they are; those that don't answer in time have no report."""
        reports: dict[int, Report | None] = {}

        async def ask(slot: _Slot) -> None:
            reports[slot.number] = None if slot.line is None else await slot.line.ask(ASK_WITHIN)

        async with create_task_group() as group:
            for slot in self._slots:
                group.start_soon(ask, slot)
        return [WorkerState(s.number, s.started, reports[s.number]) for s in self._slots]

    async def _keep(self, slot: _Slot, group: TaskGroup) -> None:
        while True:
            changed = slot.changed
            end = await self._run_one(slot)
            if slot.leaving:
                slot.leaving = False
                continue
            verdict, pause = self._restarts.judge(slot.number, end)
            who = f"worker {slot.number} (pid {end.pid})"
            if verdict is Verdict.over:
                say(f"{who} was ended by a destroy signal; the service ends")
                group.cancel_scope.cancel()
                return
            if verdict is Verdict.failed and not self._reload:
                self.error = WorkerError(f"worker {slot.number} {end.how}; see above")
                group.cancel_scope.cancel()
                return
            if self._reload and Word.refused in end.words:
                say(f"{who} {end.how}; it waits for a change of the code")
                await changed.wait()
                continue
            if Word.recycled not in end.words:
                say(f"{who} {end.how}; it is started again in {pause:g} s")
            with move_on_after(pause):
                await changed.wait()  # what is new may be what mends it

    async def _run_one(self, slot: _Slot) -> End:
        line, started = Line(), current_time()
        begun, slot.next, slot.serving = slot.next, Event(), line.serving
        begun.set()
        try:
            process = await anyio.open_process(
                [sys.executable, "-m", "anyio_kkrpc._cli._worker"],
                stdin=line.theirs.fileno(),
                stdout=None,
                stderr=None,
                start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor alone
            )
            line.theirs.close()
            slot.process, slot.line = process, line
            slot.started += 1
            try:
                line.send(slot.options)
                async with create_task_group() as group:
                    group.start_soon(line.listen, name="anyio_kkrpc words of a worker")
                    await process.wait()
                    group.cancel_scope.cancel()
                line.take()
                code, lasted = process.returncode, current_time() - started
                assert code is not None
                return End(process.pid, code, frozenset(line.words), lasted)
            finally:
                slot.process = slot.line = None
                if process.returncode is None:
                    with move_on_after(self._grace + KILL_AFTER, shield=True):
                        _terminate(process)
                        await process.wait()
                with move_on_after(KILL_AFTER, shield=True):
                    await process.aclose()  # kills it, if it still runs
        finally:
            line.close()

    async def renew(self) -> None:
        """Exchange the workers for new ones, one after the other; no call is lost."""
        for slot in self._slots:
            await self._exchange(slot)
            with move_on_after(BEGIN_WITHIN) as scope:
                await slot.serving.wait()
            if scope.cancelled_caught:
                say(f"worker {slot.number} has not begun to serve; the others stay as they are")
                return
        say("the workers are new")

    async def _watch(self, group: TaskGroup) -> None:
        """Start the workers anew, all at once, when the code changes."""
        from watchfiles import PythonFilter, awatch

        async for _ in awatch(Path.cwd(), watch_filter=PythonFilter()):
            say("the code has changed; the workers start anew")
            for slot in self._slots:
                group.start_soon(self._exchange, slot, name="anyio_kkrpc reload")

    async def _exchange(self, slot: _Slot) -> None:
        """End the present process of a worker, and see the next one started."""
        process, begun = slot.process, slot.next
        changed, slot.changed = slot.changed, Event()
        changed.set()
        if process is None:
            return
        slot.leaving = True
        _terminate(process)
        with move_on_after(self._grace + KILL_AFTER) as scope:
            await process.wait()
        if scope.cancelled_caught:
            with suppress(ProcessLookupError):
                process.kill()
        await begun.wait()


async def _listen(host: str, port: int) -> list[SocketListener]:
    try:
        listeners = await _http.bind(host, port)
    except OSError as exc:
        raise WorkerError(f"--http {host}:{port}: {exc}") from exc
    for listener in listeners:
        say(f"{_http.url_of(listener)} answers /healthz, /readyz and /metrics")
    return listeners


def _terminate(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()


async def supervise(
    options: Options, workers: int, *, reload: bool, at: tuple[str, int] | None = None
) -> None:
    """Keep so many worker processes running until told to end.

    SIGTERM and SIGINT end them cleanly, and so does a destroy signal. SIGHUP exchanges them
    for new ones, one after the other.

    :param at: host and port where to answer probes and scrapers; nowhere, if ``None``
    :raises WorkerError: if the first start of all fails in the same way, or ``at`` can't be had
    """
    supervisor = Supervisor(options, workers, reload=reload)
    listeners = [] if at is None else await _listen(*at)
    async with create_task_group() as group:

        async def watch_signals() -> None:
            with open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as caught:
                async for number in caught:
                    if number is signal.SIGHUP:
                        say("SIGHUP: new workers take the place of the present ones")
                        group.start_soon(supervisor.renew, name="anyio_kkrpc renewal")
                        continue
                    say(f"{number.name}: the workers end")
                    group.cancel_scope.cancel()
                    return

        group.start_soon(watch_signals, name="anyio_kkrpc signals")
        if listeners:
            health = Health(options, supervisor.states)
            group.start_soon(_http.serve, listeners, health.respond, name="anyio_kkrpc http")
        await supervisor.run(group)
    if supervisor.error is not None:
        raise supervisor.error
