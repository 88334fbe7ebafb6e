"""What is logged goes through the library's logger, whose filter quotes what came from elsewhere."""

from __future__ import annotations

import ast
import logging

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


def test_the_filter_is_there() -> None:
    (one,) = logging.getLogger("anyio_kkrpc").filters
    assert isinstance(one, QuotingFilter)
