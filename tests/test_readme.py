"""README: every snippet runs, and prints what README says it prints."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from anyio_kkrpc.testing import RedisServer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks() -> Iterator[Block]:
    text = README.read_text()
    for match in re.finditer(r"^```(\w[\w ]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[1], text[: match.start()].count("\n") + 2, match[2])


def test_snippets(redis_server: RedisServer) -> None:
    """They are run in order in one namespace; each output block is what was printed before it."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    printed = io.StringIO()
    ran = compared = 0
    for block in blocks():
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text
            source = source.replace("redis://localhost:6379", redis_server.url)
            code = compile(source, str(README), "exec", dont_inherit=True)
            with redirect_stdout(printed):
                exec(code, namespace)
            ran += 1
        elif block.language.startswith("output"):
            lines, expected = printed.getvalue().splitlines(), block.text.splitlines()
            if "unordered" in block.language:
                lines, expected = sorted(lines), sorted(expected)
            assert lines == expected, f"README line {block.line}"
            printed = io.StringIO()
            compared += 1
    assert printed.getvalue() == ""
    assert ran >= 14
    assert compared >= 10


def test_every_block_is_checked() -> None:
    """There is no language that no test looks at."""
    assert {block.language.partition(" ")[0] for block in blocks()} == {
        "python",
        "output",
        "console",
    }


def test_commands() -> None:
    """The commands are those that CI runs, and exist."""
    commands = "".join(block.text for block in blocks() if block.language == "console").splitlines()
    assert commands == [
        "python3 -m venv .venv",
        '.venv/bin/pip install -e ".[dev]"',
        ".venv/bin/anyio-kkrpc demo",
        ".venv/bin/nox",
    ]
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    assert callable(scripts["anyio-kkrpc"].load())
    ci = (ROOT / ".ci" / "run").read_text()
    assert ".venv/bin/nox\n" in ci
    assert '.venv/bin/pip install -e ".[dev]"' in ci


@pytest.mark.parametrize("name", ["block_timeout", "max_len", "inbox_ttl", "codec", "overflow"])
def test_options_are_listed(name: str) -> None:
    """The table has the options of the transport."""
    assert f"`{name}`" in README.read_text()


def test_all_options_are_listed() -> None:
    """None is missing, and none was made up."""
    import inspect

    from anyio_kkrpc import RedisStreamsTransport

    known = set(inspect.signature(RedisStreamsTransport).parameters)
    text = README.read_text()
    assert {name for name in known if f"`{name}" not in text} == set()


def test_promises_name_their_tests() -> None:
    """Each test that the docs name exists."""
    text = (ROOT / "docs" / "delivery.md").read_text()
    path = None
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`|`(test_\w+)`", text)
    assert len(named) > 20
    for file, test, alone in named:
        path = ROOT / file if file else path
        assert path is not None
        assert path.exists(), path
        if test or alone:
            assert f"def {test or alone}(" in path.read_text(), (path, test or alone)
