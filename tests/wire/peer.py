"""A peer that any version of the package can be: what it serves, and all that it asks.

    PYTHONPATH=<the version> python tests/wire/peer.py '{"role": "serve", "backend": "asyncio", ...}'

It says ``ready`` and where its package is, acts until it is done or its standard input ends, and
then tells as JSON what came of it. Only public names of the package are used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from anyio import to_thread

import anyio_kkrpc
from anyio_kkrpc import (
    MethodNotFoundError,
    RedisStreamsTransport,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    current_call,
    expose,
    with_call_options,
)

# As in tests.bounds, which isn't there when an older version is run.
BOUND = 100
CALL_BOUND = 250
# What `exercise` finds, whoever serves; in a broadcast a peer without the method is silent.
EXPECTED: dict[str, Any] = {
    "calls": [3, {"a": [None, "\u20ac"]}, "served", "light", {"start": 5}],
    "theme": "dark",
    "one way": 1,
    "addressed": 7,
    "error": ["OwnError", "it failed", {"code": 418}, "inner"],
    "validation": ["input", "checked"],
    "not found": "MethodNotFoundError",
    "callbacks": ["called", [[[1], {}], [["two"], {"key": True}]]],
    "stream": [0, 1, 2],
    "long stream": 499_500,
    "left early": [0],
    "failing stream": [[1], "OwnError"],
    "stream argument": 499_500,
    "timeout": "RPCTimeoutError",
    # Running handlers that were cancelled: by a timeout, by leaving, by leaving an addressed call.
    "cancelled": 3,
}


class OwnError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = 418


class Math:
    def add(self, a: int, b: int) -> int:
        return a + b


class Api:
    """What is called."""

    class Counter:
        def __init__(self, start: int) -> None:
            self.start = start

    def __init__(self, name: str = "served") -> None:
        self.theme = "light"
        self.math = Math()
        self._name = name
        self._noted = self._running = self._cancelled = 0

    def who(self) -> str:
        return self._name

    def echo(self, value: Any = None) -> Any:
        return value

    def note(self) -> None:
        self._noted += 1

    def noted(self) -> int:
        return self._noted

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
        self._running += 1
        try:
            await anyio.sleep_forever()
        except BaseException:
            self._cancelled += 1
            raise

    def running(self) -> int:
        return self._running

    def cancelled(self) -> int:
        return self._cancelled

    async def hang_once(self) -> list[Any]:
        attempt = current_call().attempt
        if attempt == 1 and self._running == 0:
            await self.hang()
        return [self._name, attempt]


async def until_equal(ask: Callable[[], Awaitable[Any]], expected: int) -> int:
    """Ask until the answer is as expected; return the answer."""
    with anyio.move_on_after(BOUND):
        while (found := await ask()) != expected:
            await anyio.sleep(0.01)
    return int(found)


def in_plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


async def exercise(url: str, codec: str, *, worker: str, grouped: bool, **options: Any) -> Any:
    """Ask one worker for everything; return what came of it, and whether all could be read.

    :param worker: its session id
    """
    async with (
        RedisStreamsTransport(url, codec=codec, use_consumer_group=grouped, **options) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        found = await _ask(channel, worker, grouped=grouped)
        statistics = transport.statistics()
        found["invalid"] = statistics.invalid + statistics.undeliverable
        return in_plain(found)


async def _ask(channel: RPCChannel, worker: str, *, grouped: bool) -> dict[str, Any]:
    api, found = channel.get_api(), {}
    found["calls"] = [
        await api.math.add(1, b=2),
        await api.echo({"a": [None, "\u20ac"]}),
        await api.who(),
        await api.theme,
        await channel.construct("Counter", 5),
    ]
    await channel.set_property("theme", "dark")
    found["theme"] = await api.theme
    await channel.set_property("theme", "light")
    before = await api.noted()
    await with_call_options(api, reply=False).note()
    found["one way"] = await until_equal(api.noted, before + 1) - before
    found["addressed"] = await channel.get_api(to=worker).echo(7)
    await _ask_wrongly(api, found, grouped=grouped)
    heard: list[Any] = []
    called = await api.call_back(lambda *args, **kwargs: heard.append([args, kwargs]))
    found["callbacks"] = [called, heard]
    await _stream(api, found)
    await _give_up(channel, worker, found)
    return found


async def _ask_wrongly(api: Any, found: dict[str, Any], *, grouped: bool) -> None:
    try:
        await api.fail()
    except RemoteError as exc:
        cause = exc.__cause__
        assert isinstance(cause, RemoteError)
        found["error"] = [exc.name, exc.message, exc.data, cause.message]
    try:
        await api.checked("no number")
    except RPCValidationError as exc:
        found["validation"] = [exc.phase, exc.method]
    if grouped:
        try:
            await api.nothing()
        except MethodNotFoundError as exc:
            found["not found"] = type(exc).__name__


async def _stream(api: Any, found: dict[str, Any]) -> None:
    found["stream"] = [item async for item in api.count(3)]
    found["long stream"] = sum([item async for item in api.count(1000)])
    found["left early"] = []
    async with api.count(100_000) as items:
        async for item in items:
            found["left early"].append(item)
            break
    taken = []
    try:
        async for item in api.fail_later():
            taken.append(item)
    except RemoteError as exc:
        found["failing stream"] = [taken, exc.name]

    async def numbers() -> AsyncIterator[int]:
        for number in range(1000):
            yield number

    found["stream argument"] = await api.total(numbers())


async def _give_up(channel: RPCChannel, worker: str, found: dict[str, Any]) -> None:
    api = channel.get_api()
    running, cancelled = await api.running(), await api.cancelled()
    try:
        await with_call_options(api, timeout=1).hang()
    except RPCTimeoutError as exc:
        found["timeout"] = type(exc).__name__
    for number, to in enumerate((None, worker), 2):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api(to=to).hang)
            await until_equal(api.running, running + number)
            group.cancel_scope.cancel()
    found["cancelled"] = await until_equal(api.cancelled, cancelled + 3) - cancelled


async def serve(url: str, name: str = "served", *, grouped: bool, **options: Any) -> Any:
    """Serve until standard input or the channel ends; return how that came."""
    ended = "asked to"
    async with (
        RedisStreamsTransport(url, use_consumer_group=grouped, **options) as transport,
        RPCChannel(transport, expose=expose(Api(name), writable=["theme"])) as channel,
        anyio.create_task_group() as group,
    ):

        async def wait_for_end() -> None:
            await to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            group.cancel_scope.cancel()

        group.start_soon(wait_for_end)
        await anyio.sleep(0)
        print("ready", os.path.dirname(anyio_kkrpc.__file__), flush=True)
        await channel.serve_forever()
        ended = "told to by a peer"
        group.cancel_scope.cancel()
    statistics = transport.statistics()
    return {"ended": ended, "invalid": statistics.invalid + statistics.undeliverable}


async def signal_destroy(url: str, **options: Any) -> None:
    """Tell all peers of the stream to end."""
    async with RedisStreamsTransport(url, **options) as transport:
        await transport.signal_destroy()


async def give_up_dead(url: str, **options: Any) -> Any:
    """Take over what a dead worker holds, as a letter; return once it is one."""
    async with (
        RedisStreamsTransport(
            url, use_consumer_group=True, claim_idle=0.05, max_deliveries=1, **options
        ) as transport,
        RPCChannel(transport, expose=Api()),
    ):
        with anyio.fail_after(BOUND):
            while not transport.statistics().dead_lettered:
                await anyio.sleep(0.01)


async def retry_dead(url: str, **options: Any) -> Any:
    """Return what the dead letters tell, and put them back."""
    async with RedisStreamsTransport(url, **options) as transport:
        letters = await transport.dead_letters()
        for letter in letters:
            await transport.retry_dead_letter(letter.id)
        return [
            {
                "entry_id": letter.entry_id,
                "group": letter.group,
                "reason": letter.reason,
                "attempts": letter.attempts,
                "ordered": 0 < letter.first <= letter.last,
                "fields": list(letter.fields),
            }
            for letter in letters
        ]


ROLES = {
    "exercise": exercise,
    "serve": serve,
    "signal_destroy": signal_destroy,
    "give_up_dead": give_up_dead,
    "retry_dead": retry_dead,
}


def main(role: str, backend: str, signing_key: str | None = None, **arguments: Any) -> None:
    if signing_key is not None:
        arguments["signing_key"] = signing_key.encode()
    act = ROLES[role]
    if role != "serve":
        print("ready", os.path.dirname(anyio_kkrpc.__file__), flush=True)
    print(json.dumps(anyio.run(lambda: act(**arguments), backend=backend)), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
