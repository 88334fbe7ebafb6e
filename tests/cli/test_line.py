"""The line between supervisor and worker, with both ends in one process."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import anyio
import msgspec
import pytest
from anyio import create_task_group, fail_after

from anyio_kkrpc._cli._line import Line
from anyio_kkrpc._cli._restarts import Word
from anyio_kkrpc._cli._supervisor import Supervisor
from anyio_kkrpc._cli._worker import QUESTION, Options, Report
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

REPORT = Report(True, 5.0, {"served": 1}, {})
OPTIONS = Options(
    target="m:n",
    url="redis://nowhere",
    stream="s",
    group="g",
    backend="asyncio",
    concurrency=1,
    grace=1.0,
    debug=False,
    codec="json",
    max_len=None,
    claim_idle=1.0,
    max_deliveries=1,
    signing_key=None,
)


@pytest.fixture
def line() -> Iterator[Line]:
    one = Line()
    yield one
    one.close()


async def test_words(line: Line) -> None:
    """They may come in pieces; what is none, which a handler may have written, is nothing."""
    for piece in (b"serv", b"ing\nno word\n\xff\nrecy"):
        line.theirs.sendall(piece)
        assert line.take()
    assert line.words == {Word.serving}
    assert line.serving.is_set()
    line.theirs.sendall(b"cled\n")
    line.theirs.close()
    assert not line.take()
    assert line.words == {Word.serving, Word.recycled}


async def test_options_and_questions(line: Line) -> None:
    line.send(OPTIONS)
    assert msgspec.json.decode(line.theirs.recv(65536), type=Options) == OPTIONS
    answers: list[Report | None] = []

    async def ask() -> None:
        answers.append(await line.ask(BOUND))

    with fail_after(BOUND):
        async with create_task_group() as tasks:
            tasks.start_soon(line.listen)
            async with create_task_group() as asking:
                for _ in range(2):  # who asks meanwhile gets the same answer
                    asking.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                assert line.theirs.recv(65536) == QUESTION
                line.theirs.sendall(msgspec.json.encode(REPORT) + b"\n")
            tasks.cancel_scope.cancel()
    assert answers == [REPORT, REPORT]


async def test_no_answer(line: Line) -> None:
    """Within that time, or from a worker that is gone."""
    assert await line.ask(0.01) is None
    line.theirs.close()
    other = Line()
    other.close()
    assert await other.ask(BOUND) is None
    other.send(OPTIONS)


async def test_workers_that_have_not_started() -> None:
    """Each has a name that its successor takes over, and nothing to tell."""
    supervisor = Supervisor(OPTIONS, 2, reload=False)
    states = await supervisor.states()
    assert [(one.number, one.started, one.report) for one in states] == [(1, 0, None), (2, 0, None)]


def test_line_without_end(line: Line) -> None:
    """What is too long to be a report is not kept."""
    line.theirs.setblocking(False)
    sent = 0
    while sent < 3 * 1024 * 1024:
        try:
            sent += line.theirs.send(b"x" * 65536)
        except BlockingIOError:
            assert line.take()
    line.take()
    line.theirs.setblocking(True)
    line.theirs.sendall(b"\nserving\n")
    line.take()
    assert line.words == {Word.serving}
    assert isinstance(line.theirs, socket.socket)
