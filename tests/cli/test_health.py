"""``check`` and ``serve --http``: whether workers take calls, and figures; on loopback only."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc._channel import ChannelStatistics, MethodStatistics
from anyio_kkrpc._cli import _check, _health, _http
from anyio_kkrpc._cli._asking import Servers
from anyio_kkrpc._cli._check import by_redis
from anyio_kkrpc._cli._health import Health, Page, WorkerState
from anyio_kkrpc._cli._http import Answer, parse_address
from anyio_kkrpc._cli._report import NotReadyError
from anyio_kkrpc._cli._worker import Options, Report
from anyio_kkrpc.redis import RedisStatistics
from anyio_kkrpc.redis._stream._places import name_of_shard
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.cli.test_cli import SHOP, Shell, wait_until

NOWHERE = "redis://:secret@127.0.0.1:1"
CHANNEL = {"served": 7, "methods": {"pay": {"failed": 1}}}


# The responder


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """The loop that the supervisor runs on."""
    return "asyncio", {}


async def respond(path: str) -> Answer:
    return Answer(200, f"this is {path}\n")


@asynccontextmanager
async def answering(
    respond: Callable[..., object] = respond,
) -> AsyncIterator[tuple[str, int]]:
    listeners = await _http.bind("127.0.0.1", 0)
    host, port = _http.url_of(listeners[0]).removeprefix("http://").split(":")
    async with anyio.create_task_group() as group:
        group.start_soon(_http.serve, listeners, respond)
        yield host, int(port)
        group.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


async def exchange(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Send and return all that comes until the other side closes."""
    async with await anyio.connect_tcp(*address) as stream:
        got = b""
        with anyio.fail_after(BOUND):
            try:
                for piece in pieces:
                    await stream.send(piece)
                while True:
                    got += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return got


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.anyio
async def test_requests() -> None:
    """Whatever is sent, there is an answer or an end, and then the next one is answered."""
    async with answering() as address:
        for request, status in (
            (b"GET /a HTTP/1.1\r\n\r\n", 200),
            (b"GET /a?b=1 HTTP/1.0\r\nHost: x\r\n\r\n", 200),
            (b"GET  /a HTTP/1.1\r\n\r\n", 400),
            (b"GET /a\r\n\r\n", 400),
            (b"GET a HTTP/1.1\r\n\r\n", 400),
            (b"GET /a HTTP/2\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
            (b"\xff\xfe /\xff HTTP/1.1\r\n\r\n", 405),
            (b"POST /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
            (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
            (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000, 431),
        ):
            answer = await exchange(address, request)
            # One that is still sending when it is refused may find the connection reset.
            assert (not answer and status == 431) or status_of(answer) == status, request[:40]
        answer = await exchange(address, b"GET /a HT", b"TP/1.1\r", b"\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert body == b"this is /a\n"
        assert b"\r\nContent-Length: 11\r\n" in head
        assert b"\r\nConnection: close" in head
        answer = await exchange(address, b"HEAD /a HTTP/1.1\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n")
        assert b"\r\nContent-Length: 11\r\n" in answer


@pytest.mark.anyio
async def test_who_leaves_or_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who say nothing have their time; those who leave, or are too many, harm nobody."""
    monkeypatch.setattr(_http, "REQUEST_TIMEOUT", 0.2)
    async with answering() as address:
        assert status_of(await exchange(address, b"GET / ")) == 408
        with socket.create_connection(address) as left:
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            left.sendall(b"GET ")
        assert status_of(await exchange(address, b"GET / HTTP/1.1\r\n\r\n")) == 200


async def ended(stream: anyio.abc.ByteStream) -> bool:
    """Wait until something comes; return whether that is the end."""
    with anyio.fail_after(BOUND):
        try:
            await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return True
    return False


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["nothing", "half", "all of it"])
async def test_a_probe_finds_room(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits, for a request that isn't sent or an answer that isn't taken, keeps nobody out:
    who has waited longest goes. Those that wait for the service stay, as long as there are others.
    """
    for bound in ("REQUEST_TIMEOUT", "ANSWER_TIMEOUT", "SEND_TIMEOUT"):
        monkeypatch.setattr(_http, bound, 10 * BOUND)
    if what == "all of it":  # which has to be more than the system takes at once
        monkeypatch.setattr(_http, "MOST_CONNECTIONS", 4)
    sent = {"nothing": b"", "half": b"GET /", "all of it": b"GET /large HTTP/1.1\r\n\r\n"}[what]
    asked, go_on = 0, anyio.Event()

    async def respond(path: str) -> Answer:
        nonlocal asked
        asked += 1
        if path == "/slow":
            await go_on.wait()
        return Answer(200, "x" * (20_000_000 if path == "/large" else 1))

    async def until_asked(number: int) -> None:
        with anyio.fail_after(BOUND):
            while asked < number:
                await anyio.sleep(0.01)

    async with answering(respond) as address, AsyncExitStack() as stack:

        async def connect(text: bytes) -> anyio.abc.ByteStream:
            stream = await stack.enter_async_context(await anyio.connect_tcp(*address))
            if text:
                await stream.send(text)
            return stream

        slow = await connect(b"GET /slow HTTP/1.1\r\n\r\n")
        await until_asked(1)
        held = [await connect(sent) for _ in range(_http.MOST_CONNECTIONS - 1)]
        if what == "all of it":
            await until_asked(1 + len(held))
        for number in range(5):
            answer = await exchange(address, b"GET /healthz HTTP/1.1\r\n\r\n")
            assert status_of(answer) == 200
            if what != "all of it" and not number:
                assert await ended(held[0])
        held += [await connect(sent) for _ in range(_http.MOST_CONNECTIONS)]
        go_on.set()
        assert not await ended(slow)


@pytest.mark.anyio
async def test_those_who_ask_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all wait for the service, the oldest goes for one who is answered at once."""
    monkeypatch.setattr(_http, "ANSWER_TIMEOUT", 10 * BOUND)
    asked = 0

    async def respond(path: str) -> Answer:
        nonlocal asked
        if path == "/slow":
            asked += 1
            await anyio.sleep_forever()
        return Answer(200, "x")

    async with answering(respond) as address, AsyncExitStack() as stack:
        held: list[anyio.abc.ByteStream] = []
        for _ in range(_http.MOST_CONNECTIONS):
            stream = await stack.enter_async_context(await anyio.connect_tcp(*address))
            held.append(stream)
            await stream.send(b"GET /slow HTTP/1.1\r\n\r\n")
        with anyio.fail_after(BOUND):
            while asked < _http.MOST_CONNECTIONS:
                await anyio.sleep(0.01)
        assert status_of(await exchange(address, b"GET /healthz HTTP/1.1\r\n\r\n")) == 200
        assert await ended(held[0])


@pytest.mark.anyio
async def test_answers_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for one has an end, and one that fails ends nothing."""
    monkeypatch.setattr(_http, "ANSWER_TIMEOUT", 0.2)

    async def never(path: str) -> Answer:
        if path == "/broken":
            raise LookupError("nothing there")
        await anyio.sleep_forever()
        raise AssertionError

    async with answering(never) as address:
        answer = await exchange(address, b"GET /broken HTTP/1.1\r\n\r\n")
        assert (status_of(answer), answer[-28:]) == (500, b"\nLookupError: nothing there\n")
        assert status_of(await exchange(address, b"GET / HTTP/1.1\r\n\r\n")) == 503


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
        ("::1:80", None),
        ("localhost", None),
        ("localhost:", None),
        ("x:65536", None),
        ("x:-1", None),
        ("x:0000080808080", None),
        ("x:٣", None),
        ("", None),
    ],
)
def test_addresses(text: str, address: tuple[str, int] | None) -> None:
    """Loopback, unless a host is named."""
    if address is None:
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(text)
    else:
        assert parse_address(text) == address


# What is told

SAMPLE = re.compile(r'(anyio_kkrpc_\w+)\{((?:\w+="(?:[^"\\\n]|\\.)*",?)+)\} (\S+)')


def samples(page: str) -> dict[str, dict[str, float]]:
    """Return the values of a page in Prometheus' text format by name and labels, checking it."""
    found: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert name in kinds
            assert (kinds[name] == "counter") == name.endswith("_total")
            values = found.setdefault(name, {})
            assert labels not in values
            values[labels] = float(value)
    return found


def test_format() -> None:
    """Each metric once with its help and type, labels quoted."""
    page = Page()
    for worker in "12":
        labels = {"stream": 'a"b\\c\nd', "worker": worker}
        page.add("x", 2, labels, counter=True, about="Of x.")
        page.add("y", None, labels, counter=False, about="Of y.")
    assert page.text() == (
        "# HELP anyio_kkrpc_x_total Of x.\n"
        "# TYPE anyio_kkrpc_x_total counter\n"
        'anyio_kkrpc_x_total{stream="a\\"b\\\\c\\nd",worker="1"} 2\n'
        'anyio_kkrpc_x_total{stream="a\\"b\\\\c\\nd",worker="2"} 2\n'
    )


def test_each_figure_is_explained() -> None:
    """By the documentation of what tells it."""
    for kind, struct in (
        ("channel", ChannelStatistics),
        ("method", MethodStatistics),
        ("transport", RedisStatistics),
    ):
        for name in struct.__struct_fields__:
            if name != "queue":
                assert _health._ABOUT[kind, name].endswith("."), name


@pytest.mark.anyio
async def test_without_redis() -> None:
    """The figures of the workers are there; that Redis isn't, too."""
    options = Options(
        target="x", url=NOWHERE, stream="s", group="w", backend="asyncio", concurrency=1, grace=1,
        debug=False, codec="json", max_len=None, claim_idle=1, max_deliveries=1, signing_key=None,
    )  # fmt: skip
    states = [
        WorkerState(1, 3, Report(False, 5.0, CHANNEL, {"queue": {"dropped": 2}})),
        WorkerState(2, 1, None),
    ]

    async def ask() -> list[WorkerState]:
        return states

    health = Health(options, ask)
    found = samples((await health.respond("/metrics")).text)
    one, two = (f'stream="s",group="w",worker="{number}"' for number in (1, 2))
    assert found == {
        "anyio_kkrpc_worker_ready": {one: 0, two: 0},
        "anyio_kkrpc_worker_starts_total": {one: 3, two: 1},
        "anyio_kkrpc_worker_memory_bytes": {one: 5},
        "anyio_kkrpc_channel_served_total": {one: 7},
        "anyio_kkrpc_method_failed_total": {f'{one},method="pay"': 1},
        "anyio_kkrpc_queue_dropped_total": {one: 2},
        "anyio_kkrpc_redis_up": {'stream="s"': 0},
    }
    assert (await health.respond("/readyz")).status == 503
    states[1] = WorkerState(2, 1, Report(True, 0.0, {}, {}))
    assert (await health.respond("/readyz")).status == 200
    assert (await health.respond("/healthz")).status == 200
    assert (await health.respond("/")).status == 404


@pytest.mark.anyio
@pytest.mark.one_server
async def test_a_stream_in_shards(redis_server: RedisServer, tmp_path: Path) -> None:
    """`check` wants workers in each shard; figures are each shard's, of those that tell."""
    url, stream = redis_server.url, f"shards-{tmp_path.name}-{os.getpid()}"
    options = Options(
        target="x", url=url, stream=stream, group="w", backend="asyncio", concurrency=1, grace=1,
        debug=False, codec="json", max_len=None, claim_idle=1, max_deliveries=1, signing_key=None,
        shards=3,
    )  # fmt: skip
    names = [name_of_shard(stream, shard) for shard in range(3)]

    def check() -> str:
        try:
            by_redis(url, stream, "w", workers=1, timeout=BOUND, shards=3)
        except NotReadyError as exc:
            return str(exc)
        return "ready"

    async def ask() -> list[WorkerState]:
        return []

    async with AsyncExitStack() as stack:
        for served in ([0, 1], [2]):
            transport = RedisStreamsTransport(
                url, stream=stream, use_consumer_group=True, consumer_group="w",
                shards=3, serve_shards=served, connect_timeout=BOUND,
            )  # fmt: skip
            await stack.enter_async_context(transport)
            await stack.enter_async_context(RPCChannel(transport, expose={"f": abs}))
            counts = ("1 worker", "1 worker", "0 workers")
            there = [f"{n} of w on {name}" for n, name in zip(counts, names, strict=True)]
            expected = "ready" if 2 in served else f"{', '.join(there)}; 1 wanted"
            with anyio.fail_after(BOUND):
                while await anyio.to_thread.run_sync(check) != expected:
                    await anyio.sleep(0.02)
        for away in ("", names[1]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Servers, "of", lambda self, name, away=away: client(url, name, away))
                found = samples((await Health(options, ask).respond("/metrics")).text)
            labels = [f'stream="{stream}",shard="{shard}"' for shard in range(3)]
            up = [label for label in labels if found["anyio_kkrpc_redis_up"][label]]
            assert up == [label for label, name in zip(labels, names, strict=True) if name != away]
            assert found["anyio_kkrpc_group_workers"] == {f'{label},group="w"': 1 for label in up}


def client(url: str, name: str, away: str) -> redis.Redis:
    """Return a client of the server that has a stream, one of which is away."""
    return redis.Redis.from_url(NOWHERE if name == away else url)


# A service


@pytest.fixture
def shell(redis_server: RedisServer, tmp_path: Path) -> Shell:
    (tmp_path / "shop.py").write_text(SHOP)
    return Shell(redis_server.url, f"health-{tmp_path.name}-{os.getpid()}", tmp_path)


def ask(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def until(port: int, path: str, condition: Callable[[int, str], bool]) -> None:
    """Ask again until the answer is that: on a busy machine some take longer than they may."""
    wait_until(lambda: condition(*ask(port, path)))


@pytest.mark.one_server
@pytest.mark.slow
def test_service(own_server: RedisServer, tmp_path: Path) -> None:
    """Ready is who takes calls: not one that stands still, nor one that Redis doesn't answer."""
    (tmp_path / "shop.py").write_text(SHOP)
    shell = Shell(own_server.url, "health", tmp_path)
    assert shell("check", "-g", "w").returncode == 1
    with shell.serving(2, "-g", "w", "--http", "127.0.0.1:0"):
        assert " answers /healthz, /readyz and /metrics" in shell.said[0]
        port = int(shell.said[0].split()[1].rpartition(":")[2])
        both = "worker 1 takes calls\nworker 2 takes calls\n"
        until(port, "/readyz", lambda status, text: (status, text) == (200, both))
        wait_until(lambda: shell("check", "--http", f":{port}").stdout == both)
        pids = {int(shell("call", "pid").stdout) for _ in range(4)}

        def is_told(status: int, text: str) -> bool:
            found = samples(text)
            if found["anyio_kkrpc_redis_up"] != {'stream="health"': 1}:
                return False
            group = {'stream="health",group="w"': 0.0}
            assert found["anyio_kkrpc_group_waiting"] == group
            assert found["anyio_kkrpc_group_pending"] == group
            assert found["anyio_kkrpc_stream_dead_letters"] == {'stream="health"': 0}
            return sum(found["anyio_kkrpc_channel_served_total"].values()) == 4

        until(port, "/metrics", is_told)
        one = pids.pop()
        os.kill(one, signal.SIGSTOP)
        try:
            until(port, "/readyz", lambda s, text: s == 200 and text.count("doesn't answer") == 1)
        finally:
            os.kill(one, signal.SIGCONT)
        with redis.Redis.from_url(own_server.url) as admin:
            # Redis answers, and the workers serve; but what reads requests is refused.
            admin.config_set("min-replicas-to-write", 1)
            admin.client_kill_filter(_type="normal", skipme=True)
            until(port, "/readyz", lambda s, text: s == 503 and text.count("take calls yet") == 2)
            assert samples(ask(port, "/metrics")[1])["anyio_kkrpc_redis_up"] == {
                'stream="health"': 1
            }
            admin.config_set("min-replicas-to-write", 0)
        until(port, "/readyz", lambda status, text: (status, text) == (200, both))
        own_server.pause()
        try:
            until(port, "/readyz", lambda s, text: s == 503 and text.count("take calls yet") == 2)
            assert ask(port, "/healthz")[0] == 200
            assert shell("check", "--http", f":{port}").returncode == 1
            assert shell("check", "--http", f":{port}", "--live").returncode == 0
            found = samples(ask(port, "/metrics")[1])
            assert found["anyio_kkrpc_redis_up"] == {'stream="health"': 0}
        finally:
            own_server.resume()
        until(port, "/readyz", lambda status, text: status == 200)
    done = shell("check", "--http", f":{port}")
    assert (done.returncode, "doesn't answer" in done.stderr) == (1, True)


@pytest.mark.slow
def test_check_by_redis(shell: Shell) -> None:
    """Workers count, clients and those that have left don't, on each version, busy or idle."""
    url = shell.variables["ANYIO_KKRPC_URL"]

    def check(workers: int) -> tuple[int, str]:
        done = shell("check", "-g", "w", "-w", str(workers))
        return done.returncode, (done.stdout + done.stderr).strip()

    there = f"of w on {shell.stream}"
    assert check(1) == (1, f"anyio-kkrpc: 0 workers {there}; 1 wanted")
    with shell.serving(1, "-g", "w", "--max-calls", "1000"):

        async def look() -> None:
            async with (
                RedisStreamsTransport(url, stream=shell.stream, use_consumer_group=True,
                    consumer_group="w") as transport,
                RPCChannel(transport) as channel,
            ):  # fmt: skip
                await anyio.to_thread.run_sync(wait_until, lambda: check(1)[0] == 0)
                assert await anyio.to_thread.run_sync(check, 1) == (0, f"1 worker {there}")
                await channel.get_api().add(1)
                code, text = await anyio.to_thread.run_sync(check, 2)
                assert (code, text) == (1, f"anyio-kkrpc: 1 worker {there}; 2 wanted")

        anyio.run(look)
    assert check(1)[0] == 1


@pytest.mark.one_server
@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["serve", "shop:Api", "--http", "nowhere"], 2, "--http"),
        (["serve", "shop:Api", "--http", "192.0.2.1:1"], 1, "--http 192.0.2.1:1: "),
        (["check"], 2, "--group"),
        (["check", "-g", ""], 2, "--group"),
        (["check", "--live", "-g", "w"], 2, "--http"),
        (["check", "--http", "x:y"], 2, "--http"),
        (["check", "--http", ":1"], 1, "doesn't answer"),
        (["check", "-g", "w", "--url", NOWHERE], 5, "connection error"),
    ],
)
def test_errors(shell: Shell, args: list[str], code: int, text: str) -> None:
    """One line that says what is wrong."""
    done = shell(*args)
    assert (done.returncode, text in done.stderr.splitlines()[-1]) == (code, True)
    assert "secret" not in done.stderr


@pytest.mark.one_server
def test_answer_that_is_no_http(shell: Shell) -> None:
    """It isn't ready."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(_check.NotReadyError):
            _check.by_http(f":{port}", "/readyz", 0.2)
