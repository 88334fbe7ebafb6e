"""docs/typescript.md: its examples run, and print what it says they print."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = [pytest.mark.slow, pytest.mark.one_server]
PAGE = Path(__file__).parents[2] / "docs" / "typescript.md"


def write_files(directory: Path, server: RedisServer, stream: str) -> list[str]:
    """Write the page's files for this server and stream; return the outputs in their order."""
    outputs = []
    for language, name, text in re.findall(
        r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    ):
        if language == "output":
            outputs.append(text)
            continue
        text = text.replace("redis://localhost:6379", server.url)
        text = text.replace('from "kkrpc"', 'from "./kkrpc.mjs"').replace("kkrpc-stream", stream)
        text = text.replace(
            "RedisStreamsTransport(", f"RedisStreamsTransport(stream={stream!r}, url="
        )
        (directory / name).write_text(text)
    return outputs


def command(directory: Path, name: str) -> list[str]:
    return [sys.executable if name.endswith(".py") else "node", str(directory / name)]


def run(directory: Path, name: str) -> str:
    done = subprocess.run(
        command(directory, name), cwd=directory, capture_output=True, text=True, timeout=BOUND
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(directory: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(directory, name), cwd=directory, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_examples(redis_server: RedisServer, stream_name: str, javascript: Path) -> None:
    """In the order of the page."""
    javascript = javascript / "docs"
    javascript.mkdir(exist_ok=True)
    for name in ("io.mjs", "kkrpc.mjs"):
        (javascript / name).write_text((javascript.parent / name).read_text())
    outputs = write_files(javascript, redis_server, stream_name)
    with running(javascript, "worker.py"):
        assert run(javascript, "client.mjs") == outputs[0]
    outputs = write_files(javascript, redis_server, stream_name + "-2")
    with running(javascript, "server.mjs") as server:
        assert server.stderr is not None
        assert server.stderr.readline() == "ready\n"
        assert run(javascript, "client.py") == outputs[1]
    assert run(javascript, "parent.py") == outputs[2]
    assert len(outputs) == 3
