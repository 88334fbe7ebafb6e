"""The links that each case runs over: every transport, and every codec on some of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import anyio
import pytest

from anyio_kkrpc import (
    MemoryTransport,
    RedisStreamsTransport,
    RPCChannel,
    expose,
)
from anyio_kkrpc.abc import Transport
from tests.bounds import CALL_BOUND
from tests.websocket.test_parts import transports as websockets

from .api import Api

WRITABLE = ("settings.theme", "settings.size", "limits.plain")


class Link(NamedTuple):
    """Two channels that talk to each other."""

    client: RPCChannel
    server: RPCChannel
    api: Any
    served: Api
    transports: tuple[Any, Any]


Connect = Callable[..., AbstractAsyncContextManager[tuple[Transport, Transport]]]
Open = Callable[..., AbstractAsyncContextManager[Link]]

LINKS = ["memory", "memory-json", "memory-cbor", "tcp-json", "tcp-cbor", "websocket-json"]
# Each pair of server, mode and codec occurs. All three at once can't differ: what is in an entry is
# nothing to a server, and what a server and a mode do is tested in tests/redis and tests/faults.
REDIS_LINKS = {
    "valkey8": ["broadcast-cbor", "group-json"],
    "redis7": ["broadcast-json", "group-cbor"],
}
# A client that speaks as a TypeScript peer does, to a native server.
DIALECT_LINKS = ["broadcast-kkrpc_0", "group-kkrpc_2"]
# Cases that are about what a dialect lacks. What becomes of it there, tests/typescript tells.
BOTH_LACK = {
    *("test_arguments", "test_construct", "test_wrong_arguments"),  # keyword arguments
    *("test_callback", "test_failing_callback"),  # keyword arguments of callbacks
    *("test_callback_after_the_call",),  # a release at once
    *("test_timeout_cancels_the_handler", "test_budget_travels", "test_cancel_while_it_runs"),
    *("test_plain_values", "test_unknown_names"),  # large integers, silence or error
    *("test_contract",),  # records that arrive to the letter
}
LACKING = {
    "kkrpc_2": {
        *BOTH_LACK,
        *("test_failing_stream", "test_error_cause_and_traceback"),  # fields, causes
    },
    "kkrpc_0": {
        *BOTH_LACK,
        *("test_empty_streams", "test_stream_argument", "test_stream_argument_left_early"),
        *("test_stream_argument_of_a_call_that_fails", "test_ping_pong", "test_pushback"),
        *("test_rich_values",),  # microseconds
        *("test_error_messages",),  # an empty one
        *("test_metadata", "test_reverse_call_nested_five_deep"),  # addresses
    },
}


@asynccontextmanager
async def _memory(codec: str | None) -> AsyncIterator[tuple[Transport, Transport]]:
    a, b = MemoryTransport.pair(codec=codec)
    async with a, b:
        yield a, b


@asynccontextmanager
async def _tcp(codec: str) -> AsyncIterator[tuple[Transport, Transport]]:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        accepted: list[Any] = []

        async def accept() -> None:
            accepted.append(await listener.listeners[0].accept())  # type: ignore[attr-defined]

        async with anyio.create_task_group() as group:
            group.start_soon(accept)
            stream = await anyio.connect_tcp("127.0.0.1", port)
        from anyio_kkrpc.transports.bytestream import ByteStreamTransport

        async with (
            ByteStreamTransport(stream, codec=codec) as client,
            ByteStreamTransport(accepted[0], codec=codec) as server,
        ):
            yield client, server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a case that takes ``open_link`` over each link."""
    if "connect" in metafunc.fixturenames:
        from tests.servers import marks_of

        links: list[Any] = [pytest.param((name, None), id=name) for name in LINKS]
        links += [
            pytest.param((name, server), id=f"{server}-{name}", marks=marks_of(server))
            for server, names in REDIS_LINKS.items()
            for name in names
        ]
        links += [
            pytest.param((name, "valkey8"), id=f"valkey8-{name}", marks=marks_of("redis7"))
            for name in DIALECT_LINKS
            if metafunc.function.__name__ not in LACKING[name.partition("-")[2]]
        ]
        metafunc.parametrize("connect", links, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out WebSockets on two of three loops: what they do there, their own tests try."""
    items[:] = [
        item
        for item in items
        if "-websocket-" not in item.name
        or "[trio" in item.name
        or "conformance" not in item.nodeid
    ]


@pytest.fixture
def connect(request: pytest.FixtureRequest, stream_name: str) -> Connect:
    """Return what opens two connected transports; options go to Redis' only."""
    name, server = request.param
    kind, _, codec = name.partition("-")
    if kind == "memory":
        return lambda **_: _memory(codec or None)
    if kind == "tcp":
        return lambda **_: _tcp(codec)
    if kind == "websocket":
        return lambda **_: websockets(codec=codec)
    url = request.getfixturevalue("servers")[server].url

    @asynccontextmanager
    async def redis(**options: Any) -> AsyncIterator[tuple[Transport, Transport]]:
        options = {"stream": stream_name, "use_consumer_group": kind == "group", **options}
        own: dict[str, Any] = {"codec": codec}
        if codec.startswith("kkrpc"):
            own = {"dialect": codec.replace("_", "-")}
        async with (
            RedisStreamsTransport(url, **options, **({} if "dialect" in own else own)) as server,
            RedisStreamsTransport(url, **options, **own) as client,
        ):
            yield client, server

    return redis


@pytest.fixture
def open_link(connect: Connect) -> Open:
    """Return what opens two channels, the second of which serves `Api`."""

    @asynccontextmanager
    async def open_(
        *,
        serve_client: bool = False,
        server_options: dict[str, Any] | None = None,
        transport_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[Link]:
        served = Api()
        options.setdefault("timeout", CALL_BOUND)
        async with AsyncExitStack() as stack:
            a, b = await stack.enter_async_context(connect(**(transport_options or {})))
            server = await stack.enter_async_context(
                RPCChannel(b, expose=expose(served, writable=WRITABLE), **(server_options or {}))
            )
            served._channel = server
            own = None
            if serve_client:
                own = Api()
            client = await stack.enter_async_context(RPCChannel(a, expose=own, **options))
            if own is not None:
                own._channel = client
            to = getattr(b, "session_id", None)
            yield Link(
                client, server, client.get_api(to=to if serve_client else None), served, (a, b)
            )

    return open_


@pytest.fixture
def is_broadcast(request: pytest.FixtureRequest) -> bool:
    """Whether the link is a broadcast, where unknown names are met with silence."""
    return "broadcast" in request.node.callspec.id


@pytest.fixture
def is_cbor(request: pytest.FixtureRequest) -> bool:
    """Whether the link carries rich types without annotations."""
    return "cbor" in request.node.callspec.id


@pytest.fixture
def carries_objects(request: pytest.FixtureRequest) -> bool:
    """Whether the link passes objects as they are, because it has no codec."""
    return bool(request.node.callspec.params["connect"][0] == "memory")
