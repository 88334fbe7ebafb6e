"""Which variants of a test a run with ``--covering`` has."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.covering import OF_PROCESSES, chosen
from tests.measured import KINDS, LOOPS

files = st.sampled_from(["tests/redis/test_y.py", f"{OF_PROCESSES[0]}/test_y.py"])
some_loops = st.sets(st.sampled_from(LOOPS))
some_kinds = st.sets(st.sampled_from(KINDS))


def ids(file: str, name: str, *parts: list[str]) -> list[str]:
    """Return the ids of a test with these parameters."""
    given = ["-".join(filter(None, one)) for one in product(*(part or [""] for part in parts))]
    return [f"{file}::{name}[{one}]" if one else f"{file}::{name}" for one in given]


@given(files, st.text("abc", min_size=1), some_loops, some_kinds, st.integers(0, 5))
def test_nothing_is_left_out_of_a_test(
    file: str, name: str, loops: set[str], kinds: set[str], others: int
) -> None:
    """Each loop, each server and each of the other parameters that it has is tried."""
    rest = [f"x{number}" for number in range(others)]
    tests = ids(file, name, sorted(loops), sorted(kinds), rest)
    kept = chosen(tests)
    assert kept <= set(tests)
    for part in (*loops, *kinds, *rest):
        assert any(part in test.partition("[")[2].rstrip("]").split("-") for test in kept)


def test_one_server_for_each_loop() -> None:
    """Not always the same one."""
    for file in ("tests/redis/test_y.py", "tests/core/test_z.py"):
        pairs = set()
        for name in ("a", "b", "c", "d"):
            kept = chosen(ids(file, name, list(LOOPS), list(KINDS)))
            assert len(kept) == len(LOOPS)
            pairs |= {test.partition("[")[2] for test in kept}
        assert len(pairs) == len(LOOPS) * len(KINDS)


def test_one_loop_for_each_process() -> None:
    tests = ids("tests/cli/test_y.py", "a", list(LOOPS), ["p", "q", "r", "s"])
    assert len(chosen(tests)) == 4


def test_tests_do_not_choose_for_each_other() -> None:
    tests = [f"tests/x.py::test_{name}" for name in "abc"]
    assert chosen(tests) == set(tests)
