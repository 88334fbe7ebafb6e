"""What a worker makes of what it takes: held, skipped, forwarded, acknowledged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc._protocol._records import Cancel, Request
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._link import Link
from anyio_kkrpc.redis._group._claims import Groups
from anyio_kkrpc.redis._group._held import Standing
from anyio_kkrpc.redis._group._keeping import Keeper
from anyio_kkrpc.redis._group._turns import Turns
from anyio_kkrpc.redis._group._worker import Worker
from anyio_kkrpc.redis._reading._hints import Hints
from anyio_kkrpc.redis._stream._entries import order
from anyio_kkrpc.redis._writing._writer import Writer
from anyio_kkrpc.redis.dialects import Entry, SharedPeer
from tests.bounds import BOUND
from tests.redis.parts import KEYS, ME, Parts, Server, make_outages, request, written

pytestmark = pytest.mark.anyio

STREAM, GROUP = KEYS.stream, b"g"
LOST = TransportConnectionError("lost")


class Writes:
    """In place of a writer."""

    unanswered: dict[bytes, int] = {}

    def __init__(self) -> None:
        self.acknowledged: list[bytes] = []
        self.waits: list[tuple[str, str]] = []
        self.forwarded: list[tuple[bytes, int, str]] = []
        self.flushed = 0
        self.acknowledges = False

    def will_acknowledge(self) -> None:
        self.acknowledges = True

    def settle(self, entry_id: bytes, reply: None) -> None:
        self.acknowledged.append(entry_id)

    def answering(self) -> list[tuple[str, str]]:
        return self.waits

    def forward(self, entry_id: bytes, attempt: int, recipient: str, fields: list[bytes]) -> None:
        self.forwarded.append((entry_id, attempt, recipient))

    def unfinished(self) -> list[bytes]:
        return []

    async def flush(self) -> None:
        self.flushed += 1

    def flush_nowait(self) -> bool:
        self.flushed += 1
        return True


class Bench:
    """A worker of the group ``g``, and what it was handed."""

    def __init__(self, *replies: Any, **others: Any) -> None:
        group = [b"name", GROUP]
        nothing = [[], [], [], b""]
        others = {"XINFO": [group], "EVAL": nothing, "XPENDING": None} | others
        silent = dict.fromkeys(("XCLAIM", "XRANGE", "XACK", "XADD", "XGROUP"))
        self.server = Server(*replies, **silent, **others)
        self.parts, self.writes, self.told = Parts(self.server, "g"), Writes(), 0
        link, writer = cast(Link, LinkTo(self.server)), cast(Writer, self.writes)
        groups = Groups(link, KEYS, GROUP, b"c", claim_idle=30.0, max_deliveries=3)
        room = self.parts.reception.room
        self.keeper = Keeper(groups, writer, make_outages(), 30.0, room, self.tell)
        self.held = self.keeper.held
        hints = Hints(
            KEYS.control,
            link.request,
            make_outages(),
            ME,
            signed=False,
            work=lambda word: self.worker.take_word(word),
            destroy=lambda sender: None,
            call=lambda word: None,
        )
        self.worker = Worker(
            groups,
            self.keeper,
            writer,
            self.parts.common,
            hints=hints,
            now=lambda: 1000.0,
            claim_idle=30.0,
            beside=self.run_beside,
            died=lambda died: None,
            turns=Turns(link.request, KEYS, GROUP, ME, 30.0, make_outages(), self.keeper.now),
        )

    async def tell(self) -> None:
        self.told += 1

    async def run_beside(self, run: Callable[[], Awaitable[None]]) -> None:
        await anyio.sleep_forever()

    async def run(self) -> None:
        """Read until nothing more can be read."""
        async with anyio.create_task_group() as tasks:
            await self.worker.begin(tasks)()
            tasks.cancel_scope.cancel()


class LinkTo:
    def __init__(self, server: Server) -> None:
        self.request = self.attempt = server.execute

    async def ask(self, what: str, portion: Any, command: Callable[[int], Any]) -> Any:
        return await self.request(*command(portion.size))


def entry(name: str, sender: str = "other", recipient: str | None = None) -> Entry:
    asked = Request(name, "call", ["f"])
    return Entry(asked, sender, 1, recipient=recipient, fields=[b"f", b"v"])


async def test_taken() -> None:
    """It is held as long as it isn't settled; what is no request is done with at once."""
    bench = Bench()
    bench.worker.take(b"1-0", entry("a"), 2, 50.0)
    bench.worker.take(b"2-0", Entry(Cancel("x"), "other", 1), 1, 50.0)
    assert bench.parts.queued() == ["a"]
    assert {key: (one.attempt, one.sure_until) for key, one in bench.held.entries.items()} == {
        b"1-0": (2, 50.0)
    }
    assert bench.writes.acknowledged == [b"2-0"]
    assert bench.worker.received == 2


async def test_for_others() -> None:
    """A TypeScript peer's request for another one goes on to that one's inbox."""
    bench = Bench()
    peer = SharedPeer.of("ts", bench.parts.dialects.compact)
    bench.worker.take(b"1-0", entry("a", peer, "other"), 3, 50.0)
    bench.worker.take(b"2-0", entry("b", peer, "g"), 1, 50.0)
    assert bench.writes.forwarded == [(b"1-0", 3, "other")]
    assert list(bench.held.entries) == [b"2-0"]
    assert bench.writes.acknowledged == []


@pytest.mark.parametrize("state", ["new", "waits", "runs", "has run", "answered", "handed back"])
async def test_what_comes_once_more(state: str) -> None:
    """Its caller took it for lost. What runs here holds the new entry, which is acknowledged with its
    reply. The new one takes the place of one that waits. What has run since is done with.
    """
    bench = Bench()
    bench.worker.take(b"0-1", entry("other"), 1, 50.0)
    if state == "answered":  # the reply waits to be written
        bench.writes.waits = [("other", "a")]
    elif state != "new":
        bench.worker.take(b"1-0", entry("a"), 1, 50.0)
    queue, taken = bench.parts.reception.queue, None
    while state != "waits" and len(queue):
        taken = queue.get_nowait()
    if state in ("runs", "has run", "handed back"):
        assert taken is not None
        bench.held.entries[b"1-0"].start()
    bench.worker.meet_another()
    if state == "has run":
        del bench.held.entries[b"1-0"]
    elif state == "handed back":
        bench.held.release(begun=True)
    again = entry("a")
    again.again = 1
    bench.worker.take(b"9-0", again, 1, 60.0)
    queued, held = bench.parts.queued(), bench.held.entries.get(b"9-0")
    if state in ("new", "waits", "handed back"):
        assert queued == (["other", "a"] if state == "waits" else ["a"])
        assert held is not None
        assert not held.started
        assert bench.writes.acknowledged == ([b"1-0"] if state == "waits" else [])
    elif state == "runs":
        assert queued == []
        assert held is not None
        assert held.started
        assert taken is not None
        assert taken.token is held
        assert bench.writes.acknowledged == [b"1-0"]
    else:
        assert queued == []
        assert held is None
        assert bench.writes.acknowledged == [b"9-0"]
    assert b"1-0" not in bench.held.entries


@pytest.mark.parametrize("state", ["waits", "runs", "has run", "answered"])
async def test_what_has_the_id_of_another_peers(state: str) -> None:
    """Peers choose their ids, so one's request is none that comes once more of another one's."""
    bench = Bench()
    if state == "answered":
        bench.writes.waits = [("victim", "a")]
    else:
        bench.worker.take(b"1-0", entry("a", "victim"), 1, 50.0)
    if state in ("runs", "has run"):
        bench.parts.reception.queue.get_nowait()
        bench.held.entries[b"1-0"].start()
    bench.worker.meet_another()
    if state == "has run":
        del bench.held.entries[b"1-0"]
    again = entry("a", "another")
    again.again = 1
    bench.worker.take(b"9-0", again, 1, 60.0)
    assert bench.parts.queued() == (["a", "a"] if state == "waits" else ["a"])
    assert bench.writes.acknowledged == []
    assert (b"1-0" in bench.held.entries) == (state in ("waits", "runs"))
    assert not bench.held.entries[b"9-0"].started


@pytest.mark.parametrize("started", [False, True])
async def test_an_id_that_another_server_gave_again(started: bool) -> None:
    """An id names an entry on one server only: both requests run, and the acknowledgement of one is
    none of the other's.
    """
    bench = Bench()
    bench.worker.take(b"1-0", entry("a"), 1, 50.0)
    lost = bench.held.entries[b"1-0"]
    if started:
        bench.parts.reception.queue.get_nowait()
        lost.start()
    bench.worker.meet_another()
    bench.worker.take(b"1-0", entry("b"), 1, 60.0)
    new = bench.held.entries[b"1-0"]
    assert len(bench.parts.reception.queue) == 2 - started
    assert new is not lost
    assert not new.started
    assert bench.held.entries[lost.id] is lost
    assert order(lost.id) < order(b"1-0")
    assert bench.held.to_keep() == {b"1-0": new}
    assert started or bench.held.standing(lost, 1e9) is Standing.SURE
    bench.worker.take(b"1-0", entry("b"), 2, 70.0)
    assert bench.held.entries[b"1-0"] is new
    assert new.sure_until == 70.0
    again = entry("a")
    again.again = 1
    bench.worker.take(b"9-0", again, 1, 60.0)  # its caller had it written once more
    assert bench.held.entries.keys() == {b"1-0", b"9-0"}
    assert (bench.held.entries[b"9-0"] is lost) == started
    assert bench.parts.queued() == (["b"] if started else ["b", "a"])


async def test_what_is_for_this_peer_alone() -> None:
    """It is another request, though its sender gave it the same id; each stays where it is."""
    bench = Bench()
    arrivals, aside = bench.parts.common.arrivals, bench.parts.reception.aside
    bench.worker.take(b"1-0", entry("a"), 1, 50.0)
    arrivals.deliver_addressed(b"5-0", entry("a"))
    again = entry("a")
    again.again = 1
    bench.worker.take(b"9-0", again, 1, 60.0)
    assert bench.writes.acknowledged == [b"1-0"]
    assert len(aside.addressed) == 1
    arrivals.deliver_addressed(b"6-0", again)
    assert len(aside.addressed) == 1
    assert [*bench.held.entries] == [b"9-0"]
    assert bench.parts.queued() == ["a"]


async def test_none_after_all() -> None:
    bench = Bench()
    bench.worker.take(b"1-0", entry("a"), 1, 50.0)
    held = bench.held.entries[b"1-0"]
    for _ in range(2):
        bench.worker.finish(held)
    assert bench.writes.acknowledged == [b"1-0"]
    assert bench.held.entries == {}


async def test_reads() -> None:
    """It makes the group, and acknowledges what nobody could run."""
    read = [(b"1-0", request("a")), (b"2-0", [b"x", b"y"]), (b"3-0", written(Cancel("x")))]
    bench = Bench([(STREAM, read)], LOST)
    await bench.run()
    assert bench.worker.made
    assert bench.writes.acknowledges
    assert bench.parts.queued() == ["a"]
    assert list(bench.held.entries) == [b"1-0"]
    assert sorted(bench.writes.acknowledged) == [b"2-0", b"3-0"]
    assert bench.writes.flushed
    assert (bench.parts.expected, bench.parts.followed_up) == (1, 1)
    head = (b"XREADGROUP", b"GROUP", GROUP, b"c", b"BLOCK", b"5000", b"COUNT", b"3")
    assert next(command[:8] for command in bench.server.asked if command[0] == head[0]) == head


async def test_no_room() -> None:
    """It takes no more than it may hold, and waits for room."""
    read = [(b"%d-0" % number, request(str(number))) for number in (1, 2)]
    bench = Bench([(STREAM, read)], LOST)
    bench.keeper.room.set_limit(2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.run)
        with anyio.fail_after(BOUND):
            while bench.keeper.room.wanted is None:
                await anyio.sleep(0.001)
        counts = [command[7] for command in bench.server.asked if command[0] == b"XREADGROUP"]
        assert counts == [b"2"]
        bench.keeper.room.lend(1)
    counts = [command[7] for command in bench.server.asked if command[0] == b"XREADGROUP"]
    assert counts == [b"2", b"1"]


async def test_group_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """It is made again, and what is held here is nobody else's then."""
    bench = Bench()
    await bench.worker.make(bench.server.execute)
    assert "made again" not in caplog.text
    bench.worker.take(b"1-0", entry("a"), 1, 50.0)
    bench.server.others["XINFO"] = ResponseError("ERR no such key")
    await bench.worker.make(bench.server.execute)
    assert "made again" in caplog.text
    held = bench.held.entries[b"1-0"]
    assert held.sure_until == float("inf")
    # What it delivers anew is in the queue once.
    bench.worker.take(b"1-0", entry("a"), 1, 60.0)
    assert bench.held.entries == {b"1-0": held}
    assert held.sure_until == 60.0
    assert bench.parts.queued() == ["a"]


async def test_farewell() -> None:
    """Who never made a group has nothing to leave."""
    bench = Bench()
    assert bench.worker.farewell() == []
    await bench.worker.make(bench.server.execute)
    assert bench.worker.farewell()[:2] == [bench.worker.turns.leave, bench.keeper.hand_back]
    async with anyio.create_task_group() as tasks:
        bench.worker.begin(tasks)
        tasks.cancel_scope.cancel()
    assert bench.worker.farewell()[2] == bench.keeper.hand_back
