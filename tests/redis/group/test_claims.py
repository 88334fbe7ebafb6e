"""A worker's scripts as methods: what they say to Redis and make of its replies, without it."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._group._claims import Groups, Look, Taken
from anyio_kkrpc.redis._group._scripts import HAND_BACK, LEAVE, LOOK, REMOVE, TAKE, TOUCH
from anyio_kkrpc.redis._stream._keys import DELAYED, HANDED_BACK, Keys

pytestmark = pytest.mark.anyio

KEYS = Keys.of("s")
CONSUMER = [KEYS.stream, b"group", b"me"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Nothing is awaited here that an event loop does."""
    return request.param


class Link:
    """Answers with what it was given, in order, and notes what it was asked."""

    ended = False

    def __init__(self, *replies: Any) -> None:
        self.replies = deque(replies)
        self.asked: list[list[Any]] = []

    async def request(self, *command: Any) -> Any:
        self.asked.append(list(command))
        reply = self.replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    attempt = request

    async def ask(self, what: str, portion: Any, make: Any) -> Any:
        """Ask again with less, as a link does whose connection is lost."""
        while True:
            try:
                return await self.request(*make(portion.size))
            except TransportConnectionError:
                portion.cut(what)


def groups(link: Link, **options: Any) -> Groups:
    anything: Any = link
    times = {"claim_idle": 30.0, "max_deliveries": 5, **options}
    return Groups(anything, KEYS, b"group", b"me", **times)


def lost() -> Exception:
    return TransportConnectionError("lost")


async def test_what_is_taken() -> None:
    """Each entry with its deliveries; what became a dead letter, and what could not."""
    reply = [
        [[b"1-0", 2, [b"json", b"{}"]]],
        [[b"2-0", 6, [b"json", b"[]"]]],
        [[b"3-0", 6, [], b"OOM"]],
        1,
        0,
    ]
    link = Link(reply)
    claims = await groups(link).take(7, 1234.5678)
    assert claims.taken == [Taken(b"1-0", 2, [b"json", b"{}"])]
    assert claims.dead == [Taken(b"2-0", 6, [b"json", b"[]"])]
    assert claims.kept == [Taken(b"3-0", 6, [], b"OOM")]
    assert (claims.more, claims.pending, claims.after) == (True, False, None)
    (command,) = link.asked
    assert command[:7] == [b"EVAL", TAKE, b"2", KEYS.stream, KEYS.dead, b"group", b"me"]
    assert command[8:] == [b"7", b"5", b"1234568", HANDED_BACK, DELAYED]


async def test_a_reply_that_does_not_come_is_asked_for_smaller() -> None:
    """It is found again by `look`, so nothing is taken; as long as the link goes on."""
    nothing: list[Any] = [[], [], [], 0, 1]
    link = Link(lost(), lost(), nothing)
    parts = groups(link)
    for _ in range(2):
        claims = await parts.take(1, 0.0)
        assert (claims.taken, claims.more) == ([], True)
    assert not (await parts.take(1, 0.0)).more
    sizes = [int(command[7]) for command in link.asked]
    assert sizes[0] > sizes[1] > sizes[2] >= 1024
    link.replies.append(lost())
    link.ended = True
    with pytest.raises(TransportConnectionError):
        await parts.take(1, 0.0)


@pytest.mark.parametrize("counted", [True, False])
async def test_recovered_is_counted_once(counted: bool) -> None:
    """A page that is asked for again, since its reply was lost, isn't one more delivery."""
    link = Link(lost(), [[], [], [], b"9-1"])
    claims = await groups(link).recover(1.0, [b"8-0"], counted=counted, start=b"(1-0", count=3)
    assert claims.after == b"(9-1"
    first, second = (command[8:] for command in link.asked)
    assert first[:3] == [b"(1-0", b"3", b"%d" % counted]
    assert second[:3] == [b"(1-0", b"3", b"0"]
    assert first[3:] == second[3:] == [b"5", b"1000", b"30000", b"300000", DELAYED, b"8-0"]


async def test_last_page() -> None:
    claims = await groups(Link([[], [], [], b""])).recover(1.0, [], counted=False)
    assert claims.after is None


async def test_many_go_in_scripts_of_a_bounded_size() -> None:
    """What they tell is put together."""
    ids = [b"%d-0" % number for number in range(600)]
    link = Link([b"1-0"], [], [b"599-0"])
    assert await groups(link).touch(ids) == [b"1-0", b"599-0"]
    assert [command[1] for command in link.asked] == [TOUCH] * 3
    assert [one for command in link.asked for one in command[6:]] == ids
    link = Link(250, 250, 99)
    assert await groups(link).hand_back([(entry, 3) for entry in ids]) == 599
    assert [command[1] for command in link.asked] == [HAND_BACK] * 3
    assert [one for command in link.asked for one in command[8::2]] == ids
    assert {one for command in link.asked for one in command[9::2]} == {b"3"}
    link = Link()
    assert await groups(link).touch([]) == []
    assert await groups(link).hand_back([]) == 0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ([3, 1500, b"9-0"], Look(3, 1.5, b"9-0")),
        ([0, -1, b""], Look(0, None, None)),
        ([0, 0, b""], Look(0, 0.0, None)),
    ],
)
async def test_look(reply: list[Any], expected: Look) -> None:
    link = Link(reply)
    assert await groups(link).look() == expected
    (command,) = link.asked
    assert command[:9] == [b"EVAL", LOOK, b"1", *CONSUMER, b"-", b"+", b"0"]


async def test_a_later_look_asks_for_what_is_idle() -> None:
    link = Link([0, -1, b""])
    await groups(link).look(b"(1-0", b"5-0")
    assert link.asked[0][6:9] == [b"(1-0", b"5-0", b"15000"]


@pytest.mark.parametrize(("reply", "leads"), [(1, True), (0, False), (None, False)])
async def test_lead(reply: Any, leads: bool) -> None:
    link = Link(reply)
    assert await groups(link).lead() is leads
    assert link.asked[0][2:] == [b"1", KEYS.claimer(b"group"), b"me", b"18000"]


async def test_everybody_leads_where_it_can_not_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    """That is said once, and once more when it has come and gone; other errors are raised."""
    refusal = ResponseError("NOPERM no permissions to access a key")
    parts = groups(Link(refusal, refusal, 0, refusal, ResponseError("OOM command not allowed")))
    assert [await parts.lead() for _ in range(4)] == [True, True, False, True]
    assert caplog.text.count("each worker of the group looks") == 2
    with pytest.raises(ResponseError, match="OOM"):
        await parts.lead()


async def test_leaving_goes_on_until_nothing_is_left() -> None:
    """Then what tells whose the consumer was is gone, too."""
    introduction = (b"SET", b"x", b"y", b"the key")
    link = Link(250, 250, 4, 1)
    await groups(link, introduction=introduction).leave()
    assert [command[1] for command in link.asked[:3]] == [LEAVE] * 3
    assert link.asked[3] == [b"DEL", b"the key"]


async def test_sweep() -> None:
    """Consumers that hold nothing and did nothing for long are removed, but never this one."""

    def consumer(name: bytes, pending: int, idle: int) -> list[Any]:
        return [b"name", name, b"pending", pending, b"idle", idle]

    names = [b"gone%d" % number for number in range(150)]
    here = [consumer(b"busy", 1, 99_999), consumer(b"new", 0, 1_000), consumer(b"me", 0, 99_999)]
    link = Link([*here, *(consumer(name, 0, 60_001) for name in names)], 100, b"50")
    assert await groups(link).sweep(60.0) == 150
    assert [command[1] for command in link.asked[1:]] == [REMOVE] * 2
    assert [one for command in link.asked[1:] for one in command[5:]] == names
