"""What is said of what a server refuses: when it begins, when it is over, and what is left out."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import FIRST_PAUSE, LONGEST_PAUSE, Outages, jittered
from anyio_kkrpc.redis._connection._target import Target

pytestmark = pytest.mark.anyio

EXC = ResponseError("OOM command not allowed when used memory > 'maxmemory'.")


async def test_what_is_left_out_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    """It is counted each time and said once, until it works; the next outage is said all the same."""
    outages = Outages(Target.parse("redis://localhost"))
    for _ in range(3):
        outages.leave_out("words", EXC)
    outages.begin("claims", EXC)
    outages.end("claims")
    outages.begin("claims", EXC)
    outages.end("claims")
    outages.end("words")
    outages.leave_out("words", EXC)
    assert outages.refused == 6
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(" ", 1)[1].split(":")[0] for line in said] == [
        "refuses words",
        "refuses claims for now",
        "takes all commands again, after 0.0 seconds",
        "refuses claims for now",
        "takes all commands again, after 0.0 seconds",
        "refuses words",
    ]


@given(st.integers(1, 40) | st.integers(min_value=1))
def test_pauses(failures: int) -> None:
    """However long an outage lasts, a pause is within its bounds, and the first one is short."""
    assert 0 <= jittered(failures) <= LONGEST_PAUSE
    assert jittered(1) <= 2 * FIRST_PAUSE
    assert max(jittered(failures + 10) for _ in range(50)) > LONGEST_PAUSE / 10
