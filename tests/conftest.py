"""Backends: every async test runs on asyncio, asyncio with uvloop, and trio.

Hypothesis makes the same examples each time, so that a run tells of what has changed in the code, and
has no bounds of time, which would tell of the load. ``pytest --hypothesis-profile=explore`` tries
others, and more of them; ``quick`` tries fewer.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc.testing import _server
from tests.bounds import BOUND

pytest_plugins = ["tests.measured", "tests.covering", "tests.outcomes", "tests.servers"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in its background; the commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("suite"), max_examples=15)
settings.register_profile(
    "explore", settings.get_profile("suite"), derandomize=False, max_examples=2000
)
settings.load_profile("suite")

BACKENDS: list[Any] = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
try:
    import uvloop  # noqa: F401
except ImportError:  # pragma: no cover
    pass
else:
    BACKENDS.insert(1, pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing of 13,000 tests goes away: the garbage collector doesn't look through them, neither
    while they are collected, which takes it a third of that time, nor whenever a test calls it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Where asyncio runs in debug mode, which costs three times as much: all that the library does with
# tasks, on memory transports, and all of its code for sockets; on the Python that runs all tests.
IS_DEFAULT = sys.version_info[:2] == (3, 11)
DEBUGGED = (
    "core",
    "driver",
    "calling",
    "serving",
    "kit/test_queue.py",
    "transports",
    "redis/connection/test_connection.py",
    "redis/connection/test_socket.py",
)


@pytest.fixture(autouse=True, scope="session")
def no_slow_steps_in_the_log() -> Iterator[None]:
    """What asyncio's debug mode says of steps that take long tells how busy the machine is."""

    def is_of_interest(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Executing ")

    logger = logging.getLogger("asyncio")
    logger.addFilter(is_of_interest)
    yield
    logger.removeFilter(is_of_interest)


@pytest.fixture(autouse=True, scope="session")
def patient_servers() -> Iterator[None]:
    """A server on a busy machine takes longer to start than who tries something out would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_server, "START_TIMEOUT", BOUND)
        yield


@pytest.fixture(autouse=True)
def patient_peers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who doesn't say how long a server may take to let it in waits for one on a slow machine."""
    if request.node.get_closest_marker("server") is None:
        return
    make = RedisStreamsTransport.__init__

    def make_patient(self: RedisStreamsTransport, *args: Any, **options: Any) -> None:
        make(self, *args, **{"connect_timeout": BOUND, **options})

    monkeypatch.setattr(RedisStreamsTransport, "__init__", make_patient)


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Name and options of the backend under test."""
    name, options = request.param
    path = request.path.relative_to(Path(__file__).parent)
    if name == "asyncio" and not options and any(path.is_relative_to(part) for part in DEBUGGED):
        options = {"debug": True} if IS_DEFAULT else {}
    return name, options
