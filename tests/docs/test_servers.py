"""The page about more than one server: its snippets run with sentinels and in a Cluster."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RedisStreamsTransport
from tests.bounds import BOUND
from tests.servers import Servers
from tests.topologies import ClusterSetup, SentinelSetup, free_port_and_bus

from .pages import DOCS, blocks_of

PAGE = DOCS / "servers.md"


@pytest.mark.server
@pytest.mark.slow
def test_snippets(servers: Servers) -> None:
    """They print what the page says."""
    executable = servers["valkey8"].executable
    with (
        SentinelSetup(executable, replicas=1, sentinels=1) as sentinels,
        ClusterSetup(executable, masters=1, replicas=0) as cluster,
    ):
        urls = {
            "redis+sentinel://sentinel1,sentinel2,sentinel3/mymaster": sentinels.url,
            "redis+cluster://node1,node2,node3": cluster.url,
        }
        namespace: dict[str, Any] = {"__name__": PAGE.stem}
        printed, expected = io.StringIO(), ""
        for block in blocks_of(PAGE):
            if block.language == "python":
                source = block.text
                for written, real in urls.items():
                    source = source.replace(written, real)
                with redirect_stdout(printed):
                    exec(compile(source, str(PAGE), "exec", dont_inherit=True), namespace)
            elif block.language == "output":
                expected += block.text
        assert printed.getvalue() == expected


SET_UPS = {
    "redis+sentinel://127.0.0.1:7003/mymaster": (7001, 7002, 7003),
    "redis+cluster://127.0.0.1:7011": (7011, 7012, 7013),
}


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SET_UPS)), ids=["sentinel", "cluster"])
def test_set_ups(number: int, tmp_path: Path) -> None:
    """Its commands start servers, which the URL beside them leads to."""
    if shutil.which("redis-server") is None or shutil.which("redis-cli") is None:
        pytest.skip("the page's commands need redis-server and redis-cli on PATH")
    url, ports = [*SET_UPS.items()][number]
    assert url in PAGE.read_text()
    commands = [block.text for block in blocks_of(PAGE) if block.language == "console"][number]
    free = {str(port): str(free_port_and_bus()) for port in ports}
    commands, url = (re.sub(r"\b70\d\d\b", lambda m: free[m[0]], text) for text in (commands, url))
    try:
        command = ["sh", "-ec", commands]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=BOUND)
        assert done.returncode == 0, done.stdout + done.stderr
        anyio.run(_enter, url)
    finally:
        for port in free.values():
            end = ["redis-cli", "-p", port, "shutdown", "nosave"]
            subprocess.run(end, capture_output=True, timeout=BOUND)


async def _enter(url: str) -> None:
    async with RedisStreamsTransport(url, connect_timeout=BOUND) as transport:
        await transport.get_stream_info()
