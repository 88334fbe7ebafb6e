"""``anyio-kkrpc serve``: one worker in this process, or several that are kept running.

The supervisor starts its workers as ``python -m anyio_kkrpc._cli._serve`` and writes the options to
their standard input, so that no password stands in a list of processes. The input stays open: when
it ends, the supervisor is gone, and the worker ends in good order as it does on SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio import create_task_group, current_time, move_on_after, open_signal_receiver
from anyio.abc import Process, TaskGroup
from msgspec import Struct

from .._channel import RPCChannel
from .._exposure import Exposed, expose
from .._groups import lone_error
from .._signals import serve_until_signalled
from ..redis import RedisStreamsTransport

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
# Seconds beyond the grace period until a worker that was told to end is killed.
KILL_AFTER = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# A worker that ran this long, in seconds, has started well.
STARTED_WELL = 10.0
# Exit code of a worker that can't start as it was told to.
WRONG_USAGE = 2


class WorkerError(Exception):
    """A worker can't be started."""


class Options(Struct, frozen=True, kw_only=True):
    """What a worker is told."""

    target: str
    url: str
    stream: str
    group: str | None
    backend: str
    concurrency: int
    grace: float
    debug: bool
    codec: str
    max_len: int | None
    claim_idle: float
    max_deliveries: int
    signing_key: bytes | None

    def __repr__(self) -> str:
        return f"<Options for {self.target} on {self.stream}>"  # the URL may hold a password


def load(target: str) -> Exposed:
    """Return the table of what ``module:name`` says.

    :raises ImportError: if there is no such module
    :raises LookupError: if it has no such name
    :raises TypeError: if it can't be exposed
    """
    module_name, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    api: Any = importlib.import_module(module_name)
    for part in name.split(".") if name else ():
        if not hasattr(api, part):
            raise LookupError(f"{target}: {module_name} has no {name!r}")
        api = getattr(api, part)
    if isinstance(api, type):
        api = api()
    return api if isinstance(api, Exposed) else expose(api)


def check(options: Options) -> None:
    """Raise what the options are refused with, before a process is started."""
    _transport(options)
    if not options.target:
        raise ValueError("MODULE:NAME: is empty")
    if options.backend != "asyncio":
        try:
            importlib.import_module(options.backend)
        except ImportError:
            raise ValueError(
                f"--backend: {options.backend} is missing: pip install {options.backend}"
            ) from None


def _transport(options: Options) -> RedisStreamsTransport:
    return RedisStreamsTransport(
        options.url,
        stream=options.stream,
        use_consumer_group=options.group is not None,
        codec=options.codec,
        max_len=options.max_len,
        claim_idle=options.claim_idle,
        max_deliveries=options.max_deliveries,
        consumer_group=options.group or "kkrpc-group",
        signing_key=options.signing_key,
    )


def run(options: Options) -> None:
    """Be a worker, until told to end."""
    table = load(options.target)
    backend, loop = BACKENDS[options.backend]
    anyio.run(_serve, options, table, False, backend=backend, backend_options=loop)


async def _serve(options: Options, table: Exposed, supervised: bool) -> None:
    with lone_error():
        async with create_task_group() as group:
            if supervised:
                group.start_soon(_end_with_parent, name="anyio_kkrpc parent")
            async with (
                _transport(options) as transport,
                RPCChannel(
                    transport,
                    expose=table,
                    max_concurrency=options.concurrency,
                    grace_period=options.grace,
                ) as channel,
            ):
                where = ", ".join(filter(None, (options.stream, options.group)))
                _say(f"serving {len(list(table))} names on {where} (pid {os.getpid()})")
                await serve_until_signalled(channel)
            _say(f"ended (pid {os.getpid()})")
            group.cancel_scope.cancel()


async def _end_with_parent() -> None:
    await anyio.wait_readable(0)
    os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    sys.stderr.write(f"anyio-kkrpc: {text}\n")
    sys.stderr.flush()


class _Supervisor:
    def __init__(self, options: Options, *, reload: bool) -> None:
        self._options = options
        self._reload = reload
        self._changed = anyio.Event()
        self._restarted: set[int] = set()
        self._processes: dict[int, Process] = {}
        self.error: WorkerError | None = None

    async def keep(self, number: int, group: TaskGroup) -> None:
        """Keep a worker running until one ends by itself, as on a destroy signal."""
        pause = FIRST_PAUSE
        while True:
            changed, started = self._changed, current_time()
            pid, code = await self._run_one()
            if pid in self._restarted:
                self._restarted.discard(pid)
                continue
            if code == 0:
                return
            if code == WRONG_USAGE:
                if not self._reload:
                    self.error = WorkerError(f"worker {number} can't start; see above")
                    group.cancel_scope.cancel()
                    return
                _say(f"worker {number} waits for a change of the code")
                await changed.wait()
                continue
            if current_time() - started > STARTED_WELL:
                pause = FIRST_PAUSE
            why = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
            _say(f"worker {number} (pid {pid}) {why}; it is started again in {pause:g} s")
            with move_on_after(pause):
                await changed.wait()  # what is new may be what mends it
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _run_one(self) -> tuple[int, int]:
        process = await anyio.open_process(
            [sys.executable, "-m", "anyio_kkrpc._cli._serve"],
            stdin=subprocess.PIPE,
            stdout=None,
            stderr=None,
            start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor alone
        )
        self._processes[process.pid] = process
        try:
            assert process.stdin is not None
            with suppress(anyio.BrokenResourceError):
                await process.stdin.send(msgspec.json.encode(self._options) + b"\n")
            return process.pid, await process.wait()
        finally:
            del self._processes[process.pid]
            if process.returncode is None:
                with move_on_after(self._options.grace + KILL_AFTER, shield=True):
                    _terminate(process)
                    await process.wait()
            with move_on_after(KILL_AFTER, shield=True):
                await process.aclose()  # kills it, if it still runs

    async def watch(self, group: TaskGroup) -> None:
        """Start the workers anew when the code changes."""
        from watchfiles import PythonFilter, awatch

        async for _ in awatch(Path.cwd(), watch_filter=PythonFilter()):
            _say("the code has changed; the workers start anew")
            self._changed.set()
            self._changed = anyio.Event()
            for process in list(self._processes.values()):
                self._restarted.add(process.pid)
                group.start_soon(self._end, process, name="anyio_kkrpc reload")

    async def _end(self, process: Process) -> None:
        _terminate(process)
        with move_on_after(self._options.grace + KILL_AFTER):
            await process.wait()
            return
        with suppress(ProcessLookupError):
            process.kill()


def _terminate(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def supervise(options: Options, workers: int, *, reload: bool) -> None:
    """Keep so many worker processes running until told to end, or they end by themselves.

    :raises WorkerError: if they can't start
    """
    supervisor = _Supervisor(options, reload=reload)
    async with create_task_group() as group:

        async def watch_signals() -> None:
            with open_signal_receiver(signal.SIGTERM, signal.SIGINT) as caught:
                async for number in caught:
                    _say(f"{number.name}: the workers end")
                    group.cancel_scope.cancel()
                    return

        group.start_soon(watch_signals, name="anyio_kkrpc signals")
        if reload:
            group.start_soon(supervisor.watch, group, name="anyio_kkrpc reload")
        async with create_task_group() as kept:
            for number in range(1, workers + 1):
                kept.start_soon(supervisor.keep, number, group, name=f"anyio_kkrpc worker {number}")
        group.cancel_scope.cancel()
    if supervisor.error is not None:
        raise supervisor.error


def _be_supervised() -> int:
    with os.fdopen(0, "rb", buffering=0, closefd=False) as parent:
        options = msgspec.json.decode(parent.readline(), type=Options)
    from ._app import report

    try:
        table = load(options.target)
    except (Exception, SystemExit) as exc:
        if options.debug:
            traceback.print_exc()
        report(exc if isinstance(exc, Exception) else ImportError(f"{options.target}: {exc!r}"))
        return WRONG_USAGE
    backend, loop = BACKENDS[options.backend]
    try:
        anyio.run(_serve, options, table, True, backend=backend, backend_options=loop)
    except Exception as exc:
        if options.debug:
            traceback.print_exc()
        return max(report(exc), 1)
    return 0


if __name__ == "__main__":
    sys.exit(_be_supervised())
