"""The command line on a real server: serve, call, dead letters, top."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest
import redis

import anyio_kkrpc
from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc._cli import main
from anyio_kkrpc._cli._attach import What
from anyio_kkrpc._cli._attaching import attach
from anyio_kkrpc.redis._stream._places import name_of_shard
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

SHOP = """
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio


class Api:
    answer = 42

    def add(self, a: int, b: int = 0) -> int:
        return a + b

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    def boom(self) -> None:
        raise ValueError("no")

    def die(self) -> None:
        os._exit(9)

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> None:
        raise SystemExit("gone")

    def colour(self) -> None:
        raise ValueError("\\x1b[31m[/red]")

    def stop(self, code: int) -> None:
        os._exit(code)

    async def busy(self, seconds: float) -> int:
        await anyio.sleep(seconds)
        return os.getpid()


@asynccontextmanager
async def pooled():
    if os.path.exists("broken"):
        raise OSError("no pool")
    sys.stderr.write(f"entering {os.getpid()}\\n")  # in one piece
    while os.path.exists("slow"):
        await anyio.sleep(0.05)
    try:
        yield Api()
    finally:
        sys.stderr.write(f"left {os.getpid()}\\n")


async def more(call, call_next):
    result = await call_next(call)
    return result + 100 if call.method == "add" else result
"""
# Of another length: Python takes bytecode for that of a file by its size and its second.
CHANGED = SHOP.replace("a + b", "a * b * 1")


class Shell:
    """Runs commands against one stream, from a directory with a module to serve.

    :ivar said: the lines that came before all workers served
    """

    def __init__(self, url: str, stream: str, directory: Path) -> None:
        self.stream = stream
        self.directory = directory
        self.said: list[str] = []
        self.variables = {
            "ANYIO_KKRPC_URL": url,
            "ANYIO_KKRPC_STREAM": stream,
            "COLUMNS": "160",
        }

    command = (sys.executable, "-m", "anyio_kkrpc")

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a command in this process, which takes a hundredth of the time that one takes to start."""
        output = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.directory)
            for name, value in self.variables.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", output[0])
            patch.setattr(sys, "stderr", output[1])
            patch.setattr(sys, "path", [*sys.path])
            code = main(args)
        sys.modules.pop("shop", None)
        texts = []
        for stream in output:
            stream.flush()
            stream.seek(0)
            texts.append(stream.read())
        return subprocess.CompletedProcess(args, code, *texts)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
            cwd=self.directory,
            env={**os.environ, **self.variables},
        )

    @contextmanager
    def serving(
        self, workers: int, *args: str, target: str = "shop:Api", ready: bool = True
    ) -> Iterator[subprocess.Popen[str]]:
        """Serve until the end of the block, from when so many workers serve if ``ready``."""
        with subprocess.Popen(
            [*self.command, "serve", target, "-w", str(workers), *args],
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={**os.environ, **self.variables},
        ) as process:
            try:
                self.said = wait_for_lines(process, workers if ready else 0, ": serving ")
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait(BOUND)


def wait_for_lines(process: subprocess.Popen[str], count: int, text: str) -> list[str]:
    assert process.stderr is not None
    lines: list[str] = []
    while sum(text in line for line in lines) < count:
        line = process.stderr.readline()
        assert line, f"it ended: {lines}"
        lines.append(line)
    return lines


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def shell(redis_server: RedisServer, tmp_path: Path, request: pytest.FixtureRequest) -> Shell:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    name = re.sub(r"\W", "-", request.node.name)
    return Shell(redis_server.url, f"cli-{name}-{os.getpid()}", tmp_path)


@pytest.mark.one_server
@pytest.mark.slow
def test_keys(shell: Shell) -> None:
    """Calls that are started, found again, cancelled and forgotten, with an exit code for each end."""
    key = ("--group", "w")
    with shell.serving(1, "--group", "w", "--claim-idle", "0.3"):
        first = shell("call", "pid", "--key", "a", *key)
        assert first.returncode == 0
        assert shell("call", "pid", "--key", "a", *key).stdout == first.stdout
        assert shell("call", "add", "1", "--key", "a", *key).returncode == 3
        assert shell("attach", "a", *key).stdout == first.stdout
        state = json.loads(shell("attach", "a", "--state", *key).stdout)
        assert state["kind"] == "done"
        assert 3590 < state["expires"] <= 3600
        assert shell("attach", "a", "--forget", *key).returncode == 0
        assert shell("attach", "a", *key).returncode == 2
        done = shell("call", "busy", "100", "--key", "b", "--keep", "60", "--start", *key)
        assert (done.returncode, done.stdout) == (0, "")
        assert shell("attach", "b", "--timeout", "0.1", *key).returncode == 4
        assert shell("attach", "b", "--forget", *key).returncode == 2
        assert shell("attach", "b", "--cancel", *key).returncode == 0
        assert shell("attach", "b", "--progress", *key).returncode == 3
        assert shell("attach", "b", "--cancel", *key).returncode == 2
        assert shell("call", "boom", "--key", "c", "--start", *key).returncode == 0
        assert shell("attach", "c", *key).returncode == 1
        assert shell("attach", "c", "--state", "--cancel", *key).returncode == 2
        assert all(
            what == "result" or what in signature(attach).parameters for what in get_args(What)
        )
        assert shell("call", "pid", "--start", *key).returncode == 2


@pytest.mark.one_server
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_serve_and_call(shell: Shell, backend: str) -> None:
    """JSON in, JSON out, and exit codes; SIGTERM ends it cleanly."""
    if backend == "uvloop":
        pytest.importorskip("uvloop")
    with shell.serving(2, "--group", "w", "--backend", backend) as process:
        done = shell("call", "add", "1", "2")
        assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
        assert shell("call", "add", "1", "-k", "b=5").stdout == "6\n"
        assert shell("call", "count", "3").stdout == "0\n1\n2\n"
        assert shell("call", "--get", "answer").stdout == "42\n"
        done = shell("call", "--no-reply", "boom")
        assert (done.returncode, done.stdout) == (0, "")
        done = shell("call", "boom")
        assert (done.returncode, done.stderr) == (1, "anyio-kkrpc: ValueError: no\n")
        done = shell("call", "nope")
        assert (done.returncode, done.stderr) == (3, "anyio-kkrpc: nope is not a function\n")
        assert shell("call", "add", "x").returncode == 3
        done = shell("call", "leave")
        assert (done.returncode, done.stderr) == (1, "anyio-kkrpc: SystemExit: gone\n")
        done = shell("call", "colour")
        assert done.stderr == "anyio-kkrpc: ValueError: \\x1b[31m[/red]\n"
        if backend == "asyncio":  # what doesn't depend on where the worker runs
            pipe = f"{shlex.join(shell.command)} call count 100000 | head -2"
            done = shell.run("bash", "-o", "pipefail", "-c", pipe)
            assert (done.returncode, done.stdout, done.stderr) == (0, "0\n1\n", "")
            done = shell.run(*shell.command, "call", "boom")
            assert (done.returncode, done.stderr) == (1, "anyio-kkrpc: ValueError: no\n")
        process.terminate()
        assert process.wait(BOUND) == 0
    done = shell("call", "add", "1", "--timeout", "2")
    assert done.returncode == 4
    assert "no answer within 2.0 s" in done.stderr


@pytest.mark.one_server
@pytest.mark.slow
def test_beginning_on_trio(shell: Shell) -> None:
    """Signals are waited for by one task at a time, so that no worker dies as it begins."""
    for _ in range(3):
        with shell.serving(1, "--group", "w", "--backend", "trio") as process:
            assert shell("call", "add", "1", "2").stdout == "3\n"
            process.terminate()
            assert process.wait(BOUND) == 0


@pytest.mark.one_server
@pytest.mark.slow
def test_worker_that_dies_is_started_again(shell: Shell) -> None:
    """A kill costs nothing, and no worker outlives its supervisor."""
    with shell.serving(1, "-g", "w", "--claim-idle", "0.2", "--reload") as process:
        first = int(shell("call", "pid").stdout)
        os.kill(first, signal.SIGKILL)
        assert "was ended by SIGKILL" in wait_for_lines(process, 1, "started again")[-1]
        wait_for_lines(process, 1, ": serving ")
        second = int(shell("call", "pid").stdout)
        assert second != first
        (shell.directory / "shop.py").write_text(CHANGED)
        wait_for_lines(process, 1, ": serving ")
        assert shell("call", "add", "3", "4").stdout == "12\n"
        third = int(shell("call", "pid").stdout)
        process.kill()
        process.wait(BOUND)
        wait_until(lambda: not Path(f"/proc/{third}").exists())


@pytest.mark.one_server
@pytest.mark.slow
def test_ways_to_die(shell: Shell) -> None:
    """Whatever ends a worker, another one takes its place; a destroy signal ends the service."""
    with shell.serving(2, "-g", "w", "--max-deliveries", "1") as process:
        for code in (0, 2):
            assert shell("call", "--no-reply", "stop", str(code)).returncode == 0
            lines = wait_for_lines(process, 1, "it is started again")
            assert f"ended with code {code}; " in lines[-1]
            wait_for_lines(process, 1, ": serving ")
        os.kill(int(shell("call", "pid").stdout), signal.SIGTERM)
        assert "ended with code 0; " in wait_for_lines(process, 1, "it is started again")[-1]
        wait_for_lines(process, 1, ": serving ")
        with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
            wait_until(lambda: len(client.xinfo_consumers(shell.stream, "w")) == 2)

        async def destroy() -> None:
            url = shell.variables["ANYIO_KKRPC_URL"]
            async with RedisStreamsTransport(url, stream=shell.stream) as transport:
                await transport.signal_destroy()

        anyio.run(destroy)
        wait_for_lines(process, 1, "by a destroy signal; the service ends")
        assert process.wait(BOUND) == 0


@pytest.mark.slow
def test_killed_while_busy(shell: Shell) -> None:
    """What a worker held when it was killed is done at once, though `claim_idle` is long."""
    url = shell.variables["ANYIO_KKRPC_URL"]
    pids: list[int] = []

    async def call(api: Any) -> None:
        pids.append(await api.busy(1.0))

    async def ask() -> None:
        async with (
            RedisStreamsTransport(url, stream=shell.stream) as transport,
            RPCChannel(transport, timeout=CALL_BOUND) as channel,
            anyio.create_task_group() as group,
        ):
            api = channel.get_api()
            first = await api.pid()
            for _ in range(8):
                group.start_soon(call, api)
            with redis.Redis.from_url(url) as client, anyio.fail_after(BOUND):
                while client.xpending(shell.stream, "w")["pending"] < 8:
                    await anyio.sleep(0.02)
            os.kill(first, signal.SIGKILL)

    with shell.serving(2, "-g", "w", "--concurrency", "4", "--claim-idle", "600"):
        anyio.run(ask)
    assert len(pids) == 8


@pytest.mark.one_server
@pytest.mark.slow
def test_sighup(shell: Shell) -> None:
    """New processes take the place of the present ones, and no call is lost."""
    with shell.serving(2, "-g", "w") as process:
        before = {shell("call", "pid").stdout for _ in range(20)}
        process.send_signal(signal.SIGHUP)
        done = [shell("call", "-t", str(CALL_BOUND), "pid") for _ in range(10)]
        assert {one.returncode for one in done} == {0}
        wait_for_lines(process, 1, "the workers are new")
        after = {shell("call", "pid").stdout for _ in range(20)}
        assert not before & after
    with shell.serving(1, "-g", "w") as process:  # without a supervisor
        (shell.directory / "shop.py").write_text(CHANGED)
        process.send_signal(signal.SIGHUP)
        wait_for_lines(process, 1, ": serving ")
        assert shell("call", "add", "3", "4").stdout == "12\n"


@pytest.mark.one_server
@pytest.mark.slow
def test_lifespan(shell: Shell) -> None:
    """Each worker enters what it is to serve, and leaves it; it can be told to end meanwhile."""
    with shell.serving(2, "-g", "w", target="shop:pooled") as process:
        assert shell("call", "add", "1", "2").stdout == "3\n"
        process.terminate()
        lines = wait_for_lines(process, 2, "left ")
        assert len({line.split()[-1] for line in lines if line.startswith("left ")}) == 2
        assert process.wait(BOUND) == 0
    (shell.directory / "slow").touch()
    grace = str(BOUND)
    with shell.serving(1, "--grace", grace, target="shop:pooled", ready=False) as process:
        wait_for_lines(process, 1, "entering ")
        process.terminate()
        assert process.wait(BOUND) == 0
    (shell.directory / "broken").touch()
    with shell.serving(2, "-g", "w", target="shop:pooled", ready=False) as process:
        lines = wait_for_lines(process, 1, "see above")
        assert sum("no pool" in line for line in lines) >= 2
        assert process.wait(BOUND) == 1


@pytest.mark.one_server
@pytest.mark.slow
def test_recycled(shell: Shell) -> None:
    """After so many calls, or for want of memory, a new process takes the place."""
    for option, number, calls in (("--max-calls", 2, 2), ("--max-memory", 1, 1)):
        with shell.serving(1, "-g", "w", option, str(number)) as process:
            ask = partial(shell, "call", "-t", str(CALL_BOUND), "pid")
            (pid,) = {ask().stdout.strip() for _ in range(calls)}
            wait_for_lines(process, 1, f"a new worker takes the place of this one (pid {pid})")
            assert ask().stdout.strip() not in ("", pid)


@pytest.mark.one_server
@pytest.mark.slow
def test_options_of_the_worker(shell: Shell) -> None:
    """Middleware, access log and tracebacks, from the command line or the environment."""
    shell.variables["ANYIO_KKRPC_MIDDLEWARE"] = "shop:more"
    shell.variables["ANYIO_KKRPC_GROUP"] = "w"
    with shell.serving(1, "--access-log", "--send-tracebacks") as process:
        assert shell("call", "add", "1", "2").stdout == "103\n"
        assert "anyio_kkrpc.access: " in wait_for_lines(process, 1, " add ")[-1]
        assert shell("call", "boom").returncode == 1


@pytest.mark.one_server
@pytest.mark.slow
def test_signed(shell: Shell) -> None:
    """With the key that its peers have, each command takes part; without it, none does."""
    shell.variables["ANYIO_KKRPC_SIGNING_KEY"] = "a secret of 16 bytes"
    with shell.serving(2, "-g", "w", "--claim-idle", "0.2", "--max-deliveries", "1"):
        assert shell("call", "add", "1", "2").stdout == "3\n"
        assert shell("call", "die").returncode == 5
        letter = json.loads(shell("dead", "list", "--json").stdout)
        assert shell("dead", "retry", letter["id"]).returncode == 0
        del shell.variables["ANYIO_KKRPC_SIGNING_KEY"]
        assert shell("call", "add", "1", "2", "-t", "0.5").returncode == 4
    with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
        client.delete(*client.keys(f"*{shell.stream}*"))


@pytest.mark.one_server
@pytest.mark.slow
def test_shards(shell: Shell) -> None:
    """A stream in several shards is served, called, and its dead letters are seen and removed."""
    shell.variables["ANYIO_KKRPC_SHARDS"] = "3"
    with shell.serving(1, "-g", "w"):
        assert shell("call", "add", "1", "2", "-g", "w").stdout == "3\n"
        assert shell("call", "add", "2", "2", "-g", "w", "--key", "k").stdout == "4\n"
        assert shell("attach", "k", "-g", "w").stdout == "4\n"
        names = [name_of_shard(shell.stream, shard) for shard in range(3)]
        seen = shell("top", "--once").stdout
        assert all(name in seen for name in names)
    with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
        assert sum(client.xlen(name) for name in names) == 2
        about = {"id": "1-1", "group": "w", "reason": "r", "attempts": "5", "first": "1"}
        about["last"] = "2"
        now = client.time()[0] * 1000
        ids = [f"{shard}:{now}-{shard}" if shard else f"{now}-0" for shard in range(3)]
        for shard, name in enumerate(names):
            client.xadd(f"{{{name}}}:dead", about | {"data": "{}"}, id=f"{now}-{shard}")
        listed = shell("dead", "list", "--json").stdout.splitlines()
        assert [json.loads(line)["id"] for line in listed] == ids
        assert json.loads(shell("dead", "show", ids[2]).stdout)["id"] == ids[2]
        done = shell("dead", "purge", ids[1], "9:1-1", "x:1-1", ids[0])
        assert (done.returncode, done.stdout) == (2, "2 removed\n")
        assert "'9:1-1', 'x:1-1'" in done.stderr
        assert shell("dead", "purge", "--older", "1d", "-y").stdout == "0 removed\n"
        again = shell("dead", "retry", ids[2]).stdout
        assert again.startswith(f"{ids[2]} is in {shell.stream} again as 2:")
        assert shell("dead", "purge", "-y").stdout == "0 removed\n"
        assert "--shards" in shell("serve", "shop:Api").stderr
        client.delete(*client.keys(f"*{shell.stream}*"))


@pytest.mark.slow
def test_dead_letters_and_top(shell: Shell) -> None:
    """A call that kills its worker ends as a dead letter, that can be seen and tried again."""
    assert shell("dead", "list").stdout == f"{shell.stream} has no dead letters\n"
    with shell.serving(2, "-g", "w", "--claim-idle", "0.2", "--max-deliveries", "2"):
        done = shell("call", "die")
        assert done.returncode == 5
        assert "dead letter" in done.stderr
        letter = json.loads(shell("dead", "list", "--json").stdout)
        assert (letter["method"], letter["attempts"], letter["group"]) == ("die", 2, "w")
        assert json.loads(shell("dead", "show", letter["id"]).stdout) == letter
        assert letter["id"] in shell("dead", "list").stdout
        with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
            # What anybody could have called.
            fields = client.xrange(f"{{{shell.stream}}}:dead")[0][1]
            odd = {**fields, b"json": fields[b"json"].replace(b'"die"', b'"a[/b]\\u001b"')}
            added = client.xadd(f"{{{shell.stream}}}:dead", odd)
            done = shell("dead", "list")
            assert (done.returncode, done.stderr) == (0, "")
            assert "a[/b]\\x1b" in done.stdout
            client.xdel(f"{{{shell.stream}}}:dead", added)
        done = shell("top", "--once", "--stream", shell.stream)
        assert (done.returncode, done.stderr) == (0, "")
        assert shell.stream in done.stdout
        assert "DEAD LETTERS" in done.stdout
        assert "worker-1-" in done.stdout
        assert shell.stream in shell("top", "--once").stdout
    done = shell("dead", "retry", letter["id"])
    assert done.stdout.startswith(f"{letter['id']} is in {shell.stream} again as ")
    assert shell("dead", "retry", letter["id"]).returncode == 2
    assert shell("dead", "show", "1-1").returncode == 2
    assert shell("dead", "retry", "--all").stdout == f"{shell.stream} has no dead letters\n"
    assert shell("dead", "purge").returncode == 2
    assert shell("dead", "purge", "--yes").stdout == "0 removed\n"
    with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
        client.delete(*client.keys(f"*{shell.stream}*"))


def test_purge(shell: Shell) -> None:
    """Some dead letters, those that are old, or all."""

    def purge(*args: str) -> tuple[int, str]:
        done = shell("dead", "purge", *args)
        return done.returncode, done.stdout.strip()

    with redis.Redis.from_url(shell.variables["ANYIO_KKRPC_URL"]) as client:
        key, now = f"{{{shell.stream}}}:dead", client.time()[0] * 1000

        def left() -> list[int]:
            return [
                (now - int(entry.split(b"-")[0])) // 3_600_000 for entry, _ in client.xrange(key)
            ]

        for hours in (240, 100, 50, 25, 23, 0):
            client.xadd(key, {"id": "1-1"}, id=f"{now - hours * 3_600_000}-7")
        assert purge(f"{now - 50 * 3_600_000}-7") == (0, "1 removed")
        assert left() == [240, 100, 25, 23, 0]
        assert purge("1-1", f"{now - 100 * 3_600_000}-7", "x") == (2, "1 removed")
        assert left() == [240, 25, 23, 0]
        assert purge("--older", "1d") == (2, "")
        assert purge("--older", "1d", "--yes") == (0, "2 removed")
        assert left() == [23, 0]
        assert purge("--older", "1d", "--yes") == (0, "0 removed")
        assert purge("--older", "22.5h", "-y") == (0, "1 removed")
        assert purge("--yes")[0] == 0
        assert left() == []


@pytest.mark.one_server
@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["dead", "purge", "--older", "7", "-y"], 2, "7d"),
        (["dead", "purge", "--older", "-1d", "-y"], 2, "7d"),
        (["dead", "purge", "1-1", "--older", "7d"], 2, "--older"),
        (["dead", "purge", "1-1"], 2, "no dead letter '1-1'"),
        (["call"], 2, "Missing argument"),
        (["call", "x", "-k", "novalue"], 2, "--kwarg"),
        (["call", "x", "1", "--get"], 2, "--get"),
        (["call", "x", "--dialect", "smoke"], 2, "dialect"),
        (["serve", "shop:Api", "-w", "2"], 2, "--group"),
        (["serve", "no_such_module"], 2, "no_such_module"),
        (["serve", "shop:nothing"], 2, "shop has no 'nothing'"),
        (["serve", "shop:nothing", "-w", "2", "-g", "w"], 1, "can't start"),
        (["call", "x", "-t", "0"], 2, "--timeout"),
        (["call", ""], 2, "METHOD"),
        (["call", "a..b"], 2, "METHOD"),
        (["call", "x", "{a: 1}"], 2, "looks like JSON"),
        (["call", "x", "-k", 'a=["b"'], 2, "looks like JSON"),
        (["serve", "shop.py:Api"], 2, "say shop:Api"),
        (["serve", "./deep/shop.py"], 2, "say deep.shop"),
        (["serve", "shop:Api", "--middleware", "shop"], 2, "--middleware"),
        (["call", "x", "--signing-key", "short"], 2, "signing_key: needs at least 16 bytes"),
        (["call", "add", "-5"], 2, "put -- before what begins with a dash"),
        (["serve", "shop:Api", "-g", ""], 2, "--group"),
        (["serve", "shop:Api", "--grace", "inf"], 2, "--grace"),
        (["serve", "exits", "-w", "2", "-g", "w"], 1, "can't start"),
        (["dead", "retry", "x"], 2, "no dead letter 'x'"),
        (["dead", "retry"], 2, "--all"),
        (["call", "x", "--url", "redis://:secret@127.0.0.1:1"], 5, "connection error"),
        (["serve", "shop:Api", "--url", "redis://:secret@127.0.0.1:1"], 5, "connection error"),
        (["top", "--once", "--url", "redis://:secret@127.0.0.1:1"], 5, "connection error"),
    ],
)
def test_errors_say_what_to_do(shell: Shell, args: list[str], code: int, text: str) -> None:
    """One line, no traceback, no password."""
    done = shell(*args)
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    assert last.startswith("anyio-kkrpc: ")
    assert text in last
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the package, in the package and on the command line."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"anyio-kkrpc {anyio_kkrpc.__version__}\n"
    assert anyio_kkrpc.__version__ == version("anyio_kkrpc")


def test_help_loads_no_transport() -> None:
    """It is there at once."""
    code = "import sys; from anyio_kkrpc._cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "anyio_kkrpc._cli._options" in loaded
    assert not loaded & {"redis", "watchfiles", "anyio_kkrpc.redis", "anyio_kkrpc.testing"}


@pytest.mark.one_server
def test_debug_shows_where(shell: Shell) -> None:
    """With --debug anywhere there is a traceback."""
    done = shell.run(*shell.command, "call", "x", "--url", "http://x", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_server(tmp_path: Path) -> None:
    """It serves until told to end, and says so if it can't."""
    with RedisServer() as taken:
        port = taken.port
        done = subprocess.run(
            [sys.executable, "-m", "anyio_kkrpc", "server", "-p", str(port)],
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
        assert done.returncode == 1
        assert f"anyio-kkrpc: port {port} can't be used, --port takes another" in done.stderr
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        with subprocess.Popen(
            [sys.executable, "-m", "anyio_kkrpc", "server", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert f" at redis://127.0.0.1:{port}, in memory" in process.stdout.readline()
            with redis.Redis(port=port) as client:
                pid = client.info("server")["process_id"]
                if number == signal.SIGKILL:
                    os.kill(pid, number)
                    assert process.wait(BOUND) == 1
                    assert "the server has ended" in process.stderr.read()
                else:
                    process.send_signal(number)
                    assert process.wait(BOUND) == 0
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
