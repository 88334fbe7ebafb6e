"""The application that serves an API: who may come, what is spoken, and how it ends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from anyio_kkrpc.websocket import Connection, Handshake, Refused, current_connection, endpoint
from anyio_kkrpc.websocket._endpoint import Endpoint
from tests.bounds import BOUND, CALL_BOUND

from .serving import Page, asking, opened, scope_of

pytestmark = pytest.mark.anyio


class Api:
    def __init__(self) -> None:
        self.waiting = anyio.Event()
        self.cancelled = anyio.Event()

    def add(self, a: int, b: int) -> int:
        return a + b

    def echo(self, value: Any) -> Any:
        return value

    def who(self) -> Any:
        return current_connection().identity

    async def ask_back(self, name: str) -> Any:
        return await current_connection().channel.get_api()[name]()

    async def steps(self, n: int, on_step: Callable[[int], Awaitable[None]]) -> str:
        for step in range(n):
            await on_step(step)
        return "done"

    async def wait(self) -> None:
        self.waiting.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()

    async def count(self, n: int) -> AsyncIterator[str]:
        for number in range(n):
            yield f"{number:06}" * 1000

    def fail(self) -> None:
        raise ValueError("no")


def call(number: int, *path: str, args: tuple[Any, ...] = ()) -> str:
    """Return what kkrpc 2 sends."""
    arguments = [{"__kkrpc_next_arg__": "value", "v": arg} for arg in args]
    return json.dumps({"t": "q", "id": f"q{number}", "op": "call", "p": path, "a": arguments})


async def ask(page: Page, number: int, *path: str, args: tuple[Any, ...] = ()) -> Any:
    page.say(call(number, *path, args=args))
    reply = json.loads(await page.hear())
    assert (reply["t"], reply["id"]) == ("r", f"q{number}")
    return reply.get("v", reply.get("e"))


# Who speaks how


async def test_kkrpc_2() -> None:
    """A frame is a bare message, without a newline; text and bytes are read."""
    async with opened(endpoint(Api())) as page:
        page.say(call(1, "add", args=(1, 2)))
        assert await page.hear() == '{"t":"r","id":"q1","v":3}'
        page.say(call(2, "add", args=(3, 4)).encode())
        assert await page.hear() == '{"t":"r","id":"q2","v":7}'
        page.say(call(3, "add", args=(5, 6)) + "\n")
        assert json.loads(await page.hear())["v"] == 11


async def test_kkrpc_0() -> None:
    """A frame is a line; one with several, or without its end, is read."""
    request = {"method": "add", "args": [1, 2], "type": "request", "version": "json"}
    lines = [json.dumps({"id": str(number), **request}) for number in range(4)]
    async with opened(endpoint(Api())) as page:
        page.say(lines[0] + "\n" + lines[1] + "\n")
        for number in range(2):
            answer = await page.hear()
            assert answer.endswith("\n")
            assert json.loads(answer)["id"] == str(number)
            assert json.loads(answer)["args"] == {"result": 3}
        page.say(lines[2])
        assert json.loads(await page.hear())["id"] == "2"
        page.say((lines[3] + "\n").encode())
        assert isinstance(await page.hear(), str)
        rich = {"json": {"id": "r", **request}}
        page.say(json.dumps(rich, separators=(",", ":")) + "\n")
        assert "json" in json.loads(await page.hear())


async def test_kkrpc_0_says_destroy() -> None:
    """It ends this connection, and no other one."""
    app = endpoint(Api())
    async with opened(app) as one, opened(app) as two:
        one.say("__DESTROY__")
        assert await one.hear_the_end() == 1000
        assert await ask(two, 1, "add", args=(1, 2)) == 3


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_native_sub_protocols(codec: str) -> None:
    """Who offers one of them is spoken to natively, in its codec, as it is also told."""
    async with asking(endpoint(Api()), subprotocols=["other", f"anyio-kkrpc.{codec}"]) as page:
        assert (await page.next_event())["subprotocol"] == f"anyio-kkrpc.{codec}"
        page.say("")
        assert await page.hear() == b""


async def test_sub_protocols_of_the_application() -> None:
    """The first of them that is offered; none if none is."""
    app = endpoint(Api(), subprotocols=["a.b", "c"])
    for offered, chosen in ((["c", "a.b"], "a.b"), (["x", "c"], "c"), (["x"], None), ([], None)):
        async with asking(app, subprotocols=offered) as page:
            assert (await page.next_event())["subprotocol"] == chosen
            assert await ask(page, 1, "add", args=(1, 2)) == 3


async def test_dialect_of_a_server_that_begins() -> None:
    """Before the page has said anything, both generations can read what it is told."""

    async def greet(connection: Connection) -> None:
        await connection.channel.get_api().hello("x")

    async with opened(endpoint(Api(), connected=greet)) as page:
        said = await page.hear()
        assert said.endswith("\n")
        request = json.loads(said)
        assert (request["t"], request["p"]) == ("q", ["hello"])
        page.say(json.dumps({"t": "r", "id": request["id"], "v": None}))
    async with opened(endpoint(Api(), connected=greet, dialect="kkrpc-0", superjson=False)) as page:
        assert json.loads(await page.hear())["method"] == "hello"


async def test_errors_callbacks_and_unknown_names() -> None:
    async with opened(endpoint(Api())) as page:
        assert (await ask(page, 1, "fail"))["m"] == "no"
        assert (await ask(page, 2, "nope"))["m"] == "nope is not a function"
        assert (await ask(page, 3, "__init__"))["m"] == "__init__ is not a function"
        argument = [
            {"__kkrpc_next_arg__": "value", "v": 2},
            {"__kkrpc_next_arg__": "callback", "id": "f"},
        ]
        page.say(json.dumps({"t": "q", "id": "q4", "op": "call", "p": ["steps"], "a": argument}))
        heard = [json.loads(await page.hear()) for _ in range(3)]
        assert [one["t"] for one in heard] == ["cb", "cb", "r"]


async def test_reverse_call() -> None:
    """A handler asks the page that called it."""
    async with opened(endpoint(Api())) as page:
        page.say(call(1, "askBack", args=("name",)).replace("askBack", "ask_back"))
        request = json.loads(await page.hear())
        assert request["p"] == ["name"]
        page.say(json.dumps({"t": "r", "id": request["id"], "v": "ada"}))
        assert json.loads(await page.hear())["v"] == "ada"


# Who may come


ORIGINS: list[tuple[Any, str | None, int]] = [
    ("same", None, 101),
    ("same", "http://shop.example", 101),
    ("same", "https://SHOP.example", 101),
    ("same", "https://shop.example:443", 101),
    ("same", "https://shop.example:8443", 403),
    ("same", "https://evil.example", 403),
    ("same", "https://shop.example.evil.example", 403),
    ("same", "https://shop.example@evil.example", 403),
    ("same", "null", 403),
    ("same", "file://", 403),
    ("same", "https://shop.example:x", 403),
    ("same", "chrome-extension://shop.example", 403),
    ("any", "https://evil.example", 101),
    (["https://app.example"], "https://app.example", 101),
    (["https://app.example"], "http://app.example", 403),
    (["https://app.example"], "https://shop.example", 403),
    (["https://app.example"], None, 101),
    (["https://APP.example:443"], "https://app.example", 101),
    (["https://app.example"], "https://app.example:443", 101),
    (["http://app.example:443"], "http://app.example", 403),
    (["https://app.example:8443"], "https://app.example:8443", 101),
    (["null"], "null", 101),
    ([], "https://shop.example", 403),
]


async def test_origins() -> None:
    """By default pages of the same host; who is no browser has no origin."""
    for origins, origin, status in ORIGINS:
        headers = {} if origin is None else {"origin": origin}
        app = endpoint(None, origins=origins)
        async with asking(app, headers=headers) as page:
            event = await page.next_event()
            assert event.get("status", 101) == status, (origins, origin)
            assert app.statistics().refused == (status == 403)


async def test_page_without_tls_on_a_server_with_it() -> None:
    """It may be somebody in between who wrote it."""
    headers = {"origin": "http://shop.example"}
    async with asking(endpoint(Api()), headers=headers, scheme="wss") as page:
        assert (await page.next_event())["status"] == 403


async def test_two_origins_are_none() -> None:
    app = endpoint(Api())
    async with asking(app, headers={"origin": "http://shop.example"}) as page:
        assert (await page.next_event())["type"] == "websocket.accept"
    twice = [(b"host", b"shop.example")] + [(b"origin", b"http://shop.example")] * 2
    page = Page({**scope_of(), "headers": twice})
    page.tell(type="websocket.connect")
    await app(page.scope, page.receive, page.send)
    assert (await page.next_event())["status"] == 403
    page.close()


async def test_authenticate() -> None:
    """It sees the handshake; what it returns is known to handlers; handshakes without it fail."""
    seen: list[Handshake] = []

    async def authenticate(handshake: Handshake) -> str:
        seen.append(handshake)
        token = handshake.cookies.get("token")
        if token != "t":
            raise Refused("log in", status=401, headers={"WWW-Authenticate": "Cookie"})
        return "ada"

    app = endpoint(Api(), authenticate=authenticate)
    headers = {"cookie": "a=b; token=t", "x-one": "1"}
    async with opened(app, path="/rpc", headers=headers, query_string=b"a=1") as page:
        assert await ask(page, 1, "who") == "ada"
    assert (seen[0].path, seen[0].query, seen[0].client) == ("/rpc", "a=1", "192.0.2.1")
    assert seen[0].headers["x-one"] == "1"
    assert seen[0].scope["type"] == "websocket"
    async with asking(app) as page:
        start = await page.next_event()
        assert start["status"] == 401
        assert (b"www-authenticate", b"Cookie") in start["headers"]
        assert (await page.next_event())["body"] == b"log in"
    async with asking(app, extensions={}) as page:
        event = await page.next_event()
        assert (event["type"], event["reason"]) == ("websocket.close", "log in")
    assert app.statistics().refused == 2
    assert app.statistics().accepted == 1


async def test_refused_with_a_code() -> None:
    """Pages see codes, but no statuses: it is accepted, and closed before anything else."""

    async def authenticate(handshake: Handshake) -> None:
        raise Refused("ü" * 100, code=4401)

    async with opened(endpoint(Api(), authenticate=authenticate)) as page:
        event = await page.next_event()
        assert (event["type"], event["code"]) == ("websocket.close", 4401)
        assert event["reason"] == "ü" * 61
    for wrong in ({"code": 1000}, {"code": 5000}, {"status": 200}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Refused(**wrong)  # type: ignore[arg-type]


async def test_authenticate_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody comes in by an error, and nobody learns of it."""

    async def authenticate(handshake: Handshake) -> None:
        raise KeyError("secret")

    async with asking(endpoint(Api(), authenticate=authenticate)) as page:
        assert (await page.next_event())["status"] == 500
        assert b"secret" not in (await page.next_event())["body"]
    assert "authenticate failed" in caplog.text


async def test_authenticate_that_takes_too_long() -> None:
    async def authenticate(handshake: Handshake) -> None:
        await anyio.sleep_forever()

    app = endpoint(Api(), authenticate=authenticate, handshake_timeout=0.01)
    async with asking(app) as page:
        assert (await page.next_event())["status"] == 503
    assert app.statistics().connections == 0


async def test_as_many_as_may_come() -> None:
    """Those who are being looked at count; when one has gone there is room."""
    app = endpoint(Api(), max_connections=2)
    async with opened(app) as one, opened(app):
        async with asking(app) as page:
            assert (await page.next_event())["status"] == 503
        one.tell(type="websocket.disconnect", code=1000)
        with anyio.fail_after(BOUND):
            while app.statistics().connections == 2:
                await anyio.sleep(0.001)
        async with opened(app) as page:
            assert await ask(page, 1, "add", args=(1, 2)) == 3
    assert app.statistics().connections == 0
    assert app.statistics().accepted == 3


# Bounds


async def test_too_large() -> None:
    """It ends the connection with 1009, before anything of it is decoded; bytes count."""
    app = endpoint(Api(), max_message_size=200)
    async with opened(app) as page:
        page.say("x" * 200)
        assert await ask(page, 1, "add", args=(1, 2)) == 3
        page.say("ü" * 101)
        assert await page.hear_the_end() == 1009
    assert app.statistics().failed == 1


async def test_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    """Each is skipped and logged; more than a hundred end the connection with 1008."""
    app = endpoint(Api())
    async with opened(app) as page:
        for nonsense in (
            "{",
            "[]",
            '{"t":"z"}',
            '{"type":"z"}',
            "\udcff",
            "\x00",
            "\n",
            "[" * 5000,
        ):
            page.say(nonsense)
        page.say(b"\xff\xfe")
        assert await ask(page, 1, "add", args=(1, 2)) == 3
        for _ in range(100):
            page.say("{")
        assert await page.hear_the_end() == 1008
    assert "skipped a frame" in caplog.text


async def test_slow_page() -> None:
    """What it doesn't read isn't produced: the stream stops within a bound, and so do replies."""
    made = 0

    class Source:
        async def count(self) -> AsyncIterator[str]:
            nonlocal made
            while True:
                made += 1
                yield "x" * 100_000

    app = endpoint(Source(), write_timeout=CALL_BOUND)
    async with opened(app) as page:
        await_room = page.blocked = anyio.Event()
        page.say(call(1, "count"))
        page.say(json.dumps({"t": "sq", "id": "p", "sid": "?", "op": "pull", "n": 10**9}))
        await anyio.wait_all_tasks_blocked()
        assert made == 0  # the reply that begins the stream isn't sent yet
        await_room.set()
        page.blocked = None
        sid = next(
            reply["v"]["id"]
            for reply in [json.loads(await page.hear()) for _ in range(2)]
            if reply.get("id") == "q1"
        )
        await_room = page.blocked = anyio.Event()
        page.say(json.dumps({"t": "sq", "id": "p", "sid": sid, "op": "pull", "n": 10**9}))
        await anyio.wait_all_tasks_blocked()
        assert 1 <= made < 40
        page.tell(type="websocket.disconnect", code=1006)
        await_room.set()


async def test_page_that_reads_nothing_is_given_up() -> None:
    app = endpoint(Api(), write_timeout=0.05)
    async with opened(app) as page:
        page.blocked = anyio.Event()
        page.say(call(1, "add", args=(1, 2)))
        with anyio.fail_after(BOUND):
            while not app.statistics().failed:
                await anyio.sleep(0.001)


async def test_flood_of_requests() -> None:
    """More than may wait are refused, each by an answer."""
    app = endpoint(Api(), max_queue_size=5, max_concurrency=1)
    async with opened(app) as page:
        page.say(call(0, "wait"))
        await anyio.wait_all_tasks_blocked()
        for number in range(1, 20):
            page.say(call(number, "add", args=(1, 2)))
        refused = [json.loads(await page.hear()) for _ in range(14)]
        assert {reply["e"]["n"] for reply in refused} == {"OverloadedError"}


# The end


async def test_page_that_goes_cancels_its_handlers() -> None:
    api = Api()
    async with opened(endpoint(api)) as page:
        page.say(call(1, "wait"))
        with anyio.fail_after(BOUND):
            await api.waiting.wait()
            page.tell(type="websocket.disconnect", code=1006)
            await api.cancelled.wait()


async def test_shutdown() -> None:
    """By ASGI's lifespan: everybody is told 1001, handlers are cancelled, nobody comes in."""
    api = Api()
    app = endpoint(api)
    life = Page({"type": "lifespan"})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, life.scope, life.receive, life.send)
        life.tell(type="lifespan.startup")
        assert (await life.next_event())["type"] == "lifespan.startup.complete"
        async with opened(app) as one, opened(app) as two:
            one.say(call(1, "wait"))
            with anyio.fail_after(BOUND):
                await api.waiting.wait()
            life.tell(type="lifespan.shutdown")
            assert await one.hear_the_end() == await two.hear_the_end() == 1001
            assert api.cancelled.is_set()
            assert (await life.next_event())["type"] == "lifespan.shutdown.complete"
            async with asking(app) as late:
                assert (await late.next_event())["status"] == 503
    life.close()
    await app.aclose()
    assert app.statistics().connections == 0


async def test_grace_at_the_end() -> None:
    """Handlers that have time finish, and are answered before the socket is closed. Who closes the
    endpoint, too, waits as long, and no longer.
    """
    begun, go_on = anyio.Event(), anyio.Event()

    class Slow:
        async def wait(self) -> str:
            begun.set()
            await go_on.wait()
            return "done"

    app = endpoint(Slow(), grace_period=BOUND)
    async with opened(app) as page, anyio.create_task_group() as tasks:
        page.say(call(1, "wait"))
        with anyio.fail_after(BOUND):
            await begun.wait()
        closed: list[bool] = []

        async def close() -> None:
            with anyio.move_on_after(BOUND) as scope:
                await app.aclose()
            closed.append(not scope.cancelled_caught)

        for _ in range(2):
            tasks.start_soon(close)
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        assert json.loads(await page.hear())["v"] == "done"
        assert await page.hear_the_end() == 1001
    assert closed == [True, True]


async def test_server_that_cancels() -> None:
    """As hypercorn does at its end."""
    app = endpoint(Api())
    page = Page(scope_of())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, page.scope, page.receive, page.send)
        page.tell(type="websocket.connect")
        assert (await page.next_event())["type"] == "websocket.accept"
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert await page.hear_the_end() == 1001
    page.close()


@pytest.mark.parametrize("where", ["connected", "api"])
async def test_what_fails_ends_its_connection(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """With 1011, without telling why; others go on."""

    @asynccontextmanager
    async def api() -> AsyncIterator[Api]:
        if where == "api":
            raise RuntimeError("secret")
        yield Api()

    async def connected(connection: Connection) -> None:
        raise RuntimeError("secret")

    app = endpoint(api, connected=connected)
    async with opened(app) as page:
        event = await page.next_event()
        assert (event["type"], event["code"], event["reason"]) == ("websocket.close", 1011, "")
    assert "what serves a WebSocket failed" in caplog.text
    assert app.statistics().failed == 1


async def test_connected_ends_with_the_connection() -> None:
    ended = anyio.Event()

    async def connected(connection: Connection) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with opened(endpoint(Api(), connected=connected)) as page:
        assert await ask(page, 1, "add", args=(1, 2)) == 3
        page.tell(type="websocket.disconnect", code=1000)
        with anyio.fail_after(BOUND):
            await ended.wait()


async def test_an_api_for_each_connection() -> None:
    """What has to be entered is entered and left with it, and knows who it is."""
    left: list[Any] = []

    @asynccontextmanager
    async def api() -> AsyncIterator[dict[str, Any]]:
        identity = current_connection().identity
        yield {"name": lambda: identity}
        left.append(identity)

    async def authenticate(handshake: Handshake) -> str:
        return handshake.query

    app = endpoint(api, authenticate=authenticate)
    async with opened(app, query_string=b"ada") as one, opened(app, query_string=b"bob") as two:
        assert await ask(one, 1, "name") == "ada"
        assert await ask(two, 1, "name") == "bob"
    assert sorted(left) == ["ada", "bob"]


async def test_no_connection_outside_of_handlers() -> None:
    with pytest.raises(LookupError):
        current_connection()


# Signs of life


async def test_silent_pages() -> None:
    """One that answers stays; one that has stopped answering is given up."""
    app = endpoint(Api(), ping_interval=0.01, ping_timeout=CALL_BOUND)
    async with opened(app) as page:
        page.say(call(1, "add", args=(1, 2)))
        answers, asked = [], 0
        while asked < 3 or not answers:
            said = json.loads(await page.hear())
            if said["t"] == "r":
                answers.append(said["v"])
                continue
            assert (said["t"], said["op"], said["p"][1]) == ("q", "ref", "release")
            page.say(json.dumps({"t": "r", "id": said["id"], "e": {"n": "Error", "m": "no"}}))
            asked += 1
        assert answers == [3]
    app = endpoint(Api(), ping_interval=0.01, ping_timeout=0.01)
    async with opened(app) as page:
        page.say(call(1, "add", args=(1, 2)))
        assert await page.hear_the_end() == 1011
    assert app.statistics().failed == 1


async def test_silent_pages_of_kkrpc_0() -> None:
    """kkrpc 0.2 answers only if it exposes something: one that never did isn't given up."""
    app = endpoint(Api(), ping_interval=0.01, ping_timeout=0.01)
    request = {"id": "1", "method": "add", "args": [1, 2], "type": "request", "version": "json"}
    async with opened(app) as page:
        page.say(json.dumps(request) + "\n")
        while (said := json.loads(await page.hear())).get("type") != "response":
            pass  # it may be asked before it is answered
        assert said["args"] == {"result": 3}
        pings = [json.loads(await page.hear()) for _ in range(5)]
        assert {ping["type"] for ping in pings} == {"request"}
        answer = {"id": pings[0]["id"], "method": "", "args": {"error": "no"}, "type": "response"}
        page.say(json.dumps(answer, separators=(",", ":")) + "\n")
        assert await page.hear_the_end() == 1011


async def test_page_that_has_said_nothing() -> None:
    """Both generations are asked, in lines that neither stumbles over; nobody is given up."""
    app = endpoint(Api(), ping_interval=0.01, ping_timeout=0.01)
    async with opened(app) as page:
        asked = [await page.hear() for _ in range(6)]
        assert all(one.endswith("\n") for one in asked)
        kinds = [json.loads(one).get("t", json.loads(one).get("type")) for one in asked]
        assert kinds == ["q", "request"] * 3


# The rest of ASGI


async def test_http() -> None:
    page = Page({"type": "http"})
    await endpoint(Api())(page.scope, page.receive, page.send)
    assert (await page.next_event())["status"] == 426
    page.close()
    with pytest.raises(RuntimeError, match="z"):
        await endpoint(Api())({"type": "z"}, page.receive, page.send)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("origins", "https://a.example", TypeError),
        ("origins", ["https://a.example/path"], ValueError),
        ("origins", ["a.example"], ValueError),
        ("origins", ["https://m\u00fcnchen.example"], ValueError),
        ("authenticate", 1, TypeError),
        ("connected", 1, TypeError),
        ("subprotocols", "a", TypeError),
        ("max_connections", 0, ValueError),
        ("ping_interval", 0, ValueError),
        ("ping_timeout", None, TypeError),
        ("handshake_timeout", -1, ValueError),
        ("dialect", "x", ValueError),
        ("timeout", -1, ValueError),
        ("grace_period", "1", TypeError),
        ("max_message_size", 0, ValueError),
        ("middleware", 1, TypeError),
        ("overflow", "block", ValueError),
        ("codec", "x", ValueError),
    ],
)
def test_options(option: str, value: Any, error: type[Exception]) -> None:
    """What is wrong is said at once, by name."""
    with pytest.raises(error, match=option):
        Endpoint(Api(), **{option: value})
