"""docs/typescript.md and docs/bridge.md: their examples run, and print what it says they print."""

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
ADAPTER = "adapter.mjs"
DOCS = Path(__file__).parents[2] / "docs"


def write_files(directory: Path, page: str, server: RedisServer, stream: str) -> list[str]:
    """Write a page's files for this server and stream; return the outputs in their order."""
    outputs = []
    for language, name, text in re.findall(
        r"^```(\w+) ?(\S*)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        if language == "output":
            outputs.append(text)
            continue
        if name == ADAPTER:
            continue  # see `place_for`
        text = text.replace("redis://localhost:6379", server.url)
        text = text.replace('from "kkrpc"', f'from "./{ADAPTER}"').replace("kkrpc-stream", stream)
        text = text.replace('spawn("python", [', f'spawn("{sys.executable}", [')
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


def place_for(javascript: Path, name: str) -> Path:
    place = javascript / name
    place.mkdir(exist_ok=True)
    (adapter,) = re.findall(
        rf"^```typescript {ADAPTER}\n(.*?)^```$",
        (DOCS / "typescript.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    (place / ADAPTER).write_text(adapter)
    return place


def test_examples(redis_server: RedisServer, stream_name: str, javascript: Path) -> None:
    """In the order of the page."""
    place = place_for(javascript, "docs")
    outputs = write_files(place, "typescript.md", redis_server, stream_name)
    with running(place, "worker.py"):
        assert run(place, "client.mjs") == outputs[0]
    outputs = write_files(place, "typescript.md", redis_server, stream_name + "-2")
    with running(place, "server.mjs") as server:
        assert server.stderr is not None
        assert server.stderr.readline() == "ready\n"
        assert run(place, "client.py") == outputs[1]
    assert run(place, "parent.py") == outputs[2]
    assert len(outputs) == 3


def test_examples_for_who_writes_typescript(
    redis_server: RedisServer, stream_name: str, javascript: Path
) -> None:
    """In the order of the page."""
    place = place_for(javascript, "bridge")
    outputs = write_files(place, "bridge.md", redis_server, stream_name)
    with running(place, "service.py"):
        assert run(place, "shop.mjs") == outputs[0]
    outputs = write_files(place, "bridge.md", redis_server, stream_name + "-2")
    with running(place, "importer.py"):
        assert run(place, "import.mjs") == outputs[1]
    assert run(place, "words.mjs") == outputs[2]
    outputs = write_files(place, "bridge.md", redis_server, stream_name + "-3")
    with running(place, "service.py"):
        assert run(place, "prices.mjs") == outputs[3]
    assert len(outputs) == 4
