"""docs/bridge.md: what kkrpc 2.1 has, and the tests behind it; and what its peers wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.promises import named_tests

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bridge.md"
TABLE = PAGE.read_text().partition("## kkrpc 2.1, feature by feature")[2]
FILES = sorted((ROOT / "tests").glob("*/vectors/kkrpc-*.jsonl"))


def test_every_feature_names_tests_that_exist() -> None:
    rows = [row for row in TABLE.splitlines() if row.startswith("| ") and "---" not in row]
    assert len(rows) > 30
    assert [row for row in rows[1:] if not named_tests(row)] == []
    for file, name in named_tests(TABLE):
        source = (ROOT / file).read_text()
        assert not name or f"def {name}(" in source, (file, name)


@pytest.mark.parametrize("vectors", FILES, ids=lambda file: file.stem)
def test_every_recording_is_read_by_a_test(vectors: Path) -> None:
    tests = [file.read_text() for file in vectors.parents[1].glob("test_*.py")]
    assert any(f'"{vectors.stem}"' in text for text in tests), "nobody says that once more"
