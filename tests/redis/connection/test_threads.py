"""The threads of connecting: handlers that block don't take them, and what hangs is bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio import to_thread
from redis.credentials import CredentialProvider

from anyio_kkrpc.redis._connection import _threads
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._login import open_connection
from anyio_kkrpc.redis._connection._threads import in_thread
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

# Seconds within which what should come has to come.
LIMIT = BOUND


async def settled(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(LIMIT):
        while not condition():
            await anyio.sleep(0.005)


@asynccontextmanager
async def all_threads_taken(backend: str) -> AsyncIterator[None]:
    """Block the threads that AnyIO has for everybody, and those of asyncio's loop."""
    release = threading.Event()
    limiter = to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    if backend == "asyncio":
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(release.wait, LIMIT)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(to_thread.run_sync, release.wait, LIMIT)
            await settled(lambda: limiter.available_tokens == 0)
            try:
                yield
            finally:
                release.set()
    finally:
        limiter.total_tokens = 40


@pytest.mark.server
async def test_handlers_take_all_threads(
    tls_server: RedisServer, certificates: tuple[str, str, str], anyio_backend_name: str
) -> None:
    """Name look-ups, credential providers and TLS files don't wait for threads of handlers."""

    class Provider(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            return "default", ""

    url = tls_server.tls_url.replace("127.0.0.1", "localhost")
    address = Address.parse(url, credential_provider=Provider())
    async with all_threads_taken(anyio_backend_name):
        async with await open_connection(address, timeout=LIMIT) as connection:
            assert await connection.execute("PING") == b"PONG"


async def test_what_hangs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connects that are given up leave only so many threads behind, and say why at the limit."""
    monkeypatch.setattr(_threads, "LIMIT", 2)
    started, release = threading.Semaphore(0), threading.Event()

    def hang() -> None:
        started.release()
        release.wait(LIMIT)

    try:
        for _ in range(2):
            async with anyio.create_task_group() as group:
                group.start_soon(in_thread, hang)
                await settled(lambda: started.acquire(blocking=False))
                group.cancel_scope.cancel()
        for _ in range(3):
            with pytest.raises(TimeoutError, match="2 threads wait for name look-ups"):
                await in_thread(hang)
        assert not started.acquire(blocking=False)
    finally:
        release.set()

    async def again() -> bool:
        try:
            return await in_thread(lambda: True)
        except TimeoutError:
            return False

    with anyio.fail_after(LIMIT):
        while not await again():
            await anyio.sleep(0.005)


async def test_errors_arrive() -> None:
    """What the function raises arrives; nothing counts as running afterwards."""

    def fail() -> None:
        raise LookupError("no ticket")

    for _ in range(2 * _threads.LIMIT):
        with pytest.raises(LookupError, match="no ticket"):
            await in_thread(fail)
