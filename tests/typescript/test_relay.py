"""kkrpc 0.2.2 on Node over stdio, joined to a worker in Redis."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.stapled import StapledByteStream
from anyio.streams.text import TextReceiveStream

from anyio_kkrpc import ByteStreamTransport, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.relay import relay
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

from .api import Api, exposed

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.one_server]

NAMES = ["add", "math.grade1.add", "echo", "same", "withProgress", "callPeer", "nothing"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Leave uvloop out, as in the other tests with TypeScript peers."""
    return str(request.param)


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_child_process_calls_a_worker(
    redis_server: RedisServer, stream_name: str, javascript: Path, allowed: bool
) -> None:
    """All that the child may call: with callbacks, calls back, 200 at once, a megabyte, undefined.
    A child whose name is missing in the list is told so. Its end ends the relay, and no worker.
    """
    options: Any = {"stream": stream_name, "connect_timeout": BOUND}
    url, api = redis_server.url, Api()
    names = NAMES if allowed else [name for name in NAMES if name != "nothing"]
    command = ["node", str(javascript / "released.mjs"), "kkrpc-0-json", "client", "stdio"]
    async with (
        RedisStreamsTransport(url, use_consumer_group=True, **options) as served,
        RPCChannel(served, expose=exposed(api), timeout=CALL_BOUND) as worker,
        RedisStreamsTransport(url, **options) as inside,
        await anyio.open_process(command) as process,
    ):
        api._channel = worker
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        stream: Any = StapledByteStream(process.stdin, process.stdout)
        async with (
            ByteStreamTransport(stream) as child,
            relay(child, inside, allow=names, back=["hello"], timeout=CALL_BOUND) as joined,
        ):
            with anyio.fail_after(BOUND):
                output = "".join([text async for text in TextReceiveStream(process.stderr)])
                await joined.serve_forever()
            if allowed:
                assert output == "all ok\n"
            else:
                assert "Method nothing is not a function" in output
            assert joined.statistics().a.unknown == (1 if not allowed else 0) + 1
        assert not worker.closed
        assert worker.statistics().unknown == 0


async def test_a_relay_is_the_child_process(
    redis_server: RedisServer, stream_name: str, javascript: Path, tmp_path: Path
) -> None:
    """A program of TypeScript's reaches workers in Redis by a relay that it starts."""
    program = tmp_path / "relay.py"
    program.write_text(PROGRAM.replace("URL", redis_server.url).replace("STREAM", stream_name))
    parent = javascript / "parent_of_relay.mjs"
    parent.write_text(PARENT)
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, connect_timeout=BOUND
        ) as served,
        RPCChannel(served, expose=exposed(Api())) as worker,
    ):
        with anyio.fail_after(BOUND):
            done = await anyio.run_process(
                ["node", str(parent), sys.executable, str(program)], check=False
            )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == "3\n1\n2\nrefused: Method same is not a function\n"
        assert not worker.closed


PROGRAM = """
import anyio
from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc.relay import relay
from anyio_kkrpc.transports import stdio


async def main() -> None:
    async with (
        stdio() as parent,
        RedisStreamsTransport("URL", stream="STREAM", connect_timeout=100) as workers,
        relay(parent, workers, allow=["add", "withProgress"]) as joined,
    ):
        await joined.serve_forever()


anyio.run(main)
"""
PARENT = """
import { spawn } from "node:child_process"
import { NodeIo, RPCChannel } from "kkrpc"

const [python, program] = process.argv.slice(2)
const child = spawn(python, [program], { stdio: ["pipe", "pipe", "inherit"] })
const api = new RPCChannel(new NodeIo(child.stdout, child.stdin)).getAPI()
console.log(await api.add(1, 2))
await api.withProgress(2, (step) => console.log(step))
await api.same(1).catch((error) => console.log(`refused: ${error.message ?? error}`))
child.once("exit", (code) => process.exit(code))
child.stdin.end()
"""
