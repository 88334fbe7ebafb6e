"""What the parts of a channel share, alone: how it begins and ends."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import EndOfStream, create_task_group
from anyio.lowlevel import checkpoint

from anyio_kkrpc import (
    MemoryTransport,
    ProtocolError,
    TransportClosedError,
    TransportConnectionError,
)
from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._protocol._records import Cancel
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


def make_core(transport: Any = None) -> Core:
    transport = MemoryTransport.pair()[0] if transport is None else transport
    return Core(transport, lambda *ids: lambda: None, timeout=5.0, send_tracebacks=False)


async def test_open_between_begin_and_end() -> None:
    """Before and after, it isn't, and says why."""
    core = make_core()
    assert not core.is_open
    assert "has not been entered" in str(core.closed_error())
    async with create_task_group() as group:
        core.enter()
        core.open(group)
        assert core.is_open
        core.end(TransportConnectionError("lost"))
        assert not core.is_open
        with pytest.raises(TransportConnectionError, match="lost"):
            await core.send(Cancel("1"), None)


async def test_one_that_ended_does_not_open() -> None:
    core = make_core()
    core.end(EndOfStream())
    async with create_task_group() as group:
        core.open(group)
        assert not core.is_open


@pytest.mark.parametrize(
    ("reason", "kind", "text"),
    [
        (EndOfStream(), TransportClosedError, "the other side has closed"),
        (TransportClosedError("closed here"), TransportClosedError, "closed here"),
        (ZeroDivisionError("oops"), TransportClosedError, "the RPC channel has ended"),
    ],
)
async def test_each_reason(reason: Exception, kind: type[Exception], text: str) -> None:
    """Each who asks gets an error of his own; what isn't the library's is its cause."""
    core = make_core()
    async with create_task_group() as group:
        core.open(group)
        core.end(reason)
    errors = [core.closed_error() for _ in range(2)]
    assert errors[0] is not errors[1]
    for error in errors:
        assert type(error) is kind
        assert text in str(error)
        assert error is not reason
        if isinstance(reason, ZeroDivisionError):
            assert error.__cause__ is reason
    known = ProtocolError("of this call")
    assert core.closed_error(known) is known


async def test_standing_tasks_outlast_the_scope_around_the_channel() -> None:
    """They end by `close`, and nothing else ends them."""
    core = make_core()
    steps: list[str] = []

    async def stand() -> None:
        steps.append("begins")
        try:
            await anyio.sleep(BOUND)
        finally:
            steps.append("ends")

    async def other() -> None:
        try:
            await anyio.sleep(BOUND)
        finally:
            steps.append("other ends")

    with anyio.CancelScope() as scope:
        async with create_task_group() as group:
            core.open(group)
            core.start_standing(stand, "standing")
            core.start(other, "task")
            for _ in range(3):
                await checkpoint()
            assert steps == ["begins"]
            scope.cancel()
            with anyio.CancelScope(shield=True):
                while "other ends" not in steps:
                    await checkpoint()
                assert "ends" not in steps
            core.close()
    assert steps[-1] == "ends"


async def test_refused_records_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    core = make_core()
    core.refuse(ProtocolError("not legal"))
    assert core.refused == 1
    assert "not legal" in caplog.text
