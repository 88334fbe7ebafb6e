"""The examples, run as their readers run them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from anyio_kkrpc.testing import RedisServer

EXAMPLES = Path(__file__).parents[1] / "examples"
BOUND = 20


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


def test_stdio() -> None:
    """A parent calls its child."""
    assert run("stdio_parent") == "Hello, parent!\n"


def test_all_are_run() -> None:
    """Each example stands in a test of this file."""
    source = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert len(names) >= 8
    assert {name for name in names - {"stdio_child"} if f'"{name}"' not in source} == set()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_says_what_it_is(name: str) -> None:
    """Each begins with a docstring, and is short."""
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) < 70
