"""What calls that are given up tell, and what is told before."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from anyio_kkrpc import MemoryTransport, RPCChannel
from anyio_kkrpc._calling._options import check_takeover
from anyio_kkrpc.abc import Capabilities

pytestmark = pytest.mark.anyio


class Knowing(MemoryTransport):
    """A transport that says what it is told to."""

    takeover: float | None = None

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, takeover=self.takeover)


@pytest.mark.parametrize(
    ("timeout", "takeover", "warned"),
    [
        (0.25, 0.25, True),
        (0.25, 7.5, True),
        (7.5, 0.25, False),
        (None, 7.5, False),
        (7, None, False),
    ],
)
async def test_too_short_for_a_takeover(
    timeout: float | None,
    takeover: float | None,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A channel whose time-out is over before another worker takes over warns of it, once."""
    check_takeover.cache_clear()
    monkeypatch.setattr(Knowing, "takeover", takeover)
    for _ in range(2):
        transport, other = Knowing.pair()
        async with transport, other, RPCChannel(transport, timeout=timeout):
            pass
    told = [record.args for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ([(timeout, takeover)] if warned else [])
