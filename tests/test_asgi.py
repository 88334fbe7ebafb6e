"""The stream of a call with a key over HTTP; browsers are played here, by any ASGI server's rules."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_kkrpc import MemoryTransport, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.abc import ItemBounds
from anyio_kkrpc.asgi import CallEvents, key_of
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Api:
    """A chat that waits after so many words."""

    def __init__(self) -> None:
        self.go = anyio.Event()

    async def chat(self, words: int, wait_after: int = -1) -> AsyncIterator[Any]:
        for number in range(words):
            if number == wait_after:
                await self.go.wait()
            yield {"word": f"{number}\n"}

    async def fail(self) -> AsyncIterator[str]:
        yield "one"
        raise LookupError("no\n\ntea")


class Browser:
    """An EventSource: it takes events, and can be closed.

    :ivar events: name, id and data of each
    """

    def __init__(self, app: Any, path: str, user: str | None = "ann", method: str = "GET") -> None:
        path, _, query = path.partition("?")
        self.app = app
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "root_path": "/chats",
            "query_string": query.encode(),
            "headers": [],
            "user": user,
        }
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.events: list[tuple[str, str, Any]] = []
        self.beats = 0
        self.over = False
        self.closed = anyio.Event()
        self.news = anyio.Event()

    async def run(self, last_id: str | None = None) -> Browser:
        if last_id is not None:
            self.scope["headers"] = [(b"last-event-id", last_id.encode())]
        with anyio.fail_after(BOUND):
            await self.app(self.scope, self.receive, self.send)
        return self

    async def receive(self) -> dict[str, Any]:
        await self.closed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        self.over = not message["more_body"]
        for text in message["body"].decode().split("\n\n")[:-1]:
            lines = dict(line.split(": ", 1) for line in text.split("\n") if line != ":")
            if not lines:
                self.beats += 1
                continue
            data = json.loads(lines["data"]) if lines["data"] else None
            self.events.append((lines.get("event", ""), lines.get("id", ""), data))
        self.news.set()
        self.news = anyio.Event()

    async def has(self, count: int) -> None:
        with anyio.fail_after(BOUND):
            while len(self.events) < count:
                await self.news.wait()

    @property
    def words(self) -> list[str]:
        return [data["word"] for name, _, data in self.events if name == ""]


def user_of(scope: Any) -> Any:
    return scope["user"]


async def async_user_of(scope: Any) -> Any:
    await anyio.lowlevel.checkpoint()
    return scope["user"]


@asynccontextmanager
async def opened(api: Api) -> AsyncIterator[RPCChannel]:
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(a, timeout=BOUND) as channel, RPCChannel(b, expose=api):
        yield channel


def said(count: int) -> list[str]:
    return [f"{number}\n" for number in range(count)]


async def reload_and_more(first: RPCChannel, second: RPCChannel, api: Api) -> None:
    """A page is reloaded, a second browser comes, and the first one's process is left for another.

    :param first: of one web process
    :param second: of another
    """
    one, two = CallEvents(first, user_of), CallEvents(second, async_user_of)
    await first.start(first.get_api().chat(6, 4), key=key_of("ann", "17"))
    async with anyio.create_task_group() as group:
        page = Browser(one, "/chats/17")
        group.start_soon(page.run)
        await page.has(4)
        page.closed.set()
        reloaded = Browser(two, f"/chats/17?after={page.events[1][1]}")
        other = Browser(one, "/chats/17")
        group.start_soon(reloaded.run)
        group.start_soon(other.run)
        await reloaded.has(2)
        await other.has(4)
        api.go.set()
    assert (page.status, reloaded.status, other.status) == (200, 200, 200)
    assert page.words == said(4)
    assert reloaded.words == said(6)[2:]
    assert other.words == said(6)
    assert not page.events[4:]
    assert other.events[:4] == page.events
    assert reloaded.events[-1] == other.events[-1]
    name, end, data = other.events[-1]
    assert (name, data) == ("end", None)
    for app in (one, two):
        again = await Browser(app, f"/chats/17?after={page.events[1][1]}").run(page.events[3][1])
        assert again.words == said(6)[4:]  # the header wins
        assert (await Browser(app, "/chats/17").run(end)).status == 204
        assert (await Browser(app, f"/chats/17?after={end}").run()).status == 204


async def test_reload() -> None:
    api = Api()
    async with opened(api) as channel:
        await reload_and_more(channel, channel, api)


@pytest.mark.server
async def test_another_web_process(redis_server: RedisServer, stream_name: str) -> None:
    api = Api()
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    async with (
        RedisStreamsTransport(redis_server.url, **options) as a,
        RedisStreamsTransport(redis_server.url, **options) as b,
        RedisStreamsTransport(redis_server.url, **options) as c,
        RPCChannel(a, timeout=BOUND) as first,
        RPCChannel(b, timeout=BOUND) as second,
        RPCChannel(c, expose=api),
    ):
        await reload_and_more(first, second, api)


async def test_what_shows_nothing() -> None:
    """Another user's call, one that isn't there, a bad name, and who is nobody, are alike."""
    async with opened(Api()) as channel:
        app = CallEvents(channel, user_of)
        await channel.start(channel.get_api().chat(1), key=key_of("ann", "17"))
        answers = [
            await Browser(app, "/chats/17", "bob").run(),
            await Browser(app, "/chats/ann/17", "bob").run(),
            await Browser(app, "/chats/../ann/17", "bob").run(),
            await Browser(app, "/chats/18").run(),
            await Browser(app, "/chats/" + "x" * 600).run(),
            await Browser(app, "/chats/17", None).run(),
        ]
        assert [(one.status, one.headers, one.events) for one in answers] == [(404, {}, [])] * 6
        assert (await Browser(app, "/chats/17").run()).words == said(1)
        refused = await Browser(app, "/chats/17", method="POST").run()
        assert (refused.status, refused.headers) == (405, {b"allow": b"GET"})
        assert (await Browser(app, "/chats/17?after=x").run()).status == 400
        with pytest.raises(ValueError, match="^namespace: "):
            await Browser(app, "/chats/17", "a/b").run()
        with pytest.raises(RuntimeError, match="websocket"):
            await app({"type": "websocket"}, None, None)  # type: ignore[arg-type]


async def test_headers_and_beats() -> None:
    async with opened(Api()) as channel, anyio.create_task_group() as group:
        app = CallEvents(channel, user_of, heartbeat=0.001)
        await channel.start(channel.get_api().chat(2, 1), key=key_of("ann", "17"))
        page = Browser(app, "/chats/17")
        group.start_soon(page.run)
        with anyio.fail_after(BOUND):
            while page.beats < 3:
                await page.news.wait()
        assert page.headers[b"content-type"].startswith(b"text/event-stream")
        assert page.headers[b"cache-control"] == b"no-store"
        page.closed.set()


async def test_other_ends() -> None:
    """An error, a cancel, a stream that began anew, and items that are lost."""
    async with opened(Api()) as channel:
        app, api = CallEvents(channel, user_of), channel.get_api()
        await channel.start(api.fail(), key=key_of("ann", "fails"))
        page = await Browser(app, "/chats/fails").run()
        assert [name for name, _, _ in page.events] == ["", "failed"]
        assert page.events[1][2] == "LookupError: no\n\ntea"
        assert (await Browser(app, "/chats/fails").run(page.events[1][1])).status == 204
        bounds = ItemBounds(keep_items=4, when_unread="go on")
        call = await channel.start(api.chat(20), key=key_of("ann", "long"), bounds=bounds)
        await call.result()
        page = await Browser(app, "/chats/long").run()
        (name, _, lost), *rest, end = page.events
        assert (name, lost["wanted"], end[0]) == ("lost", 1, "end")
        assert len(rest) == 20 - lost["first"] + 1
        await call.forget()
        await channel.start(api.chat(2), key=key_of("ann", "long"))
        page = await Browser(app, "/chats/long").run(end[1])
        assert [name for name, _, _ in page.events] == ["restarted", "", "", "end"]
        call = await channel.start(api.chat(2, 1), key=key_of("ann", "cancelled"))
        page = Browser(app, "/chats/cancelled")
        async with anyio.create_task_group() as group:
            group.start_soon(page.run)
            await page.has(1)
            await call.cancel()
        assert [name for name, _, _ in page.events] == ["", "failed"]
        assert (await Browser(app, "/chats/cancelled").run(page.events[0][1])).status == 204


async def test_invented_positions() -> None:
    """Nobody waits behind them: the items come from the first one, or it is no position at all."""
    async with opened(Api()) as channel:
        app = CallEvents(channel, user_of)
        call = await channel.start(channel.get_api().chat(2), key=key_of("ann", "17"))
        await call.result()
        whole = (await Browser(app, "/chats/17").run()).events
        epoch = whole[0][1].partition("-")[0]
        for after in (f"{epoch}-99", f"{epoch}9-1", "9" * 18 + "-" + "9" * 18):
            for page in (
                await Browser(app, "/chats/17").run(after),
                await Browser(app, f"/chats/17?after={after}").run(),
            ):
                assert page.events == [("restarted", "", None), *whole]
        for after in ("9" * 30 + "-1", "1-", "-1", "1-1-1", "%00", "%C2%B9-1", "1-%0A"):
            assert (await Browser(app, f"/chats/17?after={after}").run()).status == 400
        assert (await Browser(app, "/chats/17").run("\xb9-1")).status == 400


async def test_what_has_failed_is_told_once() -> None:
    """Who comes back after that comes no more, though no entry of the stream says how it ended."""
    async with opened(Api()) as channel:
        app = CallEvents(channel, user_of)
        call = await channel.start(channel.get_api().chat(2, 1), key=key_of("ann", "17"))
        page = Browser(app, "/chats/17?after=5-5")
        async with anyio.create_task_group() as group:
            group.start_soon(page.run)
            await page.has(2)
            await call.cancel()
        assert [name for name, _, _ in page.events] == ["restarted", "", "failed"]
        assert (await Browser(app, "/chats/17?after=5-5").run(page.events[-1][1])).status == 204


async def test_an_item_that_cannot_be_json() -> None:
    """Ends it once: a browser that comes back by itself comes no more, though the call runs on. A
    page that is loaded anew is told again.
    """

    class Odd:
        async def numbers(self) -> AsyncIterator[Any]:
            yield 1
            yield {(1, 2): 3}
            await anyio.sleep_forever()

    a, b = MemoryTransport.pair()
    async with a, b, RPCChannel(a, timeout=BOUND) as channel, RPCChannel(b, expose=Odd()):
        app = CallEvents(channel, user_of)
        call = await channel.start(channel.get_api().numbers(), key=key_of("ann", "17"))
        page = await Browser(app, "/chats/17").run()
        assert [name for name, _, _ in page.events] == ["", "failed"]
        last = page.events[-1][1]
        assert (await Browser(app, "/chats/17").run(last)).status == 204
        page = await Browser(app, f"/chats/17?after={last}").run()
        assert [name for name, _, _ in page.events] == ["restarted", "", "failed"]
        await call.cancel()


async def test_end_of_the_web_process() -> None:
    """Each response is a whole one that names no end: its browser comes again."""
    api = Api()
    a, b = MemoryTransport.pair(codec="json")
    async with b, RPCChannel(b, expose=api), anyio.create_task_group() as group:
        async with a, RPCChannel(a, timeout=BOUND) as channel:
            app = CallEvents(channel, user_of)
            call = await channel.start(channel.get_api().chat(9, 2), key=key_of("ann", "17"))
            stopped, left = Browser(app, "/chats/17"), Browser(app, "/chats/17")
            async with anyio.create_task_group() as server:
                server.start_soon(stopped.run)
                await stopped.has(2)
                server.cancel_scope.cancel()
            assert (stopped.over, stopped.words) == (True, said(2))
            group.start_soon(left.run)
            await left.has(2)
            position = left.events[-1][1]
        with anyio.fail_after(BOUND):
            while not left.over:
                await left.news.wait()
        assert left.words == said(2)
        for late in (
            await Browser(app, "/chats/17").run(),
            await Browser(app, "/chats/17").run(position),
        ):
            assert (late.status, late.over, late.events) == (200, True, [])
        del call


async def test_options() -> None:
    async with opened(Api()) as channel:
        with pytest.raises(ValueError, match="^heartbeat: "):
            CallEvents(channel, user_of, heartbeat=0)
    for namespace in ("", "a/b"):
        with pytest.raises(ValueError, match="^namespace: "):
            key_of(namespace, "17")
    with pytest.raises(ValueError, match="^key: "):
        key_of("ann", "x" * 600)
