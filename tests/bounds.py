"""How long tests wait, at most, for what must happen.

It happens within milliseconds; these bounds end a test that hangs, and must not depend on how much
else the machine has to do. What must be quick is counted: commands, writes, turns of the loop.
Each is shorter than the next one, so that a test says what it was waiting for, and pytest's own
time-out is the longest.
"""

from __future__ import annotations

BOUND = 100.0
"""Seconds for a condition, a process, a task group."""

CALL_BOUND = 250.0
"""Seconds for calls: a handler whose cancel is lost must not end by its deadline, while the test
waits for its end."""
