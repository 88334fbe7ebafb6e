"""Channels as a whole, on a memory transport."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture
def no_blocking_calls() -> Iterator[None]:
    """On asyncio, a call that blocks the event loop raises `blockbuster.BlockingError`."""
    with blockbuster_ctx():
        yield
