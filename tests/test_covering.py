"""Which variants of a test a run with ``--covering`` has."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.covering import OF_LOOPS, chosen
from tests.measured import KINDS, LOOPS

pytest_plugins = ["pytester"]

files = st.sampled_from(["tests/redis/test_y.py", f"{OF_LOOPS[0]}/test_y.py"])
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


@given(files, st.text("abc", min_size=1), some_loops, some_kinds, st.integers(0, 5))
def test_once(file: str, name: str, loops: set[str], kinds: set[str], others: int) -> None:
    """Each of the other parameters is tried, on one loop and one server."""
    rest = [f"x{number}" for number in range(others)]
    kept = chosen(ids(file, name, sorted(loops), sorted(kinds), rest), once=True)
    if file.startswith(OF_LOOPS):
        assert len(kept) == max(1, len(loops)) * max(1, others)
    else:
        assert len(kept) == max(1, others)
    for part in rest:
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


def test_one_loop_for_each_of_the_others() -> None:
    """Another one from test to test, so that all of them meet; all loops where it is about them."""
    met = set()
    for name in "abcdefgh":
        kept = chosen(ids("tests/redis/test_y.py", name, list(LOOPS), ["p", "q", "r", "s"]))
        assert len(kept) == 4
        met |= {test.partition("[")[2] for test in kept}
    assert len(met) == len(LOOPS) * 4
    tests = ids(f"{OF_LOOPS[0]}/test_y.py", "a", list(LOOPS), ["p", "q", "r", "s"])
    assert chosen(tests) == set(tests)


def test_tests_do_not_choose_for_each_other() -> None:
    tests = [f"tests/x.py::test_{name}" for name in "abc"]
    assert chosen(tests) == set(tests)


def test_what_is_chosen_by_name_is_not_left_out(pytester: pytest.Pytester) -> None:
    """What `-k` leaves is what is chosen from."""
    pytester.makeconftest('pytest_plugins = ["tests.covering"]')
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("loop", ["asyncio", "trio", "uvloop"])
        @pytest.mark.parametrize("name", [f"x{number}" for number in range(9)])
        def test_it(name: str, loop: str) -> None: ...
        """
    )
    for how in ("--covering", "--covering-once"):
        pytester.runpytest_inprocess("-p", "no:asyncio", how, "-k", "not uvloop").assert_outcomes(
            passed=9, deselected=18
        )
