"""README and docs: every snippet runs, and prints what the page says it prints."""

from __future__ import annotations

import inspect
import io
import re
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.main import get_command

from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc._cli._app import app
from anyio_kkrpc.testing import RedisServer
from tests.docs.pages import DOCS, README, ROOT, blocks_of

pytest_plugins = ["pytester"]
# Their snippets are files and commands, or need several servers: see test_walkthroughs, test_servers
# and tests/typescript/test_docs.
WALKTHROUGHS = {
    *("quickstart.md", "command-line.md", "typescript.md", "bridge.md", "servers.md"),
    "websocket.md",
}
PAGES = [README, *sorted(DOCS.glob("*.md"))]
SNIPPETS = [
    page
    for page in PAGES
    if page.name not in WALKTHROUGHS
    and any(block.language == "python" for block in blocks_of(page))
]
LANGUAGES = {"python", "output", "console", "text", "typescript", "ini", "dockerfile", "yaml"}


@pytest.mark.one_server
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets(page: Path, redis_server: RedisServer) -> None:
    """They are run in order in one namespace; each output block is what was printed before it."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    url = f"{redis_server.url}/{1 + SNIPPETS.index(page)}"  # pages have streams of the same names
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    printed = io.StringIO()
    for block in blocks_of(page):
        if block.language == "python" and not block.name.endswith(".py"):
            source = "\n" * (block.line - 1) + block.text
            source = source.replace("redis://localhost:6379", url)
            code = compile(source, str(page), "exec", dont_inherit=True)
            with redirect_stdout(printed):
                exec(code, namespace)
        elif block.language == "output":
            lines, expected = printed.getvalue().splitlines(), block.text.splitlines()
            if block.name == "unordered":
                lines, expected = sorted(lines), sorted(expected)
            assert lines == expected, f"{page.name} line {block.line}"
            printed = io.StringIO()
    assert printed.getvalue() == ""


def test_all_pages_are_known() -> None:
    """There is no page and no language that no test looks at."""
    assert {"README.md", "calls.md", "exposing.md", "redis.md"} <= {page.name for page in SNIPPETS}
    assert {page.name for page in PAGES} >= WALKTHROUGHS
    for page in PAGES:
        assert {block.language for block in blocks_of(page)} <= LANGUAGES, page


def test_suite_of_others(pytester: pytest.Pytester) -> None:
    """The files on the page about testing are a test suite that passes, with AnyIO's plugin and
    pytest-asyncio's, which in its strict mode leaves to the other what isn't marked as its own.
    """
    pytest.importorskip("pytest_asyncio")
    files = {block.name: block.text for block in blocks_of(DOCS / "testing.md") if block.name}
    suite = {"test_shop.py", "test_shop_fixture.py", "test_shop_asyncio.py"}
    assert set(files) == {"conftest.py", *suite}
    for name, text in files.items():
        (pytester.path / name).write_text(text)
    scope = "asyncio_default_fixture_loop_scope=function"
    result = pytester.runpytest_subprocess(
        "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "anyio", "-o", scope
    )
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] >= 6  # two of pytest-asyncio, two for each backend


def commands_of(page: Path, name: str = "") -> list[str]:
    found = [b for b in blocks_of(page) if b.language == "console" and b.name == name]
    return "".join(block.text for block in found).splitlines()


def test_commands() -> None:
    """README's commands are those that CI runs, and exist."""
    assert commands_of(README) == [
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


def test_deployments() -> None:
    """What the manifests give to the commands exists, on the command line and in the environment."""
    blocks = [
        b for b in blocks_of(DOCS / "deployment.md") if b.language in ("ini", "dockerfile", "yaml")
    ]
    text = "\n".join(block.text for block in blocks)
    options: set[str] = set()
    variables: set[str] = set()
    for name in ("serve", "check"):
        for parameter in get_command(app).commands[name].params:  # type: ignore[attr-defined]
            options.update(parameter.opts)
            variables.add(str(getattr(parameter, "envvar", None)))
    used = set(re.findall(r"(?<= )--[\w-]+(?= )", "".join(re.findall(r"ExecStart=.*\\\n.*", text))))
    assert len(used) >= 4
    assert used - options == set()
    used = set(re.findall(r"ANYIO_KKRPC_\w+", text))
    assert len(used) >= 4
    assert used - variables == set()


def test_all_options_are_listed() -> None:
    """None is missing, and none was made up."""
    known = set(inspect.signature(RedisStreamsTransport).parameters)
    text = (DOCS / "redis.md").read_text()
    table = text[text.index("| option |") :].partition("\n\n")[0]
    listed = set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines())))
    assert listed == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """Pages, pictures and headings that are linked to exist."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert heading in {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }


def test_examples_are_shown() -> None:
    """The page about frameworks shows files that exist, which Sphinx doesn't check by itself."""
    shown = re.findall(r"\{literalinclude\} (\S+)", (DOCS / "frameworks.md").read_text())
    assert len(shown) >= 5
    assert [name for name in shown if not (DOCS / name).exists()] == []
