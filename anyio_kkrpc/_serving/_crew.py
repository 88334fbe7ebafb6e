"""The crew: standing tasks that take requests, run them, and settle them.

Its tasks, the members, stay, so that a request costs no task of its own. One member at a time, the
leader, receives. It runs one request after the other until one of them has to wait: then another
member leads. So a request that doesn't wait costs no switch of tasks either. Members that have
nothing to do follow: they wait to become the leader.

What holds, in whatever order things happen:

- One member leads as long as the crew takes requests and fewer run than may: it waits for the next
  one, or settles one that didn't have to wait. Who leads stands in `Crew.leader`, and each member
  that ends, however it does, passes the lead on.
- Nothing but the crew's end cancels a member that follows, receives or settles. A request that has
  had to wait or was cancelled leaves its scope before it is settled, and that is used for no other
  one. What cancels a request, however late, hits that request or nobody.
- A task that a handler has spoiled runs no other request: one in which it has left a scope or a
  task group open, or that was cancelled by somebody else than the crew. A new member settles what
  that one had to, with the reply if there is one, else with an error.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from anyio import (
    CancelScope,
    Event,
    create_task_group,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from .._runtime._clock import OneShot, cancel_requests, one_shots, open_scopes
from .._runtime._timer import Timer, TimerEntry

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("anyio_kkrpc")

# Members without work that are kept for the next burst.
_MAX_IDLE = 64
_NO_ANSWER: Any = object()

J = TypeVar("J")
R = TypeVar("R")


Answer: TypeAlias = tuple[R | None, Awaitable[R | None] | None]


class SpoiledTaskError(Exception):
    """A task is not as it was before a handler ran in it."""


class Member(Generic[J, R]):
    """A standing task of a crew, and what belongs to the request that it runs.

    :ivar serves: tells the request that runs from others; ``None`` if there is none
    :ivar deadline: when that request is out of time, on AnyIO's clock, or ``None``
    :ivar job: what was received and isn't settled yet
    """

    __slots__ = ("_crew", "_due", "_reply", "_scope", "_used", "deadline", "job", "serves", "turn")

    def __init__(self, crew: Crew[J, R], job: J | None = None, reply: R | None = None) -> None:
        self._crew = crew
        self.job = job
        self._reply = reply
        self._scope = CancelScope()
        # Whether the scope is not to be used for another request.
        self._used = False
        self._due: TimerEntry | None = None
        self.serves: object = None
        self.deadline: float | None = None
        self.turn: OneShot | None = None

    # For the request that runs

    def waits(self) -> None:
        """Note that the request has to wait for something: from now on it can be out of time."""
        crew = self._crew
        self._used = True
        if self.deadline is not None:
            self._due = crew.timer.at(self.deadline, partial(self.cancel, self.serves))
        if crew.leader is self:
            crew.leader = None
            crew.lead_on()

    def cancel(self, request: object) -> None:
        """Cancel a request, named as in `serves`, unless it doesn't run here any more."""
        if self.serves is request:
            self._used = True
            self._scope.cancel()

    # The task

    async def run(self) -> None:
        """Settle what another member could not, then serve requests until it isn't needed."""
        crew = self._crew
        scopes, foreign = open_scopes(), cancel_requests()
        try:
            while True:
                if self.job is not None:
                    await self._settle(self.job)
                if crew.leader is not self and not await crew.lead(self):
                    return
                failure: BaseException | None = None
                try:
                    with self._scope:
                        try:
                            await self._take(scopes, foreign)
                        except BaseException as exc:
                            failure = exc
                            raise
                except BaseException as exc:
                    if exc is failure:
                        raise
                    raise SpoiledTaskError("a scope or task group was left open") from exc
                finally:
                    self._forget()
                if foreign():
                    raise get_cancelled_exc_class()()
                if self.job is not None and self._reply is _NO_ANSWER:
                    self._reply = None  # cancelled: nobody waits for a reply
                self._scope = CancelScope()
                self._used = False
        except crew.ends:
            crew.end()
        except GeneratorExit:  # the task is closed, as it is together with its event loop
            crew.over = True
            raise
        except BaseException as exc:
            await self._fall(exc)
        finally:
            crew.leave(self)

    async def _take(self, scopes: Callable[[], object], foreign: Callable[[], object]) -> None:
        """Take requests and run them in a scope, until it isn't to be used for another one."""
        crew = self._crew
        receive, answer, settle = crew.receive, crew.answer, crew.settle
        while crew.leader is self:
            self.job = job = await receive()
            self._reply = _NO_ANSWER
            before = scopes()
            try:
                reply, rest = answer(job, self)
                if rest is not None:
                    reply = await rest
            except Exception as exc:
                reply = crew.failed(job, exc)
            self._reply = reply
            if self._used or scopes() != before or foreign():
                return  # something may be left open in the scope, which leaving it tells
            self.serves = None
            try:  # as `_settle` does; its coroutine would be a hundredth of what a call costs
                await settle(job, reply)
            except crew.ends:
                raise
            except Exception as exc:
                await crew.settle_otherwise(job, reply, exc)
            self.job = None
            if crew.settled is not None:
                crew.settled.set()

    async def _settle(self, job: J) -> None:
        """Settle a request outside of the scope in which it ran."""
        crew, reply = self._crew, self._reply
        try:
            await crew.settle(job, reply)
        except crew.ends:
            raise
        except Exception as exc:
            await crew.settle_otherwise(job, reply, exc)
        self.job = None
        if crew.settled is not None:
            crew.settled.set()

    def _forget(self) -> None:
        """Leave nothing of a request that is over."""
        self.serves = None
        if self._due is not None:
            self._crew.timer.cancel(self._due)
            self._due = None

    async def _fall(self, exc: BaseException) -> None:
        """End because of an exception: with the crew, or another member takes this one's place."""
        crew, job, reply = self._crew, self.job, self._reply
        if isinstance(exc, get_cancelled_exc_class()):
            await checkpoint_if_cancelled()  # the crew is
        elif not isinstance(exc, SpoiledTaskError):
            crew.fail(exc)
            return
        if not crew.over:
            what = "requests" if job is None else crew.label(job)
            logger.warning("the task that served %s is replaced: %r", what, exc)
            if job is not None:
                if reply is _NO_ANSWER:
                    reply = None if self._scope.cancel_called else crew.failed(job, exc)
                crew.start(job, reply)
        self.job = None
        if isinstance(exc, SpoiledTaskError):
            await crew.keep(self)
            return
        try:
            await cancel_shielded_checkpoint()
        except get_cancelled_exc_class():
            pass  # one that was asked for and not delivered yet would end the whole group


class Crew(Generic[J, R]):
    """Runs requests, as many at a time as it may.

    :param receive: returns the next request; if it is cancelled, none is lost
    :param answer: runs a request; returns its reply, or ``None`` if there is none, and what is to
        be awaited for that, if there is anything. Before that awaits anything, `Member.serves` and
        `Member.deadline` are set; once it has to wait, it calls `Member.waits`. A cancellation
        leaves it only if it is real.
    :param settle: finishes a request with its reply
    :param settle_otherwise: does so after ``settle`` has raised
    :param failed: returns the reply to a request that ``answer`` couldn't run to its end
    :param label: names a request for the log
    :param ends: exceptions of ``receive`` and ``settle`` after which nothing more is received
    :param limit: how many requests run at once
    :param timer: cancels what is out of time
    :ivar leader: the member that receives, or is about to
    :ivar over: whether it was cancelled, or has failed
    :ivar settled: set when a request was settled, if somebody waits for that
    """

    def __init__(
        self,
        receive: Callable[[], Awaitable[J]],
        answer: Callable[[J, Member[J, R]], Answer[R]],
        settle: Callable[[J, R | None], Awaitable[None]],
        *,
        settle_otherwise: Callable[[J, R | None, Exception], Awaitable[None]],
        failed: Callable[[J, BaseException], R | None],
        label: Callable[[J], str],
        ends: tuple[type[Exception], ...],
        limit: int,
        timer: Timer,
    ) -> None:
        self.receive = receive
        self.answer = answer
        self.settle = settle
        self.settle_otherwise = settle_otherwise
        self.failed = failed
        self.label = label
        self.ends = ends
        self.limit = limit
        self.timer = timer
        self.leader: Member[J, R] | None = None
        self.over = False
        self.settled: Event | None = None
        # Whether nothing more is received.
        self._ended = False
        self._members: set[Member[J, R]] = set()
        self._followers: deque[Member[J, R]] = deque()
        self._one_shot: Callable[[], OneShot]
        self._tasks: TaskGroup | None = None
        self._context: Context
        self._failure: BaseException | None = None
        self._gone: Event
        self._kept = 0

    async def run(self) -> None:
        """Serve until it is cancelled, or nothing more is received and all is settled.

        Who cancels the scope around it has to call `cancel`, so that what runs can have time to
        finish.
        """
        if self.over:
            return
        self._one_shot, self._context, self._gone = one_shots(), copy_context(), Event()
        with CancelScope(shield=True):
            try:
                async with create_task_group() as self._tasks:
                    self.lead_on()
            except BaseExceptionGroup:
                if not self._kept:  # the others raise nothing
                    raise
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def drain(self, seconds: float) -> None:
        """Wait so long at most until what runs is settled."""
        with move_on_after(seconds, shield=True):
            while not self.over and any(member.job is not None for member in self._members):
                self.settled = Event()
                await self.settled.wait()

    def cancel(self) -> None:
        """End it, and cancel all that runs."""
        self.over = True
        self.end()
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def end(self) -> None:
        """Receive no more; what runs goes on."""
        self._ended = True
        self.leader = None
        for member in self._followers:
            assert member.turn is not None
            member.turn.set()
        if self.settled is not None:
            self.settled.set()

    def change_limit(self, change: int) -> None:
        """Let more requests run at once, or fewer from now on."""
        self.limit += change
        self.lead_on()

    # For its members

    def lead_on(self) -> None:
        """Let somebody lead, if nobody does and one more may run."""
        tasks = self._tasks
        if self.leader is not None or self._ended or self.over or tasks is None:
            return
        if tasks.cancel_scope.cancel_called:
            return
        if len(self._members) - len(self._followers) >= self.limit:
            return
        if self._followers:
            self.leader = member = self._followers.popleft()
            assert member.turn is not None
            member.turn.set()
        else:
            self.leader = self.start()

    def start(self, job: J | None = None, reply: R | None = None) -> Member[J, R]:
        """Start a member, which first settles ``job``, if that is given."""
        assert self._tasks is not None
        member = Member(self, job, reply)
        self._members.add(member)
        # Not in the context of a handler, which may be what this comes from.
        self._context.run(partial(self._tasks.start_soon, member.run, name="anyio_kkrpc handler"))
        return member

    async def lead(self, member: Member[J, R]) -> bool:
        """Wait until a member without work leads; return false if it isn't needed."""
        members, followers = len(self._members), self._followers
        if self._ended or self.over:
            return False
        if self.leader is None and members - len(followers) <= self.limit:
            self.leader = member
            return True
        if members > self.limit or len(followers) >= _MAX_IDLE:
            return False
        turn = member.turn = self._one_shot()
        followers.append(member)
        try:
            await turn.wait()
        finally:
            if member in followers:
                followers.remove(member)
        return self.leader is member

    def leave(self, member: Member[J, R]) -> None:
        """Note that a member does nothing any more."""
        self._members.discard(member)
        if self.leader is member:
            self.leader = None
        self.lead_on()
        if self.settled is not None:
            self.settled.set()
        if not self._members:
            self._gone.set()

    def fail(self, exc: BaseException) -> None:
        """End all of it, because of what a member has raised."""
        if not self.over:
            self._failure = exc
        self.cancel()

    async def keep(self, member: Member[J, R]) -> None:
        """Keep a task until all others have ended: with a scope left open it can't end well."""
        self._kept += 1
        self.leave(member)
        with CancelScope(shield=True):
            await self._gone.wait()
