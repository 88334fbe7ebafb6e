"""The command line and the demo, as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import redis

from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND


def cli(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyio_kkrpc", *args],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )


@pytest.mark.one_server
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_demo(redis_server: RedisServer, backend: str) -> None:
    """It shows all it promises, both workers answer, and nothing is left."""
    done = cli("demo", "--url", redis_server.url, "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answered = [int(n) for n in re.findall(r"worker-[12] │ (\d+)", done.stdout)]
    assert len(answered) == 2
    assert min(answered) > 0
    for text in ("-> 15", "division by zero", "100%", "subscriber heard: the demo works", "Done"):
        assert text in done.stdout
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.keys("*kkrpc-demo*") == []
        assert peers_of(client) == []


def peers_of(client: redis.Redis) -> list[str]:
    return [one["name"] for one in client.client_list() if one["name"].startswith("anyio_kkrpc:")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_that_is_ended(number: signal.Signals) -> None:
    """It takes its workers and its server along, and its workers' arguments hold no password."""
    with (
        RedisServer(password="s3cret") as server,
        redis.Redis(port=server.port, password="s3cret") as client,
        subprocess.Popen(
            [sys.executable, "-m", "anyio_kkrpc", "demo"],
            env={**os.environ, "ANYIO_KKRPC_URL": server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        end = time.monotonic() + BOUND
        # Stopped for each look: it ends by itself, and must not while this process gets no turn.
        process.send_signal(signal.SIGSTOP)
        while len(peers_of(client)) < 4:  # a writer and an inbox for each of two at least
            process.send_signal(signal.SIGCONT)
            assert time.monotonic() < end
            time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        assert "s3cret" not in " ".join(part for one in children for part in one.cmdline())
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(BOUND) == 130
        assert not any(one.is_running() for one in children)
    with subprocess.Popen(
        [sys.executable, "-m", "anyio_kkrpc", "demo"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "started at" in process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        children = psutil.Process(process.pid).children()
        assert len(children) >= 1
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        assert process.wait(BOUND) == 130
        assert not any(one.is_running() for one in children)


def test_demo_with_a_server_of_its_own() -> None:
    """Without a URL it starts one."""
    done = cli("demo")
    assert done.returncode == 0, done.stderr
    assert "started at redis://127.0.0.1:" in done.stdout


def test_errors_are_one_line() -> None:
    """No traceback, no password."""
    done = cli("demo", "--url", "redis://:secret@127.0.0.1:1")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("anyio-kkrpc: Redis Streams connection error")
    assert "secret" not in done.stderr
    done = cli("demo", "--url", "http://x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("anyio-kkrpc: url: needs to begin with redis://, rediss://")


def test_help() -> None:
    """It says what there is."""
    done = cli("--help")
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert cli().returncode == 2


def test_missing_extra() -> None:
    """Without typer, the line says what to install."""
    code = "import sys; sys.modules['typer'] = None\n"
    code += "from anyio_kkrpc._cli import main; sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert done.returncode == 1
    assert 'pip install "anyio_kkrpc[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
