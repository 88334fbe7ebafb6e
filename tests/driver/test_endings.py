"""Who is told of the end of a stream."""

from __future__ import annotations

import pytest

from anyio_kkrpc._driver._endings import tell


class Odd(BaseException):
    pass


def test_all_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """What one of them raises is logged, and keeps it from nobody."""
    told: list[object] = []

    def fail(end: object) -> None:
        raise Odd

    tell([told.append, fail, told.append], "end")
    assert told == ["end", "end"]
    assert "what was told of the end of a stream failed" in caplog.text


def test_interrupt_is_nobodys_own() -> None:
    def interrupt(end: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tell([interrupt], "end")
