"""How many instructions a call, and an item of a stream, cost at client and worker. The numbers may
only shrink.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.servers import Servers

from .instructions import build_switch, count

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="the numbers are of one version of Python"
    ),
]

# Thousand instructions per call at 64 in flight, and per item that is at hand, in a group, on uvloop,
# with Valkey 8.1.
MOST = {
    ("calls", "client"): 99,
    ("calls", "worker"): 95,
    ("items", "client"): 33,
    ("items", "worker"): 37.5,
}
# What another build of Python or of a library may add.
_SPARE = 0.03
_TRIES = 6


@pytest.mark.parametrize(("what", "side"), MOST)
def test_instructions(what: str, side: str, tmp_path: Path, servers: Servers) -> None:
    library = build_switch(tmp_path)
    if library is None:
        pytest.skip("needs valgrind with its headers, and gcc")
    most = MOST[what, side] * 1000 * (1 + _SPARE)
    # What else the machine does makes the batches smaller, never larger: the least one counts.
    for _ in range(_TRIES):
        found = count(tmp_path, library, side, what, "group", "uvloop", servers["valkey8"].url)
        assert found > 10_000, "the count is wrong"
        if found <= most:
            return
    pytest.fail(f"{found:.0f} instructions, and {most:.0f} at most")
