"""Lets streams that kkrpc 0.x peers read go on, not faster than these can follow."""

from __future__ import annotations

from typing import Protocol

from anyio import sleep
from anyio.abc import TaskGroup

from ...typescript._streams import TICK, ClassicStreams


class _Receives(Protocol):
    @property
    def ended_reason(self) -> Exception | None: ...


class Pacing:
    """Runs a task as long as there are streams that need it.

    :param inbound: tells when nothing is sent any more
    """

    def __init__(self, streams: ClassicStreams, inbound: _Receives) -> None:
        self._streams = streams
        self._inbound = inbound
        self._running = False
        self._tasks: TaskGroup | None = None

    def begin(self, tasks: TaskGroup) -> None:
        """Let the task run from now on.

        :param tasks: where
        """
        self._tasks = tasks

    def go_on(self) -> None:
        """Have the task run, if any stream needs it."""
        if self._streams.busy and not self._running and self._tasks is not None:
            self._running = True
            self._tasks.start_soon(self._run, name="anyio_kkrpc pacing")

    async def _run(self) -> None:
        try:
            while self._streams.busy and self._inbound.ended_reason is None:
                self._streams.tick()
                await sleep(TICK)
        finally:
            self._running = False
