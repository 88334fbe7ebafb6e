"""Python and TypeScript peers on one stream and over stdio, in both directions."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from subprocess import PIPE
from typing import Any

import anyio
import pytest
import redis
from anyio.streams.text import TextReceiveStream

from anyio_kkrpc import (
    ByteStreamTransport,
    MethodNotFoundError,
    OverloadedError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    TransportClosedError,
    with_call_options,
)
from anyio_kkrpc.testing._server import RedisServer
from anyio_kkrpc.transports.links import open_process
from anyio_kkrpc.typescript import UNDEFINED
from anyio_kkrpc.typescript.superjson import URL, Map
from tests.bounds import BOUND, CALL_BOUND
from tests.servers import Servers

from .api import Api, serve

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

DIALECTS = ["kkrpc-2", "kkrpc-0-superjson", "kkrpc-0-json"]
CLASSIC = ["kkrpc-0-superjson", "kkrpc-0-json"]
MODES = ["broadcast", "group"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Leave uvloop out: what TypeScript peers write is the same to it, and its sockets and pipes are
    tested with Python peers."""
    return str(request.param)


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, servers: Servers) -> RedisServer:
    """Return one of the servers for each direction: it doesn't know who speaks."""
    return servers["redis7" if "calls_python" in request.node.name else "valkey8"]


def options_of(dialect: str) -> dict[str, Any]:
    """Return the options of a Python peer that speaks like a TypeScript peer."""
    if dialect == "kkrpc-2":
        return {"dialect": "kkrpc-2"}
    return {"dialect": "kkrpc-0", "superjson": dialect == "kkrpc-0-superjson"}


@asynccontextmanager
async def node(directory: Path, script: str, *args: str) -> AsyncIterator[Any]:
    """Run a script that says when it is ready; end it at the end."""
    command = ["node", str(directory / script), *args]
    async with await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=None) as process:
        try:
            assert process.stdout is not None
            lines = TextReceiveStream(process.stdout)
            with anyio.fail_after(BOUND):
                assert await lines.receive() == "ready\n"
            yield process, lines
        finally:
            with suppress(ProcessLookupError):
                process.kill()


async def run_client(directory: Path, script: str, *args: str) -> str:
    """Run a script that checks what Python serves; return what it printed."""
    with anyio.fail_after(BOUND):
        done = await anyio.run_process(["node", str(directory / script), *args], check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


@asynccontextmanager
async def redis_channel(
    url: str, stream: str, api: Any = None, **options: Any
) -> AsyncIterator[RPCChannel]:
    """Open a channel on Redis."""
    async with (
        RedisStreamsTransport(url, stream=stream, **options) as transport,
        RPCChannel(transport, expose=api, timeout=CALL_BOUND) as channel,
    ):
        yield channel


# TypeScript calls Python


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", MODES)
async def test_typescript_calls_python(
    redis_server: RedisServer,
    stream_name: str,
    javascript: Path,
    witness: redis.Redis,
    dialect: str,
    mode: str,
) -> None:
    """A native Python server answers each TypeScript peer in kind; nothing is left behind."""
    group = mode == "group"
    to = "server" if dialect == "kkrpc-2" and not group else "-"
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(
                redis_server.url, stream=stream_name, session_id="server", use_consumer_group=group
            )
        )
        api = await serve(stack, transport)
        output = await run_client(
            javascript, "client.mjs", dialect, "client", to, mode, redis_server.url, stream_name
        )
        assert "reverse ok\n" in output
        assert api._channel is not None
        if dialect != "kkrpc-2":
            with anyio.fail_after(BOUND):
                await api._channel.serve_forever()  # ended by __DESTROY__
        statistics = api._channel.statistics()
        assert statistics.handlers == statistics.outgoing_streams == 0
        assert transport.statistics().invalid == 0
        if group:
            with anyio.fail_after(BOUND):
                while witness.xpending(stream_name, "kkrpc-group")["pending"]:
                    await anyio.sleep(0.005)


@pytest.mark.parametrize("mode", MODES)
async def test_one_worker_serves_every_dialect_at_once(
    redis_server: RedisServer, stream_name: str, javascript: Path, mode: str
) -> None:
    """Native, kkrpc 2 and kkrpc 0.x clients call at the same time.

    The kkrpc 2 client is in Python: a TypeScript one would destroy what kkrpc 0.x peers read, since
    it writes no newlines.
    """
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(
                redis_server.url,
                stream=stream_name,
                use_consumer_group=mode == "group",
                honor_destroy_signal=False,
            )
        )
        await serve(stack, transport)
        clients = [
            await stack.enter_async_context(
                redis_channel(redis_server.url, stream_name, dialect=dialect)
            )
            for dialect in ("native", "kkrpc-2")
        ]
        async with anyio.create_task_group() as group:
            for dialect in CLASSIC:
                args = (dialect, dialect, "-", "pair", redis_server.url, stream_name)
                group.start_soon(run_client, javascript, "pair.mjs", *args)
            for number in range(50):
                for client in clients:
                    assert await client.get_api().add(number, 1) == number + 1
        assert transport.statistics().invalid == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_many_workers_share_what_typescript_asks(
    redis_server: RedisServer, stream_name: str, javascript: Path, dialect: str
) -> None:
    """Calls, callbacks and streams reach the right one of two workers."""
    async with AsyncExitStack() as stack:
        apis = []
        for _ in range(2):
            transport = await stack.enter_async_context(
                RedisStreamsTransport(redis_server.url, stream=stream_name, use_consumer_group=True)
            )
            apis.append(await serve(stack, transport))
        async with anyio.create_task_group() as group:
            for client in ("one", "two"):
                # To kkrpc 2, the group is one peer.
                args = (dialect, client, "kkrpc-group", "pair", redis_server.url, stream_name)
                group.start_soon(run_client, javascript, "pair.mjs", *args)
        for api in apis:
            assert api._channel is not None
            assert api._channel.statistics().served


@pytest.mark.parametrize("dialect", CLASSIC)
async def test_released_kkrpc_calls_python(
    redis_server: RedisServer, stream_name: str, javascript: Path, dialect: str
) -> None:
    """kkrpc 0.2.2's own channel calls Python over Redis."""
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            RedisStreamsTransport(redis_server.url, stream=stream_name)
        )
        await serve(stack, transport)
        args = (dialect, "client", redis_server.url, stream_name)
        await run_client(javascript, "released.mjs", *args)
        assert transport.statistics().invalid == 0


# Python calls TypeScript


async def check_calls(channel: RPCChannel, dialect: str, *, silent: bool) -> None:
    """Call all that ``api.mjs`` has."""
    api = channel.get_api()
    classic = dialect != "kkrpc-2"
    assert await api.add(7, 8) == 15
    assert await api.math.grade1.add(5, 3) == 8
    value = {"a": [1, 2.5, None, True, "", [], {}], "k.e y": {"d\\ot.": 1}, "héllo 🚀": "\n"}
    assert await api.echo(value) == value
    assert await api.nothing() is None
    missing = "null" if dialect == "kkrpc-0-json" else "you"
    assert await api.greet(UNDEFINED, "hi") == f"hi {missing}"
    kept = "true undefined" if dialect == "kkrpc-0-superjson" else "false null"
    assert await api.has({"u": UNDEFINED, "list": [UNDEFINED]}) == kept
    large = "ü" * (1 << 19)
    assert await api.echo(large) == large

    async def add(number: int) -> None:
        assert await api.add(number, 1) == number + 1

    async with anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(add, number)

    assert await api.counter == 42
    assert await api.settings.theme == "light"
    await channel.set_property("settings.theme", "dark")
    assert await api.settings.theme == "dark"
    assert await channel.construct("Counter", 5) == {"value": 5}

    steps: list[int] = []
    assert await api.withProgress(3, steps.append) == 3
    assert await api.withProgress(1, steps.append) == 1
    assert steps == [1, 2, 3, 1]

    assert [item async for item in api.countTo(0)] == []
    assert [item async for item in api.countTo(40)] == list(range(1, 41))
    closed = await api.closed()
    async with api.slowCount(100_000, 1) as items:
        assert await items.__anext__() == 1
    with anyio.fail_after(BOUND):
        while await api.closed() == closed:
            await anyio.sleep(0.005)
    received = []
    with pytest.raises(RemoteError, match="stream broke") as failed:
        async for item in api.failStream(2):
            received.append(item)
    assert received == [1, 2]
    assert failed.value.name == ("CustomError" if classic else "Error")

    with pytest.raises(RemoteError) as simple:
        await api.throwSimple()
    assert (simple.value.name, simple.value.message) == ("Error", "This is a simple error")
    with pytest.raises(RemoteError) as custom:
        await api.throwCustom()
    assert custom.value.name == "CustomError"
    assert custom.value.message == "This is a custom error\nof two lines 🚀"
    assert custom.value.data == {"code": 418}

    if silent:
        with pytest.raises(RPCTimeoutError):
            await with_call_options(api, timeout=0.3).nope(1)
    else:
        for call in (api.nope(1), api.nope.deep(1), channel.construct("Nope")):
            with pytest.raises(MethodNotFoundError):
                await call

    assert await api.callPeer("hello", "bob") == "hi bob"
    with pytest.raises(TypeError, match="keyword"):
        await api.add(a=1, b=2)
    if classic:
        with pytest.raises(TypeError, match="streams as arguments"):
            await api.sum(_numbers(3))
        with pytest.raises(TypeError, match="__callback__"):
            await api.echo("__callback__x")
        with pytest.raises(TypeError, match="dot"):
            await api["dotted.name"]()
    else:
        assert await api.sum(_numbers(50)) == 1275
        assert await api["dotted.name"]() == "dotted"
        meta = {"traceparent": "00-1-2-01"}
        assert await with_call_options(api, metadata=meta).meta() == meta
        assert await api.hold(steps.append) is True
        assert channel.statistics().callbacks == 1
    if dialect != "kkrpc-0-superjson":
        with pytest.raises(TypeError, match=r"2\*\*53"):
            await api.echo([2**53])
    with anyio.fail_after(BOUND):
        while channel.statistics().incoming_streams:
            await anyio.sleep(0.005)
    assert channel.statistics().calls == channel.statistics().outgoing_streams == 0


async def _numbers(n: int) -> AsyncIterator[int]:
    for number in range(1, n + 1):
        yield number


async def check_types(api: Any) -> None:
    """Send and get back what superjson carries."""
    moment = datetime(2024, 2, 3, 4, 5, 6, 789000, tzinfo=timezone.utc)
    loop: dict[str, Any] = {"name": "loop"}
    loop["self"] = loop
    shared = {"v": 1}
    for value, name in [
        (moment, "Date"),
        (2**70, "BigInt"),
        (-(2**60), "BigInt"),
        (2**53 - 1, "Number"),
        (float("inf"), "Number"),
        ({1, "two"}, "Set"),
        ({1: "a", "b": [2]}, "Map"),
        (Map(only="text"), "Map"),
        (b"\x01\xff", "Uint8Array"),
        (array("d", [1.5, -2.0]), "Float64Array"),
        (URL("http://example.com/a?b=c"), "URL"),
        (re.compile("x+y", re.IGNORECASE), "RegExp"),
        (None, "null"),
        ({"a.b": {"c\\d": moment}, "list": [{1}]}, "Object"),
    ]:
        back = await api.echo(value)
        assert back == value or back.pattern == value.pattern
        assert await api.typeOf(value) == name
    nan = await api.echo(float("nan"))
    assert nan != nan
    error = await api.echo(ValueError("boom"))
    assert isinstance(error, RemoteError)
    assert (error.name, error.message) == ("ValueError", "boom")
    back = await api.echo(loop)
    assert back["self"] is back
    assert await api.sameObject({"x": shared, "y": [shared]}) is True
    back = await api.echo({"x": shared, "y": [shared]})
    assert back["x"] is back["y"][0]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", MODES)
async def test_python_calls_typescript(
    redis_server: RedisServer, stream_name: str, javascript: Path, dialect: str, mode: str
) -> None:
    """A Python client speaks as a TypeScript peer does, in either mode of its own."""
    options = options_of(dialect)
    async with node(javascript, "server.mjs", dialect, "server", redis_server.url, stream_name) as (
        process,
        lines,
    ):
        if dialect == "kkrpc-2" and mode == "broadcast":
            options["remote_peer_id"] = "server"
        # A TypeScript peer knows no inbox: it takes its part of the group's requests itself.
        async with redis_channel(
            redis_server.url, stream_name, Api(), use_consumer_group=False, **options
        ) as channel:
            await check_calls(channel, dialect, silent=dialect != "kkrpc-2")
            if dialect == "kkrpc-0-superjson":
                await check_types(channel.get_api())
            if dialect == "kkrpc-2":
                assert await channel.get_api().letGo() is True
                with anyio.fail_after(BOUND):
                    while channel.statistics().callbacks:
                        await anyio.sleep(0.005)
                return
            assert await channel.get_api().dropped() == 0
            transport: Any = channel._transport
            if mode == "broadcast":
                await transport.signal_destroy()
                with anyio.fail_after(BOUND):
                    assert await lines.receive() == "destroyed\n"
                    await process.wait()
            else:
                # The signal may be here before Redis has confirmed what called for it.
                with anyio.move_on_after(BOUND), suppress(TransportClosedError):
                    await with_call_options(channel.get_api(), reply=False).signalDestroy()
                    await channel.serve_forever()
                with pytest.raises(TransportClosedError, match="destroy signal"):
                    await channel.get_api().add(1, 2)


async def test_stream_without_backpressure_is_bounded(
    redis_server: RedisServer, stream_name: str, javascript: Path
) -> None:
    """What a slow reader doesn't take is cancelled at its source, and fails after what it has."""
    async with (
        node(javascript, "server.mjs", "kkrpc-0-json", "server", redis_server.url, stream_name),
        redis_channel(redis_server.url, stream_name, dialect="kkrpc-0", max_queue_size=100) as (
            channel
        ),
    ):
        api = channel.get_api()
        received = []
        with pytest.raises(OverloadedError, match="cancelled"):
            async with api.countTo(20_000) as items:
                received.append(await items.__anext__())
                while not await api.closed():
                    pass
                async for item in items:
                    received.append(item)
        assert received == list(range(1, len(received) + 1))
        assert 100 <= len(received) < 1000
        assert await api.add(1, 2) == 3


@pytest.mark.parametrize("dialect", CLASSIC)
async def test_python_calls_released_kkrpc(
    redis_server: RedisServer, stream_name: str, javascript: Path, dialect: str
) -> None:
    """Python calls kkrpc 0.2.2's own channel over Redis, which calls back."""
    args = (dialect, "server", redis_server.url, stream_name)
    async with (
        node(javascript, "released.mjs", *args),
        redis_channel(redis_server.url, stream_name, Api(), **options_of(dialect)) as channel,
    ):
        await check_released(channel, rich=dialect == "kkrpc-0-superjson")


async def check_released(channel: RPCChannel, *, rich: bool) -> None:
    """Call all that kkrpc 0.2.2 can."""
    api = channel.get_api()
    assert await api.add(7, 8) == 15
    assert await api.math.grade1.add(5, 3) == 8
    steps: list[int] = []
    assert await api.withProgress(3, steps.append) == 3
    assert steps == [1, 2, 3]
    assert await api.callPeer("hello", "bob") == "hi bob"
    with pytest.raises(RemoteError, match=r"of 0\.2\.2"):
        await api.fail()
    large = "x" * (1 << 20)
    assert await api.echo(large) == large
    assert await api.nothing() is None
    assert await api.greet(UNDEFINED) == ("hello you" if rich else "hello null")
    if rich:
        assert await api.echo({"u": [UNDEFINED, None]}) == {"u": [UNDEFINED, None]}
        value = {"when": datetime.fromtimestamp(0, timezone.utc), "m": {1: {2}}, "big": 2**70}
        assert await api.echo(value) == value
    else:
        assert await api.echo(b"\x01\xff") == b"\x01\xff"


# stdio


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_python_calls_a_child_process(javascript: Path, dialect: str) -> None:
    """A TypeScript peer is the child, and serves over its stdio."""
    command = ["node", str(javascript / "server.mjs"), dialect, "server", "stdio"]
    async with (
        open_process(command, **options_of(dialect)) as transport,
        RPCChannel(transport, expose=Api(), timeout=CALL_BOUND) as channel,
    ):
        await check_calls(channel, dialect, silent=False)
        if dialect == "kkrpc-0-superjson":
            await check_types(channel.get_api())


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_child_process_calls_python(javascript: Path, dialect: str) -> None:
    """A TypeScript peer is the child, and calls over its stdio a Python that wasn't told."""
    script = str(javascript / "client.mjs")
    command = ["node", script, dialect, "client", "-", "stdio", "stdio"]
    options = {"dialect": "kkrpc-2"} if dialect == "kkrpc-2" else {}
    async with (
        AsyncExitStack() as stack,
        await anyio.open_process(command) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        stream: Any = anyio.streams.stapled.StapledByteStream(process.stdin, process.stdout)
        transport = await stack.enter_async_context(ByteStreamTransport(stream, **options))
        await serve(stack, transport)
        with anyio.fail_after(BOUND):
            output = "".join([text async for text in TextReceiveStream(process.stderr)])
        assert output == "all ok\n"
        assert transport.statistics().invalid == 0


@pytest.mark.parametrize("dialect", CLASSIC)
@pytest.mark.parametrize("role", ["server", "client"])
async def test_released_kkrpc_as_child_process(javascript: Path, dialect: str, role: str) -> None:
    """kkrpc 0.2.2's own NodeIo over stdio, in both directions."""
    command = ["node", str(javascript / "released.mjs"), dialect, role, "stdio"]
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(await anyio.open_process(command))
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        stream: Any = anyio.streams.stapled.StapledByteStream(process.stdin, process.stdout)
        options = options_of(dialect) if role == "server" else {}
        transport = await stack.enter_async_context(ByteStreamTransport(stream, **options))
        api = await serve(stack, transport)
        assert api._channel is not None
        if role == "server":
            await check_released(api._channel, rich=dialect == "kkrpc-0-superjson")
            process.kill()
            return
        with anyio.fail_after(BOUND):
            output = "".join([text async for text in TextReceiveStream(process.stderr)])
        assert output == "all ok\n"


def test_packages_are_pinned(javascript: Path) -> None:
    """The peers are the versions whose wire was recorded."""
    for name, version in {"kkrpc": "0.2.2", "superjson": "2.2.6", "ioredis": "5.11.1"}.items():
        package = json.loads((javascript / "node_modules" / name / "package.json").read_text())
        assert package["version"] == version
