"""What leaves together for one peer: one entry, of which each record has a fate of its own."""

from __future__ import annotations

import itertools

import anyio
import pytest

from anyio_kkrpc._protocol._records import CallbackCall, Record, Reply, Request, StreamReply
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._writing import _packs
from anyio_kkrpc.redis.dialects import Several
from anyio_kkrpc.redis.dialects._signing import Signer
from anyio_kkrpc.redis.dialects.native import SEVERAL, VERSION

from .pure import dialects
from .test_writer import CALLER, KEYS, Model, Rig, ids, in_virtual_time, running

INBOX = KEYS.inbox(CALLER)


def entries(model: Model, key: bytes = INBOX) -> list[list[str]]:
    """Return which records each command has brought to an inbox."""
    found = []
    for command in model.commands:
        if command[0] == b"XADD" and command[1] == key:
            entry = dialects(session_id="reader").decode(command[command.index(b"*") + 1 :])
            assert entry is not None
            several = entry.entries if isinstance(entry, Several) else [entry]
            found.append([name_of(one.record) for one in several])
    return found


def name_of(record: Record) -> str:
    return record.sid if isinstance(record, StreamReply) else record.id  # type: ignore[union-attr]


def post_unwritten(rig: Rig, record: Record, recipient: str = CALLER) -> None:
    """Post a record without a write."""
    post = rig.writer.commands.make(Envelope(record, None, recipient))
    assert post is not None
    rig.writer._post(post)


def settle_unwritten(rig: Rig, number: int) -> None:
    entry_id = b"%d-0" % number
    rig.model.pending.add(entry_id)
    rig.writer.settle(entry_id, Envelope(Reply(f"r{number}", number), None, CALLER), 1)


def test_one_entry_per_write_and_recipient() -> None:
    """Replies, items and callbacks alike; each peer has its own; acknowledgements are behind."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            for number in range(3):
                settle_unwritten(rig, number)
                post_unwritten(rig, CallbackCall("other", []), "another")
            post_unwritten(rig, StreamReply("1", "s", v=1, i=0))
            post_unwritten(rig, CallbackCall("c", []))
            rig.writer.flush_nowait()
            await rig.settled()
            rig.reply(3)
            await rig.settled()
        assert entries(model) == [["r0", "r1", "r2", "s", "c"], ["r3"]]
        assert entries(model, KEYS.inbox("another")) == [["other"] * 3]
        assert [command[0] for command in model.commands] == [
            b"XADD",
            b"XADD",
            b"XACK",
            b"XADD",
            b"XACK",
        ]
        assert model.pending == model.unanswered == set()
        assert [record.id for record in model.read()] == ["r0", "r1", "r2", "1", "c", "r3"]

    in_virtual_time(check)


@pytest.mark.parametrize("version", range(VERSION + 1))
def test_older_peers(version: int) -> None:
    """They get each record by itself."""

    async def check() -> None:
        model = Model([])
        async with running(model, version=version) as rig:
            for number in range(3):
                settle_unwritten(rig, number)
            rig.writer.flush_nowait()
            await rig.settled()
        expected = [["r0", "r1", "r2"]] if version >= SEVERAL else [["r0"], ["r1"], ["r2"]]
        assert entries(model) == expected

    in_virtual_time(check)


def test_what_stands_alone() -> None:
    """Requests, and what is large, in the order in which they were posted."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            records = [
                CallbackCall("a", []),
                CallbackCall("b", []),
                Request("q", "call", ["f"]),
                CallbackCall("c", []),
                CallbackCall("large", ["x" * 10_000]),
                CallbackCall("d", []),
                CallbackCall("e", []),
            ]
            for record in records:
                post_unwritten(rig, record)
            rig.writer.flush_nowait()
            await rig.settled()
        assert entries(model) == [["a", "b"], ["q"], ["c"], ["large"], ["d", "e"]]
        assert model.read() == records

    in_virtual_time(check)


@pytest.mark.parametrize("size", [0, 1000])
def test_bounds(size: int) -> None:
    """Small or large: an entry has so many bytes, of which each record counts for some more."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            for number in range(400):
                post_unwritten(rig, CallbackCall(f"{number}", ["x" * size]))
            rig.writer.flush_nowait()
            await rig.settled()
        found = entries(model)
        most = _packs._MOST_BYTES // (size + _packs._OVERHEAD)
        assert 0.7 * most < max(map(len, found)) <= most
        assert [name for names in found for name in names] == [f"{number}" for number in range(400)]

    in_virtual_time(check)


@pytest.mark.parametrize("verdict", ["oom", "noreplicas", "noperm", "cut", "cut behind"])
def test_refused_or_lost(verdict: str) -> None:
    """Each is written again, in order, and read once; nothing is acknowledged before its reply."""

    async def check() -> None:
        model = Model(["take", verdict])
        async with running(model) as rig:
            rig.reply(0)
            await rig.settled()
            model.verdicts.clear()
            model.verdicts.append(verdict)
            for number in range(1, 4):
                settle_unwritten(rig, number)
            rig.writer.flush_nowait()
            await anyio.sleep(20)
            await rig.settled()
            assert ids(model.read()) == ["r0", "r1", "r2", "r3"]
            assert model.pending == model.unanswered == set()
        assert rig.returned == []

    in_virtual_time(check)


def test_lost_before_they_left() -> None:
    """What is posted and not written yet when the connection is lost goes over the next one."""

    async def check() -> None:
        model = Model([])
        async with running(model) as rig:
            for number in range(3):
                settle_unwritten(rig, number)
            rig.stream.feed(b"")
            await anyio.sleep(1)
            await rig.settled()
            assert ids(model.read()) == ["r0", "r1", "r2"]
            assert model.pending == model.unanswered == set()

    in_virtual_time(check)


def test_what_comes_behind_what_did_not_leave() -> None:
    """When the connection is lost, what was to leave is before what came while that was noticed,
    also where all of it is numbered anew, as after an outage that inboxes didn't outlive.
    """

    async def check() -> None:
        model, there = Model([]), False

        def refuse(command: list[bytes]) -> bytes | None:
            if command[0] == b"EXISTS":
                return b":%d\r\n" % there
            return None if there or command[0] != b"XADD" else b"$-1\r\n"

        async def request(*command: bytes) -> object:
            return await rig.connection.request(*command)

        async def keep_own(request: object) -> None:
            """It is there."""

        model.refuses = refuse
        async with running(model) as rig, anyio.create_task_group() as group:
            group.start_soon(rig.writer.undelivered.run, request, keep_own)
            post_unwritten(rig, CallbackCall("a", []))
            post_unwritten(rig, CallbackCall("b", []))
            rig.connection.break_off(OSError())
            for name in "cd":
                post_unwritten(rig, CallbackCall(name, []))
            await anyio.sleep(1)
            assert entries(model) == [["a"], ["b"], ["c"], ["d"]]
            there = True
            await anyio.sleep(1)
            await rig.settled()
            group.cancel_scope.cancel()
        assert ids(model.read()) == [*"abcd"]

    in_virtual_time(check)


def test_signed() -> None:
    """An entry has one signature, over all of its records."""

    async def check() -> None:
        model = Model([])
        nonces = itertools.count()
        signer = Signer(b"k" * 16, lambda: 1.0, lambda: b"%016x" % next(nonces))
        async with running(model, signer=signer) as rig:
            for number in range(3):
                settle_unwritten(rig, number)
            rig.writer.flush_nowait()
            await rig.settled()
        (command,) = [command for command in model.commands if command[0] == b"XADD"]
        fields = command[command.index(b"*") + 1 :]
        signer.check(INBOX, b"1000-0", fields)
        entry = dialects(session_id="reader").decode(fields)
        assert isinstance(entry, Several)
        assert [name_of(one.record) for one in entry.entries] == ["r0", "r1", "r2"]

    in_virtual_time(check)
