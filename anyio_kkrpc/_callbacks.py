"""Functions as arguments: the ones given to the other side, and the ones got from it."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from typing import Any, final

from anyio import Event
from anyio.lowlevel import checkpoint_if_cancelled

from ._core import Core
from ._protocol._exports import CallbackExport

logger = logging.getLogger("anyio_kkrpc")

# Invocations that wait because a callback is slower than its caller; beyond this the oldest go.
MAX_WAITING = 10_000


class CallbackRunner:
    """Runs the invocations of one callback one after the other, in the order in which they came."""

    __slots__ = ("_dropped", "_export", "_idle", "_running", "_waiting")

    def __init__(self, export: CallbackExport) -> None:
        self._export = export
        self._waiting: deque[tuple[list[Any], dict[str, Any]]] = deque()
        self._running = False
        self._idle: Event | None = None
        self._dropped = 0

    def invoke(self, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Queue an invocation; return whether a task must be started that calls `run`."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self._dropped += 1
            if self._dropped == 1:
                logger.warning(
                    "callback %r is slower than its caller: dropping its oldest invocations",
                    self._export.function,
                )
        self._waiting.append((args, kwargs))
        if self._running:
            return False
        self._running = True
        return True

    async def run(self) -> None:
        """Run what is queued. An exception of the callback is logged and ends nothing."""
        function = self._export.function
        try:
            while self._waiting:
                args, kwargs = self._waiting.popleft()
                try:
                    result = function(*args, **kwargs)
                    if inspect.isawaitable(result):
                        await result
                except KeyboardInterrupt:
                    raise
                except BaseException:
                    await checkpoint_if_cancelled()
                    # Nobody has cancelled this task: whatever it is, the callback raised it.
                    logger.exception("callback %r failed", function)
        finally:
            self._running = False
            if self._idle is not None:
                self._idle.set()
                self._idle = None

    async def idle(self) -> None:
        """Wait until nothing is queued or running."""
        while self._running:
            if self._idle is None:
                self._idle = Event()
            await self._idle.wait()


@final
class RemoteCallback:
    """A function of the other side, got as an argument. Calling it returns when the call was sent.

    There is no result: kkrpc's callbacks have none. When the object is collected, the other side is
    told that the function won't be called again.
    """

    __slots__ = ("__weakref__", "_core", "_id", "_owner", "_request_id")

    def __init__(self, core: Core, callback_id: str, owner: str | None, request_id: str) -> None:
        self._core = core
        self._id = callback_id
        self._owner = owner
        self._request_id = request_id

    async def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call it with values.

        :raises TransportClosedError: if the channel is closed
        :raises TypeError: if an argument can't be sent
        """
        core = self._core
        said = self._request_id if core.broadcast else None
        await core.send(core.peer.callback_call(self._id, args, kwargs, said), self._owner)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteCallback):
            return NotImplemented
        return (self._core, self._id, self._owner) == (other._core, other._id, other._owner)

    def __hash__(self) -> int:
        return hash((self._id, self._owner))

    def __repr__(self) -> str:
        return f"<RemoteCallback {self._id}>"

    def __del__(self) -> None:
        self._core.release(self._id, self._owner, self._request_id)
