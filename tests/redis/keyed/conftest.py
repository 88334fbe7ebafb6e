"""What tests of calls with keys have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.proxy import Proxy, proxy


@pytest.fixture
async def middle(place: Any) -> AsyncIterator[Proxy]:
    """Between a peer and the server of the module's ``place``."""
    async with proxy(place.url) as middle:
        yield middle
