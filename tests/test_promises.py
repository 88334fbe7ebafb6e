"""What looks at whether the promises of the docs were tested: what it reads, and what it misses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.outcomes import Outcome, read
from tests.promises import PAGE, Named, complaints, named_tests

ROOT = PAGE.parents[1]
TEST = "tests/x/test_y.py::test_z"
COMPLETE = [
    Outcome(f"{TEST}[{server}-{loop}-group]", "passed", 0.0)
    for server in ("redis7", "valkey8")
    for loop in ("asyncio", "uvloop", "trio")
]


def test_every_row_names_tests_that_exist() -> None:
    """Each row of a table names at least one test, and each name is that of a file or function."""
    text = PAGE.read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ") and "---" not in row]
    assert [row for row in rows if row != "| promise | test |" and not named_tests(row)] == []
    named = named_tests(text)
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / file).read_text()
        assert not name or f"def {name}(" in source, (file, name)


def test_names() -> None:
    """A name alone belongs to the file before; other words in backquotes are no tests."""
    text = "| `max_len` | `tests/a/test_b.py::test_c`, `test_d` | and `tests/test_e.py`. `test_f`"
    assert named_tests(text) == [
        Named("tests/a/test_b.py", "test_c"),
        Named("tests/a/test_b.py", "test_d"),
        Named("tests/test_e.py", ""),
        Named("tests/test_e.py", "test_f"),
    ]


@pytest.mark.parametrize("name", ["test_z", ""])
def test_complete(name: str) -> None:
    """A test, and a file, that ran everywhere; one without loop and server; one in a class."""
    others = [
        Outcome("tests/x/test_y.py::TestC::test_plain", "passed", 0.0),
        Outcome("tests/x/test_other.py::test_z", "failed", 0.0),
    ]
    assert complaints([Named("tests/x/test_y.py", name)], COMPLETE + others) == []
    assert complaints([Named("tests/x/test_y.py", "test_plain")], COMPLETE + others) == []


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], f"{TEST}: has not run"),
        ([o for o in COMPLETE if "trio" not in o.test], f"{TEST}: has not run on trio"),
        ([o for o in COMPLETE if "valkey8" in o.test], f"{TEST}: has not run on redis7"),
        ([*COMPLETE, Outcome(f"{TEST}[x]", "skipped", 0.0)], f"{TEST}[x]: skipped"),
        ([*COMPLETE, Outcome(f"{TEST}[x]", "failed", 0.0)], f"{TEST}[x]: failed"),
    ],
    ids=["not run", "loop", "server", "skipped", "failed"],
)
def test_incomplete(outcomes: list[Outcome], expected: str) -> None:
    """What is missing is named."""
    assert complaints([Named("tests/x/test_y.py", "test_z")], outcomes) == [expected]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_a_run_writes(tmp_path: Path, workers: str) -> None:
    """Each test once with its outcome, whichever process ran it; a failing fixture is a failure."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_skips(): pytest.skip('no')\n"
        "@pytest.mark.skip\n"
        "def test_is_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_broken(broken): pass\n"
    )
    plugins = ("-p", "tests.outcomes", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", *plugins, "-n", workers),
            *("--outcomes", str(tmp_path / "found"), str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    found = {one.test.partition("::")[2]: one.outcome for one in read(tmp_path / "found")}
    assert found == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_is_skipped": "skipped",
        "test_broken": "failed",
    }
