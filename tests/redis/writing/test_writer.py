"""The writer against a model of a server that refuses, or is lost, whenever the test wants it.

Time is virtual: pauses cost nothing.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import hiredis
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from anyio_kkrpc import (
    DeliveryError,
    OverloadedError,
    RPCTimeoutError,
    TransportConnectionError,
)
from anyio_kkrpc._protocol._records import CallbackCall, Cancel, Record, Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._connection import _patience
from anyio_kkrpc.redis._connection._patience import Outages, Patience
from anyio_kkrpc.redis._connection._resp import HIGH_WATER, Connection
from anyio_kkrpc.redis._reading._repeats import Repeats
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis._stream._scripts import LAST_ID
from anyio_kkrpc.redis._writing._commands import Commands
from anyio_kkrpc.redis._writing._writer import Writer
from anyio_kkrpc.redis.dialects import Dialects
from anyio_kkrpc.redis.dialects.native import AGAIN, VERSION
from tests.redis.conftest import NOWHERE, FakeStream

KEYS = Keys.of("s")
GROUP = b"g"
CALLER = "caller"
REFUSALS = {
    "oom": b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "noreplicas": b"-NOREPLICAS Not enough good replicas to write.\r\n",
    "noperm": b"-NOPERM this user has no permissions to access one of the keys\r\n",
}
NO_STREAM = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"


class Server(FakeStream):
    """One connection to the model of a server: a stream of requests, their group, and inboxes.

    Commands are executed a few at a time, some time after they were written, and answered later.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self._reader = hiredis.Reader()
        self.commands: deque[list[bytes]] = deque()
        self._came = anyio.Event()

    def send_nowait(self, data: bytes) -> int:
        sent = super().send_nowait(data)
        if sent:
            self._take(data)
        return sent

    async def send(self, item: bytes) -> None:
        await super().send(item)
        self._take(item)

    def _take(self, data: bytes) -> None:
        self._reader.feed(data)
        while (command := self._reader.gets()) is not False:
            if command[0] == b"XACK":
                self._check(command[3:])
            self.commands.append(command)
            self._came.set()

    def _check(self, entries: list[bytes]) -> None:
        """Note those not answered whose reply isn't ahead, so that it could be taken."""
        ahead = {entry for command in self.commands for entry in self.model.answered(command)}
        self.model.unanswered |= set(entries) - ahead - {*self.model.replied_to}

    async def serve(self) -> None:
        while not self.closed:
            if not self.commands:
                self._came = anyio.Event()
                await self._came.wait()
            await anyio.sleep(0.001)
            answers = []
            for _ in range(min(len(self.commands), next(self.model.sizes))):
                answer = self.model.answer(self.commands.popleft())
                if answer is None:
                    self.feed(b"")
                    return
                answers.append(answer)
            if answers:
                self.feed(b"".join(answers))


class Model:
    """What the server has.

    :param verdicts: what becomes of the next commands: ``"take"``, a key of `REFUSALS`, or ``"cut"``
        and ``"cut behind"``, where the connection is lost before or after the command was executed
    :param sizes: how many commands are executed at a time
    :ivar replied_to: entries whose reply is there
    :ivar unanswered: entries that were to be acknowledged though nothing had answered them
    """

    def __init__(self, verdicts: list[str], sizes: list[int] | None = None) -> None:
        self.verdicts = deque(verdicts)
        self.sizes: Iterator[int] = itertools.cycle(sizes or [1000])
        self.pending: set[bytes] = set()
        self.inboxes: dict[bytes, list[dict[bytes, bytes]]] = {}
        self.stream: list[tuple[bytes, dict[bytes, bytes]]] = []
        self.commands: list[list[bytes]] = []
        self.replied_to: list[bytes] = []
        self.unanswered: set[bytes] = set()
        self.refuses: Callable[[list[bytes]], bytes | None] = lambda command: None
        self.numbers = itertools.count(1)
        # What makes undone what was executed, in its order.
        self.undo: list[Callable[[], object]] = []
        # How many replicas there are, and where in `commands` it was waited for them.
        self.replicas = 0
        self.waits: list[int] = []

    def answer(self, command: list[bytes]) -> bytes | None:
        self.commands.append(command)
        refusal = self.refuses(command)
        if refusal is not None:
            return refusal
        verdict = "take"
        if command[0] != b"XRANGE" and self.verdicts:
            verdict = self.verdicts.popleft()
        if verdict == "cut":
            return None
        # XACK needs no memory, and the right to it isn't the right to the inboxes.
        if verdict in REFUSALS and (verdict == "noreplicas" or command[0] == b"XADD"):
            return REFUSALS[verdict]
        answer = self.execute(command)
        return None if verdict == "cut behind" else answer

    def execute(self, command: list[bytes]) -> bytes:
        name = command[0]
        if name == b"XRANGE":
            return _pack([[entry_id, _flat(fields)] for entry_id, fields in self.stream])
        if name == b"XACK":
            done = self.pending.intersection(command[3:])
            self.pending -= done
            self.undo.append(lambda: self.pending.update(done))
            return b":%d\r\n" % len(done)
        if name == b"EVAL" and command[1] == LAST_ID:
            return _pack(self.stream[-1][0] if self.stream else b"0-0")
        if name == b"EVAL":
            added = {*command[6::2]} - self.pending
            self.pending |= added
            self.undo.append(lambda: self.pending.difference_update(added))
            return b":1\r\n"
        if name == b"WAIT":
            self.waits.append(len(self.commands) - 1)
            return b":%d\r\n" % self.replicas
        if name == b"PEXPIRE":
            return b":1\r\n"
        assert name == b"XADD"
        fields = command[command.index(b"*") + 1 :]
        entry_id = b"%d-0" % next(self.numbers)
        if command[1] == KEYS.stream:
            self.stream.append((entry_id, dict(zip(fields[::2], fields[1::2], strict=True))))
            self.undo.append(self.stream.pop)
        else:
            before, entries = len(self.replied_to), self.inboxes.setdefault(command[1], [])
            records = _records(fields)
            entries.extend(records)
            self.replied_to.extend(self.answered(command))

            def undo() -> None:
                del entries[-len(records) :], self.replied_to[before:]

            self.undo.append(undo)
        return _pack(entry_id)

    @staticmethod
    def answered(command: list[bytes]) -> set[bytes]:
        """Return the entries of the group that a command brings the replies to."""
        found = (re.search(rb'"t":"r","id":"r(\d+)"', part) for part in command)
        return {match[1] + b"-0" for match in found if match is not None}

    def read(self, recipient: str = CALLER, *, in_order: bool = True) -> list[Any]:
        """Return the records that a reader finds in its inbox."""
        key, codec = KEYS.inbox(recipient), get_codec("json")
        repeats, found = Repeats(key), []
        for entry in self.inboxes.get(key, []):
            record, number = codec.decode(entry[b"json"]), entry[b"n"]
            if repeats.came_before(key, "me", number):
                continue
            if in_order and repeats.disorder:
                found += repeats.sort(key, "me", number, record, 0, 0.0)
            else:
                found.append(record)
        assert not in_order or not repeats.disorder
        return found

    def read_before(self, recipient: str = CALLER) -> list[Any]:
        """The same with a reader of version 0: what isn't numbered above the last came before."""
        key, codec, found = KEYS.inbox(recipient), get_codec("json"), []
        last_epoch, last = b"", 0
        for entry in self.inboxes.get(key, []):
            epoch, _, count = entry[b"n"].partition(b".")
            if epoch != last_epoch or int(count) > last:
                found.append(codec.decode(entry[b"json"]))
                last_epoch, last = epoch, int(count)
        return found


def _records(fields: list[bytes]) -> list[dict[bytes, bytes]]:
    """Return each record of an entry as if it stood alone."""
    head = dict(zip(fields[:8:2], fields[1:8:2], strict=True))
    epoch, _, count = head.get(b"n", b"").partition(b".")
    records = [(fields[2], fields[3]), *zip(fields[8::2], fields[9::2], strict=True)]
    return [
        {**head, name: data, b"n": b"%s.%d" % (epoch, int(count) + at)}
        for at, (name, data) in enumerate(records)
        if name == b"json"  # not a signature
    ]


def _flat(fields: dict[bytes, bytes]) -> list[bytes]:
    return [part for pair in fields.items() for part in pair]


def _pack(value: Any) -> bytes:
    if isinstance(value, bytes):
        return b"$%d\r\n%s\r\n" % (len(value), value)
    return b"*%d\r\n%s" % (len(value), b"".join(map(_pack, value)))


class Rig:
    """A writer whose connection to a model is made again when it is lost."""

    def __init__(
        self,
        model: Model,
        version: int = VERSION,
        *,
        serves: bool = True,
        replicas: int = 0,
        **options: Any,
    ) -> None:
        self.model = model
        self.returned: list[Envelope] = []
        self.given_up: list[tuple[bytes, int]] = []
        self.failures: list[Exception] = []
        dialects = Dialects(
            "native",
            "me",
            get_codec("json"),
            superjson=True,
            remote_peer_id=None,
            skips_own=False,
            max_queue_size=10,
            max_queue_bytes=10,
            deliver=lambda record, sender: None,
            now=lambda: 0.0,
            time_of_day=lambda: 0.0,
        )
        if version:
            # What the caller has written tells which version it is of.
            hello = get_codec("json").encode(Cancel("hello"))
            for peer in (CALLER.encode(), b"another"):
                dialects.decode([b"from", peer, b"json", hello, b"v", b"%d" % version])
        defaults: dict[str, Any] = {
            "group": GROUP,
            "consumer": b"me",
            "max_message_size": 1 << 26,
            "max_backlog": None,
            "signer": None,
            "epoch": b"e",
            "added": None,
        }
        self.writer = Writer(
            Commands(KEYS, dialects, **{**defaults, **options}),
            dialects.native,
            returned=self.returned.append,
            patience=Patience("writes", Outages(NOWHERE)),
            replicas=replicas,
            given_up=lambda entry_id, attempt: self.given_up.append((entry_id, attempt)),
            failed=self.failures.append,
        )
        if serves:
            self.writer.will_acknowledge()
        self.stream = FakeStream()
        self.connections = 0
        # Called between two connections.
        self.meet: Callable[[], object] = lambda: None
        self.reachable = anyio.Event()
        self.reachable.set()

    async def keep_up(self) -> None:
        while True:
            await self.reachable.wait()
            self.meet()
            self.stream = server = Server(self.model)
            self.connection = connection = Connection(server, NOWHERE)
            self.connections += 1
            async with anyio.create_task_group() as group:
                group.start_soon(server.serve)
                try:
                    await self.writer.attach(connection, 0.0)
                    await connection.run()
                except TransportConnectionError:
                    pass
                finally:
                    self.writer.detach()
                    await anyio.aclose_forcefully(server)
                    group.cancel_scope.cancel()
            await anyio.sleep(0.001)

    async def confirm(self, name: str) -> None:
        """Make a one-way call."""
        await self.writer.send_and_confirm(Envelope(Request(name, "call", ["f"], o=True)))

    async def settled(self) -> None:
        """Wait until nothing is on its way, nor waits."""
        with anyio.fail_after(1000):
            while self.writer._outgoing.ledger.written or not self.writer._outgoing.ledger.flowing:
                await anyio.sleep(0.01)

    async def until_asked(self) -> None:
        """Wait until something is on its way."""
        while not self.writer._outgoing.ledger.written:
            await anyio.sleep(0)

    def reply(self, number: int) -> None:
        """Settle an entry of the group."""
        entry_id = b"%d-0" % number
        self.model.pending.add(entry_id)
        self.writer.settle(entry_id, Envelope(Reply(f"r{number}", number), None, CALLER), 1)
        self.writer.flush_nowait()

    def post(self, record: Record, recipient: str | None = CALLER) -> Envelope:
        envelope = Envelope(record, None, recipient)
        self.writer.send_nowait(envelope)
        return envelope


@asynccontextmanager
async def running(model: Model, **options: Any) -> AsyncIterator[Rig]:
    rig = Rig(model, **options)
    async with anyio.create_task_group() as group:
        group.start_soon(rig.writer.run)
        group.start_soon(rig.keep_up)
        await rig.settled()
        yield rig
        group.cancel_scope.cancel()


def in_virtual_time(function: Callable[[], Awaitable[None]]) -> None:
    trio.run(function, clock=MockClock(autojump_threshold=0))


VERDICTS = st.lists(
    st.one_of(st.just("take"), st.sampled_from(["take", *REFUSALS, "cut", "cut behind"])),
    max_size=60,
)


@settings(max_examples=200)
@given(
    VERDICTS,
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.lists(st.tuples(st.sampled_from("rrcqadx"), st.integers(0, 3)), max_size=40),
    st.sampled_from([VERSION, VERSION, VERSION - 1, 0]),
)
def test_any_pattern(
    verdicts: list[str], sizes: list[int], work: list[tuple[str, int]], version: int
) -> None:
    """Whatever is refused or lost: each reply and callback is read once and in order, each request is
    there once or came back, and nothing is acknowledged that nothing answers. Readers of version 0
    get all that was refused, too, though late.
    """

    if not version:
        # It can't be told what was refused when the connection was lost before anybody heard of it.
        verdicts = [verdict for verdict in verdicts if "cut" not in verdict]
    if "noperm" in verdicts:
        # A request that is given up for good leaves its number out.
        work = [one for one in work if one[0] not in "adx"]

    async def check() -> None:
        model = Model(verdicts, sizes)
        async with running(model, version=version) as rig:
            sent, requests, addressed = [], [], ["none"]
            cancelled = set()
            for number, (kind, pause) in enumerate(work):
                try:
                    if kind == "r":
                        rig.reply(number)
                        sent.append(f"r{number}")
                    elif kind == "c":
                        rig.post(CallbackCall(f"c{number}", []))
                        sent.append(f"c{number}")
                    elif kind == "q":
                        requests.append(rig.post(Request(f"q{number}", "call", ["f"]), None))
                    elif kind == "x":
                        cancelled.add(addressed[-1])
                        rig.post(Cancel(addressed[-1]))
                    else:
                        request = Request(f"a{number}", "call", ["f"])
                        deadline = anyio.current_time() + 1 if kind == "d" else None
                        requests.append(Envelope(request, None, CALLER, deadline=deadline))
                        addressed.append(request.id)
                        sent.append(request.id)
                        rig.writer.send_nowait(requests[-1])
                except OverloadedError:
                    if kind in "ad":
                        requests.pop()
                        sent.pop()
                await anyio.sleep(pause / 1000)
            await rig.settled()
            await anyio.sleep(20)  # nor does anything come of itself
            await rig.settled()
        returned = [envelope.record.id for envelope in rig.returned]  # type: ignore[union-attr]
        records = model.read() if version else model.read_before()
        found = [record.id for record in records if not isinstance(record, Cancel)]
        if not version:
            assert len(set(found)) == len(found)
            found = [one for one in sent if one in found]
        assert found == [one for one in sent if one in found]
        gone = set(sent) - set(found)
        assert gone <= cancelled.union(returned)
        assert len(set(returned)) == len(returned)
        assert model.pending == model.unanswered == set()
        there = [get_codec("json").decode(entry[b"json"]).id for _, entry in model.stream]  # type: ignore[union-attr]
        assert len(set(there)) == len(there)
        wanted = {envelope.record.id for envelope in requests}  # type: ignore[union-attr]
        assert {*there, *found, *returned} >= wanted - cancelled
        assert not {*there, *found} & {*returned}
        assert (rig.given_up, rig.failures) == ([], [])

    in_virtual_time(check)


OOM, NOREPLICAS, NOPERM = REFUSALS.values()
WRONGTYPE = b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"


def adds(answer: bytes, *keys: bytes) -> Callable[[list[bytes]], bytes | None]:
    """Refuse what adds an entry, to these keys or any."""
    return lambda command: (
        answer if command[0] == b"XADD" and (not keys or command[1] in keys) else None
    )


def all_of_it(answer: bytes) -> Callable[[list[bytes]], bytes | None]:
    return lambda command: answer if command[0] != b"XRANGE" else None


def ids(records: list[Any]) -> list[str]:
    return [record.id for record in records]


def acknowledged(model: Model) -> list[bytes]:
    """Return what was given to XACK, one after the other."""
    return [entry for command in model.commands if command[0] == b"XACK" for entry in command[3:]]


def test_one_write_while_nothing_is_amiss() -> None:
    """A reply and its acknowledgement leave together; nothing else is written."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            rig.reply(1)
            await rig.settled()
            assert len(rig.stream.written) == 1
        assert [command[0] for command in model.commands] == [b"XADD", b"XACK"]
        assert model.pending == set()

    in_virtual_time(check)


def test_reply_refused_and_acknowledgement_taken() -> None:
    """No memory: the entry is pending again at once, and no other is acknowledged unanswered."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(OOM)
            rig.reply(1)
            rig.reply(2)
            await anyio.sleep(0.01)
            assert acknowledged(model) == [b"1-0", b"2-0"]
            assert model.pending == {b"1-0", b"2-0"}
            assert dict(rig.writer.unanswered) == {b"1-0": 1, b"2-0": 1}
            rig.reply(3)
            await anyio.sleep(60)
            assert acknowledged(model) == [b"1-0", b"2-0"]
            assert model.pending == {b"1-0", b"2-0", b"3-0"}
            model.refuses = lambda command: None
            await rig.settled()
            assert ids(model.read()) == ["r1", "r2", "r3"]
            # For a while a reply must be taken first; then they leave together again.
            rig.reply(4)
            assert len(model.pending) == 1
            await rig.settled()
            written = len(rig.stream.written)
            await anyio.sleep(30)
            rig.reply(5)
            await rig.settled()
            assert len(rig.stream.written) == written + 1
        assert model.pending == set()
        assert rig.connections == 1

    in_virtual_time(check)


def test_pauses_grow_and_are_bounded() -> None:
    """One write is tried again, alone, with pauses up to a second."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = all_of_it(NOREPLICAS)
            for number in range(50):
                rig.post(CallbackCall(f"c{number}", []))
            await anyio.sleep(100)
            assert 100 < len(model.commands) - 50 < 400
            model.refuses = lambda command: None
            await anyio.sleep(1.1)
            assert ids(model.read()) == [f"c{number}" for number in range(50)]

    in_virtual_time(check)


@pytest.mark.parametrize("answer", [OOM, NOREPLICAS], ids=["oom", "noreplicas"])
def test_order(answer: bytes) -> None:
    """Refused from some moment on, for a while: what is repeated and what is new keep their order."""

    async def check() -> None:
        model = Model([], [3])
        async with running(model) as rig:
            for number in range(100):
                rig.post(CallbackCall(f"c{number}", []))
                if number % 30 == 10:
                    model.refuses = adds(answer)
                elif number % 30 == 25:
                    await anyio.sleep(0.2)
                    model.refuses = lambda command: None
                await anyio.sleep(0.001)
            await rig.settled()
        assert ids(model.read()) == [f"c{number}" for number in range(100)]

    in_virtual_time(check)


def test_acknowledgement_that_is_taken_at_the_second_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is over then, and no pause is needed before what waits is written."""
    monkeypatch.setattr(_patience, "jittered", lambda failures: 0.0)

    async def check() -> None:
        model = Model(["take", "noreplicas"], [1])
        async with running(model) as rig:
            rig.reply(1)
            rig.reply(2)
            await rig.settled()
        assert ids(model.read()) == ["r1", "r2"]
        assert model.pending == model.unanswered == set()

    in_virtual_time(check)


def test_what_was_taken_behind_a_refused_one_is_not_written_again() -> None:
    """The first of three is refused: it comes late, and only it is written twice."""

    async def check() -> None:
        model = Model(["noreplicas"])
        async with running(model) as rig:
            for number in range(3):
                rig.post(CallbackCall(f"c{number}", []))
            await rig.settled()
        assert ids(model.read(in_order=False)) == ["c1", "c2", "c0"]
        assert ids(model.read()) == ["c0", "c1", "c2"]
        assert len(model.commands) == 3  # the others are one entry

    in_virtual_time(check)


def test_request_without_memory() -> None:
    """It is refused at once, by the server, and while it is known to refuse by the writer."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(OOM)
            rig.post(Request("q1", "call", ["f"]), None)
            one_way = Envelope(Request("q2", "call", ["f"], o=True))
            with pytest.raises(OverloadedError, match="out of memory: the request did not run"):
                await rig.writer.send_and_confirm(one_way)
            (returned,) = rig.returned
            assert returned.record.id == "q1"  # type: ignore[union-attr]
            assert isinstance(returned.error, OverloadedError)
            rig.post(CallbackCall("c", []))
            await anyio.sleep(0.1)
            with pytest.raises(OverloadedError):
                rig.post(Request("q3", "call", ["f"]), None)
            with pytest.raises(OverloadedError):
                await rig.writer.send_and_confirm(one_way)
            model.refuses = lambda command: None
            await rig.settled()
            rig.post(Request("q4", "call", ["f"]), None)
            await rig.settled()
            assert len(model.stream) == 1
            assert len(rig.returned) == 1

    in_virtual_time(check)


def test_request_is_repeated_until_its_deadline() -> None:
    """NOREPLICAS: one whose time runs out isn't written any more, another one comes late."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = all_of_it(NOREPLICAS)
            now = anyio.current_time()
            for name, seconds in (("short", 5.0), ("long", 100.0)):
                request = Request(name, "call", ["f"], d=seconds * 1000)
                rig.writer.send_nowait(Envelope(request, deadline=now + seconds))
            await anyio.sleep(50)
            (returned,) = rig.returned
            assert returned.record.id == "short"  # type: ignore[union-attr]
            assert isinstance(returned.error, RPCTimeoutError)
            model.refuses = lambda command: None
            await rig.settled()
        ((_, entry),) = model.stream
        request = get_codec("json").decode(entry[b"json"])  # type: ignore[assignment]
        assert request.id == "long"
        assert 48_000 < request.d < 50_000  # type: ignore[operator]

    in_virtual_time(check)


def test_cancel_takes_a_request_back() -> None:
    """One that waits, or was refused, is never written; nor is its cancel."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = all_of_it(NOREPLICAS)
            rig.post(Request("refused", "call", ["f"]), None)
            while not rig.writer._outgoing.ledger.drained:
                await anyio.sleep(0.001)
            rig.post(Request("waits", "call", ["f"]), None)
            for name in ("refused", "waits"):
                rig.post(Cancel(name), None)
            rig.post(Cancel("another"), None)
            model.refuses = lambda command: None
            await rig.settled()
        assert model.stream == []
        (entry,) = model.inboxes[KEYS.control]
        assert b"another" in entry[b"json"]

    in_virtual_time(check)


def test_connection_lost_with_much_waiting() -> None:
    """More than a connection takes at once waits for the next: it goes on, and all is written."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            rig.reachable = anyio.Event()
            rig.stream.feed(b"")
            await anyio.sleep(0.1)
            for number in range(40):
                rig.post(CallbackCall(f"c{number}", ["x" * (HIGH_WATER // 8)]))
            rig.reachable.set()
            await rig.settled()
        assert ids(model.read()) == [f"c{number}" for number in range(40)]
        assert rig.connections == 2

    in_virtual_time(check)


BIG = "x" * (HIGH_WATER + 1)


def test_no_acknowledgement_ahead_of_a_reply_that_waits() -> None:
    """The connection was lost with both on their way; on the next one there is no room for both."""

    async def check() -> None:
        model = Model(["cut"])
        async with running(model) as rig:
            rig.post(CallbackCall("first", [BIG]))
            rig.reply(1)
            await rig.settled()
            assert rig.connections == 2
        assert ids(model.read()) == ["first", "r1"]
        assert model.pending == model.unanswered == set()

    in_virtual_time(check)


@asynccontextmanager
async def stuck(model: Model) -> AsyncIterator[Rig]:
    """Run a writer whose connection is up, takes nothing, and has no room any more."""
    async with running(model) as rig:
        await anyio.sleep(1)
        rig.stream.stall()
        rig.post(CallbackCall("first", [BIG]))
        await rig.stream.sending.wait()
        with anyio.move_on_after(0.1):
            await rig.writer.send(Envelope(CallbackCall("second", [BIG]), None, CALLER))
        yield rig


async def took(seconds: float, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
    started = anyio.current_time()
    await function(*args)
    assert anyio.current_time() - started == pytest.approx(seconds, abs=0.1)


def test_deadlines_hold_while_sending() -> None:
    """The connection is stuck: nobody waits for room longer than its deadline."""

    async def check() -> None:
        model = Model([])
        async with stuck(model) as rig:
            writer, now = rig.writer, anyio.current_time()
            request = Envelope(Request("request", "call", ["f"]), deadline=now + 1)
            addressed = Envelope(Request("to", "call", ["f"]), None, CALLER, deadline=now + 2)
            await took(1, writer.send, request)
            await took(1, writer.send, addressed)
            # One that is given up is not written any more.
            with anyio.move_on_after(1):
                await writer.send_and_confirm(Envelope(Request("one-way", "call", ["f"], o=True)))
            # Nor is a reply that nobody waits for; its entry is done with.
            model.pending.add(b"1-0")
            reply = Envelope(Reply("r1", 1), None, CALLER)
            post = writer.settle(b"1-0", reply)
            await took(1, writer.wait_flushed, post, anyio.current_time() + 1)
            (returned,) = rig.returned
            assert returned.record is reply.record
            assert isinstance(returned.error, RPCTimeoutError)
            # What has no deadline waits for room.
            async with anyio.create_task_group() as group:
                for name in ("item", "callback"):
                    group.start_soon(writer.send, Envelope(CallbackCall(name, []), None, CALLER))
                await anyio.sleep(3)
                assert len(rig.writer._outgoing.ledger.waiting()) == 4
                rig.stream.gate.set()
            await rig.settled()
        # What is left of those for an inbox keeps their numbers from being missed.
        first, second, cancel, error, *rest = model.read()
        assert ids([first, second]) == ["first", "second"]
        assert cancel == Cancel("to")
        assert (error.id, error.e["n"]) == ("r1", "RPCTimeoutError")
        assert sorted(ids(rest)) == ["callback", "item"]
        assert model.stream == []
        assert model.pending == set()
        assert rig.connections == 1

    in_virtual_time(check)


def test_a_half_sent_request_is_sent_to_its_end() -> None:
    """What the connection has is not taken back; its cancel follows."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            rig.stream.stall()
            request = Envelope(
                Request("big", "call", ["f"], [BIG] * 3), deadline=anyio.current_time() + 1
            )
            await took(1, rig.writer.send, request)
            rig.post(Cancel("big"), None)
            rig.stream.gate.set()
            await rig.settled()
        assert len(model.stream) == 1
        assert len(model.inboxes[KEYS.control]) == 1

    in_virtual_time(check)


class TestReplicas:
    """Who wants them to have a one-way call waits until they do."""

    def test_they_have_it(self) -> None:
        """It is asked once for all that is written together; nobody waits for what has a reply."""

        async def check() -> None:
            model = Model([])
            model.replicas = 2
            async with running(model, replicas=2) as rig:
                rig.post(Request("0", "call", ["f"]), None)
                await rig.settled()
                assert model.waits == []
                async with anyio.create_task_group() as group:
                    for name in ("1", "2", "3"):
                        group.start_soon(rig.confirm, name)
                assert len(model.stream) == 4
                assert 1 <= len(model.waits) <= 2
                assert model.commands[-1][0] == b"WAIT"

        in_virtual_time(check)

    def test_too_few(self, caplog: pytest.LogCaptureFixture) -> None:
        """They are waited for; the call isn't written twice. It is said once."""

        async def check() -> None:
            model = Model([])
            async with running(model, replicas=1) as rig:
                async with anyio.create_task_group() as group:
                    group.start_soon(rig.confirm, "1")
                    await anyio.sleep(10)
                    assert 5 < len(model.waits) < 30
                    model.replicas = 1
                await rig.confirm("2")
                assert len(model.stream) == 2
            assert caplog.text.count("0 of 1 replicas have what was written") == 1

        in_virtual_time(check)

    def test_out_of_time(self) -> None:
        """Who gives up can tell what it waited for, and nothing is asked any more."""

        async def check() -> None:
            model = Model([])
            async with running(model, replicas=1) as rig:
                sent = Envelope(Request("1", "call", ["f"], o=True))
                with anyio.move_on_after(5):
                    await rig.writer.send_and_confirm(sent)
                assert isinstance(sent.error, RPCTimeoutError)
                assert "may run, but 0 of 1 replicas have" in str(sent.error)
                await anyio.sleep(5)
                asked = len(model.waits)
                await anyio.sleep(5)
                assert len(model.waits) == asked

        in_virtual_time(check)

    @pytest.mark.parametrize("lost", [False, True])
    def test_connection_that_is_lost(self, lost: bool) -> None:
        """The next server is looked at: what it lacks is written once more, and says so."""

        async def check() -> None:
            model = Model([])
            async with running(model, replicas=1) as rig:
                async with anyio.create_task_group() as group:
                    group.start_soon(rig.confirm, "1")
                    await anyio.sleep(1)
                    assert len(model.stream) == 1
                    if lost:
                        model.stream.clear()
                        rig.writer.meet_another()
                    model.replicas = 1
                    await anyio.aclose_forcefully(rig.stream)
                ((_, fields),) = model.stream
                assert fields.get(AGAIN) == (b"1" if lost else None)

        in_virtual_time(check)

    @pytest.mark.parametrize(
        "answer",
        [
            b"-UNBLOCKED force unblock from blocking operation, instance state changed\r\n",
            b"-ERR WAIT cannot be used with replica instances. Please also note\r\n",
        ],
        ids=["while it waits", "before it waits"],
    )
    def test_server_that_becomes_a_replica(
        self, answer: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What it had written and not passed on is lost: it has confirmed nothing by that."""

        async def check() -> None:
            model = Model([])
            model.replicas = 1
            model.refuses = lambda command: answer if command[0] == b"WAIT" else None
            async with running(model, replicas=1) as rig:
                confirmed = anyio.Event()

                async def confirm() -> None:
                    await rig.confirm("1")
                    confirmed.set()

                async with anyio.create_task_group() as group:
                    group.start_soon(confirm)
                    await anyio.sleep(1)
                    assert not confirmed.is_set()
                    model.stream.clear()
                    model.refuses = lambda command: None
                    rig.writer.meet_another()
                    await anyio.aclose_forcefully(rig.stream)
                ((_, fields),) = model.stream
                assert fields[AGAIN] == b"1"
                asked = len(model.waits)
                await rig.confirm("2")
                assert len(model.waits) > asked
            assert "no replica is waited for" not in caplog.text

        in_virtual_time(check)

    @pytest.mark.parametrize("taken", [0, 1])
    def test_connection_that_is_lost_while_it_waits(self, taken: int) -> None:
        """It is asked again on the next one, also if nothing else is written there."""

        async def check() -> None:
            model = Model(["take"] * (1 + taken) + ["cut"])
            async with running(model, replicas=1) as rig:
                async with anyio.create_task_group() as group:
                    group.start_soon(rig.confirm, "1")
                    while rig.connections < 2:
                        await anyio.sleep(0.01)
                    model.replicas = 1
                    with anyio.fail_after(10):
                        while not model.waits[taken:]:
                            await anyio.sleep(0.01)
                assert len(model.stream) == 1

        in_virtual_time(check)

    def test_answer_that_is_none(self) -> None:
        """What isn't a number confirms nothing."""

        async def check() -> None:
            model = Model([])
            model.refuses = lambda command: b"$3\r\none\r\n" if command[0] == b"WAIT" else None
            async with running(model, replicas=1) as rig:
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as group:
                        group.start_soon(rig.confirm, "1")
                        await anyio.sleep(5)
                        assert sum(command[0] == b"WAIT" for command in model.commands) > 1
                        model.refuses, model.replicas = (lambda command: None), 1
                assert model.waits

        in_virtual_time(check)

    def test_without_the_right(self, caplog: pytest.LogCaptureFixture) -> None:
        async def check() -> None:
            model = Model([])
            model.refuses = lambda command: NOPERM if command[0] == b"WAIT" else None
            async with running(model, replicas=1) as rig:
                for name in ("1", "2"):
                    await rig.confirm(name)
            assert caplog.text.count("no replica is waited for (replicas_to_confirm): NOPERM") == 1

        in_virtual_time(check)

    def test_the_end(self) -> None:
        """Whoever waits then is told; for who has given up before nothing is asked any more."""

        async def check() -> None:
            model = Model([])
            async with running(model, replicas=1) as rig:
                with anyio.move_on_after(1):
                    await rig.confirm("1")
                told: list[Exception] = []

                async def wait() -> None:
                    try:
                        await rig.confirm("2")
                    except RuntimeError as exc:
                        told.append(exc)

                async with anyio.create_task_group() as group:
                    group.start_soon(wait)
                    await anyio.sleep(1)
                    rig.writer.end(RuntimeError("over"))
                assert [str(exc) for exc in told] == ["over"]

        in_virtual_time(check)


def test_sent_again() -> None:
    """In their order, with what is left of their time; those whose time is over aren't. The cancel of such a request goes to all."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            now = anyio.current_time()
            sent = [
                Envelope(Request(name, "call", ["f"], d=9e6), token=b"1-0", deadline=deadline)
                for name, deadline in [("1", now + 9), ("2", now), ("3", now + 8), ("4", None)]
            ]
            assert await rig.writer.send_again(sent) == 3
            await rig.settled()
            codec = get_codec("json")
            found = [codec.decode(entry[b"json"]) for _, entry in model.stream]
            assert [(one.id, one.d) for one in found] == [("1", 9000), ("3", 8000), ("4", 9e6)]
            assert [entry[AGAIN] for _, entry in model.stream] == [b"1"] * 3
            rig.writer.forget_repeated({"3"})
            rig.writer._cancel([Cancel("1"), Cancel("3")], [[b"one"], [b"one"]])
            await rig.settled()
            assert ids(model.read("one")) == ["1"]
            (control,) = model.inboxes[KEYS.control]
            assert codec.decode(control[b"json"]) == Cancel("3")

    in_virtual_time(check)


@pytest.mark.parametrize("known", [False, True])
def test_no_memory_for_what_is_sent_again(known: bool) -> None:
    """It may have run, so it isn't refused as what is new is; whoever runs it is told of a cancel."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(OOM, KEYS.stream, KEYS.inbox(CALLER))
            if known:
                rig.post(CallbackCall("c", []))
                await anyio.sleep(1)
            again = Envelope(Request("1", "call", ["f"]), token=b"1-0")
            assert await rig.writer.send_again([again]) == (0 if known else 1)
            if not known:
                await anyio.sleep(1)
            (back,) = rig.returned
            assert isinstance(back.error, DeliveryError)
            assert "whether it ran isn't known" in str(back.error)
            if not known:
                with pytest.raises(OverloadedError, match="did not run"):
                    rig.post(CallbackCall("c", []))
                    await anyio.sleep(1)
                    rig.post(Request("2", "call", ["f"]), None)

    in_virtual_time(check)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_cancel_of_what_waits_to_be_sent_again(repeated: bool, early: bool) -> None:
    """It is taken back, and who had it from the server before is told."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(NOREPLICAS, KEYS.stream, KEYS.inbox(CALLER))
            if not early:
                rig.post(CallbackCall("c", []))
                await anyio.sleep(1)
            asked = Envelope(Request("1", "call", ["f"]), token=b"1-0" if repeated else None)
            if repeated:
                assert await rig.writer.send_again([asked]) == 1
            else:
                rig.writer.send_nowait(asked)
            if not early:
                await anyio.sleep(1)
            rig.writer.send_nowait(Envelope(Cancel("1"), token=asked.token))
            await anyio.sleep(1)
            model.refuses = lambda command: None
            await anyio.sleep(10)
            await rig.settled()
            assert model.stream == []
            assert (KEYS.control in model.inboxes) is repeated

    in_virtual_time(check)


@pytest.mark.parametrize("arrived", [False, True])
@pytest.mark.parametrize("another", [False, True])
def test_what_another_server_may_have_had(arrived: bool, another: bool) -> None:
    """What was on its way is looked for behind what is known to be there, of what is there still. If
    it isn't found, a worker may have read it from the server before: it says so.
    """

    async def check() -> None:
        model = Model(["take", "cut behind" if arrived else "cut"])
        async with running(model) as rig:
            rig.post(Request("1", "call", ["f"]), None)
            await rig.settled()
            if another:
                rig.writer.meet_another()
                model.stream.clear()
            sent = rig.post(Request("2", "call", ["f"]), None)
            await anyio.sleep(0.1)
            await rig.settled()
            last_id, fields = model.stream[-1]
            assert sent.token == last_id
            assert fields.get(AGAIN) == (b"1" if another and not arrived else None)
            assert len(model.stream) == (1 if another else 2)
            starts = [command[2] for command in model.commands if command[0] == b"XRANGE"]
            lost = another and not arrived
            assert starts == [b"(0-0" if lost else b"(1-0"]
            # Who may run what the server before had is told of a cancel, too.
            rig.writer._cancel([Cancel("2")], [[b"one"]])
            await rig.settled()
            assert [*model.inboxes] == [KEYS.control if lost else KEYS.inbox("one")]

    in_virtual_time(check)


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize(
    ("group", "recipient"), [(GROUP, None), (None, None), (GROUP, CALLER), (None, CALLER)]
)
def test_cancels_that_another_server_may_have_lost(
    group: bytes | None, recipient: str | None, sure: bool
) -> None:
    """They go out again to where they went, those of a group to all that share it."""

    async def check() -> None:
        model = Model([])
        async with running(model, group=group, serves=False) as rig:
            sent = rig.post(Request("1", "call", ["f"]), recipient)
            await rig.settled()
            rig.writer.send_nowait(Envelope(Cancel("1"), None, recipient, token=sent.token))
            await anyio.sleep(1)
            key = KEYS.control if recipient is None else KEYS.inbox(recipient)
            before = len(model.inboxes.get(key, ()))
            rig.writer.meet_another(sure=sure)
            await anyio.sleep(1)
            entries = model.inboxes.get(key, [])
            assert len(entries) == before + sure
            codec = get_codec("json")
            assert not sure or codec.decode(entries[-1][b"json"]) == Cancel("1")
            assert len({entry[b"n"] for entry in entries}) == len(entries)

    in_virtual_time(check)


def test_another_server_while_it_is_looked() -> None:
    """What the one before had shown to have until then, this one may lack."""

    async def check() -> None:
        model = Model(["cut behind"])
        pages = 0

        def look(command: list[bytes]) -> bytes | None:
            nonlocal pages
            if command[0] != b"XRANGE":
                return None
            pages += 1
            if pages == 1:
                ((entry_id, fields),) = model.stream
                others = [[b"2-%d" % n, [b"from", b"other"]] for n in range(499)]
                return _pack([[entry_id, _flat(fields)], *others])
            if pages == 2:
                model.stream.clear()
                rig.writer.meet_another()
                rig.stream.feed(b"")
            return None

        model.refuses = look
        async with running(model) as rig:
            for name in ("1", "2"):
                rig.post(Request(name, "call", ["f"]), None)
            with anyio.fail_after(100):
                while len(model.stream) < 2:
                    await anyio.sleep(0.01)
            await rig.settled()
            codec = get_codec("json")
            assert ids([codec.decode(entry[b"json"]) for _, entry in model.stream]) == ["1", "2"]
            assert [entry[AGAIN] for _, entry in model.stream] == [b"1", b"1"]

    in_virtual_time(check)


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(["take", "take", "oom", "cut", "cut behind"]), max_size=20),
    st.lists(st.integers(1, 3), min_size=1, max_size=5),
    st.lists(st.tuples(st.sampled_from("rrrc"), st.integers(0, 3)), max_size=10),
    st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=5),
)
@example(["take", "cut"], [1], [("r", 0)], [1])
@example(["take", "cut", "take", "cut"], [1], [("r", 0), ("r", 0)], [0, 1])
@example(["take", "cut", "take", "oom", "cut"], [1], [("r", 0), ("c", 0), ("r", 3)], [1])
def test_any_failover(
    verdicts: list[str], sizes: list[int], work: list[tuple[str, int]], losses: list[int | None]
) -> None:
    """Each connection that is lost leads to the same server or to another one, which lacks the last
    so many of what was executed: whose acknowledgement it has, that has its reply, or gets it.
    """

    async def check() -> None:
        model = Model(verdicts, sizes)
        lost = itertools.cycle(losses)

        def meet() -> None:
            count = next(lost)
            if count is not None and rig.connections:
                for _ in range(min(count, len(model.undo))):
                    model.undo.pop()()
                rig.writer.meet_another()

        async with running(model) as rig:
            rig.meet = meet
            for number, (kind, pause) in enumerate(work):
                if kind == "r":
                    rig.reply(number)
                else:
                    rig.post(CallbackCall(f"c{number}", []))
                await anyio.sleep(pause / 1000)
            await rig.settled()
            await anyio.sleep(20)
            await rig.settled()
        replied = {record.id for record in model.read(in_order=False) if isinstance(record, Reply)}
        answered = {f"r{number}" for number, (kind, _) in enumerate(work) if kind == "r"}
        pending = {f"r{entry[:-2].decode()}" for entry in model.pending}
        assert answered - pending <= replied
        # What is known to be acknowledged is pending again where the acknowledgement is lost.
        assert replied | pending == answered
        assert model.unanswered == set()
        assert (rig.given_up, rig.failures) == ([], [])

    in_virtual_time(check)


def test_what_is_being_acknowledged_is_held() -> None:
    """Until that is answered: it may be lost with its connection, and is repeated then. Who recovers
    what this worker owns may ask meanwhile, and have its answer from the next connection.
    """

    async def check() -> None:
        model = Model(["take", "cut"], [1])
        async with running(model) as rig:
            held = []
            rig.reply(1)
            with anyio.fail_after(100):
                while rig.connections < 2 or rig.writer._outgoing.ledger.written:
                    held.append(rig.writer.unfinished())
                    await anyio.sleep(0.0005)
            assert {*map(tuple, held)} == {(b"1-0",)}
            await rig.settled()
            assert rig.writer.unfinished() == []
            assert model.pending == set()

    in_virtual_time(check)


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_acknowledgement_that_another_server_would_take(lost: int | None) -> None:
    """A reply was taken, and nobody knows whether its acknowledgement was. Another server gets the
    reply first, under its number, whatever it has; the same one only the acknowledgement.
    """

    async def check() -> None:
        model = Model(["take", "cut"], [1])
        async with running(model) as rig:
            if lost is not None:
                rig.meet = lambda: rig.writer.meet_another()
            rig.reply(1)
            with anyio.fail_after(100):
                while rig.connections < 2:
                    await anyio.sleep(0.001)
            for _ in range(lost or 0):
                model.undo.pop()()
            rig.reply(2)
            await rig.settled()
            await anyio.sleep(1)
            assert ids(model.read()) == ["r1", "r2"]
            assert len(model.inboxes[KEYS.inbox(CALLER)]) == (3 if lost == 0 else 2)
            assert acknowledged(model) == [b"1-0", b"1-0", b"2-0"]
            assert model.pending == model.unanswered == set()

    in_virtual_time(check)


def test_end_with_replies_that_wait() -> None:
    """What could not be answered is known, so that it goes back to the group."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(NOREPLICAS)
            rig.reply(1)
            await anyio.sleep(0.1)
            rig.reply(2)
            rig.writer.end(RuntimeError())
            assert set(rig.writer.unanswered) == {b"1-0", b"2-0"}
            assert model.pending == {b"1-0", b"2-0"}

    in_virtual_time(check)


@pytest.mark.parametrize("to", [None, CALLER])
@pytest.mark.parametrize("backlog", [None, 100])
def test_arguments_that_are_changed_while_they_wait(to: str | None, backlog: int | None) -> None:
    """They arrive as they were when the call was made, and end nothing if they can't be encoded."""

    async def check() -> None:
        model, args = Model([]), [[1]]
        async with running(model, max_backlog=backlog) as rig:
            model.refuses = lambda command: REFUSALS["noreplicas"]
            request = Request("q", "call", ["f"], a=args, d=100_000)
            deadline = anyio.current_time() + 100
            rig.writer.send_nowait(Envelope(request, None, to, deadline=deadline))
            await anyio.sleep(1)
            args[0].append(object())  # type: ignore[arg-type]
            added = []

            def take(command: list[bytes]) -> bytes | None:
                added.append(command)
                return None if command[0] == b"XADD" else _pack(b"1-0")

            model.refuses = take
            await rig.settled()
        (written,) = [one for one in added if one[0] == b"XADD" or command_adds(one)]
        assert b'"a":[[1]],"d":9' in written[written.index(b"json") + 1]

    def command_adds(command: list[bytes]) -> bool:
        return command[0] == b"EVAL" and b"from" in command

    in_virtual_time(check)


def test_result_that_is_changed_while_it_waits() -> None:
    """It arrives as it was returned, though it gets another number."""

    async def check() -> None:
        model, there, result = Model([]), False, [1]

        def refuse(command: list[bytes]) -> bytes | None:
            return None if there or command[0] != b"XADD" else b"$-1\r\n"

        async def request(*command: bytes) -> object:
            return there

        async def keep_own(request: object) -> None:
            """It is there."""

        model.refuses = refuse
        async with running(model) as rig, anyio.create_task_group() as group:
            group.start_soon(rig.writer.undelivered.run, request, keep_own)
            rig.connection.break_off(OSError())
            await anyio.sleep(1)
            rig.post(Reply("r", result))
            await anyio.sleep(1)
            result.append(object())  # type: ignore[arg-type]
            there = True
            await anyio.sleep(1)
            await rig.settled()
            group.cancel_scope.cancel()
        assert model.read() == [Reply("r", [1])]

    in_virtual_time(check)


def test_arguments_that_are_changed_before_they_are_sent_again() -> None:
    """Who waits is told if they can't be encoded any more."""

    async def check() -> None:
        model, args = Model([]), [[1]]
        async with running(model) as rig:
            sent = [
                rig.post(Request("q", "call", ["f"], a=args), None),
                rig.post(Request("p", "call", ["f"]), None),
            ]
            await rig.settled()
            args[0].append(object())  # type: ignore[arg-type]
            assert await rig.writer.send_again(sent) == 1
            await rig.settled()
        assert len(model.stream) == 3
        (back,) = rig.returned
        assert isinstance(back.error, DeliveryError)
        assert "can't encode anew" in str(back.error)

    in_virtual_time(check)


@pytest.mark.parametrize("away", [False, True])
def test_end_with_records_that_wait(away: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody else knows of is counted and logged; what has left isn't."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            rig.post(CallbackCall("left", []))
            await rig.settled()
            if away:
                rig.reachable = anyio.Event()
                rig.connection.break_off(OSError())
            else:
                model.refuses = adds(NOREPLICAS)
            await anyio.sleep(0.1)
            rig.post(CallbackCall("a", []))
            rig.post(Reply("b"), "another")
            rig.post(Request("q", "call", ["f"]), None)
            rig.reply(1)
            await anyio.sleep(0.1)
            while rig.writer._outgoing.ledger.written:  # what is tried again just now may be taken
                await anyio.sleep(0.001)
            for _ in range(2):
                rig.writer.end(RuntimeError())
            assert rig.writer.undeliverable == 2

    in_virtual_time(check)
    (text,) = [text for text in caplog.messages if "were not sent" in text]
    assert text.startswith("2 records")


@pytest.mark.parametrize("cancels", [False, True])
def test_what_an_answer_calls_forth_before_a_refusal(cancels: bool) -> None:
    """A cancel for who has the request, or a small reply: it leaves, though nothing is to follow it
    until it is answered.
    """

    async def check() -> None:
        model = Model([])
        async with running(model, version=2) as rig:
            request = rig.post(Request("q", "call", ["f"]), None)
            await rig.settled()
            model.refuses = refuse
            if cancels:
                rig.writer.send_nowait(Envelope(Cancel("q"), token=request.token))
                await rig.until_asked()
            else:
                rig.reply(1)
            rig.post(CallbackCall("c", []), "another")
            await anyio.sleep(0.0015)
            model.refuses = lambda command: None
            await rig.settled()
        assert sorted(ids(model.read("another"))) == (["c", "q"] if cancels else ["c"])
        assert ids(model.read()) == ([] if cancels else ["r1"])

    def refuse(command: list[bytes]) -> bytes | None:
        if command[0] == b"EVAL":
            return _pack([[b"another"]])
        if command[0] != b"XADD":
            return None
        return NO_STREAM if command[1] == KEYS.inbox(CALLER) else REFUSALS["oom"]

    in_virtual_time(check)


def test_right_to_one_inbox() -> None:
    """Without the right to one inbox its reply waits for it, and nothing else does."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(NOPERM, KEYS.inbox(CALLER))
            rig.reply(1)
            await anyio.sleep(0.1)
            rig.post(CallbackCall("c", []), "another")
            await anyio.sleep(0.1)
            assert ids(model.read("another")) == ["c"]
            assert model.pending == {b"1-0"}
            await anyio.sleep(5)
            model.refuses = lambda command: None
            await anyio.sleep(0.5)
            assert ids(model.read()) == ["r1"]
            assert model.pending == set()
            assert (rig.given_up, rig.failures) == ([], [])

    in_virtual_time(check)


def test_right_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    """After a while the reply is given up: somebody else is to have the entry, which is pending."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(NOPERM, KEYS.inbox(CALLER))
            rig.reply(1)
            await anyio.sleep(9)
            assert rig.given_up == []
            await anyio.sleep(2)
            assert rig.given_up == [(b"1-0", 1)]
            assert model.pending == {b"1-0"}
            assert rig.writer.undeliverable == 1
            await rig.settled()

    in_virtual_time(check)
    (text,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "XADD" in text
    assert "{s}:inbox:caller" in text


def test_right_to_ask() -> None:
    """A client that never had the right is told at once; one that had it waits for it."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(NOPERM)
            rig.post(Request("q1", "call", ["f"]), None)
            await anyio.sleep(0.1)
            assert "XADD, key" in str(rig.returned.pop().error)
            model.refuses = lambda command: None
            rig.post(Request("q2", "call", ["f"]), None)
            await rig.settled()
            model.refuses = adds(NOPERM)
            rig.post(Request("q3", "call", ["f"]), None)
            await anyio.sleep(1)
            model.refuses = lambda command: None
            await anyio.sleep(1)
            assert len(model.stream) == 2
            assert rig.returned == []

    in_virtual_time(check)


def test_right_to_acknowledge() -> None:
    """A worker that may not acknowledge waits for the right, and then is of no use."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = lambda command: NOPERM if command[0] == b"XACK" else None
            rig.reply(1)
            await anyio.sleep(5)
            assert ids(model.read()) == ["r1"]
            model.refuses = lambda command: None
            await rig.settled()
            assert model.pending == set()
            model.refuses = lambda command: NOPERM if command[0] == b"XACK" else None
            rig.reply(2)
            await anyio.sleep(9)
            assert rig.failures == []
            await anyio.sleep(3)
            assert "XACK, key" in str(rig.failures[0])

    in_virtual_time(check)


def test_reply_that_is_never_taken() -> None:
    """A small error goes in its place; if that isn't taken either, the entry is somebody else's."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = lambda command: (
                WRONGTYPE if command[0] == b"XADD" and len(command[-5]) > 1000 else None
            )
            model.pending.add(b"1-0")
            rig.writer.settle(b"1-0", Envelope(Reply("r1", "x" * 2000), None, CALLER), 1)
            rig.writer.flush_nowait()
            await rig.settled()
            await anyio.sleep(1)
            (reply,) = model.read()
            assert "WRONGTYPE" in reply.e["m"]
            assert model.pending == set()
            model.refuses = adds(WRONGTYPE)
            rig.reply(2)
            await anyio.sleep(1)
            assert rig.given_up == [(b"2-0", 1)]
            assert model.pending == {b"2-0"}

    in_virtual_time(check)


@pytest.mark.parametrize(
    "answer",
    [b"-READONLY You can't write against a read only replica.\r\n", b"-MOVED 1 host:1\r\n"],
    ids=["readonly", "moved"],
)
def test_another_server(answer: bytes) -> None:
    """What leads to another server gives the connection up; all is written to the next one."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            model.refuses = adds(answer)
            rig.reply(1)
            rig.post(Request("q", "call", ["f"]), None)
            await anyio.sleep(0.1)
            assert rig.connections > 1
            model.refuses = lambda command: None
            await rig.settled()
        assert ids(model.read()) == ["r1"]
        assert len(model.stream) == 1
        assert model.pending == set()

    in_virtual_time(check)
