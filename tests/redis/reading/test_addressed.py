"""What is for this peer: from where it is read on, and who gets what."""

from __future__ import annotations

from typing import Any, cast

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc._protocol._records import Bye, Cancel, Record, Reply, Request
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._portion import Portion
from anyio_kkrpc.redis._reading._addressed import Addressed
from anyio_kkrpc.redis._reading._in_order import InOrder
from anyio_kkrpc.redis._reading._inbox import Inbox
from anyio_kkrpc.redis._reading._losses import Losses
from anyio_kkrpc.redis._reading._open_calls import OpenCalls
from anyio_kkrpc.redis._reading._reader import Reader
from anyio_kkrpc.redis._reading._repeats import Repeats
from anyio_kkrpc.redis.dialects.native import MARK_OF_SEVERAL
from tests.redis.parts import KEYS, ME, Parts, Server, request, written

pytestmark = pytest.mark.anyio

INBOX, CONTROL, STREAM = KEYS.inbox(ME), KEYS.control, KEYS.stream
LOST = TransportConnectionError("lost")
WRONG = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")


class Ear(Listener):
    def __init__(self) -> None:
        self.heard: list[Record] = []

    def received(self, envelope: Envelope) -> None:
        self.heard.append(envelope.record)

    def ended(self, reason: Exception) -> None:
        raise AssertionError


class Desk:
    """The reader of one peer's inbox, whose server answers as it is told."""

    def __init__(self, *replies: Any, serving: bool = False, **others: Any) -> None:
        others = {"PEXPIRE": 1, "DEL": 1} | others
        self.server, self.ear = Server(*replies, **others), Ear()
        self.parts = Parts(self.server)
        inbound = self.parts.reception.inbound
        inbound.listen(self.ear, serve=1)
        common, repeats = self.parts.common, Repeats(INBOX)
        self.reader = Reader({}, common.decoder, 5.0)
        self.inbox = Inbox(INBOX, 60.0, self.server.execute, lambda made: None)
        in_order = InOrder(repeats, common.arrivals.deliver_addressed)
        self.parts.skipped = in_order.skipped
        self.addressed = Addressed(
            KEYS,
            ME,
            self.inbox,
            self.reader,
            common,
            inbound=inbound,
            repeats=repeats,
            in_order=in_order,
            losses=cast(Losses, None),
            open_calls=cast(OpenCalls, None),
            signals=self.parts.signals,
            serving=lambda: serving,
        )

    async def ask(self, what: str, portion: Portion, command: Any) -> Any:
        return await self.server.execute(*command(1))

    async def run(self) -> None:
        """Read from a known start until nothing more can be read."""
        self.reader.begin({CONTROL: b"1-0", INBOX: b"1-0"})
        self.server.connects = 0
        await self.addressed.run(self.server.connection)


@pytest.mark.parametrize("shared", [False, True])
async def test_start(shared: bool) -> None:
    desk = Desk(EVAL=b"7-0")
    found = await desk.addressed.find_start(desk.server.execute, desk.ask, shared=shared)
    assert found == b"7-0"
    assert desk.reader.positions == dict.fromkeys(
        (CONTROL, INBOX, STREAM) if shared else (CONTROL, INBOX), b"7-0"
    )


async def test_start_without_a_right() -> None:
    """A key that holds something else is left out by who reads it; nothing else is."""
    desk = Desk(EVAL=ResponseError("NOPERM no"))
    with pytest.raises(ResponseError, match="NOPERM"):
        await desk.addressed.find_start(desk.server.execute, desk.ask, shared=False)


async def test_who_gets_what() -> None:
    """Replies at once, requests aside; what all are told is no reply, and none of one's own."""
    reply, cancel = Reply("r", v=1), Cancel("c")
    inbox = [(b"5-0", written(reply)), (b"6-0", request("a"))]
    control = [
        (b"5-0", written(cancel)),
        (b"6-0", written(Cancel("own"), ME)),
        (b"7-0", request("b")),
        (b"8-0", [b"hint", b"claim"]),
    ]
    desk = Desk([(INBOX, inbox), (CONTROL, control)], LOST)
    await desk.run()
    assert desk.ear.heard == [reply, cancel]
    assert desk.parts.reception.aside.waiting
    record = (await desk.parts.reception.aside.receive()).record
    assert isinstance(record, Request)
    assert record.id == "a"
    assert desk.addressed.misplaced == 1
    assert desk.addressed.received == 5
    assert desk.parts.words == [b"claim"]
    assert desk.inbox.consumed == [b"5-0", b"6-0"]
    assert desk.reader.positions == {CONTROL: b"8-0", INBOX: b"6-0"}
    assert (desk.parts.expected, desk.parts.followed_up) == (1, 1)


def several(count: int, *records: bytes) -> list[bytes]:
    """Return the fields of an entry of several records, the number of which is ``count`` and on."""
    first, *others = records
    head = [b"from", b"other", b"json", first, b"n", b"e+1.%d" % count, *MARK_OF_SEVERAL]
    return [*head, *(part for one in others for part in (b"json", one))]


def replies(*ids: str) -> list[bytes]:
    return [get_codec("json").encode(Reply(one, v=1)) for one in ids]


def heard(desk: Desk) -> list[str]:
    return [record.id for record in desk.ear.heard if isinstance(record, Reply)]


async def test_several_records() -> None:
    """Each is handed on, in order; they come once; one that can't be read spoils no other."""
    call = get_codec("json").encode(Request("q", "call", ["f"]))
    inbox = [
        (b"5-0", several(1, *replies("a"), call, *replies("b"))),
        (b"6-0", several(4, b"{", *replies("c"), b"[")),
        (b"7-0", several(3, *replies("b"), b"{", *replies("c"))),
        (b"8-0", several(7, b"{", b"[")),
        (b"9-0", several(9, *replies("d", "e"))),
    ]
    control = [(b"5-0", several(1, *replies("x", "y")))]
    desk = Desk([(INBOX, inbox), (CONTROL, control)], LOST)
    await desk.run()
    assert heard(desk) == ["a", "b", "c", "d", "e"]
    record = (await desk.parts.reception.aside.receive()).record
    assert isinstance(record, Request)
    assert record.id == "q"
    assert desk.addressed.received == 6
    assert not desk.addressed.repeats.disorder
    # Two records of two entries, one entry, and what was for all.
    assert desk.parts.common.decoder.invalid == 5
    assert desk.inbox.consumed == [b"5-0", b"6-0", b"7-0", b"9-0"]


async def test_several_records_of_which_some_are_too_large() -> None:
    """These are refused by themselves, wherever they stand; in what all are told, all of it is."""
    large = get_codec("json").encode(Reply("large", v="x" * 10_000))
    inbox = [
        (b"5-0", several(1, *replies("a"), large, *replies("b"), large)),
        (b"6-0", several(5, large, *replies("c"))),
        (b"7-0", several(7, *replies("d"))),
        (b"8-0", written(Reply("large", v="x" * 10_000))),
        (b"9-0", [*several(8, *replies("e", "f")), b"new", large]),
    ]
    control = [(b"5-0", several(1, large, *replies("x")))]
    desk = Desk([(INBOX, inbox), (CONTROL, control)], LOST)
    await desk.run()
    assert heard(desk) == [*"abcdef"]
    assert desk.parts.common.decoder.invalid == 5
    assert not desk.addressed.repeats.disorder


async def test_several_records_that_come_too_early() -> None:
    """They wait for what is missing, and follow it, whatever they came again with."""
    inbox = [
        (b"5-0", several(1, *replies("a", "b"))),
        (b"6-0", several(5, *replies("e", "f"))),
        (b"7-0", several(3, *replies("c", "d"))),
        (b"8-0", several(6, *replies("f", "g", "h"))),
    ]
    desk = Desk([(INBOX, inbox[:2])], [(INBOX, inbox[2:])], LOST)
    await desk.run()
    assert heard(desk) == [*"abcdefgh"]


@pytest.mark.parametrize("count", [1, 2])
async def test_several_posts_are_expected(count: int) -> None:
    """Where several records came together, be it in one entry; not where one did."""
    lone = several(3, *replies("c"))
    desk = Desk(
        [(INBOX, [(b"5-0", several(1, *replies(*"ab"[:count])))])],
        [(INBOX, [(b"6-0", lone)])],
        LOST,
    )
    await desk.run()
    assert desk.parts.expected == count - 1


async def test_destroyed() -> None:
    desk = Desk([(CONTROL, [(b"5-0", written(Bye()))])], LOST)
    await desk.run()
    assert len(desk.parts.ended) == 1


async def test_wrong_keys(caplog: pytest.LogCaptureFixture) -> None:
    """The inbox is made again; the control stream is read no more."""
    desk = Desk(WRONG, LOST, XINFO=WRONG, EVAL=b"9-0")
    await desk.run()
    assert desk.reader.positions == {INBOX: b"9-0"}
    assert (b"DEL", INBOX) in desk.server.asked
    assert desk.addressed.misplaced == 2
    assert caplog.text.count("holds something else than a stream") == 2
    assert [str(one) for one in desk.parts.failures] == ["there is no server any more"]


AGAIN = ResponseError("TRYAGAIN Multiple keys request during rehashing of slot")
ASK = ResponseError("ASK 3999 127.0.0.1:6381")


async def test_slot_that_moves() -> None:
    """What is there still is read, whichever of the keys are on another node, or nowhere."""
    reply, cancel = Reply("r", v=1), Cancel("c")
    inbox, control = [(b"5-0", written(reply))], [(b"6-0", written(cancel))]
    replies: list[Any] = [AGAIN, ASK, [(INBOX, inbox)]]
    replies += [ASK, [(CONTROL, control)], ASK, LOST]
    desk = Desk(*replies)
    await desk.run()
    assert desk.ear.heard == [reply, cancel]
    assert desk.reader.positions == {CONTROL: b"6-0", INBOX: b"5-0"}
    reads = [command for command in desk.server.asked if command[0] == b"XREAD"]
    assert [command[-2:] for command in reads[1:3]] == [(CONTROL, b"1-0"), (INBOX, b"1-0")]
    assert [b"BLOCK" in command for command in reads[:3]] == [True, False, True]
    assert not desk.addressed.misplaced


async def test_slot_that_moves_and_something_else() -> None:
    """What no move explains is said, and what came beside it isn't lost."""
    denied = ResponseError("NOPERM no")
    inbox = [(b"5-0", written(Reply("r", v=1)))]
    desk = Desk(AGAIN, denied, [(INBOX, inbox)])
    await desk.run()
    assert desk.ear.heard == [Reply("r", v=1)]
    assert desk.parts.failures == [denied]


async def test_slot_that_moves_and_wrong_keys() -> None:
    """A control stream that is none is left out then, too."""
    desk = Desk(AGAIN, WRONG, [], LOST, XINFO=WRONG, EVAL=b"9-0")
    await desk.run()
    assert desk.addressed.misplaced == 2
    assert [str(one) for one in desk.parts.failures] == ["there is no server any more"]


async def test_listens_to_the_stream() -> None:
    """From what came first on, but not from before this peer came; and its read is ended once."""
    desk = Desk(EVAL=b"7-0")
    desk.addressed.listen_to_stream(b"3-0")
    assert STREAM not in desk.reader.positions  # it doesn't read yet
    await desk.addressed.find_start(desk.server.execute, desk.ask, shared=False)
    for after in (b"3-0", b"30-0"):
        desk.addressed.listen_to_stream(after)
        assert desk.reader.positions[STREAM] == b"7-0"
    assert desk.inbox.wake_wanted


@pytest.mark.parametrize("early", [False, True])
async def test_stopped(early: bool) -> None:
    """Also before it has begun; its connection is closed."""
    desk = Desk()
    if early:
        desk.addressed.stop()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(desk.run)
        await anyio.wait_all_tasks_blocked()
        desk.addressed.stop()
    assert desk.server.closed
    assert desk.parts.failures == []
