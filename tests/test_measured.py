"""Which variants of a test are measured for coverage."""

from __future__ import annotations

import pytest

from tests.measured import chosen


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (["asyncio-redis7-a", "uvloop-redis7-a", "uvloop-valkey8-a"], ["uvloop-valkey8-a"]),
        (["valkey8-uvloop", "uvloop", "redis7-uvloop", "trio"], ["valkey8-uvloop", "uvloop"]),
        (["trio-a", "asyncio-a", "asyncio-b"], ["asyncio-a", "asyncio-b"]),
        (["trio"], ["trio"]),
        (["trio-a", "asyncio-b", "uvloop-b"], ["trio-a", "uvloop-b"]),
        (["redis7-a", "redis7-b"], ["redis7-a", "redis7-b"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_one_loop_and_one_server(variants: list[str], expected: list[str]) -> None:
    """Those that are preferred among those that there are; what runs on none always is."""
    tests = [f"tests/x/test_y.py::test_z[{variant}]" for variant in variants]
    assert chosen(tests) == {f"tests/x/test_y.py::test_z[{variant}]" for variant in expected}


def test_tests_do_not_choose_for_each_other() -> None:
    tests = ["tests/x/test_y.py::test_z[trio]", "tests/x/test_y.py::test_a[uvloop]"]
    assert chosen([*tests, "tests/x/test_y.py::test_plain"]) == {
        *tests,
        "tests/x/test_y.py::test_plain",
    }


def test_what_depends_on_the_loop() -> None:
    tests = {f"tests/runtime/test_y.py::test_z[{loop}]" for loop in ("asyncio", "trio")}
    assert chosen([*tests, "tests/guards/test_y.py::test_z"]) == tests
