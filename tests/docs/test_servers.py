"""The page about more than one server: its snippets run with sentinels and in a Cluster."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import pytest

from tests.servers import Servers
from tests.topologies import ClusterSetup, SentinelSetup

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
