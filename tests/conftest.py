"""Backends: every async test runs on asyncio (debug mode), asyncio with uvloop, and trio."""

from __future__ import annotations

from typing import Any

import pytest

pytest_plugins = ["tests.servers"]

BACKENDS: list[Any] = [
    pytest.param(("asyncio", {"debug": True}), id="asyncio"),
    pytest.param(("trio", {}), id="trio"),
]
try:
    import uvloop  # noqa: F401
except ImportError:  # pragma: no cover
    pass
else:
    BACKENDS.insert(1, pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"))


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Name and options of the backend under test."""
    return request.param
