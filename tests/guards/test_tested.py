"""Each module is tested by name: some test imports it, or what it defines, and so tries it alone.

What a module says in its own tests is found there when it breaks; through its users it is found
late, or not at all. `KNOWN` has those that no test imports, with the reason; it may only shrink.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from .source import PACKAGE, modules, tree

TESTS = Path(__file__).parents[1]
KNOWN = {
    "_cli._demo": "prints what processes do; tests/cli/test_demo.py runs it, and reads that",
    "testing.pytest_plugin": "pytest loads it by its name, as tests/testing/test_kit.py has it do",
}


def named(file: Path, package: str = PACKAGE) -> Iterator[str]:
    """Yield what a test names of the package, dotted, without the package's own name."""
    for node in ast.walk(tree(file)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in found:
            first, _, rest = name.partition(".")
            if first == package:
                yield rest


def module_of(name: str) -> str | None:
    """Return the module that a dotted name is, or that defines it, wherever it was imported from."""
    if name in modules():
        return name
    home, _, attribute = name.rpartition(".")
    if home not in modules():
        return None
    found = getattr(importlib.import_module(f"{PACKAGE}.{home}".rstrip(".")), attribute, None)
    defined = getattr(found, "__module__", None) or f"{PACKAGE}.{home}"
    first, _, rest = str(defined).partition(".")
    return rest if first == PACKAGE else home


def defines(file: Path) -> bool:
    """Whether there is anything to be tried: a function or a class."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) for node in ast.walk(tree(file)))


def test_each_module_is_tested_by_name() -> None:
    tested = {module_of(name) for file in TESTS.rglob("*.py") for name in set(named(file))}
    alone = {name for name, file in modules().items() if defines(file) and name not in tested}
    assert sorted(alone - KNOWN.keys()) == []
    assert sorted(KNOWN.keys() - alone) == [], "take them out of KNOWN"
