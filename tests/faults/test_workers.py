"""Workers that die, hang, or leave: what they had taken is run, or given up with an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio import to_thread

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    current_call,
    with_call_options,
)
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.faults.worker import Api

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

CLAIM_IDLE = 0.4
Start = Callable[..., Any]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    path.touch()
    return path


@pytest.fixture
def start(
    anyio_backend_name: str, redis_server: RedisServer, stream_name: str, ledger: Path
) -> Iterator[Start]:
    """Start a worker process; returns when it serves."""
    processes: list[subprocess.Popen[str]] = []

    async def start(grace: float = 0) -> subprocess.Popen[str]:
        arguments = [anyio_backend_name, redis_server.url, stream_name, ledger, CLAIM_IDLE, grace]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker", *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert await to_thread.run_sync(process.stdout.readline) == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def client(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, use_consumer_group=True, **options)


async def test_killed_worker(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, start: Start, ledger: Path
) -> None:
    """Its call is run by another worker, though nothing new is asked; the caller gets the result."""
    async with (
        client(redis_server, stream_name) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        first = await start()
        results: list[str] = []

        async def call() -> None:
            results.append(await channel.get_api().hang_once("key"))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until(ledger.read_text)
            await start()
            first.kill()
        assert results == ["attempt 2"]
        lines = [line.split() for line in ledger.read_text().splitlines()]
        assert [line[2] for line in lines] == ["1", "2"]
        assert lines[0][1] != lines[1][1]
        await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)


async def test_stopped_worker(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, start: Start, ledger: Path
) -> None:
    """What came to it while it was stopped is another worker's when it goes on: it runs once."""
    async with (
        client(redis_server, stream_name) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        api, results = channel.get_api(), []

        async def work(key: str) -> None:
            results.append(await api.work(key, 0))

        stopped = await start()
        assert await api.pid() == stopped.pid
        for key in map(str, range(100)):
            length = witness.xlen(stream_name)
            stopped.send_signal(signal.SIGSTOP)
            await to_thread.run_sync(os.waitid, os.P_PID, stopped.pid, os.WSTOPPED)
            async with anyio.create_task_group() as group:
                group.start_soon(work, key)
                await until(lambda length=length: witness.xlen(stream_name) > length)  # type: ignore[misc]
                if not witness.xpending(stream_name, "kkrpc-group")["pending"]:
                    stopped.send_signal(signal.SIGCONT)  # its last read had just come to an end
                    continue
                async with (
                    client(redis_server, stream_name, claim_idle=CLAIM_IDLE) as other,
                    RPCChannel(other, expose=Api(ledger)),
                ):
                    await until(lambda key=key: key in results)  # type: ignore[misc]
                break
        stopped.send_signal(signal.SIGCONT)
        # It serves again, and all that came before is behind it.
        assert await api.pid() == stopped.pid
        assert await api.work("last", 0) == "last"
    lines = [line.split() for line in ledger.read_text().splitlines()]
    ran = [(run, int(pid)) for run, pid, _ in lines]
    assert ran[-2:] == [(key, os.getpid()), ("last", stopped.pid)]
    assert len({run for run, _ in ran}) == len(ran)


async def test_poison(
    redis_server: RedisServer, stream_name: str, start: Start, ledger: Path
) -> None:
    """A request that kills each worker becomes a dead letter; it can be looked at and put back."""

    class Api:
        ran = 0

        def die(self) -> str:
            self.ran += 1
            return "survived"

    outcome: list[BaseException] = []
    async with (
        client(redis_server, stream_name) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):

        async def call() -> None:
            try:
                await channel.get_api().die()
            except DeliveryError as exc:
                outcome.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            for _ in range(2):
                worker = await start()
                await to_thread.run_sync(worker.wait)
            api = Api()
            async with (
                client(redis_server, stream_name, claim_idle=CLAIM_IDLE, max_deliveries=2) as last,
                RPCChannel(last, expose=api),
            ):
                await until(lambda: outcome)
                assert api.ran == 0
                assert "delivered 2 times" in str(outcome[0])
                (letter,) = await transport.dead_letters()
                assert letter.attempts == 2
                assert letter.group == "kkrpc-group"
                assert "without being finished" in letter.reason
                assert letter.first <= letter.last
                assert letter.fields["from"].decode() == transport.session_id
                assert (await transport.get_all_entries())[0].id == letter.entry_id
                with pytest.raises(LookupError):
                    await transport.retry_dead_letter("1-1")
                await transport.retry_dead_letter(letter.id)
                await until(lambda: api.ran == 1)
                assert await transport.dead_letters() == []
                assert last.statistics().dead_lettered == 1
    assert ledger.read_text().count("die") == 2


async def test_purge(redis_server: RedisServer, stream_name: str, witness: redis.Redis) -> None:
    """All dead letters go."""
    async with client(redis_server, stream_name) as transport:
        for _ in range(3):
            witness.xadd(f"{{{stream_name}}}:dead", {"id": "1-1"})
        assert await transport.purge_dead_letters() == 3
        assert await transport.dead_letters() == []


async def test_long_handler_keeps_its_entry(redis_server: RedisServer, stream_name: str) -> None:
    """A handler that outlasts `claim_idle` several times is run once, though others are idle."""

    claim_idle = 2.0  # much longer than a busy machine lets this process wait for its turn

    class Api:
        def __init__(self) -> None:
            self.ran = 0

        async def long(self) -> int:
            self.ran += 1
            await anyio.sleep(2.5 * claim_idle)
            return current_call().attempt

    apis = [Api(), Api()]
    async with (
        client(redis_server, stream_name, claim_idle=claim_idle) as one,
        client(redis_server, stream_name, claim_idle=claim_idle) as two,
        RPCChannel(one, expose=apis[0]),
        RPCChannel(two, expose=apis[1]) as channel,
    ):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(channel.get_api().long)
        assert apis[0].ran + apis[1].ran == 8
        assert one.statistics().claimed == two.statistics().claimed == 0


async def test_orderly_end_hands_back(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What a leaving worker holds is taken by another at once, uncounted if it was not begun."""
    attempts: list[int] = []

    class Slow:
        async def work(self, n: int) -> int:
            await anyio.sleep_forever()
            return n

    class Quick:
        def work(self, n: int) -> int:
            attempts.append(current_call().attempt)
            return n

    results: list[int] = []
    async with (
        client(redis_server, stream_name) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(n))

        async with anyio.create_task_group() as group:
            # Long after the end of this test something could be claimed.
            async with client(redis_server, stream_name, claim_idle=CALL_BOUND) as leaving:
                async with RPCChannel(leaving, expose=Slow(), max_concurrency=3):
                    for n in range(3):
                        group.start_soon(call, n)
                    await until(lambda: leaving.statistics().outstanding == 3)
                    staying = client(redis_server, stream_name, claim_idle=CALL_BOUND)
                    async with staying, RPCChannel(staying, expose=Quick()):
                        with anyio.fail_after(BOUND):
                            await leaving.destroy()
                            await until(lambda: len(results) == 3)
                    assert leaving.statistics().handed_back == 3
    assert sorted(results) == [0, 1, 2]
    assert max(attempts) <= 2
    await until(lambda: witness.xinfo_consumers(stream_name, "kkrpc-group") == [])


async def test_sigterm(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, start: Start, ledger: Path
) -> None:
    """A worker that is told to end finishes what runs, in its grace period, and leaves nothing."""
    results: list[str] = []
    async with (
        client(redis_server, stream_name) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        worker = await start(grace=10)

        async def call() -> None:
            results.append(await channel.get_api().work("key", 0.5))

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until(ledger.read_text)
            worker.send_signal(signal.SIGTERM)
        assert results == ["key"]
        output, _ = await to_thread.run_sync(worker.communicate)
        assert output == "left\n"
        assert worker.returncode == 0
        assert ledger.read_text().count("key") == 1
    assert witness.xinfo_consumers(stream_name, "kkrpc-group") == []
    assert witness.keys(f"*{stream_name}*inbox*") == []


async def test_sigterm_and_a_stream(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, start: Start, tmp_path: Path
) -> None:
    """It comes to its end in the grace period, and nothing is left then either."""
    gate = tmp_path / "gate"
    async with (
        client(redis_server, stream_name) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        worker = await start(grace=BOUND)
        async with channel.get_api().count(str(gate)) as items:
            assert await items.__anext__() == 0
            worker.send_signal(signal.SIGTERM)
            gate.touch()
            assert [number async for number in items] == list(range(1, 500))
        output, _ = await to_thread.run_sync(worker.communicate)
        assert (output, worker.returncode) == ("left\n", 0)
    assert witness.keys(f"*{stream_name}*inbox*") == []


async def test_worker_that_comes_back_under_its_name(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What it had taken before its process died is its own, at once, and counts as delivered."""

    class Api:
        def work(self) -> int:
            return current_call().attempt

    results: list[int] = []
    async with (
        client(redis_server, stream_name) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):

        async def call() -> None:
            results.append(await channel.get_api().work())

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until(lambda: witness.xlen(stream_name))
            # A worker that takes it and is never heard of again.
            witness.xgroup_create(stream_name, "kkrpc-group", "0")
            assert witness.xreadgroup("kkrpc-group", "worker-7", {stream_name: ">"})
            async with (
                client(redis_server, stream_name, consumer_name="worker-7") as again,
                RPCChannel(again, expose=Api()),
            ):
                await until(lambda: results)
    assert results == [2]


async def test_consumers_of_the_past_are_removed(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, monkeypatch: Any
) -> None:
    """A consumer that holds nothing and did nothing for long goes; one that holds something stays."""
    monkeypatch.setattr("anyio_kkrpc.redis._group._claiming._SWEEP_LEAST", 0.1)
    monkeypatch.setattr("anyio_kkrpc.redis._group._claiming._SWEEP_FACTOR", 1)
    witness.xgroup_create(stream_name, "kkrpc-group", "0", mkstream=True)
    witness.xgroup_createconsumer(stream_name, "kkrpc-group", "old")

    class Api:
        def work(self) -> None: ...

    async with (
        client(redis_server, stream_name, claim_idle=0.1) as transport,
        RPCChannel(transport, expose=Api()),
    ):
        await until(
            lambda: (
                b"old"
                not in [c["name"] for c in witness.xinfo_consumers(stream_name, "kkrpc-group")]
            )
        )


async def test_cancelled_before_it_was_taken(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Nobody serves yet: a call that is given up is deleted, and never runs."""
    ran: list[str] = []

    class Api:
        def note(self, what: str) -> None:
            ran.append(what)

    async with (
        client(redis_server, stream_name) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().note, "cancelled")
            await until(lambda: witness.xlen(stream_name) == 1)
            group.cancel_scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 0)
        async with client(redis_server, stream_name) as late, RPCChannel(late, expose=Api()):
            await channel.get_api().note("wanted")
    assert ran == ["wanted"]


async def test_expired_requests_are_not_started(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request that waited in the stream for longer than its caller is acknowledged, not run."""
    ran: list[int] = []

    class Api:
        def note(self, n: int) -> None:
            ran.append(n)

    async with (
        client(redis_server, stream_name) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api = with_call_options(channel.get_api(), timeout=1, reply=False)
        await api.note(1)
        entry_id, _ = witness.xrange(stream_name)[0]
        seconds, micros = witness.time()
        while seconds * 1000 + micros // 1000 <= int(entry_id.split(b"-")[0]) + 1000:
            await anyio.sleep(0.02)
            seconds, micros = witness.time()
        async with client(redis_server, stream_name) as late:
            async with RPCChannel(late, expose=Api()) as serving:
                await channel.get_api().note(2)
                await until(lambda: serving.statistics().expired == 1)
    assert ran == [2]
    assert witness.xpending(stream_name, "kkrpc-group")["pending"] == 0


@pytest.mark.parametrize("leaves", ["channel", "transport"])
async def test_handler_that_ends_in_the_turn_of_its_channel(
    redis_server: RedisServer, stream_name: str, leaves: str
) -> None:
    """What it returns reaches nobody, so its request isn't acknowledged: another worker runs it."""
    began, gate = anyio.Event(), anyio.Event()

    class Gated:
        async def work(self, n: int) -> int:
            began.set()
            await gate.wait()
            return n

    class Quick:
        def work(self, n: int) -> int:
            return n

    results: list[int] = []
    async with (
        client(redis_server, stream_name) as used,
        client(redis_server, stream_name) as other,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(n))

        async with anyio.create_task_group() as group:
            async with AsyncExitStack() as stack:
                kept = await stack.enter_async_context(client(redis_server, stream_name))
                async with RPCChannel(kept, expose=Gated()):
                    group.start_soon(call, 1)
                    await began.wait()
                    gate.set()
                if leaves == "transport":
                    await stack.aclose()
                async with RPCChannel(other, expose=Quick()):
                    await until(lambda: len(results) == 1)


async def test_channel_that_leaves_its_transport(
    redis_server: RedisServer, stream_name: str
) -> None:
    """A channel that ends hands back what it held, though its transport stays open."""

    class Slow:
        async def work(self, n: int) -> int:
            await anyio.sleep_forever()
            return n

    class Quick:
        def work(self, n: int) -> int:
            return n

    results: list[int] = []
    async with (
        client(redis_server, stream_name) as used,
        client(redis_server, stream_name) as kept,
        client(redis_server, stream_name) as other,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(n))

        async with anyio.create_task_group() as group:
            async with RPCChannel(kept, expose=Slow(), max_concurrency=2):
                for n in range(5):
                    group.start_soon(call, n)
                await until(lambda: kept.statistics().outstanding == 2)
            async with RPCChannel(other, expose=Quick()):
                await until(lambda: len(results) == 5)
        assert kept.statistics().outstanding == 0
        assert kept.statistics().handed_back == 2
        # And it can be used again, and again at once.
        for n in range(3):
            async with RPCChannel(kept, expose=Quick()):
                if n:
                    assert await channel.get_api().work(n) == n


class Deaf:
    """A listener that has no use for anything."""

    def received(self, envelope: Envelope) -> None:
        raise AssertionError(envelope)

    def ended(self, reason: Exception) -> None:
        pass


@pytest.mark.parametrize("leaving", ["cancelled", "drained"])
async def test_late_receive_reads_nothing(
    redis_server: RedisServer, stream_name: str, leaving: str
) -> None:
    """A handler's task that goes on after its channel has left doesn't have requests read."""

    class Api:
        def work(self, n: int) -> int:
            return n

    async with (
        client(redis_server, stream_name) as left,
        client(redis_server, stream_name) as other,
        client(redis_server, stream_name) as using,
        RPCChannel(other, expose=Api()),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        left.listen(Deaf(), serve=1)
        if leaving == "drained":
            left.listen(Deaf(), serve=0)
            group.start_soon(left.receive)
        else:
            left.listen(None)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await left.receive()
        received = left.statistics().received
        # If it read, it would get one of these sooner or later.
        assert [await channel.get_api().work(n) for n in range(50)] == list(range(50))
        assert left.statistics().received == received
        assert left.statistics().outstanding == 0
        group.cancel_scope.cancel()


async def test_draining_worker_keeps_only_what_it_has_begun(
    redis_server: RedisServer, stream_name: str
) -> None:
    """What waits in a worker that takes no more goes to others at once, not after its grace."""
    gate = anyio.Event()

    class Slow:
        begun = 0

        async def work(self, n: int) -> str:
            self.begun += 1
            await gate.wait()
            return "slow"

    class Quick:
        def work(self, n: int) -> str:
            return "quick"

    api = Slow()
    results: list[str] = []
    async with (
        client(redis_server, stream_name) as slow,
        client(redis_server, stream_name) as using,
        RPCChannel(using) as channel,
        anyio.create_task_group() as group,
    ):

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(n))

        async def drain() -> None:
            async with RPCChannel(slow, expose=api, max_concurrency=2, grace_period=30):
                slow.serve_more(2)  # as while two handlers wait for calls of their own
                for n in range(4):
                    group.start_soon(call, n)
                await until(lambda: slow.statistics().outstanding == 4 and api.begun == 2)

        group.start_soon(drain)
        await until(lambda: slow.statistics().handed_back == 2)
        async with client(redis_server, stream_name) as quick, RPCChannel(quick, expose=Quick()):
            await until(lambda: len(results) == 2)
        assert results == ["quick", "quick"]
        gate.set()
    assert sorted(results) == ["quick", "quick", "slow", "slow"]


async def test_claims_and_reads_wait_for_room_together(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A full worker waits to claim and to read; once it has room it does both."""
    gate = anyio.Event()

    class Api:
        async def work(self, n: int) -> int:
            await gate.wait()
            return n

    results: list[int] = []
    async with (
        client(redis_server, stream_name, claim_idle=0.1) as serving,
        client(redis_server, stream_name) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(n))

        async with anyio.create_task_group() as group:
            for n in range(3):
                group.start_soon(call, n)
            await until(lambda: witness.xlen(stream_name) == 3)
            # These two are lost by a worker that is gone; the others are there to be read.
            witness.xgroup_create(stream_name, "kkrpc-group", "0")
            witness.xreadgroup("kkrpc-group", "gone", {stream_name: ">"}, count=2)
            async with RPCChannel(serving, expose=Api(), max_concurrency=1):
                await until(lambda: serving.statistics().outstanding)
                for n in range(3, 8):
                    group.start_soon(call, n)
                await anyio.sleep(0.3)  # longer than a claim needs to become due
                assert results == []
                gate.set()
                await until(lambda: len(results) == 8)
    assert sorted(results) == list(range(8))
