"""The crew alone, with fakes for what it receives, runs and settles.

`Play` does anything in any order: requests come, wait, finish, are cancelled, expire, are settled
slowly, spoil their task; more or fewer may run; the crew is drained, cancelled, ends. What is done
without a turn between happens in one turn of the event loop: a cancel in the turn in which its
request finishes, and so on. Once all tasks wait, what must hold is looked at.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CancelScope, Event, create_task_group, fail_after, get_cancelled_exc_class
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc._driver._context import begin_awaiting
from anyio_kkrpc._serving._crew import Answer, Crew, Member
from tests.bounds import BOUND


class Gone(Exception):
    """Nothing more is received."""


class Job:
    """A request.

    :ivar kind: what its handler does: ``"quick"`` doesn't wait, ``"slow"`` waits for ``gate``,
        ``"stubborn"`` as well and doesn't end by being cancelled; ``"fails"`` leaves ``answer`` with
        an exception then; with ``"leaks"`` a scope stays open, with ``"leaks group"`` a task group,
        and with ``"cancels"`` its own task is cancelled; "at once" where it doesn't wait before that
    :ivar named: whether somebody has cancelled it, or it was out of time
    :ivar replies: what it was settled with
    """

    def __init__(self, number: int, kind: str = "quick", *, deadline: float | None = None) -> None:
        self.number, self.kind, self.deadline = number, kind, deadline
        self.gate = Event()
        self.member: Member[Job, str] | None = None
        self.named = self.began = self.hit = False
        self.replies: list[str | None] = []

    def __repr__(self) -> str:
        return f"<{self.number} {self.kind}>"


class Due:
    """What a timer holds."""

    def __init__(self, job: Job, action: Callable[[], None]) -> None:
        self.job, self.action, self.open = job, action, True


class Work:
    """What a crew does, and what was seen of it."""

    def __init__(self, limit: int = 2) -> None:
        self.waiting: deque[Job] = deque()
        self.jobs: list[Job] = []
        self.running: set[Job] = set()
        self.settling: set[Job] = set()
        self.receiving = 0
        self.ended = False
        self.hold: Event | None = None
        self.dues: list[Due] = []
        self.left_open: list[CancelScope] = []
        self.keeps: list[Any] = []
        self.errors: list[str] = []
        self._came = Event()
        timer: Any = self
        self.crew: Crew[Job, str] = Crew(
            self.receive,
            self.begin,
            self.settle,
            settle_otherwise=self.settle_otherwise,
            failed=lambda job, exc: f"failed: {type(exc).__name__}",
            label=repr,
            ends=(Gone,),
            limit=limit,
            timer=timer,
        )

    def give(self, kind: str = "quick", *, deadline: float | None = None) -> Job:
        job = Job(len(self.jobs), kind, deadline=deadline)
        self.jobs.append(job)
        self.waiting.append(job)
        self._came.set()
        return job

    def end(self) -> None:
        self.ended = True
        self._came.set()

    def settle_quickly(self) -> None:
        if self.hold is not None:
            self.hold.set()
        self.hold = None

    def settle_slowly(self) -> None:
        self.settle_quickly()
        self.hold = Event()

    def at(self, deadline: float, action: partial[None]) -> Due:
        due = Due(action.args[0], action)
        self.dues.append(due)
        return due

    def cancel(self, due: Due) -> None:
        due.open = False

    async def receive(self) -> Job:
        self.receiving += 1
        if self.receiving > 1:
            self.errors.append("two members receive")
        try:
            while not self.waiting:
                if self.ended:
                    raise Gone
                self._came = Event()
                await self._came.wait()
            return self.waiting.popleft()
        finally:
            self.receiving -= 1

    def begin(self, job: Job, member: Member[Job, str]) -> Answer[str]:
        """Answer, with something to be awaited for it only where that has to be."""
        answer = self.answer(job, member)
        if job.kind not in ("quick", "leaks at once"):
            return None, answer
        coroutine, reply = begin_awaiting(answer)
        assert coroutine is None
        return reply, None

    async def answer(self, job: Job, member: Member[Job, str]) -> str | None:
        job.member = member
        member.serves, member.deadline = job, job.deadline
        if job.began:
            self.errors.append(f"{job} runs twice")
        job.began = True
        self.running.add(job)
        try:
            if job.kind != "quick" and not job.kind.endswith("at once"):
                member.waits()
                await self._wait(job)
            await self._misbehave(job.kind)
            return "done"
        finally:
            self.running.discard(job)

    async def _misbehave(self, kind: str) -> None:
        if kind == "fails":
            raise ValueError("x")
        if kind.startswith("leaks group"):
            group = create_task_group()
            self.keeps.append(group)
            await group.__aenter__()
            self.left_open.append(group.cancel_scope)
        elif kind.startswith("leaks"):
            scope = CancelScope()
            scope.__enter__()
            self.left_open.append(scope)
        elif kind.startswith("cancels"):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    async def _wait(self, job: Job) -> None:
        try:
            await job.gate.wait()
        except get_cancelled_exc_class():
            job.hit = True
            if not job.named and not self.crew.over:
                self.errors.append(f"{job} was cancelled, and nobody meant it")
            if job.kind != "stubborn":
                raise

    async def settle(self, job: Job, reply: str | None) -> None:
        self.settling.add(job)
        try:
            while self.hold is not None:
                await self.hold.wait()
            await checkpoint()
            job.replies.append(reply)
        finally:
            self.settling.discard(job)

    async def settle_otherwise(self, job: Job, reply: str | None, exc: Exception) -> None:
        job.replies.append(f"otherwise: {exc!r}")


MISCHIEF = ("leaks", "leaks at once", "leaks group", "leaks group at once")
HARMLESS = ("quick", "slow", "slow", "slow", "slow", "slow", "slow", "fails", "stubborn")
# Only asyncio's tasks can be cancelled.
KINDS = {
    "asyncio": (*HARMLESS, *MISCHIEF, "cancels", "cancels at once"),
    "trio": (*HARMLESS, *MISCHIEF),
}
ENDS = ("drain", "end", "stop")
ALL = -1
# How many turns of the event loop come after a step; ``None`` for none, ``ALL`` until all wait.
TURNS = st.sampled_from((None, None, 0, 1, 2, ALL, ALL, ALL))


def steps(backend: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """Return what makes a step: the name of a method of `Play`, and its arguments."""
    kinds, index = st.sampled_from(KINDS[backend]), st.integers(0, 9)
    gives = st.tuples(st.just("give"), kinds, st.booleans(), st.integers(1, 3))
    return st.one_of(
        gives,
        gives,
        st.tuples(st.sampled_from(("finish", "cancel", "cancel_too_late")), index),
        st.tuples(st.just("expire"), index),
        st.tuples(st.just("finish_and_cancel"), index, st.booleans()),
        st.tuples(st.just("change_limit"), st.sampled_from((1, -1))),
        st.tuples(st.just("cancel_what_was_left_open")),
        st.tuples(st.sampled_from(("settle_slowly", "settle_quickly"))),
    )


def plays(backend: str) -> st.SearchStrategy[Any]:
    """Return what makes steps, each with the turns that follow it, and the end."""
    some = st.lists(st.tuples(steps(backend), TURNS), min_size=15, max_size=50)
    end = st.tuples(st.sampled_from(ENDS), TURNS)
    return st.tuples(st.integers(1, 3), some, end, st.lists(st.tuples(steps(backend), TURNS)))


def pick(things: list[Any], index: int) -> Any:
    return things[index % len(things)] if things else None


class Play:
    """Takes the steps, and looks at what must hold; counts how often interesting states came."""

    def __init__(self, limit: int, seen: Counter[str]) -> None:
        self.base, self.lent, self.seen = limit, 0, seen
        self.work = Work(limit)
        self.draining = self.drained = False

    def give(self, kind: str, timed: bool, count: int) -> None:
        for _ in range(count):
            self.work.give(kind, deadline=1.0 if timed else None)

    def _running(self, index: int) -> Job | None:
        job: Job | None = pick(sorted(self.work.running, key=lambda job: job.number), index)
        return job

    def finish(self, index: int) -> None:
        self._finish(self._running(index))

    def _finish(self, job: Job | None) -> None:
        if job is not None:
            job.gate.set()

    def cancel(self, index: int) -> None:
        self._cancel(self._running(index))

    def cancel_too_late(self, index: int) -> None:
        self._cancel(pick([job for job in self.work.jobs if job.replies], index))

    def _cancel(self, job: Job | None) -> None:
        if job is not None and job.member is not None:
            self.note("cancelled too late", job not in self.work.running)
            job.named = job.named or job in self.work.running
            job.member.cancel(job)

    def finish_and_cancel(self, index: int, cancel_first: bool) -> None:
        """In one turn, with more to do for the member that ran it."""
        job = self._running(index)
        self.note("cancelled in the turn in which it finishes", job is not None)
        both = [self._finish, self._cancel]
        for step in reversed(both) if cancel_first else both:
            step(job)
        self.work.give("slow")
        self.work.give("quick")

    def expire(self, index: int) -> None:
        due = pick([due for due in self.work.dues if due.open], index)
        if due is not None:
            due.open = False
            due.job.named = True
            self.note("expired")
            due.action()

    def cancel_what_was_left_open(self) -> None:
        self.note("scopes that were left open are cancelled", bool(self.work.left_open))
        while self.work.left_open:
            self.work.left_open.pop().cancel()

    def change_limit(self, change: int) -> None:
        if self.lent + change >= 0:
            self.lent += change
            self.work.crew.change_limit(change)

    def settle_quickly(self) -> None:
        self.work.settle_quickly()

    def settle_slowly(self) -> None:
        self.work.settle_slowly()

    def end(self) -> None:
        self.work.end()

    def stop(self) -> None:
        self.work.crew.cancel()

    async def drain(self) -> None:
        self.draining = True
        await self.work.crew.drain(BOUND)
        self.drained = True

    async def run(
        self, first: list[tuple[Any, Any]], end: tuple[str, int | None], then: list[tuple[Any, Any]]
    ) -> None:
        async with create_task_group() as group:
            group.start_soon(self.work.crew.run)
            try:
                with fail_after(BOUND):
                    await self.take_steps(first)
                    await self.go_on(ALL)
                    if end[0] == "drain":
                        group.start_soon(self.drain)
                    else:
                        getattr(self, end[0])()
                    await self.go_on(end[1])
                    await self.take_steps(then)
                    await self.wind_up()
            finally:
                self.work.crew.cancel()

    async def take_steps(self, steps: list[tuple[Any, Any]]) -> None:
        for (name, *arguments), turns in steps:
            getattr(self, name)(*arguments)
            await self.go_on(turns)

    # Looking at it

    async def go_on(self, turns: int | None) -> None:
        if turns is None:
            return
        everything = turns == ALL
        for _ in range(12 + 4 * len(self.work.jobs) if everything else turns):
            await checkpoint()
        if everything:
            self.look()

    def look(self) -> None:
        """What holds once all tasks wait."""
        work, crew = self.work, self.work.crew
        assert work.errors == []
        for job in work.jobs:
            places = [job in work.waiting, job in work.running, job in work.settling]
            cut = crew.over and job.began and not job.replies and not any(places)
            assert sum(places) + len(job.replies) + cut == 1, (job, places, job.replies)
            if job.replies:
                self.check_reply(job, job.replies[0])
        in_hand = len(work.running) + len(work.settling)
        if crew.over:
            assert not (work.receiving or work.settling)
            assert all(job.kind == "stubborn" for job in work.running)
        elif not work.ended:
            # Never deaf: somebody receives or is about to, unless as many run as may.
            leader = crew.leader
            about_to = leader is not None and leader.job in work.settling
            assert work.receiving + about_to == 1 or in_hand >= crew.limit
            self.note("saturated, more wait", in_hand >= crew.limit and bool(work.waiting))
        if self.draining and not self.drained:
            assert in_hand
            self.note("drains")

    def check_reply(self, job: Job, reply: str | None) -> None:
        if reply is None:
            assert job.named, "settled without a reply, though nobody had cancelled it"
            assert job.hit
        elif job.kind == "fails":
            assert reply == "failed: ValueError"
        else:
            assert reply == "done"

    def note(self, name: str, happened: bool = True) -> None:
        if happened:
            self.seen[name] += 1

    async def wind_up(self) -> None:
        """Let all that runs finish, then end it: nothing is left, nothing was lost."""
        work, crew = self.work, self.work.crew
        self.settle_quickly()
        await self.go_on(ALL)
        while work.running:
            for job in work.running:
                job.gate.set()
            await self.go_on(ALL)
        if not (crew.over or work.ended):
            assert not work.waiting, "what waits isn't taken any more"
            assert all(len(job.replies) == 1 for job in work.jobs)
        assert self.drained == self.draining
        assert crew.limit == self.base + self.lent


WANTED = (
    "cancelled in the turn in which it finishes",
    "cancelled too late",
    "expired",
    "saturated, more wait",
    "scopes that were left open are cancelled",
    "drains",
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_any_order(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """No request is lost, none is cancelled that nobody meant, and the crew is never deaf."""
    caplog.set_level(logging.CRITICAL, "anyio_kkrpc")  # what is spoiled is logged
    seen: Counter[str] = Counter()

    @given(plays(backend))
    def check(play: Any) -> None:
        limit, first, end, then = play
        anyio.run(partial(play_it, limit, first, end, then, seen), backend=backend)

    check()
    assert [name for name in WANTED if not seen[name]] == [], seen


async def play_it(limit: int, first: Any, end: Any, then: Any, seen: Counter[str]) -> None:
    await Play(limit, seen).run(first, end, then)


@asynccontextmanager
async def serving(work: Work) -> AsyncIterator[Work]:
    """Run a crew."""
    with fail_after(BOUND):
        async with create_task_group() as group:
            group.start_soon(work.crew.run)
            try:
                yield work
            finally:
                work.crew.cancel()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await checkpoint()


class Unsettled(Work):
    """One that can't settle as it should."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def settle(self, job: Job, reply: str | None) -> None:
        self.settling.add(job)
        raise self.error


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["quick", "slow"])
async def test_what_settling_raises(kind: str) -> None:
    """It is settled otherwise, and the crew goes on."""
    async with serving(Unsettled(ValueError("x"))) as work:
        for _ in range(3):
            job = work.give(kind)
            job.gate.set()
            await until(lambda: job.replies)
            assert job.replies == ["otherwise: ValueError('x')"]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["quick", "slow"])
async def test_end_while_settling(kind: str) -> None:
    """It takes no more, and ends when the rest has."""
    work = Unsettled(Gone())
    with fail_after(BOUND):
        async with create_task_group() as group:
            group.start_soon(work.crew.run)
            slow = work.give("slow")
            await until(lambda: slow.began)
            work.give(kind).gate.set()
            await until(lambda: work.settling)
            work.give()
            slow.gate.set()
        assert len(work.waiting) == 1


@pytest.mark.anyio
async def test_error_of_receive() -> None:
    """It ends the crew, as itself, with all that runs."""

    class Broken(Work):
        async def receive(self) -> Job:
            if len(self.jobs) == 1 and not self.waiting:
                raise ValueError("broken")
            return await super().receive()

    work = Broken()
    job = work.give("slow")
    with fail_after(BOUND), pytest.raises(ValueError, match="broken"):
        await work.crew.run()
    assert job.hit


@pytest.mark.anyio
async def test_interrupted() -> None:
    """Ctrl-C in a handler ends the crew, as itself, with all that runs."""

    class Interrupted(Work):
        async def _wait(self, job: Job) -> None:
            if job.kind == "slow":
                await until(lambda: other.began)
                raise KeyboardInterrupt
            await super()._wait(job)

    work = Interrupted()
    other = work.give("stubborn")
    work.give("slow")
    with fail_after(BOUND), pytest.raises(KeyboardInterrupt):
        await work.crew.run()
    assert other.hit


@pytest.mark.anyio
async def test_cancelled_while_it_settles() -> None:
    """When the crew is cancelled, nothing holds it up, whether its members settle, run or follow."""
    work = Work(limit=3)
    async with serving(work):
        jobs = [work.give("slow"), work.give("slow"), work.give("slow")]
        await until(lambda: len(work.running) == 3)
        jobs[0].gate.set()
        await until(lambda: jobs[0].replies)
        work.settle_slowly()
        jobs[1].gate.set()
        await until(lambda: work.settling)
        work.give("quick")
        await until(lambda: len(work.settling) == 2)
    assert [job.replies for job in work.jobs] == [["done"], [], [], []]
    assert jobs[2].hit


@pytest.mark.anyio
async def test_cancelled_before_it_began() -> None:
    """Then it doesn't begin."""
    work = Work()
    work.give()
    work.crew.cancel()
    await work.crew.run()
    assert len(work.waiting) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["receives", "follows", "runs", "settles", "settles quick"])
async def test_others_cancel_the_task(
    where: str, anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio lets anybody cancel any task: another one takes its place, and nothing is lost."""
    if anyio_backend_name == "trio":
        pytest.skip("only asyncio's tasks can be cancelled")
    tasks: dict[int, asyncio.Task[Any]] = {}

    class Known(Work):
        async def answer(self, job: Job, member: Member[Job, str]) -> str | None:
            task = asyncio.current_task()
            assert task is not None
            tasks[job.number] = task
            return await super().answer(job, member)

        async def _wait(self, job: Job) -> None:
            try:
                await job.gate.wait()
            except asyncio.CancelledError:
                raise ValueError("cancelled by others") from None

    async with serving(Known()) as work:
        first = work.give("quick" if where == "settles quick" else "slow")
        if where.startswith("settles"):
            work.settle_slowly()
            first.gate.set()
            await until(lambda: work.settling)
        else:
            await until(lambda: first.began)
        if where in ("receives", "follows"):
            second = work.give("quick")  # another one leads: the first will follow
            await until(lambda: second.replies)
            first.gate.set()
            await until(lambda: first.replies)
            for _ in range(9):
                await checkpoint()
        tasks[1 if where == "receives" else 0].cancel()
        await checkpoint()
        work.settle_quickly()
        await until(lambda: first.replies)
        jobs = [work.give("slow") for _ in range(2)]
        for job in jobs:
            job.gate.set()
        await until(lambda: all(job.replies for job in jobs))
    assert work.errors == []
    assert first.replies == ["failed: ValueError" if where == "runs" else "done"]
    assert all(job.replies == ["done"] for job in jobs)
    if where != "runs" or sys.version_info >= (
        3,
        11,
    ):  # before, one that was caught leaves no trace
        assert "is replaced" in caplog.text


@pytest.mark.anyio
async def test_members_begin_in_the_crews_own_context() -> None:
    """Whoever makes a member necessary: a handler's variables are its own."""
    variable: ContextVar[str] = ContextVar("variable", default="none")
    seen: list[str] = []

    class Watched(Work):
        async def answer(self, job: Job, member: Member[Job, str]) -> str | None:
            seen.append(variable.get())
            return await super().answer(job, member)

    async with serving(Watched(limit=1)) as work:
        first = work.give("slow")
        await until(lambda: first.began)
        variable.set("of a handler")
        work.crew.change_limit(1)
        second = work.give()
        await until(lambda: second.replies)
    assert seen == ["none", "none"]
