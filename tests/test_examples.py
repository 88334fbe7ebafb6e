"""The examples, run as their readers run them."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import anyio
import pytest
import redis

import anyio_kkrpc
from anyio_kkrpc import RemoteError
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *args],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(name: str, url: str, first_line: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example until the end of the block, from when it has printed its first line."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), url], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == first_line
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


class Serving(NamedTuple):
    """A web app that runs."""

    port: int
    process: subprocess.Popen[str]


@contextmanager
def serving_app(name: str, url: str) -> Iterator[Serving]:
    """Run the app of an example until the end of the block, unless it is killed there."""
    arguments = ["--app-dir", str(EXAMPLES), f"{name}:app", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "REDIS_URL": url},
    ) as process:
        log = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                log.append(line)
                ready = re.search(r"running on http://127\.0\.0\.1:(\d+)", line)
                if ready:
                    assert "such calls fail" not in "".join(log)
                    yield Serving(int(ready[1]), process)
                    break
            else:
                pytest.fail("".join(log))
        finally:
            process.terminate()
            rest = process.communicate(timeout=BOUND)[1]
    if process.returncode != -signal.SIGKILL:
        assert "Application shutdown complete" in rest
    assert "Traceback" not in rest


@contextmanager
def get(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    **query: object,
) -> Iterator[http.client.HTTPResponse]:
    """Make a request; the connection is closed at the end of the block."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND)) as connection:
        connection.request(method, f"{path}?{urlencode(query)}", headers=headers or {})
        with connection.getresponse() as response:
            yield response


def answer(port: int, **query: object) -> tuple[int, Any]:
    """Ask the app for a whole answer; return the status and what came."""
    with get(port, "/answer", **query) as response:
        return response.status, json.load(response)


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """Give name and data of each Server-Sent Event."""
    for event in whole_events(response):
        yield event["event"], json.loads(event.get("data") or "null")


def whole_events(response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
    """Give what each Server-Sent Event says; comments are none."""
    event = {"event": "message"}
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name and name != ":":
            event[name] = value
        elif len(event) > 1:
            yield event
            event = {"event": "message"}


@pytest.mark.one_server
def test_publisher_and_subscribers(redis_server: RedisServer) -> None:
    """Every subscriber hears both."""
    url = redis_server.url
    with (
        running("subscriber", url, "listening") as one,
        running("subscriber", url, "listening") as two,
    ):
        assert run("publisher", url) == "thank you\n"
        for subscriber in (one, two):
            assert subscriber.stdout is not None
            assert [subscriber.stdout.readline() for _ in range(2)] == [
                "heard: answered by the first subscriber\n",
                "heard: answered by nobody\n",
            ]
    with redis.Redis.from_url(url) as client:
        client.delete("example-news", "{example-news}:control")


@pytest.mark.one_server
def test_worker_and_clients(redis_server: RedisServer) -> None:
    """Callback, streams and trio, against a worker."""
    url = redis_server.url
    with running("worker", url, "working"):
        steps = [f"{done} of 5" for done in range(1, 6)]
        assert run("progress_callback", url).splitlines() == [*steps, "5 pictures"]
        assert run("streaming", url).split("\n") == ["1", "2", "3", "enough at 10", ""]
        typed = run("typed_api", url).splitlines()
        assert [*typed[:1], *typed[2:]] == ["15", "1", "2", "3"]
        assert re.fullmatch(r"working since \d{4}-\d\d-\d\d", typed[1])
        bars = run("progress_bar", url).splitlines()
        assert [(bar.split()[0], "100%" in bar) for bar in bars] == [
            ("Lisbon", True),
            ("Oslo", True),
            ("Cairo", True),
        ]
        assert run("trio_program", url).splitlines() == ["12 = 2 2 3", "97 = 97", "1001 = 7 11 13"]
    with redis.Redis.from_url(url) as client:
        client.delete("example-jobs", "{example-jobs}:control")


@pytest.mark.one_server
@pytest.mark.slow
def test_web_app(redis_server: RedisServer) -> None:
    """Answers, refusals and streams, up to a browser that goes away in the middle of one."""
    url = redis_server.url
    with serving_app("fastapi_app", url) as (port, _), ThreadPoolExecutor(11) as threads:
        assert answer(port, prompt="a", timeout=0.1)[0] == 504
        waiting = [threads.submit(answer, port, prompt="hi", timeout=BOUND) for _ in range(11)]
        refused = next(as_completed(waiting))
        assert refused.result()[0] == 503
        waiting.remove(refused)

        with running("fastapi_worker", url, "working") as worker:
            assert worker.stdout is not None
            for asked in waiting:
                assert asked.result() == (200, "You said: hi\nThat is all I know. ")
                assert worker.stdout.readline() == "7 of 7 tokens\n"

            with get(port, "/") as response:
                assert b"EventSource" in response.read()
            with get(port, "/chat", prompt="hi") as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                *tokens, last = events(response)
            assert last == ("done", None)
            assert [name for name, _ in tokens] == ["message"] * 7
            assert "".join(text for _, text in tokens) == "You said: hi\nThat is all I know. "
            assert worker.stdout.readline() == "7 of 7 tokens\n"

            with get(port, "/chat", prompt="word " * 1000) as response:
                coming = events(response)
                assert [next(coming)[1] for _ in range(3)] == ["You ", "said: ", "word "]
            sent = re.fullmatch(r"(\d+) of 1007 tokens\n", worker.stdout.readline())
            assert sent is not None
            assert int(sent[1]) < 1000
    with redis.Redis.from_url(url) as client:
        client.delete("example-chat", "{example-chat}:control")


class Tab:
    """What a page keeps of an answer: the words, and the position behind the last one.

    :ivar is_over: whether the end has come
    """

    def __init__(self, user: str) -> None:
        self._cookie = {"Cookie": f"user={user}"}
        self.words: list[str] = []
        self.last = ""
        self.is_over = False

    def read(self, port: int, most: int | None = None, *, again: bool = False) -> int:
        """Read on, so many words at most; return the status.

        :param again: as a browser does by itself, not as a page that was reloaded
        """
        after, headers = {"after": self.last} if self.last and not again else {}, self._cookie
        if again:
            headers = {**headers, "Last-Event-ID": self.last}
        with get(port, "/chats/mine", headers=headers, **after) as response:
            for event in whole_events(response):
                self.last = event["id"]
                if event["event"] == "end":
                    self.is_over = True
                else:
                    self.words.append(json.loads(event["data"]))
                if len(self.words) == most:
                    break
            return response.status


@pytest.mark.one_server
@pytest.mark.slow
def test_chat(redis_server: RedisServer) -> None:
    """Each word comes once: to who reloads, to another tab, and over the death of the app."""
    url = redis_server.url
    prompt = " ".join(map(str, range(60)))
    mine, other = {"Cookie": "user=ada"}, {"Cookie": "user=eve"}
    one, two = Tab("ada"), Tab("ada")
    with running("chat_worker", url, "working"), ThreadPoolExecutor(1) as threads:
        with serving_app("chat_app", url) as (port, process):
            with get(port, "/") as response:
                assert response.headers["Set-Cookie"].startswith("user=")
                assert b"?after=" in response.read()
            for status, headers, said in (
                (401, {}, prompt), (202, mine, prompt), (202, mine, prompt), (409, mine, "else"),
            ):  # fmt: skip
                ask = {"method": "PUT", "headers": headers, "prompt": said}
                with get(port, "/chats/mine", **ask) as response:
                    assert response.status == status
            for path, headers in (("mine", other), ("mine", {}), ("none", mine)):
                with get(port, f"/chats/{path}", headers=headers) as response:
                    assert response.status == 404
            one.read(port, 3)
            one.read(port, 6)
            reading = threads.submit(two.read, port)
            one.read(port, 12)
            process.kill()
            with suppress(http.client.IncompleteRead):
                reading.result()
            assert not two.is_over
        with serving_app("chat_app", url) as (port, _):
            reading = threads.submit(two.read, port, again=True)
            one.read(port)
            reading.result()
            for tab in (one, two):
                assert tab.is_over
                assert "".join(tab.words) == f"You said: {prompt}\nThat is all I know. "
                assert tab.read(port, again=True) == 204
    with redis.Redis.from_url(url) as client:
        client.delete("example-chats", *client.keys("{example-chats}:*"))


def load(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example that has a web app."""
    monkeypatch.setenv("REDIS_URL", url)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class Browser:
    """What an ASGI server does for one WebSocket.

    :ivar came: messages of the app
    """

    def __init__(self, app: Any, state: dict[str, Any], path: str, query: bytes) -> None:
        self._app = app
        self._scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "path": path,
            "query_string": query,
            "headers": [],
            "state": state,
        }
        self._sends, self._receives = anyio.create_memory_object_stream[dict[str, Any]](2)
        self._sends.send_nowait({"type": "websocket.connect"})
        self.came: list[dict[str, Any]] = []

    def leave(self) -> None:
        self._sends.send_nowait({"type": "websocket.disconnect", "code": 1001})

    async def until(self, number: int) -> None:
        with anyio.fail_after(BOUND):
            while len(self.came) < number:
                await anyio.sleep(0.01)

    async def run(self) -> None:
        async def send(message: dict[str, Any]) -> None:
            self.came.append(message)

        with self._sends, self._receives:
            await self._app(self._scope, self._receives.receive, send)


@pytest.mark.anyio
@pytest.mark.one_server
async def test_progress_over_a_websocket(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is told, then the result; the job ends with a browser that goes away."""
    url = redis_server.url
    with running("worker", url, "working"), redis.Redis.from_url(url) as admin:
        app = load("websocket_app", url, monkeypatch).app
        async with app.router.lifespan_context(app) as state, anyio.create_task_group() as group:
            browser = Browser(app, state, "/resize", b"count=3")
            with anyio.fail_after(BOUND):
                await browser.run()
            begin, *told, end = browser.came
            assert (begin["type"], end["type"]) == ("websocket.accept", "websocket.close")
            *steps, result = (json.loads(message["text"]) for message in told)
            assert steps == [{"done": done, "of": 3} for done in (1, 2, 3)]
            assert result == {"result": "3 pictures"}

            browser = Browser(app, state, "/resize", b"count=100000")
            group.start_soon(browser.run)
            await browser.until(4)
            assert admin.xpending("example-jobs", "kkrpc-group")["pending"] == 1
            browser.leave()
            with anyio.fail_after(BOUND):
                while admin.xpending("example-jobs", "kkrpc-group")["pending"]:
                    await anyio.sleep(0.01)
        admin.delete("example-jobs", "{example-jobs}:control")


@pytest.mark.one_server
def test_statuses(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The web app answers with those that the page about it tells."""
    module = load("fastapi_app", redis_server.url, monkeypatch)
    page = (EXAMPLES.parent / "docs" / "frameworks.md").read_text()
    rows = re.findall(r"\| `(\w+)`[^|]* \| (\d+) \|", page)
    assert len(rows) == 5
    for name, status in rows:
        error = RemoteError("x", "y") if name == "RemoteError" else getattr(anyio_kkrpc, name)("x")
        assert anyio.run(module.failed, None, error).status_code == int(status)


def test_stdio() -> None:
    """A parent calls its child."""
    assert run("stdio_parent") == "Hello, parent!\n"


def test_all_are_run() -> None:
    """Each example stands in a test of this file."""
    source = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert len(names) >= 8
    used = {"stdio_child"}
    assert {name for name in names - used if f'"{name}"' not in source} == set()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_says_what_it_is(name: str) -> None:
    """Each begins with a docstring, and is short."""
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) < 70
