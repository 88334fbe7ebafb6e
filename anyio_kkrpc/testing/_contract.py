"""What every transport must do, as a suite for its author."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import anyio
import anyio.lowlevel
from anyio import CancelScope, EndOfStream, create_task_group, fail_after, wait_all_tasks_blocked

from .._exceptions import OverloadedError, TransportClosedError
from ..abc import Envelope, Listener, Transport
from ..records import Cancel, Record, Reply, Request, StreamReply

__all__ = ("check_transport",)

MakePair = Callable[[], AbstractAsyncContextManager[tuple[Transport, Transport]]]
_Check = Callable[[Transport, Transport], Awaitable[None]]

# Seconds within which each step has to happen.
BOUND = 10.0


class RecordingListener(Listener):
    """Keeps what it is told, and lets others wait for it."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.reasons: list[Exception] = []
        self._changed = anyio.Event()

    def received(self, envelope: Envelope) -> None:
        self.records.append(envelope.record)
        self._change()

    def ended(self, reason: Exception) -> None:
        self.reasons.append(reason)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what was told holds, for at most `BOUND` seconds."""
        with fail_after(BOUND):
            while not condition():
                await self._changed.wait()


def _request(number: int, size: int = 0) -> Request:
    return Request(f"r{number}", "call", ["f"], a=[number, "x" * size])


def _address(record: Record, to: Transport) -> Envelope:
    """An envelope for a peer, where it has an id to be addressed by."""
    return Envelope(record, None, getattr(to, "session_id", None))


async def check_transport(make_pair: MakePair, *, close_is_seen: bool = True) -> None:
    """Check that two transports that talk to each other keep the contract of `Transport`.

    Call it from a test, on each backend. ``make_pair`` is called once for each rule, and must give
    two new transports that are entered and talk only to each other.

    :param make_pair: returns an async context manager of two transports
    :param close_is_seen: whether one side learns that the other has closed: true of connections,
        not of brokers
    :raises AssertionError: if a rule is broken; its traceback names the rule
    """
    rules: list[_Check] = [
        _requests_arrive_in_order,
        _responses_pass_requests,
        _listener_gets_what_came_before_it,
        _receive_that_is_cancelled_loses_nothing,
        _concurrent_senders_do_not_mix,
        _cancelled_sender_tears_nothing,
        _unsendable_values_send_nothing,
        _settle_sends_the_reply,
        _close_wakes_whoever_waits,
        _close_is_idempotent_and_final,
        _close_that_is_cancelled_closes,
    ]
    if close_is_seen:
        rules.append(_the_other_side_sees_the_end)
    for rule in rules:
        async with make_pair() as (one, two):
            await rule(one, two)


async def _requests_arrive_in_order(one: Transport, two: Transport) -> None:
    for start in (0, 100):
        for number in range(start, start + 20):
            await one.send(Envelope(_request(number)))
        with fail_after(BOUND):
            for number in range(start, start + 20):
                envelope = await two.receive()
                assert envelope.record == _request(number)
                assert envelope.attempt == 1
                assert envelope.error is None


async def _responses_pass_requests(one: Transport, two: Transport) -> None:
    listener = RecordingListener()
    two.listen(listener, serve=10)
    for number in range(10):
        await one.send(Envelope(_request(number)))
    replies: list[Record] = [Reply(f"a{number}", number) for number in range(10)]
    replies.append(StreamReply(id="s", sid="s", d=True))
    for reply in replies:
        await one.send(_address(reply, two))
    await listener.until(lambda: len(listener.records) == len(replies))
    assert listener.records == replies
    with fail_after(BOUND):
        for number in range(10):
            assert (await two.receive()).record == _request(number)


async def _listener_gets_what_came_before_it(one: Transport, two: Transport) -> None:
    await one.send(_address(_request(0), two))
    await one.send(_address(Reply("a", 1), two))
    await one.send(_address(_request(1), two))
    with fail_after(BOUND):
        assert (await two.receive()).record == _request(0)
    listener = RecordingListener()
    two.listen(listener, serve=10)
    await listener.until(lambda: listener.records == [Reply("a", 1)])
    with fail_after(BOUND):
        assert (await two.receive()).record == _request(1)


async def _receive_that_is_cancelled_loses_nothing(one: Transport, two: Transport) -> None:
    got: list[Record] = []
    sent = 0
    with fail_after(BOUND):
        for round_ in range(10):
            async with create_task_group() as tasks:

                async def receive() -> None:
                    got.append((await two.receive()).record)

                for _ in range(3):
                    tasks.start_soon(receive)
                if round_ % 2:
                    await wait_all_tasks_blocked()
                await one.send(Envelope(_request(sent)))
                sent += 1
                if round_ % 3:
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        while len(got) < sent:
            got.append((await two.receive()).record)
    assert sorted(str(r) for r in got) == sorted(str(_request(n)) for n in range(sent))


async def _concurrent_senders_do_not_mix(one: Transport, two: Transport) -> None:
    got: list[Record] = []
    async with create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(one.send, Envelope(_request(number, size=10_000)))
        with fail_after(BOUND):
            while len(got) < 50:
                got.append((await two.receive()).record)
    assert {r.id for r in got if isinstance(r, Request)} == {f"r{n}" for n in range(50)}
    assert all(r == _request(int(r.id[1:]), size=10_000) for r in got if isinstance(r, Request))


async def _cancelled_sender_tears_nothing(one: Transport, two: Transport) -> None:
    for number in range(20):
        with CancelScope() as scope:
            async with create_task_group() as tasks:
                tasks.start_soon(one.send, Envelope(_request(number, size=50_000)))
                if number % 2:
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
    await one.send(Envelope(_request(1000)))
    with fail_after(BOUND):
        while True:
            record = (await two.receive()).record
            assert isinstance(record, Request)
            if record == _request(1000):
                break
            assert record == _request(int(record.id[1:]), size=50_000)


async def _unsendable_values_send_nothing(one: Transport, two: Transport) -> None:
    try:
        await one.send(Envelope(Request("bad", "call", ["f"], a=[object()])))
    except (TypeError, OverloadedError):
        pass
    else:
        with fail_after(BOUND):
            await two.receive()  # a link without a codec passes objects as they are
    await one.send(Envelope(_request(1)))
    with fail_after(BOUND):
        assert (await two.receive()).record == _request(1)


async def _settle_sends_the_reply(one: Transport, two: Transport) -> None:
    listener = RecordingListener()
    one.listen(listener)
    for number in range(3):
        await one.send(Envelope(_request(number)))
        with fail_after(BOUND):
            envelope = await two.receive()
        reply = None if number == 1 else Reply(f"r{number}", number)
        await two.settle(
            envelope, None if reply is None else Envelope(reply, None, envelope.sender)
        )
    await listener.until(lambda: len(listener.records) == 2)
    assert listener.records == [Reply("r0", 0), Reply("r2", 2)]


async def _close_wakes_whoever_waits(one: Transport, two: Transport) -> None:
    listener = RecordingListener()
    one.listen(listener, serve=1)
    woken = 0

    async def receive() -> None:
        nonlocal woken
        try:
            await one.receive()
        except TransportClosedError:
            woken += 1

    with fail_after(BOUND):
        async with create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(receive)
            await wait_all_tasks_blocked()
            await one.aclose()
    assert woken == 3
    assert [type(reason) for reason in listener.reasons] == [TransportClosedError]
    late = RecordingListener()
    one.listen(late)
    assert len(late.reasons) == 1


async def _close_is_idempotent_and_final(one: Transport, two: Transport) -> None:
    with fail_after(BOUND):
        await one.aclose()
        await one.aclose()
    for call in (lambda: one.send(Envelope(_request(1))), one.receive):
        try:
            with fail_after(BOUND):
                await call()
        except TransportClosedError:
            continue
        raise AssertionError("a closed transport takes calls")


async def _close_that_is_cancelled_closes(one: Transport, two: Transport) -> None:
    with CancelScope() as scope:
        scope.cancel()
        await one.aclose()
    try:
        await one.send(Envelope(Cancel("1")))
    except TransportClosedError:
        return
    raise AssertionError("a closed transport takes calls")


async def _the_other_side_sees_the_end(one: Transport, two: Transport) -> None:
    listener = RecordingListener()
    two.listen(listener, serve=1)
    await one.send(Envelope(_request(1)))
    with fail_after(BOUND):
        assert (await two.receive()).record == _request(1)
        await one.aclose()
        try:
            await two.receive()
        except EndOfStream:
            pass
        else:
            raise AssertionError("something was received after the end")
    await listener.until(lambda: bool(listener.reasons))
    assert isinstance(listener.reasons[0], EndOfStream)
