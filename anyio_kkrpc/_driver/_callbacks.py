"""Functions as arguments: the ones given to the other side, and the ones got from it."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias, final

from anyio import Event
from anyio.lowlevel import checkpoint_if_cancelled

from .._exceptions import DeliveryError, OverloadedError, ProtocolError
from .._protocol._ahead import WINDOW, Ahead
from .._protocol._budget import BUDGET, weight_of
from .._protocol._events import CallbackInvoked
from .._protocol._exports import CallbackExport
from .._runtime._fresh import fresh_copy
from .._runtime._sparing import Sparing
from .._values._callbacks import NO_RESULT, CallbackArguments, arguments_of, check_calls
from .._values._conversion import convert_value
from ._asking import MAX_RUNNING, Answering, ask
from ._context import running
from ._core import Core

logger = logging.getLogger("anyio_kkrpc")

_P = ParamSpec("_P")
Callback: TypeAlias = Callable[_P, object]
"""What a Protocol takes as a function, synchronous or asynchronous: ``Callback[[Progress]]``.

Whatever it returns is accepted, so that ``list.append``, lambdas and ``async def`` all fit.
"""

# What may wait because a callback is slower than its callers: invocations, and what they weigh.
# Beyond this the oldest go, so it is only for peers that don't wait for a callback: those that do
# have WINDOW and BUDGET for each call that has passed it, with a last one that is larger.
MAX_WAITING = 10_000
MAX_WEIGHT = 16 * BUDGET


class CallbackRunner:
    """Runs the invocations of one callback one after the other, in the order in which they came."""

    __slots__ = (
        "_answering",
        "_arguments",
        "_core",
        "_export",
        "_failures",
        "_idle",
        "_name",
        "_running",
        "_waiting",
        "_weight",
    )

    def __init__(self, core: Core, export: CallbackExport) -> None:
        self._core = core
        self._export = export
        self._arguments = arguments_of(export.function)
        self._name: str = getattr(export.function, "__qualname__", "a callback")
        self._failures = Sparing()
        self._waiting: deque[tuple[CallbackInvoked, int]] = deque()
        self._weight = 0
        self._answering: set[Answering] = set()
        self._running: CallbackInvoked | None = None
        self._idle: Event | None = None

    def invoke(self, event: CallbackInvoked) -> bool:
        """Queue an invocation; return whether a task must be started that calls `run`."""
        if event.asked is not None:
            try:
                event.driver = Answering(self._core, event.asked, event.sender, event.budget)
            except ProtocolError as exc:
                self._core.refuse(exc)
                return False
        weight = weight_of((event.args, event.kwargs))
        self._waiting.append((event, weight))
        self._weight += weight
        if self._running is None:
            self._running = event
            return True
        passes = 2 * len(self._export.passes)
        most, heaviest = max(MAX_WAITING, passes * WINDOW), max(MAX_WEIGHT, passes * BUDGET)
        while len(self._waiting) > most or (self._weight > heaviest and len(self._waiting) > 1):
            self._drop()
        return False

    def _drop(self) -> None:
        """Throw the oldest away."""
        event, weight = self._waiting.popleft()
        self._weight -= weight
        if not self._export.dropped:
            logger.warning(
                "callback %r is slower than its caller: dropping its oldest invocations",
                self._export.function,
            )
        self._export.drop(event.sender)
        self._core.note_dropped_callback()
        self._tell(event)

    def _tell(self, event: CallbackInvoked) -> None:
        if event.driver is not None:
            event.driver.refuse(OverloadedError("the callback is slower than its callers"))
        if event.progress is not None:
            self._core.owe(event.progress, event.sender)
            event.progress = None

    def close(self) -> None:
        """Tell those who wait for the callback that it won't run any more."""
        for event in (self._running, *(event for event, _ in self._waiting)):
            if event is not None and event.progress is not None:
                event.progress.gone = True
                self._tell(event)
        ended = DeliveryError("the peer that has the function ended meanwhile")
        for answering in (*self._answering, *(event.driver for event, _ in self._waiting)):
            if answering is not None:
                answering.refuse(ended)

    async def run(self) -> None:
        """Run what is queued. An exception of the callback is logged and ends nothing."""
        function, arguments = self._export.function, self._arguments
        try:
            while self._waiting:
                event, weight = self._waiting.popleft()
                self._weight -= weight
                self._running = event
                if event.driver is not None:
                    self._answer(event)
                    continue
                try:
                    args, kwargs = event.args, event.kwargs
                    if arguments is not None:
                        args, kwargs = arguments.converted(args, kwargs, self._name)
                    result = function(*args, **kwargs)
                    if inspect.isawaitable(result):
                        await result
                except KeyboardInterrupt:
                    raise
                except BaseException:
                    await checkpoint_if_cancelled()
                    # Nobody has cancelled this task: whatever it is, the callback raised it.
                    more = self._failures.admit(self._core.now(), "not logged")
                    if more is not None:
                        logger.exception("callback %r failed%s", function, more)
                self._tell(event)
        finally:
            self._running = None
            if self._idle is not None:
                self._idle.set()
                self._idle = None

    def _answer(self, event: CallbackInvoked) -> None:
        """Run one whose result is wanted beside the others, which don't wait for it."""
        answering: Answering = event.driver
        if len(self._answering) >= MAX_RUNNING:
            why = f"{MAX_RUNNING} invocations of the callback run already"
            answering.refuse(OverloadedError(why))
            return
        self._answering.add(answering)

        async def run() -> None:
            try:
                await answering.run(self._converted, event.args, event.kwargs)
            finally:
                self._answering.discard(answering)

        self._core.start_standing(run, "callback")

    def _converted(self, /, *args: Any, **kwargs: Any) -> Any:
        values: Sequence[Any] = args
        if self._arguments is not None:
            values, kwargs = self._arguments.converted(args, kwargs, self._name)
        function = self._export.function
        if isinstance(function, RemoteCallback):
            function = function.pass_on  # its result is wanted from who has it
        return function(*values, **kwargs)

    async def idle(self) -> None:
        """Wait until nothing is queued or running."""
        while self._running is not None:
            if self._idle is None:
                self._idle = Event()
            await self._idle.wait()


class Turns:
    """Lets those who call a function of the other side send one after the other, in the order in
    which they came, as far as it lets them be ahead.
    """

    __slots__ = ("_ahead", "_core", "_error", "_waiting")

    def __init__(self, core: Core, ahead: Ahead) -> None:
        self._core = core
        self._ahead = ahead
        self._error: Exception | None = None
        self._waiting: deque[Event] = deque()
        ahead.driver = self

    @property
    def free(self) -> bool:
        """Whether the next one need not wait."""
        return not (self._waiting or self._ahead.full or self._error)

    async def wait(self) -> None:
        """Wait for one's turn. It is to be used before anything is awaited, and then to be handed
        on by `go_on`.

        :raises DeliveryError: if the other side is gone, or has the function no more
        :raises TransportClosedError: if the channel ends
        """
        turn = Event()
        self._waiting.append(turn)
        self.go_on()
        lender = None if running.get() is None else self._core.lender
        if lender is not None:
            lender.lend()
        try:
            await turn.wait()
        except BaseException:
            self._waiting.remove(turn)
            self.go_on()
            raise
        finally:
            if lender is not None:
                lender.take_back()
        self._waiting.remove(turn)
        if self._error is not None:
            self.go_on()
            raise fresh_copy(self._error)

    def go_on(self) -> None:
        """Let the next one go, if it may."""
        if self._waiting and (self._error is not None or not self._ahead.full):
            self._waiting[0].set()

    def fail(self, error: Exception) -> None:
        """Let nobody call it any more."""
        self._error = self._error or error
        self.go_on()


@final
class RemoteCallback:
    """A function of the other side, got as an argument. Calling it returns when the call was sent.

    That gives no result: kkrpc's callbacks have none. `ask` waits for it, where this library is at
    the other side, too. Where the other side says how far it may be
    called ahead, a call waits until it is no further ahead. When the object is collected, the other
    side is told that the function won't be called again.
    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_arguments",
        "_core",
        "_id",
        "_name",
        "_owner",
        "_request_id",
        "_result",
    )

    def __init__(
        self,
        core: Core,
        callback_id: str,
        owner: str | None,
        request_id: str,
        ahead: Ahead | None,
    ) -> None:
        self._core = core
        self._id = callback_id
        self._owner = owner
        self._request_id = request_id
        self._ahead = ahead
        self._arguments: CallbackArguments | None = None
        self._result: Any = Any
        self._name = ""
        if ahead is not None:
            Turns(core, ahead)

    async def __call__(self, /, *args: Any, **kwargs: Any) -> None:
        """Call it with values. If that is cancelled while it waits for its turn, nothing was sent.

        :raises DeliveryError: if the other side is gone, or has the function no more
        :raises TransportClosedError: if the channel is closed
        :raises TypeError: if an argument can't be sent
        :raises RPCValidationError: if an argument doesn't fit the annotation of the handler that
            has got the function
        """
        core, ahead = self._core, self._ahead
        sent: Sequence[Any] = args
        if self._arguments is not None:
            sent, kwargs = self._arguments.checked(args, kwargs, self._name)
        said = self._request_id if core.broadcast else None
        record = core.conversation.callback_call(self._id, sent, kwargs, said)
        if ahead is None:
            await core.send(record, self._owner)
            return
        weight, turns = weight_of((sent, kwargs)), ahead.driver
        if not turns.free:
            await turns.wait()
        number = core.conversation.send_callback(ahead, record, weight)
        turns.go_on()
        try:
            await core.send(record, self._owner)
        except Exception:
            ahead.take_back(number, record)
            turns.go_on()
            raise

    async def ask(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it, and return what it returns, which may be a stream.

        It comes after the invocations before it, and doesn't hold up those behind it. It has as
        much time as a call; if this is cancelled, or out of time, so is the function.

        :raises RemoteError: what the function raised
        :raises RPCTimeoutError: if it took too long
        :raises OverloadedError: if too many invocations of it run already
        :raises TypeError: if the other side sends no results, as kkrpc and older versions of this
            library; or as of the call without a result, whose other errors it raises as well
        """
        result = await self._ask(args, kwargs, undefined=False)
        return convert_value(result, self._result, self._name or "a callback", "output")

    async def pass_on(self, /, *args: Any, **kwargs: Any) -> Any:
        """The same for another peer, to which it was passed on: undefined is ``UNSET``."""
        return await self._ask(args, kwargs, undefined=True)

    async def _ask(self, args: Sequence[Any], kwargs: dict[str, Any], *, undefined: bool) -> Any:
        core, name = self._core, self._name or "a callback"
        if self._ahead is None or not self._ahead.results:
            raise TypeError("the peer that has the function sends no results of functions")
        if self._arguments is not None:
            args, kwargs = self._arguments.checked(args, kwargs, self._name)
        said = self._request_id if core.broadcast else None
        return await ask(
            core, self._id, args, kwargs, self._owner, name, request_id=said, undefined=undefined
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteCallback):
            return NotImplemented
        return (self._core, self._id, self._owner) == (other._core, other._id, other._owner)

    def __hash__(self) -> int:
        return hash((self._id, self._owner))

    def __repr__(self) -> str:
        return f"<RemoteCallback {self._id}>"

    def __del__(self) -> None:
        self._core.release(self._id, self._owner, self._request_id, self._ahead)


@check_calls.register(RemoteCallback)
def _(
    callback: RemoteCallback, arguments: CallbackArguments | None, result: Any, name: str
) -> Callable[..., Any]:
    callback._arguments, callback._name = arguments, name
    if result is NO_RESULT:
        return callback
    callback._result = result
    return callback.ask
