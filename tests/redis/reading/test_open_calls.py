"""Which requests are sent again, given what another server has of them. Time is virtual."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

import anyio
import pytest
import redis
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from anyio_kkrpc._protocol._records import Reply, Request
from anyio_kkrpc.abc import Envelope, Listener
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._inbound import Inbound
from anyio_kkrpc.kit._queue import BoundedQueue
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._reading._open_calls import _MISSING, OpenCalls
from anyio_kkrpc.redis.dialects import Dialects

# There; lost; answered, and trimmed, the reply being in the inbox; the same, and given up meanwhile.
Fate: TypeAlias = Literal["there", "lost", "answered", "given up"]


class Caller(Listener):
    """A listener that waits for replies."""

    def __init__(self) -> None:
        self.open: dict[str, Envelope] = {}

    def received(self, envelope: Envelope) -> None:
        assert isinstance(envelope.record, Reply)
        self.open.pop(envelope.record.id, None)

    def ended(self, reason: Exception) -> None:
        raise AssertionError

    def waiting(self) -> list[Envelope]:
        return list(self.open.values())


class Rig:
    """A server that was promoted, and what this peer does there.

    :ivar has: the ids of its entries
    :ivar unread: replies in the inbox
    :ivar at: the server from which the inbox is read
    """

    ended = False

    def __init__(self) -> None:
        queue: BoundedQueue[Envelope] = BoundedQueue(10, 1000, "drop_oldest")
        self.inbound, self.caller = Inbound(queue), Caller()
        self.inbound.listen(self.caller)
        self.has: set[bytes] = set()
        self.unread: list[str] = []
        self.kept: list[Envelope] = []
        self.sent: list[str] = []
        self.refusals: list[Exception] = []
        self.asked: list[Any] = []
        self.server, self.moved = b"new", anyio.Event()
        self.reads = True
        self.forgotten: list[Collection[str]] = []
        link: Any = self
        reader: Any = self
        where = (b"s", b"me", self.inbound, link, reader, self.read_on, self.send_again)
        self.calls = OpenCalls(*where, lambda: self.kept, self.forgotten.append)
        self.calls.identity.current = b"new"

    def ask(self, name: str, token: Any, recipient: str | None = None) -> Envelope:
        sent = Envelope(Request(name, "call", ["f"]), None, recipient, token=token)
        self.caller.open[name] = sent
        return sent

    async def request(self, *command: Any) -> Any:
        await anyio.sleep(0.01)
        self.asked.append(command)
        if self.refusals:
            raise self.refusals.pop(0)
        return [one for one in command[5::2] if one not in self.has]

    async def read_on(self) -> bool:
        await anyio.sleep(0.01)
        assert self.server == b"new"
        if not self.reads:
            await anyio.sleep(4)
            return False
        for name in self.unread:
            self.inbound.deliver(Envelope(Reply(name), "worker"))
        return True

    async def send_again(self, requests: Sequence[Envelope]) -> int:
        for request in requests:
            assert isinstance(request.record, Request)
            self.sent.append(request.record.id)
        return len(requests)

    async def look(self) -> None:
        """Meet another server, and wait until all is done."""
        self.calls.note()
        await anyio.sleep(100)


def with_rig(function: Callable[[Rig], Awaitable[None]]) -> None:
    async def check() -> None:
        rig = Rig()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.calls.run)
            await function(rig)
            tasks.cancel_scope.cancel()

    trio.run(check, clock=MockClock(autojump_threshold=0))


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from(["there", "lost", "answered", "given up"])),
        max_size=30,
    ),
    st.integers(0, 3),
)
def test_any_loss(requests: list[tuple[bool, Fate]], late: int) -> None:
    """Sent again is, in its order, what was accepted, isn't there, and has no answer. What was trimmed
    has one: it is read before that is decided. Of what is in another peer's inbox nothing tells.
    """

    async def check(rig: Rig) -> None:
        expected = []
        for number, (addressed, fate) in enumerate(requests):
            name, token = str(number), b"%d-0" % number
            rig.ask(name, None if addressed else token, "peer" if addressed else None)
            if fate == "there":
                rig.has.add(token)
            elif fate in ("answered", "given up"):
                rig.unread.append(name)
            if fate == "lost" or (addressed and fate == "there"):
                expected.append(name)
        if late:  # the reader comes later than the link
            rig.server = b"old"
        rig.calls.note()
        for number, (_, fate) in enumerate(requests):
            if fate == "given up":
                del rig.caller.open[str(number)]
        await anyio.sleep(late * 4)
        assert not late or not rig.sent
        rig.server = b"new"
        rig.moved.set()
        await anyio.sleep(100)
        assert rig.sent == expected
        asked = sum(not addressed for addressed, _ in requests)
        assert sum(len(command) - 5 for command in rig.asked) == 2 * asked
        assert rig.calls.looked_up == len(requests)
        assert rig.calls.sent_again == len(expected)

    with_rig(check)


@pytest.mark.parametrize("server", [b"new", b"other"])
def test_an_inbox_that_cannot_be_read(server: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It is read from another server for good, or too slowly: what is lost doesn't wait for ever."""

    async def check(rig: Rig) -> None:
        rig.ask("lost", b"1-0")
        rig.server, rig.reads = server, False
        rig.calls.note()
        await anyio.sleep(14)
        assert rig.sent == []
        await anyio.sleep(2)
        assert rig.sent == ["lost"]
        assert ("on another server" in caplog.text) == (server == b"other")
        rig.server, rig.reads = b"new", True
        rig.ask("later", b"2-0")
        rig.calls.note()
        await anyio.sleep(1)
        assert "later" in rig.sent

    with_rig(check)


def test_what_nobody_has_accepted() -> None:
    """What waits to be written, or to be looked for, is its writer's affair."""

    async def check(rig: Rig) -> None:
        rig.ask("written", object())
        rig.ask("refused", b"")
        rig.kept = [rig.ask("kept", None, "peer")]
        await rig.look()
        assert rig.sent == rig.asked == []
        assert rig.calls.looked_up == 0
        assert rig.forgotten == [{"written", "refused", "kept"}]

    with_rig(check)


def test_many() -> None:
    async def check(rig: Rig) -> None:
        for number in range(1000):
            rig.ask(str(number), b"%d-0" % number)
        rig.has = {b"%d-0" % number for number in range(0, 1000, 2)}
        await rig.look()
        assert [len(command) - 5 for command in rig.asked] == [500] * 4
        assert rig.sent == [str(number) for number in range(1, 1000, 2)]

    with_rig(check)


def test_the_next_server() -> None:
    """One that comes while the one before is still asked: what was sent again isn't looked for."""

    async def check(rig: Rig) -> None:
        for name in ("1", "2"):
            rig.ask(name, name.encode() + b"-0")
        rig.has.add(b"2-0")
        rig.calls.note()
        await anyio.sleep(0.015)  # it has been asked
        rig.caller.open["1"].token = object()
        rig.has.clear()
        await rig.look()
        assert rig.sent == ["2"]

    with_rig(check)


@pytest.mark.server
@pytest.mark.parametrize("dialect", ["native", "cbor", "kkrpc-0", "kkrpc-2"])
@pytest.mark.parametrize("mine", [True, False])
def test_what_a_server_has(
    witness: redis.Redis, stream_name: str, dialect: str, mine: bool
) -> None:
    """An entry counts if it is the request: another one may have its id on another server."""
    writer = Dialects(
        "native" if dialect == "cbor" else dialect,
        "me",
        get_codec("cbor" if dialect == "cbor" else "json"),
        superjson=True,
        remote_peer_id=None,
        skips_own=False,
        max_queue_size=10,
        max_queue_bytes=10_000,
        deliver=None,
        now=lambda: 0.0,
        time_of_day=lambda: 0.0,
    ).own
    name = "0123456789abcdef-1"
    ids = []
    # This one, one whose id begins as its does, none, and one of somebody else.
    for one in (name, name + "a"):
        fields = writer.encode(Request(one, "call", ["f"], [name[:-1]]), None)
        assert fields is not None
        ids.append(witness.xadd(stream_name, dict(zip(fields[::2], fields[1::2], strict=True))))
    sender = b"me" if mine else b"other"
    missing = witness.eval(
        _MISSING, 1, stream_name, sender, ids[0], name, ids[1], name, "9-9", name
    )
    assert missing == ([] if mine or writer.shared else ids[:1]) + [ids[1], b"9-9"]


def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    """For now, it is asked again at once; else it is said, and it is asked again after a while, not
    for ever, and as long as anybody waits. Nothing is sent twice at random.
    """

    async def check(rig: Rig) -> None:
        rig.ask("1", b"1-0")
        rig.refusals.append(ResponseError("OOM not now"))
        await rig.look()
        assert rig.sent == ["1"]
        rig.refusals.append(ResponseError("NOPERM this user has no permissions"))
        rig.calls.note()
        await anyio.sleep(4)
        assert rig.sent == ["1"]
        await anyio.sleep(2)
        assert rig.sent == ["1", "1"]
        assert caplog.text.count("which requests were lost can't be found: NOPERM") == 1
        rig.refusals += [ResponseError("NOPERM no")] * 100
        rig.calls.note()
        await anyio.sleep(21)
        assert len(rig.refusals) == 95
        rig.calls.note()  # the next one may tell
        await anyio.sleep(1)
        assert len(rig.refusals) == 94
        await anyio.sleep(1000)
        assert len(rig.refusals) == 35
        rig.calls.note()
        await anyio.sleep(1)
        del rig.caller.open["1"]
        await anyio.sleep(1000)
        assert len(rig.refusals) == 34
        assert rig.sent == ["1", "1"]

    with_rig(check)
