"""Records what peers write: every entry, whoever adds it and wherever, as MONITOR shows it.

    PYTHONPATH=<the version to record> python tests/wire/record.py vectors/native-<version>.jsonl

A word behind that records only the cases that begin with it: of version 3 those with ``together``
and ``references``, since all other entries are as before.

Only the public names of the package are used, so that any version can be recorded. A line holds
``case``, what the peers did; ``key``, ``stream``, ``control``, ``dead`` or ``inbox:<session id>``;
``fields``, names and values in their order, where a value is text or ``{"hex": ...}``; and
``record``, what that version reads from it: the class, and each member as Python writes it. Where
an entry has several records, ``behind`` holds those that follow the first.
"""

from __future__ import annotations

import datetime
import decimal
import json
import re
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import redis
from msgspec import UNSET

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCError,
    expose,
    with_call_options,
)
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.testing import RedisServer

STREAM = "wire"
KEY = b"a secret of sixteen bytes"
_ARGUMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


class OwnError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = 418


class Api:
    """What is called."""

    class Counter:
        def __init__(self, start: int) -> None:
            self.start = start

    def __init__(self) -> None:
        self.theme = "light"
        self.running = anyio.Event()

    def add(self, a: int, b: int) -> int:
        return a + b

    def echo(self, value: Any = None) -> Any:
        return value

    def fail(self) -> None:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise OwnError("it failed") from exc

    def checked(self, n: int) -> int:
        return n

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def one(self) -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async def fail_later(self) -> AsyncIterator[int]:
        yield 1
        raise OwnError("it failed later")

    async def total(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    async def call_back(self, function: Callable[..., Awaitable[None]]) -> str:
        await function(1)
        await function("two", key=True)
        return "called"

    async def hang(self) -> None:
        self.running.set()
        await anyio.sleep_forever()


class Tap:
    """Collects the entries that are added, as MONITOR shows them."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"MONITOR\r\n")
        self._lines.readline()
        self._marks = 0
        self._seen = threading.Semaphore(0)
        self._added: list[tuple[bytes, list[bytes]]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._lines:
            command = [unescape(text) for text in _ARGUMENT.findall(line)]
            if command[:1] == [b"ECHO"]:
                self._seen.release()
            elif command[:1] == [b"XADD"] and b"*" in command:  # others ask for rights only
                self._added.append((command[1], command[command.index(b"*") + 1 :]))

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._lines.close()
        self._socket.close()
        self._client.close()

    def take(self) -> list[tuple[bytes, list[bytes]]]:
        """Return what was added since the last time."""
        self._client.echo("mark")
        assert self._seen.acquire(timeout=10)
        added, self._added = self._added, []
        return added


def unescape(text: bytes) -> bytes:
    def one(match: re.Match[bytes]) -> bytes:
        if match[1]:
            return bytes([int(match[1], 16)])
        return _ESCAPES.get(match[2], match[2])

    return _ESCAPE.sub(one, text)


def describe(record: Any) -> dict[str, str]:
    """Return class and members of a record; members that are absent are left out."""
    members = {name: getattr(record, name) for name in record.__struct_fields__}
    return {
        "class": type(record).__name__,
        **{name: repr(value) for name, value in members.items() if value is not UNSET},
    }


def as_line(case: str, key: bytes, fields: list[bytes]) -> dict[str, Any]:
    pairs = list(zip(fields[::2], fields[1::2], strict=True))
    line: dict[str, Any] = {
        "case": case,
        "key": "stream" if key == STREAM.encode() else key.decode().split(":", 1)[1],
        "fields": [[as_text(name), as_text(value)] for name, value in pairs],
    }
    if pairs[0][0] == b"from":
        name, data = pairs[1]
        line["record"] = describe(get_codec(name.decode()).decode(data))
        behind = pairs[4:] if len(pairs) > 4 and pairs[3][0] == b"v" else []
        others = [pair for pair in behind if pair[0] in (b"json", b"cbor")]
        if others:
            line["behind"] = [describe(get_codec(n.decode()).decode(d)) for n, d in others]
    return line


def as_text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"hex": value.hex()}


@asynccontextmanager
async def peers(
    url: str, api: Any = None, *, codec: str = "json", **options: Any
) -> AsyncIterator[tuple[RPCChannel, RPCChannel | None]]:
    """Open a client and, if there is something to serve, a worker."""
    options = {"use_consumer_group": True, **options}
    async with AsyncExitStack() as stack:
        served = None
        if api is not None:
            transport = RedisStreamsTransport(url, stream=STREAM, session_id="worker", **options)
            await stack.enter_async_context(transport)
            served = await stack.enter_async_context(RPCChannel(transport, expose=api))
        transport = RedisStreamsTransport(
            url, stream=STREAM, session_id="client", codec=codec, **options
        )
        await stack.enter_async_context(transport)
        yield await stack.enter_async_context(RPCChannel(transport, timeout=30)), served


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.01)


def values(codec: str) -> list[Any]:
    plain = [None, True, 0, -(2**53), 1.5, "text \u20ac \U0001f600", [1, [2]], {"a": {"b": None}}]
    if codec == "json":
        return [*plain, {"__kkrpc_next_arg__": "callback", "id": "1"}]
    moment = datetime.datetime(2026, 11, 27, 3, 4, 5, tzinfo=datetime.timezone.utc)
    return [*plain, b"\x00\xff", moment, decimal.Decimal("1.10"), 2**70]


async def calls(url: str, codec: str, **options: Any) -> None:
    async with peers(url, Api(), codec=codec, **options) as (channel, _):
        api = channel.get_api()
        await api.add(1, b=2)
        for value in values(codec):
            await api.echo(value)
        await api.echo()
        assert await api.theme == "light"
        await with_call_options(api, metadata={"traceparent": "00-1-2-03"}).echo(1)
        await with_call_options(api, reply=False).echo("nobody waits")
        await with_call_options(api, timeout=None).echo("as long as it takes")
        await channel.get_api(to="worker").echo("addressed")


async def writes(url: str, codec: str) -> None:
    async with peers(url, expose(Api(), writable=["theme"]), codec=codec) as (channel, _):
        await channel.set_property("theme", "dark")
        await channel.construct("Counter", 5)


async def errors(url: str, codec: str) -> None:
    async with peers(url, Api(), codec=codec) as (channel, _):
        for name, arguments in [("fail", []), ("nothing", []), ("checked", ["no number"])]:
            try:
                await getattr(channel.get_api(), name)(*arguments)
            except (RemoteError, RPCError):
                pass


async def streams(url: str, codec: str) -> None:
    async with peers(url, Api(), codec=codec) as (channel, _):
        api = channel.get_api()
        assert [item async for item in api.count(3)] == [0, 1, 2]
        async with api.one() as items:
            async for _ in items:
                break
        try:
            async for _ in api.fail_later():
                pass
        except RemoteError:
            pass

        async def numbers() -> AsyncIterator[int]:
            for number in range(3):
                yield number

        assert await api.total(numbers()) == 3


async def callbacks(url: str, codec: str) -> None:
    heard: list[Any] = []

    async with peers(url, Api(), codec=codec) as (channel, _):
        assert await channel.get_api().call_back(lambda *a, **k: heard.append((a, k))) == "called"
    assert heard == [((1,), {}), (("two",), {"key": True})]


async def together(url: str, codec: str, **options: Any) -> None:
    """Replies, items and callbacks of calls that are made at the same time."""
    async with peers(url, Api(), codec=codec, **options) as (channel, _):
        api = channel.get_api()

        async def read() -> None:
            assert [item async for item in api.count(3)] == [0, 1, 2]

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(api.echo, number)
                group.start_soon(read)
                group.start_soon(api.call_back, lambda *a, **k: None)


async def references(url: str, codec: str) -> None:
    """An object of the worker is used and released; one of the client is passed."""
    from anyio_kkrpc import by_reference

    class Owner(Api):
        def given(self) -> Any:
            return {"inner": by_reference(self), "like it": {"__kkrpc_ref__": True}}

        async def use(self, thing: Any) -> Any:
            return await thing["echo"]("used")

    async with peers(url, Owner(), codec=codec) as (channel, served):
        assert served is not None
        thing = (await channel.get_api().given())["inner"]
        assert await thing.add(1, b=2) == 3
        assert await thing.theme == "light"
        assert await channel.get_api().use(by_reference(Api())) == "used"
        del thing
        await until(lambda: not served.statistics().references_given)


async def cancels(url: str, codec: str) -> None:
    for to in (None, "worker"):
        api = Api()
        async with peers(url, api, codec=codec) as (channel, _), anyio.create_task_group() as group:
            group.start_soon(channel.get_api(to=to).hang)
            await api.running.wait()
            await anyio.sleep(0.1)  # until the client knows the id of its entry
            group.cancel_scope.cancel()


async def bye(url: str, codec: str) -> None:
    async with peers(url, Api(), codec=codec) as (_, served):
        assert served is not None
        async with RedisStreamsTransport(
            url, stream=STREAM, session_id="third", codec=codec
        ) as third:
            await third.signal_destroy()
        await until(lambda: served.closed)


async def hints(url: str, codec: str) -> None:
    """A worker that leaves gives back what it holds; a kkrpc 0.x peer comes, and ends all."""
    api = Api()
    async with AsyncExitStack() as stack:
        channel, _ = await stack.enter_async_context(peers(url, codec=codec))
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().hang)
            leaving = RedisStreamsTransport(
                url, stream=STREAM, session_id="worker", use_consumer_group=True
            )
            async with leaving, RPCChannel(leaving, expose=api):
                await api.running.wait()
            group.cancel_scope.cancel()
    async with AsyncExitStack() as stack:
        _, served = await stack.enter_async_context(peers(url, Api(), codec=codec))
        other = await stack.enter_async_context(
            RedisStreamsTransport(url, stream=STREAM, session_id="typescript", dialect="kkrpc-0")
        )
        channel = await stack.enter_async_context(RPCChannel(other, timeout=30))
        assert served is not None
        await channel.get_api().add(1, 2)
        with redis.Redis.from_url(url) as client:
            client.xadd(STREAM, {"data": "__DESTROY__", "sessionId": "typescript"})
        await until(lambda: served.closed)


async def dead_letters(url: str, codec: str, **options: Any) -> None:
    """Somebody took a request and was never seen again."""
    with redis.Redis.from_url(url) as client:
        client.xgroup_create(STREAM, "kkrpc-group", "0", mkstream=True)
        async with peers(url, codec=codec, **options) as (channel, _):
            failed: list[DeliveryError] = []

            async def call() -> None:
                try:
                    await channel.get_api().add(1, 2)
                except DeliveryError as exc:
                    failed.append(exc)

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await until(
                    lambda: client.xreadgroup("kkrpc-group", "gone", {STREAM: ">"}, count=1)
                )
                async with (
                    RedisStreamsTransport(
                        url,
                        stream=STREAM,
                        session_id="worker",
                        use_consumer_group=True,
                        claim_idle=0.1,
                        max_deliveries=1,
                        **options,
                    ) as transport,
                    RPCChannel(transport, expose=Api()),
                ):
                    await until(lambda: failed)


Case = Callable[[], Awaitable[None]]


def cases(url: str) -> Iterator[tuple[str, Case]]:
    for codec in ("json", "cbor"):
        for act in (calls, writes, errors, streams, callbacks, cancels, bye, dead_letters):
            yield f"{act.__name__} {codec}", lambda act=act, codec=codec: act(url, codec)  # type: ignore[misc]
        yield (
            f"calls signed {codec}",
            lambda codec=codec: calls(url, codec, signing_key=KEY),  # type: ignore[misc]
        )
        yield (
            f"dead_letters signed {codec}",
            lambda codec=codec: dead_letters(url, codec, signing_key=KEY),  # type: ignore[misc]
        )
        yield f"together {codec}", lambda codec=codec: together(url, codec)  # type: ignore[misc]
        yield (
            f"together signed {codec}",
            lambda codec=codec: together(url, codec, signing_key=KEY),  # type: ignore[misc]
        )
        yield f"references {codec}", lambda codec=codec: references(url, codec)  # type: ignore[misc]
    yield "calls broadcast json", lambda: calls(url, "json", use_consumer_group=False)
    yield "hints json", lambda: hints(url, "json")


def main(out: Path, only: str = "") -> None:
    with (
        RedisServer() as server,
        redis.Redis.from_url(server.url) as client,
        Tap(server.port) as tap,
        out.open("w") as file,
    ):
        for case, act in cases(server.url):
            if not case.startswith(only):
                continue
            anyio.run(act)
            for key, fields in tap.take():
                file.write(json.dumps(as_line(case, key, fields)) + "\n")
            client.flushall()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
