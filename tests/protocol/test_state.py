"""The transition tables, whole: every state with every input."""

from __future__ import annotations

import ast
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anyio_kkrpc._protocol
from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol import _state as s

TABLES: list[Any] = [
    pytest.param(s.CALL, s.CallState, s.CallInput, id="call"),
    pytest.param(s.HANDLING, s.HandlingState, s.HandlingInput, id="handling"),
    pytest.param(s.CALLBACK, s.CallbackState, s.CallbackInput, id="callback"),
    pytest.param(s.CONSUMER, s.ConsumerState, s.ConsumerInput, id="consumer"),
    pytest.param(s.PRODUCER, s.ProducerState, s.ProducerInput, id="producer"),
]


@pytest.mark.parametrize(("table", "states", "inputs"), TABLES)
def test_each_state_and_input_is_legal_or_a_protocol_error(
    table: Any, states: type[IntEnum], inputs: type[IntEnum]
) -> None:
    """Every combination leads to a state of the same table or raises, and says what was wrong."""
    assert set(table) == set(states)
    legal = 0
    for state in states:
        for step in inputs:
            if step in table[state]:
                assert isinstance(s.advance(table, state, step), states)
                legal += 1
            else:
                with pytest.raises(ProtocolError, match=f"{step.name}.*{state.name}"):
                    s.advance(table, state, step)
    assert 0 < legal < len(states) * len(inputs)


@pytest.mark.parametrize(("table", "states", "inputs"), TABLES)
def test_all_states_are_reachable_and_final_ones_stay(
    table: Any, states: type[IntEnum], inputs: type[IntEnum]
) -> None:
    """From the first state all others can be reached, and some state has no way out."""
    reached, todo = set(), [states(0)]
    while todo:
        state = todo.pop()
        if state not in reached:
            reached.add(state)
            todo.extend(table[state].values())
    assert reached == set(states)
    assert any(set(table[state].values()) <= {state} for state in states)


@given(st.lists(st.sampled_from(s.CallInput), max_size=8))
def test_a_call_is_settled_once(steps: list[s.CallInput]) -> None:
    """Whatever comes after the first outcome of a call, its outcome stays."""
    state = s.CallState.WAITING
    for step in steps:
        settled = state is not s.CallState.WAITING
        try:
            after = s.advance(s.CALL, state, step)
        except ProtocolError:
            continue
        assert after is not s.CallState.WAITING
        assert not settled or after is state
        state = after


def test_the_protocol_imports_no_io() -> None:
    """The core imports only itself, msgspec and pure parts of the standard library."""
    allowed = {"__future__", "collections", "enum", "itertools", "math", "typing", "msgspec"}
    folder = Path(anyio_kkrpc._protocol.__file__).parent
    modules = sorted(folder.glob("*.py"))
    assert len(modules) >= 6
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{module.name} imports from outside the core"
                names = [] if node.level else [node.module or ""]
            else:
                continue
            for name in names:
                assert name.partition(".")[0] in allowed, f"{module.name} imports {name}"
