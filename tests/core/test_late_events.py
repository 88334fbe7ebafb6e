"""What comes too late is no error: replies at their deadline, items at the time-out, answers twice."""

from __future__ import annotations

import logging
import time
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, create_task_group, fail_after, wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from anyio_kkrpc import (
    OverloadedError,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    with_call_options,
)
from anyio_kkrpc._protocol._records import Cancel, Record, Reply, Request, StreamReply
from anyio_kkrpc._protocol._values import STREAM
from anyio_kkrpc._runtime._timer import Timer
from anyio_kkrpc.abc import Capabilities, Envelope, Listener, Transport
from anyio_kkrpc.middleware import CallNext, Invocation
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

# A loop that was held up finds the deadline and what was received in one turn, in either order.
TURNS = range(5)


class Scripted(Transport):
    """A transport to nobody: keeps what is sent, and receives what the test says, when it says."""

    def __init__(self, *, broadcast: bool = False) -> None:
        self.capabilities_ = Capabilities(broadcast=broadcast)
        self.sent: list[Record] = []
        self.listener: Listener | None = None
        self.refuses = 0

    @property
    def capabilities(self) -> Capabilities:
        return self.capabilities_

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        self.listener = listener

    async def receive(self) -> Envelope:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(self, item: Envelope) -> None:
        await checkpoint()
        if self.refuses:
            self.refuses -= 1
            raise OverloadedError("nothing is taken now")
        self.sent.append(item.record)

    async def aclose(self) -> None:
        await checkpoint()

    def requests(self) -> list[Request]:
        return [record for record in self.sent if isinstance(record, Request)]

    async def until_asked(self, number: int) -> None:
        # Not wait_all_tasks_blocked(): on asyncio that may take a tenth of a second.
        while len(self.requests()) < number:
            await checkpoint()

    def deliver(self, record: Record, sender: str | None = None) -> None:
        assert self.listener is not None
        self.listener.received(Envelope(record, sender))


async def hold_up_until(deadline: float, turns: int) -> None:
    """Hold the loop up past a deadline, and return so many turns after it has seen that."""
    time.sleep(max(deadline - anyio.current_time(), 0) + 0.02)
    for _ in range(turns):
        await checkpoint()


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("failed", [False, True])
async def test_reply_at_its_deadline(turns: int, failed: bool) -> None:
    """The call has its answer or its time-out; other calls go on."""
    transport = Scripted()
    outcomes: list[Any] = []
    async with RPCChannel(transport, timeout=30) as channel, create_task_group() as group:

        async def call(name: str, timeout: float) -> None:
            api = with_call_options(channel.get_api(), timeout=timeout)
            try:
                outcomes.append(await getattr(api, name)())
            except Exception as exc:
                outcomes.append(exc)

        group.start_soon(call, "other", 30)
        started = anyio.current_time()
        group.start_soon(call, "late", 0.05)
        await transport.until_asked(2)
        other, late = sorted(transport.requests(), key=lambda request: request.d or 0, reverse=True)
        await hold_up_until(started + 0.05, turns)
        transport.deliver(Reply(late.id, e={"n": "E", "m": ""}) if failed else Reply(late.id, "on"))
        await wait_all_tasks_blocked()
        assert len(outcomes) == 1
        if turns or failed:
            assert outcomes[0] == "on" or isinstance(outcomes[0], (RPCTimeoutError, RemoteError))
        else:  # it was there before the deadline was seen
            assert outcomes[0] == "on"
        transport.deliver(Reply(other.id, "fine"))
        with fail_after(BOUND):
            while len(outcomes) < 2:
                await checkpoint()
        assert outcomes[1] == "fine"
        assert not channel.closed
        assert channel.statistics().calls == 0


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("ends", [False, True])
async def test_item_at_the_time_out(turns: int, ends: bool) -> None:
    """An item or the end that came in time is read, or the stream timed out; nothing else."""
    transport = Scripted()
    outcomes: list[Any] = []
    async with RPCChannel(transport, timeout=0.2) as channel, create_task_group() as group:

        async def read() -> None:
            stream = await with_call_options(channel.get_api(), timeout=30).items()
            started.set()
            try:
                async for item in stream:
                    outcomes.append(item)
                    break
                else:
                    outcomes.append("end")
            except RPCTimeoutError as exc:
                outcomes.append(exc)

        started = anyio.Event()
        group.start_soon(read)
        await transport.until_asked(1)
        (request,) = transport.requests()
        transport.deliver(Reply(request.id, {STREAM: "async-iterable", "id": "s"}))
        await started.wait()
        since = anyio.current_time()
        await checkpoint()
        await hold_up_until(since + 0.2, turns)
        transport.deliver(StreamReply("p", "s", d=ends, v=7, i=0))
        with fail_after(BOUND):
            while not outcomes:
                await checkpoint()
        expected = "end" if ends else 7
        assert outcomes[0] == expected or (turns and isinstance(outcomes[0], RPCTimeoutError))
        assert not channel.closed


async def test_a_second_answer_of_one_peer_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """A repeated answer to a question to all is dropped; a stream in it is closed at its source."""
    transport = Scripted(broadcast=True)
    async with RPCChannel(transport) as channel, create_task_group() as group:
        values: list[Any] = []

        async def ask() -> None:
            question = channel.broadcast(channel.get_api().items(), timeout=30, limit=2)
            async for reply in question:
                values.append(reply.result())

        group.start_soon(ask)
        await wait_all_tasks_blocked()
        (request,) = transport.requests()
        for number in range(2):
            value = {STREAM: "async-iterable", "id": f"s{number}"}
            transport.deliver(Reply(request.id, value), "worker")
        transport.deliver(StreamReply("p", "s1", d=True), "worker")  # before it is known as left
        transport.deliver(Reply(request.id, 2), "another")
        await wait_all_tasks_blocked()
        assert len(values) == 2
        assert channel.statistics().incoming_streams == 1
    assert "failed" not in caplog.text


@pytest.mark.parametrize("refused", [False, True])
async def test_a_question_that_is_asked_again(refused: bool) -> None:
    """Middleware that goes on twice: the first question is taken back, answers to the second count."""

    async def twice(invocation: Invocation, go_on: CallNext) -> Any:
        if refused:
            transport.refuses = 1
            with pytest.raises(OverloadedError):
                await go_on(invocation)
        else:
            await go_on(invocation)
            transport.deliver(Reply(transport.requests()[0].id, "old"), "worker")
        return await go_on(invocation)

    transport = Scripted(broadcast=True)
    async with RPCChannel(transport, middleware=[twice]) as channel, create_task_group() as group:
        values: list[Any] = []

        async def ask() -> None:
            async for reply in channel.broadcast(
                channel.get_api().health(), timeout=BOUND, limit=2
            ):
                values.append(reply.result())

        group.start_soon(ask)
        await transport.until_asked(1 if refused else 2)
        *earlier, request = transport.requests()
        for asked in (*earlier, request):
            transport.deliver(Reply(asked.id, "first"), "worker")
        transport.deliver(Reply(request.id, "second"), "another")
        await wait_all_tasks_blocked()
        assert values == ["first", "second"]
        assert channel.statistics().calls == 0
        cancelled = [record.id for record in transport.sent if isinstance(record, Cancel)]
        assert cancelled[: len(earlier)] == [asked.id for asked in earlier]


async def test_a_question_that_nobody_reads_is_not_asked_again() -> None:
    """It was left while middleware waited: going on asks nobody, and leaves nothing open."""

    async def wait(invocation: Invocation, go_on: CallNext) -> Any:
        await go_on(invocation)
        await question.aclose()
        return await go_on(invocation)

    transport = Scripted(broadcast=True)
    async with RPCChannel(transport, middleware=[wait]) as channel:
        question = channel.broadcast(channel.get_api().health(), timeout=BOUND)
        with pytest.raises(ClosedResourceError):
            await question.__anext__()
        assert len(transport.requests()) == 1
        assert channel.statistics().calls == 0


class Strange(BaseException):
    """Such as a panic of an extension module: no Exception."""


@pytest.mark.parametrize("raised", [ValueError("x"), Strange("x"), SystemExit(3), GeneratorExit()])
async def test_what_is_due_and_fails(
    raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the timer goes on."""
    timer = Timer()
    called: list[int] = []

    def fail() -> None:
        called.append(0)
        raise raised

    async with create_task_group() as group:
        group.start_soon(timer.run)
        await wait_all_tasks_blocked()
        now = anyio.current_time()
        timer.at(now, fail)
        timer.at(now, lambda: called.append(1))
        timer.at(now + 0.01, lambda: called.append(2))
        with fail_after(BOUND):
            while len(called) < 3:
                await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    assert called == [0, 1, 2]
    assert [record.levelno for record in caplog.records if record.name == "anyio_kkrpc"] == [
        logging.ERROR
    ]


async def test_what_the_outbox_cannot_send(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a transport raises at a record that nobody waits for, the channel goes on."""

    class Failing(Scripted):
        async def send(self, item: Envelope) -> None:
            if not isinstance(item.record, Request):
                raise UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed")
            await super().send(item)

    transport = Failing()
    async with RPCChannel(transport) as channel, create_task_group() as group:
        async with create_task_group() as leaving:
            leaving.start_soon(channel.get_api().work)
            await wait_all_tasks_blocked()
            leaving.cancel_scope.cancel()  # leaves a cancel to send
        await wait_all_tasks_blocked()
        group.start_soon(channel.get_api().ping)
        await wait_all_tasks_blocked()
        transport.deliver(Reply(transport.requests()[1].id, 1))
    assert "a Cancel was not sent: UnicodeEncodeError" in caplog.text
