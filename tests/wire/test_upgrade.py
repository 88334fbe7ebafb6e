"""Peers of the version before, from this repository's history, and present ones, on one stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio import to_thread

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel, expose
from anyio_kkrpc.testing import RedisServer

from . import peer
from .peer import BOUND, CALL_BOUND, EXPECTED, Api

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
# The last commit whose entries have no version, and one that speaks the version before.
BEFORE = "271e9c98e37a0cb2b3d05e1e88a295c1edfdd734"
VERSION_2 = "80a1e26225a7b183e36be470136db9c2beacc53c"
KEY = "a secret of sixteen bytes"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """On uvloop both versions write what they do on asyncio."""
    return request.param


@pytest.fixture(scope="module")
def before(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package as it was."""
    commit = getattr(request, "param", BEFORE)
    git = ["git", "-C", str(ROOT)]
    there = (ROOT / ".git").exists() and not subprocess.run(
        [*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True
    ).returncode
    if not there:
        if os.environ.get("CI"):
            pytest.fail("CI needs the history: clone it as a whole")
        pytest.skip("this is no clone with the history")
    place = tmp_path_factory.mktemp("before")
    archive = subprocess.run([*git, "archive", commit, "anyio_kkrpc"], capture_output=True)
    assert archive.returncode == 0, archive.stderr
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    return place


class Old:
    """A process of the version before."""

    def __init__(self, place: Path, role: str, backend: str, **arguments: Any) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "wire" / "peer.py"),
                json.dumps({"role": role, "backend": backend, **arguments}),
            ],
            env={**os.environ, "PYTHONPATH": str(place)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._place = place

    async def ready(self) -> None:
        line = await self._read()
        assert line == f"ready {self._place / 'anyio_kkrpc'}\n"

    async def _read(self) -> str:
        assert self.process.stdout is not None
        return await to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)

    async def outcome(self) -> Any:
        """Return what it tells in the end."""
        line = await self._read()
        self.end()
        assert await to_thread.run_sync(self.process.wait, abandon_on_cancel=True) == 0
        return json.loads(line)

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()


@asynccontextmanager
async def old(place: Path, role: str, backend: str, **arguments: Any) -> AsyncIterator[Old]:
    process = Old(place, role, backend, **arguments)
    try:
        with anyio.fail_after(CALL_BOUND):
            await process.ready()
            yield process
    finally:
        process.process.kill()
        process.process.wait()
        for file in (process.process.stdin, process.process.stdout):
            assert file is not None
            file.close()


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def expected(*, grouped: bool) -> dict[str, Any]:
    found = {**EXPECTED, "invalid": 0}
    if not grouped:
        del found["not found"]
    return found


# Streams, callbacks and all that isn't about a group are the same in both modes.
MODES = pytest.mark.parametrize(
    ("before", "grouped"),
    [(BEFORE, False), (BEFORE, True), (VERSION_2, True)],
    ids=["broadcast", "group", "group of version 2"],
    indirect=["before"],
)


@MODES
async def test_an_old_worker(
    server: RedisServer, stream_name: str, before: Path, anyio_backend_name: str, grouped: bool
) -> None:
    """All that a present client does arrives at it, in either codec, until the destroy signal."""
    common: dict[str, Any] = {"url": server.url, "stream": stream_name}
    async with old(
        before, "serve", anyio_backend_name, session_id="old", grouped=grouped, **common
    ) as worker:
        for codec in ("json", "cbor"):
            found = await peer.exercise(codec=codec, worker="old", grouped=grouped, **common)
            assert found == expected(grouped=grouped)
        await peer.signal_destroy(**common)
        outcome = await worker.outcome()
    assert outcome == {"ended": "told to by a peer", "invalid": 0}


@MODES
async def test_an_old_client(
    server: RedisServer, stream_name: str, before: Path, anyio_backend_name: str, grouped: bool
) -> None:
    """All that it does arrives at a present worker."""
    common: dict[str, Any] = {"url": server.url, "stream": stream_name}
    async with (
        RedisStreamsTransport(**common, session_id="new", use_consumer_group=grouped) as transport,
        RPCChannel(transport, expose=expose(Api(), writable=["theme"])) as channel,
    ):
        for codec in ("json", "cbor"):
            async with old(
                before,
                "exercise",
                anyio_backend_name,
                codec=codec,
                worker="new",
                grouped=grouped,
                **common,
            ) as client:
                assert await client.outcome() == expected(grouped=grouped)
        assert transport.statistics().invalid == 0
        assert transport.statistics().undeliverable == 0
        async with old(before, "signal_destroy", anyio_backend_name, **common) as client:
            await client.outcome()
            await until(lambda: channel.closed)


@pytest.mark.parametrize("signing_key", [None, KEY], ids=["plain", "signed"])
@pytest.mark.parametrize("writer", ["old", "new"])
async def test_dead_letters(
    server: RedisServer,
    raw: redis.Redis,
    stream_name: str,
    before: Path,
    anyio_backend_name: str,
    writer: str,
    signing_key: str | None,
) -> None:
    """One gives a request up, the other looks at it and puts it back, and it can be run."""
    common: dict[str, Any] = {"url": server.url, "stream": stream_name}
    key = None if signing_key is None else signing_key.encode()

    async def act(role: str) -> Any:
        if (role == "give_up_dead") is (writer == "new"):
            return await peer.ROLES[role](signing_key=key, **common)
        async with old(
            before, role, anyio_backend_name, signing_key=signing_key, **common
        ) as process:
            return await process.outcome()

    async with (
        RedisStreamsTransport(**common, use_consumer_group=True, signing_key=key) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        failed: list[DeliveryError] = []

        async def call() -> None:
            with pytest.raises(DeliveryError) as caught:
                await channel.get_api().note()
            failed.append(caught.value)

        group.start_soon(call)
        await until(lambda: raw.exists(stream_name))
        raw.xgroup_create(stream_name, "kkrpc-group", "0")
        ((_, ((entry_id, fields),)),) = raw.xreadgroup("kkrpc-group", "gone", {stream_name: ">"})
        await act("give_up_dead")
        await until(lambda: failed)
        # The version before takes all that is behind the sixth field for the request's.
        more = ["request"] if writer == "new" else []
        (letter,) = await act("retry_dead")
        assert letter == {
            "entry_id": entry_id.decode(),
            "group": "kkrpc-group",
            "reason": "delivered 1 times without being finished",
            "attempts": 1,
            "ordered": True,
            "fields": [*(name.decode() for name in fields), *more],
        }
        api = Api()
        async with (
            RedisStreamsTransport(**common, use_consumer_group=True, signing_key=key) as serving,
            RPCChannel(serving, expose=api),
        ):
            await until(api.noted)
            assert serving.statistics().invalid == 0


@pytest.mark.parametrize("end", ["killed", "asked to"])
@pytest.mark.parametrize("first", ["old", "new"])
async def test_workers_of_one_group(
    server: RedisServer,
    stream_name: str,
    before: Path,
    anyio_backend_name: str,
    first: str,
    end: str,
) -> None:
    """What one worker leaves or dies with, a worker of the other version runs."""
    common: dict[str, Any] = {
        "url": server.url,
        "stream": stream_name,
        "claim_idle": 0.5 if end == "killed" else 1000.0,
    }
    present = Path(peer.anyio_kkrpc.__file__).parents[1]
    places = {"old": before, "new": present}
    second = "new" if first == "old" else "old"
    async with (
        RedisStreamsTransport(server.url, stream=stream_name, use_consumer_group=True) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
        old(
            places[first], "serve", anyio_backend_name, name=first, grouped=True, **common
        ) as leaving,
        anyio.create_task_group() as group,
    ):
        results: list[Any] = []

        async def call() -> None:
            results.append(await channel.get_api().hang_once())

        group.start_soon(call)
        await peer.until_equal(channel.get_api().running, 1)
        async with old(
            places[second], "serve", anyio_backend_name, name=second, grouped=True, **common
        ) as staying:
            if end == "killed":
                leaving.process.kill()
            else:
                leaving.end()
                assert (await leaving.outcome())["ended"] == end
            await until(lambda: results)
            assert results == [[second, 2]]
            staying.end()
            assert (await staying.outcome())["invalid"] == 0


async def test_an_old_worker_that_is_killed(
    server: RedisServer, stream_name: str, before: Path, anyio_backend_name: str
) -> None:
    """It has no sign of life, which doesn't make it gone: its inbox tells the reader of a stream."""
    common: dict[str, Any] = {"url": server.url, "stream": stream_name, "inbox_ttl": 2.0}
    async with (
        RedisStreamsTransport(**common) as transport,
        RPCChannel(transport, timeout=None) as channel,
        old(
            before, "serve", anyio_backend_name, session_id="old", grouped=False, **common
        ) as worker,
    ):
        async with channel.get_api(to="old").count(100_000) as items:
            assert await items.__anext__() == 0
            await anyio.sleep(3)
            assert await items.__anext__() == 1
            worker.process.kill()
            with anyio.fail_after(BOUND), pytest.raises(DeliveryError, match="its inbox is"):
                async for _ in items:
                    pass


async def test_a_request_that_is_written_once_more(
    server: RedisServer, raw: redis.Redis, stream_name: str, before: Path, anyio_backend_name: str
) -> None:
    """An old worker doesn't know what says so, and ignores it: the request runs and is answered."""
    common: dict[str, Any] = {"url": server.url, "stream": stream_name}
    async with (
        RedisStreamsTransport(**common, use_consumer_group=True) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        answers: list[Any] = []

        async def call() -> None:
            answers.append(await channel.get_api().who())

        group.start_soon(call)
        await until(
            lambda: [one for one in transport._inbound.waiting() if one.token.__class__ is bytes]
        )
        raw.xtrim(stream_name, maxlen=0, approximate=False)  # as another server would have lost it
        transport._lane.addressed.open_calls.note()
        await until(lambda: raw.xlen(stream_name))
        ((_, fields),) = raw.xrange(stream_name)
        assert fields[b"again"] == b"1"
        async with old(before, "serve", anyio_backend_name, grouped=True, **common) as worker:
            await until(lambda: answers)
            worker.end()
            assert (await worker.outcome())["invalid"] == 0
        assert answers == ["served"]
