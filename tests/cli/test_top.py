"""The live view: its layout, what it asks a real server, and how it behaves in a terminal."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from anyio import create_task_group, fail_after, sleep, sleep_forever
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc._cli._top import Watch
from anyio_kkrpc._cli._top_look import SEARCH_INTERVAL, GroupLook, Search, StreamLook, Worker, look
from anyio_kkrpc._cli._top_shards import with_totals
from anyio_kkrpc._cli._top_table import age, rate, shorten
from anyio_kkrpc._cli._top_view import Fitted, Frame
from anyio_kkrpc.redis._stream._keys import DELAYED, HANDED_BACK
from anyio_kkrpc.redis._stream._places import name_of_shard
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

ALIKE = [f"consumer-{letter * 26}" for letter in "ab"]


def draw(frame: Frame, width: int = 80, height: int | None = None) -> list[str]:
    """Return the lines without colour."""
    console = Console(width=width, height=height or 1, color_system=None)
    lines = console.render_lines(Fitted(frame) if height else frame, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def group(
    name: str = "workers",
    waiting: int | None = 0,
    running: int = 0,
    oldest: float | None = None,
    taken: int = 0,
    workers: list[Worker] | None = None,
) -> GroupLook:
    return GroupLook(name, waiting, running, oldest, taken, workers or [])


def frame(*streams: StreamLook, **others: object) -> Frame:
    return Frame("top", list(streams), **others)  # type: ignore[arg-type]


# Layout


@pytest.mark.parametrize("width", [80, 100, 200])
def test_names_can_be_told_apart(width: int) -> None:
    """Names that begin alike stay different, however long those beside them are."""
    workers = [Worker(f"{name}{end}", 1, 0.1) for name in ALIKE for end in "xy"]
    long = "a-stream-with-a-rather-long-name-of-its-own"
    view = frame(StreamLook(long, groups=[group("a-group-of-which-the-same-is-true", 1, 4, 2.0)]))
    view.streams[0].groups[0].workers = workers
    lines = draw(view, width)
    assert max(map(cell_len, lines)) <= width
    shown = [line.split()[0] for line in lines[-4:]]
    assert len(set(shown)) == 4
    assert all(name.startswith("consumer-") and name[-1] in "xy" for name in shown)
    if width == 200:
        assert shown == [worker.name for worker in workers]
        assert long in "\n".join(lines)


@pytest.mark.parametrize("width", range(1, 120, 7))
def test_fits_any_width(width: int) -> None:
    """Columns that matter less go first; nothing is wider than the terminal."""
    workers = [Worker(name, 12345, 1000.0) for name in ALIKE]
    view = frame(StreamLook("jobs", 10**6, dead=7, groups=[group("g", 10**6, workers=workers)]))
    lines = draw(view, width)
    assert max(map(cell_len, lines)) <= width
    if width >= 60:
        assert "waiting" in "\n".join(lines)


@given(st.lists(st.text("ab世x", min_size=1, max_size=30), unique=True, max_size=30))
def test_shorten(names: list[str]) -> None:
    """All names are different, and none is too long."""
    for width in (8, 12, 40):
        short = shorten(names, width)
        assert list(short) == names
        assert len(set(short.values())) == len(names)
        assert all(cell_len(name) <= width for name in short.values())
        assert width < 40 or all(name == short[name] for name in names if cell_len(name) <= 40)


@pytest.mark.parametrize("height", [12, 24, 50])
def test_more_than_the_screen_holds(height: int) -> None:
    """What matters is shown, in the order of names, and how much isn't is said."""
    workers = [Worker(f"worker-{n:03}", 9 if n == 77 else 0, 1.0) for n in range(200)]
    streams = [StreamLook(f"stream-{n:02}", groups=[group()]) for n in range(40)]
    streams[20].groups = [group(waiting=5, running=9, workers=workers)]
    streams[30].groups = [group(waiting=8)]
    lines = draw(frame(*streams), height=height)
    text = "\n".join(lines)
    assert len(lines) <= height
    assert "worker-077" in text
    assert text.index("\nstream-20") < text.index("\nstream-30")
    rows = sum(line.startswith("stream-") for line in lines)
    assert re.search(rf"and {40 - rows} more, where 0 wait", text)
    rows = sum(line.startswith("worker-") for line in lines)
    assert f"and {200 - rows} more workers, holding 0" in text
    assert not any(line.startswith("and ") for line in draw(frame(*streams)))


def test_what_needs_attention_has_a_word() -> None:
    """Each is said in words, so that it is seen without colour."""
    text = "\n".join(
        draw(
            frame(
                StreamLook("a b", dead=3, groups=[]),
                StreamLook("s", groups=[group("g", 12, 0, 7.0)]),
                StreamLook("lost", groups=[group("g", None, 0, 7.0, workers=[Worker("w", 0, 99)])]),
                StreamLook("old", groups=[group("g", 0, 1, 300.0, workers=[Worker("w", 1, 1.0)])]),
                StreamLook("mute", groups=[group("g", 0, 2, 9.0, workers=[Worker("w", 2, 130.0)])]),
                trouble="since 10:00",
            ),
            120,
        )
    )
    assert re.search(r"NOT REACHABLE +since 10:00", text)
    assert re.search(r"DEAD LETTERS +a b: 3  \(anyio-kkrpc dead list -s 'a b'\)", text)
    assert re.search(r"NO WORKER +s, g: 12 waiting, the oldest for 7.0 s", text)
    assert re.search(r"NO WORKER +lost, g: some waiting", text)
    assert re.search(r"OLD +old, g: the oldest request is unfinished after 5 min", text)
    assert re.search(r"SILENT +mute, g: 2 held by 1 worker not heard of for 2 min", text)
    assert "nothing needs attention" not in text
    assert "nothing needs attention" in "\n".join(draw(frame(StreamLook("quiet"))))


def test_notices_leave_room_for_the_tables() -> None:
    """With trouble everywhere the tables are still there."""
    streams = [StreamLook(f"stream-{n:02}", dead=1, groups=[group()]) for n in range(40)]
    lines = draw(frame(*streams), height=24)
    assert len(lines) <= 24
    assert sum("DEAD LETTERS" in line for line in lines) == 6
    assert "and 34 more of these" in lines
    assert sum(line.startswith("stream-") for line in lines) > 6


def test_names_are_no_commands() -> None:
    """Names are what others wrote: neither Rich nor the terminal takes them as commands."""
    name = "[/b]\x1b[red]"
    worker = Worker(name, 1, 1.0)
    text = "\n".join(draw(frame(StreamLook(name, dead=1, groups=[group(name, workers=[worker])]))))
    assert text.count("[/b]\\x1b[red]") >= 3
    assert "\x1b" not in text


def test_rates_and_ages() -> None:
    """A rate needs two looks; a stream that was made anew has none below zero."""
    assert rate(5, None, 1.0) == rate(None, 5, 1.0) == rate(5, 5, 0.0) == "-"
    assert rate(6, 5, 2.0) == "0.5/s"
    assert rate(20_005, 5, 2.0) == "10,000/s"
    assert rate(0, 5, 2.0) == "0/s"
    ages = [age(s) for s in (0.04, 9.96, 119, 120, 7199, 7200, 172800)]
    assert ages == ["0.0 s", "10 s", "119 s", "2 min", "119 min", "2 h", "2 d"]
    old = StreamLook("s", written=10, groups=[group(taken=10)])
    new = StreamLook("s", written=30, groups=[group(taken=20)])
    lines = "\n".join(draw(frame(new, before={"s": old}, seconds=2.0), 120))
    assert re.search(r"s +workers .* 10/s +5.0/s", lines)


def shard(number: int, **about: Any) -> StreamLook:
    """Return a shard of which all is as its number, but for what is given."""
    n, name = number, "consumer-me" + (f"@{number}" if number else "")
    one = group("g", n, n, float(n), 10 * n, [Worker(name, n, 10.0 - n), Worker("w", 1, 9.0)])
    found = StreamLook(name_of_shard("jobs", n), n, 10 * n, n, [one])
    for key, value in about.items():
        setattr(found, key, value)
    return found


def test_shards_are_shown_together() -> None:
    """A row for all of a stream, with its rates, is before those of each; workers are there once."""
    shards = [shard(number) for number in range(4)]
    old = [shard(n, written=5 * n, groups=[group("g", taken=0)]) for n in range(4)]
    others = [StreamLook("jobs-b", groups=[group()]), StreamLook("jobs/1.1", groups=[group()])]
    before = {one.name: one for one in old}
    lines = draw(frame(*others, *reversed(shards), before=before, seconds=1.0), 160)
    rows = {line.split("  ")[0].strip(): line.split("  ", 1)[-1].split() for line in lines}
    names = [name for name in rows if name.startswith("jobs")]
    assert names == [
        *("jobs in all", "jobs", "jobs/1.254", "jobs/2.46", "jobs/3.61", "jobs-b", "jobs/1.1")
    ]
    assert rows["jobs in all"] == ["g", "6", "6", "3.0", "s", "30/s", "60/s", "2", "6", "6"]
    assert rows["jobs/3.61"] == ["g", "3", "3", "3.0", "s", "15/s", "30/s", "2", "3", "3"]
    assert sum("consumer-me" in line for line in lines) == 4
    shards[2].written = shards[2].groups[0].waiting = shards[2].dead = None
    (total,) = [one for one in with_totals(shards) if one.total]
    assert (total.written, total.dead, total.groups[0].waiting) == (None, None, None)
    assert [(one.name, one.holds, one.idle) for one in total.groups[0].workers] == [
        *(("consumer-me", 6, 7.0), ("w", 4, 9.0))
    ]
    assert not any(one.total for one in with_totals([*others, shards[0]]))


# What it asks


def request(client: redis.Redis, stream: str, *, ms: int | str = "*") -> bytes:
    """Write what a request looks like, as a peer that has gone did."""
    record = '{"t":"q","id":"1","op":"call","p":["add"],"a":[],"d":30000}'
    entry = "*" if ms == "*" else f"{ms}-0"
    made = client.xadd(stream, {"from": "x", "json": record}, id=entry)
    assert isinstance(made, bytes)
    return made


@pytest.fixture
def own(own_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of a server that holds nothing else."""
    with redis.Redis.from_url(own_server.url) as client:
        yield client


def search(client: redis.Redis) -> list[str]:
    found = Search(client)
    found.go_on(None)
    assert found.complete
    return found.names


async def test_finds_streams_by_their_peers(
    own_server: RedisServer, own: redis.Redis, anyio_backend_name: str
) -> None:
    """A group and a broadcast are found though nothing was ever cancelled; what is beside isn't."""
    assert search(own) == []
    own.xadd("foreign", {"text": "hello"})
    own.xadd("foreign-data", {"data": "hello"})
    own.set("{jobs}:control-of-something", "x")
    async with (
        RedisStreamsTransport(own_server.url, stream="jobs", use_consumer_group=True) as one,
        RPCChannel(one),
        RedisStreamsTransport(own_server.url, stream="{a}news") as two,
        RPCChannel(two) as channel,
    ):
        await with_call_options(channel.get_api(), reply=False).headline("x")
        await two.signal_destroy()
        own.xadd("{jobs}:dead", {"id": "1-1"})
        keys = {key.decode() for key in own.keys("*")}
        assert {"{a}news:control", "{jobs}:dead"} < keys
        assert any(key.startswith("{jobs}:inbox:") for key in keys)
        assert search(own) == ["jobs", "{a}news"]
    own.delete("jobs")
    # Its dead letters are still there to be seen.
    assert search(own) == ["jobs", "{a}news"]
    assert look(own, ["jobs"])[0].dead == 1


def test_finds_what_waits_for_workers(own: redis.Redis) -> None:
    """When all peers have gone, requests are found by what they are, of kkrpc too."""
    request(own, "left")
    own.xadd("typescript", {"data": '{"type":"request"}\n', "sessionId": "x"})
    own.xadd("binary", {"from": "x", "cbor": b"\xa0"})
    own.xadd("mail", {"from": "x", "to": "y"})
    own.xadd(b"\xff\xfe", {"from": "x", "json": "{}"})
    own.xadd("empty", {"x": "y"}, maxlen=0, approximate=False)
    assert search(own) == ["binary", "left", "typescript"]
    seen = Search(own)
    seen.go_on(None)
    request(own, "empty")
    seen._next = 0.0
    seen.go_on(None)
    assert seen.names == ["binary", "empty", "left", "typescript"]


def test_search_is_in_parts(own: redis.Redis) -> None:
    """It does a part at each look, forgets nothing meanwhile, and pauses longer if it took long."""
    with own.pipeline(transaction=False) as pipe:
        for n in range(5000):
            pipe.set(f"key-{n}", "x")
        pipe.execute()
    request(own, "one")
    part = Search(own)
    parts = 1
    part.go_on(0.0)
    assert not part.complete
    while not part.complete:
        part.go_on(0.0)
        parts += 1
    assert parts > 4
    assert part.names == ["one"]
    before = own.info("commandstats")["cmdstat_scan"]["calls"]
    part.go_on(None)
    assert own.info("commandstats")["cmdstat_scan"]["calls"] == before
    assert part._next > time.monotonic() + SEARCH_INTERVAL / 2
    own.delete("one")
    request(own, "two")
    part._next = 0.0
    part.go_on(0.0)
    assert "one" in part.names  # it may come later still
    part._spent = 60.0
    while part._cursor:
        part.go_on(0.0)
    assert part.names == ["two"]
    assert part._next > time.monotonic() + 600


def test_looks_at_groups(own: redis.Redis) -> None:
    """What waits, what runs, and for how long, on the server's clock."""
    now = int(own.time()[0]) * 1000
    for ms in (now - 90_000, now - 80_000, now - 70_000):
        request(own, "jobs", ms=ms)
    own.xgroup_create("jobs", "g", id="0")
    (found,) = look(own, ["jobs"])
    assert (found.length, found.written, found.dead) == (3, 3, 0)
    (seen,) = found.groups
    assert (seen.waiting, seen.running, seen.workers, seen.some_wait) == (3, 0, [], True)
    assert seen.oldest == pytest.approx(90, abs=20)
    own.xreadgroup("g", "worker", {"jobs": ">"}, count=2)
    own.xreadgroup("g", HANDED_BACK, {"jobs": ">"}, count=1)
    own.xack("jobs", "g", f"{now - 90_000}-0")
    (handed_back,) = own.xpending_range("jobs", "g", "-", "+", 1, HANDED_BACK)
    for owner in (HANDED_BACK, DELAYED):
        own.xclaim("jobs", "g", owner, 0, [handed_back["message_id"]], justid=True)
        (seen,) = look(own, ["jobs"])[0].groups
        assert (seen.waiting, seen.running, seen.taken) == (1, 1, 3)
    # What was handed back or is delayed waits, and its owner is no worker.
    assert (seen.waiting, seen.running, seen.taken) == (1, 1, 3)
    assert [(worker.name, worker.holds) for worker in seen.workers] == [("worker", 1)]
    assert seen.oldest == pytest.approx(80, abs=20)
    assert look(own, ["nothing"]) == [StreamLook("nothing")]


@pytest.mark.anyio
async def test_calls_with_keys(own_server: RedisServer, own: redis.Redis) -> None:
    """Those that run are named, and those that are to begin later are counted."""

    async def render(page: int) -> None:
        await sleep_forever()

    transport = RedisStreamsTransport(
        own_server.url, stream="jobs", use_consumer_group=True, consumer_name="painter"
    )
    async with transport, RPCChannel(transport, expose={"render": render}) as channel:
        api = channel.get_api()
        one = await channel.start(api.render(1), key="page-1")
        await channel.start(api.render(2), key="page-2", delay=3600)
        with fail_after(BOUND):
            while (await one.state()).kind != "running":
                await sleep(0.01)
        async with create_task_group() as group:
            group.start_soon(with_call_options(api, timeout=BOUND).render, 3)
            watch = Watch(own_server.url, None)
            try:
                with fail_after(BOUND):
                    while watch.next().streams[0].groups[0].running < 2:
                        await sleep(0.01)
                shown = watch.next()
            finally:
                watch.close()
            group.cancel_scope.cancel()
    ((call,),) = [group.keyed for group in shown.streams[0].groups]
    assert (call.key, call.worker, call.attempt) == ("page-1", "painter", 1)
    assert shown.streams[0].delayed == 1
    for height in (None, 30):
        lines = draw(shown, 100, height)
        assert any(re.match(r"page-1 +jobs +kkrpc-group +painter +\d", line) for line in lines)
        assert "1 call with a key to begin later" in lines
    many = shown.streams[0].groups[0]
    many.keyed *= 9
    lines = draw(shown, 100, 16)
    assert len(lines) <= 16
    assert any(re.match(r"and \d more calls with keys", line) for line in lines)


def test_number_of_waiting_that_nobody_knows(own: redis.Redis) -> None:
    """After requests were deleted the server can't tell how many wait, but whether any does."""
    own.xgroup_create("jobs", "g", id="0", mkstream=True)
    ids = [request(own, "jobs") for _ in range(3)]
    own.xdel("jobs", ids[1])
    (seen,) = look(own, ["jobs"])[0].groups
    assert (seen.waiting, seen.some_wait) == (None, True)
    assert "some" in "\n".join(draw(frame(*look(own, ["jobs"]))))
    own.xdel("jobs", ids[0], ids[2])
    (seen,) = look(own, ["jobs"])[0].groups
    assert (seen.waiting, seen.some_wait, seen.oldest) == (0, False, None)


def test_what_the_user_may_not_read(own_server: RedisServer, own: redis.Redis) -> None:
    """A stream that this user may not read is named, and the others are shown."""
    request(own, "mine")
    request(own, "yours")
    own.xadd("{yours}:dead", {"id": "1-1"})
    own.acl_setuser(
        "me", enabled=True, passwords=["+pw"], keys=["mine"], commands=["+@all"], reset=True
    )
    watch = Watch(own_server.url.replace("//", "//me:pw@"), None)
    try:
        lines = draw(watch.first(None))
    finally:
        watch.close()
    assert any(re.match(r" NOT READABLE +yours: ", line) for line in lines)
    assert any(re.match(r"mine +no group .* \?", line) for line in lines)


# In a terminal


class Terminal:
    """``top`` in a terminal of its own, and the frames it draws there."""

    def __init__(self, *args: str, columns: int = 100, rows: int = 30) -> None:
        self._master, child = os.openpty()
        self.resize(columns, rows)
        # It is the terminal that makes a SIGINT of Ctrl-C, so it has to be the controlling one.
        control = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        control += "; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        command = [sys.executable, "-c", control, "-m", "anyio_kkrpc", "top", *args]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, start_new_session=True,
            env={**environment, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(child)
        self.output = ""

    def resize(self, columns: int, rows: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    @property
    def frame(self) -> str:
        """What the last whole frame shows."""
        frames = self.output.split("\x1b[H")
        text = frames[-2] if len(frames) > 2 else ""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")

    def wait(self, condition: Callable[[str], object]) -> str:
        """Read until a frame is such; return it."""
        end = time.monotonic() + BOUND
        while not condition(self.frame):
            left = end - time.monotonic()
            assert left > 0, self.frame or self.output
            if select.select([self._master], [], [], left)[0]:
                assert self._read(), self.output
        return self.frame

    def finish(self) -> int:
        """Read to the end; return the exit code."""
        end = time.monotonic() + BOUND
        while True:
            left = end - time.monotonic()
            assert left > 0, self.output
            if select.select([self._master], [], [], left)[0] and not self._read():
                return self.process.wait(BOUND)

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says so when the last one has closed the other end
            return False
        self.output += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(BOUND)
        os.close(self._master)


@contextmanager
def terminal(*args: str, columns: int = 100, rows: int = 30) -> Iterator[Terminal]:
    shown = Terminal(*args, columns=columns, rows=rows)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def worker(url: str, directory: Path) -> Iterator[None]:
    """Serve stream ``jobs`` in a process of its own."""
    (directory / "shop.py").write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    command = [sys.executable, "-m", "anyio_kkrpc", "serve", "shop", "-g", "workers", "-s", "jobs"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "ANYIO_KKRPC_URL": url},
    ) as process:
        try:
            assert process.stderr is not None
            assert ": serving " in process.stderr.readline()
            yield
        finally:
            process.terminate()
            process.wait(BOUND)


def is_restored(shown: Terminal) -> bool:
    """Whether screen, cursor and keys are as before, and nothing was written then."""
    output = shown.output
    last = {name: output.rfind(f"\x1b[?{name}") for name in ("1049h", "1049l", "25l", "25h")}
    after = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\^C", "", output[last["1049l"] :]).strip()
    assert -1 < last["1049h"] < last["1049l"]
    assert -1 < last["25l"] < last["25h"]
    return shown.echoes and not after


@pytest.mark.one_server
@pytest.mark.slow
def test_live_view(own_server: RedisServer, own: redis.Redis, tmp_path: Path) -> None:
    """Frames change, rates come with calls, Ctrl-C ends it with 0 and the terminal as it was."""
    url = own_server.url
    with terminal("--url", url, "--interval", "0.2", columns=100) as shown:
        shown.wait(lambda text: "no streams of anyio_kkrpc yet" in text)
        # A backlog from before there are workers; it is found by the search that runs again.
        own.xgroup_create("jobs", "workers", id="0", mkstream=True)
        request(own, "jobs")
        shown.wait(lambda text: re.search(r"NO WORKER +jobs, workers: 1 waiting", text))
        with worker(url, tmp_path):
            shown.wait(lambda text: re.search(r"consumer-\w{26} +jobs +workers", text))
            quiet = r"jobs +workers +0 +0 +- +0/s +0/s +1 +0"
            text = shown.wait(lambda text: re.search(quiet, text))
            assert "nothing needs attention" in text

            def rates(text: str) -> bool:
                # One more request for each frame, so that there is one between two looks.
                request(own, "jobs")
                return bool(re.search(r"jobs +workers .* [1-9][\d.]*/s +[1-9][\d.]*/s +1", text))

            shown.wait(rates)
            own.xadd("{jobs}:dead", {"id": "1-1"})
            shown.wait(lambda text: re.search(r"DEAD LETTERS +jobs: 1", text))
            shown.resize(60, 20)
            text = shown.wait(lambda text: "DEAD" in text and max(map(len, text.split("\n"))) <= 60)
            assert len(text.split("\n")) <= 21
            assert re.search(r"jobs +workers", text)
            shown.press(b"\x03")
            assert shown.finish() == 0
            assert is_restored(shown)
            assert "Traceback" not in shown.output


@pytest.mark.one_server
@pytest.mark.slow
def test_server_that_goes_away(own_server: RedisServer, own: redis.Redis) -> None:
    """It says so, shows what was before, and goes on; SIGTERM ends it as Ctrl-C does."""
    request(own, "jobs")
    with terminal("--url", own_server.url, "--interval", "0.1") as shown:
        shown.wait(lambda text: "jobs" in text)
        own_server.kill()
        text = shown.wait(lambda text: "NOT REACHABLE" in text)
        assert re.search(r"jobs +no group", text)
        own_server.restart()
        with redis.Redis.from_url(own_server.url) as client:
            request(client, "jobs")
        text = shown.wait(lambda text: "NOT REACHABLE" not in text)
        assert re.search(r"jobs +no group", text)
        own_server.pause()
        shown.wait(lambda text: re.search(r"NOT REACHABLE .*[Tt]imeout", text))
        own_server.resume()
        shown.wait(lambda text: "NOT REACHABLE" not in text)
        shown.process.send_signal(signal.SIGTERM)
        assert shown.finish() == 0
        assert is_restored(shown)
        assert "Traceback" not in shown.output


@pytest.mark.one_server
@pytest.mark.slow
def test_it_fits_the_screen_and_q_ends_it(own_server: RedisServer, own: redis.Redis) -> None:
    """As in other programs of this kind, without waiting for the next look; other keys do not."""
    for n in range(40):
        request(own, f"stream-{n}")
        own.xgroup_create(f"stream-{n}", "g", id="0")
    for n in range(200):
        own.xgroup_createconsumer("stream-7", "g", f"consumer-{n:026}")
    with terminal("--url", own_server.url, "--interval", "600", columns=80, rows=24) as shown:
        text = shown.wait(lambda text: "more of these" in text)
        assert re.search(r"and \d+ more, where \d+ wait", text)
        assert re.search(r"and \d+ more workers, holding 0 *\n?$", text)
        assert not shown.echoes
        shown.press(b"x")
        # A new size is taken up at once.
        shown.resize(70, 20)
        text = shown.wait(lambda text: max(map(len, text.split("\n"))) <= 70)
        assert "more workers" in text
        shown.press(b"q")
        assert shown.finish() == 0
        assert is_restored(shown)


@pytest.mark.one_server
@pytest.mark.slow
def test_ctrl_c_before_the_first_look(own_server: RedisServer) -> None:
    """Nothing was shown, so it is an interrupted command."""
    own_server.pause()
    with terminal("--url", own_server.url, "--once") as shown:
        end = time.monotonic() + BOUND
        while f":{own_server.port:04X} 01 " not in Path("/proc/net/tcp").read_text():
            assert time.monotonic() < end, "it didn't connect"
            time.sleep(0.01)
        shown.press(b"\x03")
        assert shown.finish() == 130
        assert "Traceback" not in shown.output


@pytest.mark.one_server
@pytest.mark.slow
def test_without_a_terminal(own_server: RedisServer, own: redis.Redis) -> None:
    """One look follows the other, as text; a name that is no stream is refused."""
    request(own, "jobs")
    command = [sys.executable, "-m", "anyio_kkrpc", "top", "--url", own_server.url]
    with subprocess.Popen(
        [*command, "--interval", "0.1", "-s", "jobs"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        looks = 0
        while looks < 3:
            line = process.stdout.readline()
            assert line
            assert "\x1b" not in line
            looks += line.startswith("jobs ")
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUND) == 0
    own.set("text", "x")
    done = subprocess.run(
        [*command, "--once", "-s", "text"], capture_output=True, text=True, timeout=BOUND
    )
    assert (done.returncode, done.stderr) == (2, "anyio-kkrpc: --stream: text is no stream\n")
