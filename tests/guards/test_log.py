"""What is logged goes through the library's logger, whose filter quotes what came from elsewhere."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyio_kkrpc
from anyio_kkrpc._runtime._log import QuotingFilter

from .source import modules, tree

# Where a user may give a logger, so that the texts are quoted there.
_OTHERS = {"middleware": "anyio_kkrpc.access"}


def test_one_logger() -> None:
    """Every module has this one."""
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger"):
                found.setdefault(name, set()).add(ast.unparse(node.args[0]))
    assert found.pop("") == {"__name__"}
    for name, loggers in found.items():
        assert loggers == {repr(_OTHERS.get(name, "anyio_kkrpc"))}, name
    assert len(found) > 10


def test_nothing_is_formatted_before() -> None:
    """Texts are arguments of what is logged, so that they can be told from the library's own."""
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
                assert not isinstance(node.args[0], (ast.JoinedStr, ast.BinOp, ast.Call)), (
                    f"{name}:{node.lineno}"
                )


_LEVELS = {"exception": "ERROR"}


def messages() -> set[tuple[str, str]]:
    """Return level and text of all that is logged, with dots for what is put in."""
    found = set()
    for path in modules().values():
        for function in ast.walk(tree(path)):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if ast.unparse(node.func.value) in ("logger", "log") and node.args:
                    level = _LEVELS.get(node.func.attr, node.func.attr.upper())
                    if level == "LOG":
                        level, first = ast.unparse(node.args[0]), node.args[1]
                    else:
                        first = node.args[0]
                    found |= {(level, _dotted(text)) for text in _texts(first, function)}
    return found


def _texts(node: ast.expr, function: ast.AST) -> list[str]:
    """Return what an expression may be: a text, one of two, or what such a name was given."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, function) + _texts(node.orelse, function)
    assert isinstance(node, ast.Name), f"which text is {ast.unparse(node)}?"
    return [text for value in _given(node.id, function) for text in _texts(value, function)]


def _given(name: str, function: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = zip(target.elts, value.elts, strict=True)
        else:
            pairs = zip((target,), (value,), strict=True)
        yield from (given for one, given in pairs if ast.unparse(one) == name)


def _dotted(text: str) -> str:
    return re.sub(r"%(?:\.\d+)?[sdrfgi]", "...", text).replace("%%", "%")


def test_each_message_is_explained() -> None:
    """The page about logging has all of them, and none that is no more: mend docs/logging.md."""
    page = Path(anyio_kkrpc.__file__).parents[1] / "docs" / "logging.md"
    if not page.exists():
        pytest.skip("the package was not imported from its checkout")
    rows = re.findall(r"(?m)^\| ([A-Z]+|level) \| `` (.*?) `` \| .+ \|$", page.read_text())
    assert len(rows) == len(set(rows))
    explained, logged = set(rows), messages()
    assert logged - explained == set(), "these have no row"
    assert explained - logged == set(), "these aren't logged any more"


def test_the_filter_is_there() -> None:
    (one,) = logging.getLogger("anyio_kkrpc").filters
    assert isinstance(one, QuotingFilter)
