"""What a task waits at that has nothing to do for long: the task is started when that is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextvars import Context, copy_context
from functools import partial
from typing import TypeAlias, final

from anyio import Event
from anyio.lowlevel import checkpoint

__all__ = ("Bell", "Beside", "start_each")


@final
class Bell:
    """An event that can be cleared, for one task, which is started when it is first set."""

    __slots__ = ("_event", "_is_set", "_start")

    def __init__(self) -> None:
        self._is_set = False
        self._event: Event | None = None
        self._start: Callable[[], object] | None = None

    def start(self, start: Callable[[], object]) -> None:
        """Have the task started once this is set, or now if it is.

        :param start: starts it, without awaiting; called once
        """
        if self._is_set:
            start()
        else:
            self._start = start

    def set(self) -> None:
        """Wake the task, or have it started."""
        self._is_set = True
        event, self._event = self._event, None
        start, self._start = self._start, None
        if event is not None:
            event.set()
        if start is not None:
            start()

    def is_set(self) -> bool:
        """Whether it was set, and not cleared since."""
        return self._is_set

    def clear(self) -> None:
        """Have `wait` wait for the next time that this is set."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until this is set."""
        if self._is_set:
            await checkpoint()
            return
        event = self._event
        if event is None:
            event = self._event = Event()
        await event.wait()


Run: TypeAlias = Callable[[], Awaitable[None]]
# A task: its name, what it does, and what is set once it has something to do, if that may be never.
Beside: TypeAlias = tuple[str, Run, Bell | None]


def start_each(tasks: Iterable[Beside], start: Callable[[str, Run], object]) -> None:
    """Start tasks, at once or when there is something for them to do, in the context of now.

    :param start: starts one, without awaiting
    """
    context = copy_context()
    for name, run, bell in tasks:
        if bell is None:
            start(name, run)
        else:
            bell.start(partial(_run_in, context, partial(start, name, run)))


def _run_in(context: Context, start: Callable[[], object]) -> None:
    context.run(start)
