"""Objects by reference whose owner or holder is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import anyio
import pytest
import redis
from anyio import to_thread

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

from .referring import Api, Session

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

# Long enough for a busy machine to say in time that it is there.
CLAIM_IDLE = 3.0


class Asked(Session):
    """Of this side; each use is told."""

    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.used = anyio.Event()

    def ask(self, question: Any) -> str:
        self.attempts.append(question)
        self.used.set()
        return f"attempt {question}"


async def test_killed(
    redis_server: RedisServer,
    stream_name: str,
    anyio_backend_name: str,
    witness: redis.Redis,
) -> None:
    """Its sessions fail, what it ran is run with the same objects, and what it held is let go.

    Nobody has a time-out: it is presence that tells.
    """
    options: Any = {
        "url": redis_server.url,
        "stream": stream_name,
        "use_consumer_group": True,
        "claim_idle": CLAIM_IDLE,
    }
    command = json.dumps({"backend": anyio_backend_name, "options": options})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.referring", command],
        stdout=subprocess.PIPE,
        text=True,
    )
    used, kept, results = Asked(), Asked(), []

    async def use() -> None:
        results.append(await channel.get_api().use(used))

    try:
        assert process.stdout is not None
        ready, peer = (await to_thread.run_sync(process.stdout.readline)).split()
        assert ready == "ready"
        async with (
            RedisStreamsTransport(**options) as using,
            RedisStreamsTransport(**options) as next_worker,
            RPCChannel(using, timeout=None) as channel,
        ):
            session = await channel.get_api().open_session()
            assert await session.ask("first") == "asked: first"
            await channel.get_api().keep(kept)
            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(use)
                    await used.used.wait()
                    process.kill()
                    with pytest.raises(DeliveryError):
                        await session.wait()
                    with pytest.raises(DeliveryError):
                        await session.ask("is anybody there?")
                    async with RPCChannel(next_worker, expose=Api()):
                        while not results:
                            await anyio.sleep(0.01)
                assert results == ["attempt 2"]
                assert used.attempts == [1, 2]
                assert channel.statistics().references_held == 0
                # Of the objects of this side the one that is kept is left, as long as its inbox is.
                assert witness.delete(f"{{{stream_name}}}:inbox:{peer}")
                while channel.statistics().references_given:
                    await anyio.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
