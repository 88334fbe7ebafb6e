"""The package's source as the guards see it: modules, who imports whom, sizes, private names."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import anyio_kkrpc

ROOT = Path(anyio_kkrpc.__file__).parent
PACKAGE = ROOT.name


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return each module by its dotted name below the package; the package itself is ``""``."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts)
        found[name.removesuffix("__init__").rstrip(".")] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(root: Path = ROOT) -> Iterator[tuple[str, str, int, list[str]]]:
    """Yield ``importer, imported module, line, imported names`` for imports within the package.

    Those for type checkers, those inside functions and absolute ones count like all others.
    """
    known = modules(root)
    for name, file in known.items():
        base = [*name.split(".")] if name else []
        if file.name != "__init__.py":
            base = base[:-1]
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first, _, rest = alias.name.partition(".")
                    if first == root.name:
                        yield name, _module(rest, known), node.lineno, []
            elif isinstance(node, ast.ImportFrom):
                prefix = _prefix(node, base, root.name)
                if prefix is None:
                    continue
                names: dict[str, list[str]] = defaultdict(list)
                for alias in node.names:
                    full = f"{prefix}.{alias.name}".lstrip(".")
                    if full in known:
                        names[full]  # the module itself
                    else:
                        names[_module(prefix, known)].append(alias.name)
                for target, taken in names.items():
                    yield name, target, node.lineno, taken


def _prefix(node: ast.ImportFrom, base: list[str], package: str) -> str | None:
    """Return what names are imported from, below the package; ``None`` if it is elsewhere."""
    if node.level:
        parts = base[: len(base) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])
    first, _, rest = (node.module or "").partition(".")
    return rest if first == package else None


def _module(name: str, known: Iterable[str]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def circles(arrows: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, however many stand in between."""
    after: dict[str, set[str]] = defaultdict(set)
    for start, end in arrows:
        if start != end:
            after[start].add(end)
    reached = {start: _reach(start, after) for start in list(after)}
    found: list[set[str]] = []
    for start, ends in reached.items():
        if start in ends and not any(start in circle for circle in found):
            found.append({end for end in ends if start in reached.get(end, ())})
    return found


def _reach(start: str, after: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(after[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += after.get(name, ())
    return seen


def sizes(root: Path = ROOT) -> Iterator[tuple[str, str, int]]:
    """Yield ``kind, name, size``: lines of modules and functions, methods and attributes of classes."""
    for name, file in modules(root).items():
        where = f"{name or '__init__'}"
        yield "lines of a module", where, len(file.read_text().splitlines())
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                size = node.end_lineno - node.lineno + 1
                yield "lines of a function", f"{where}.{node.name}", size
            elif isinstance(node, ast.ClassDef):
                yield "methods of a class", f"{where}.{node.name}", len(list(_methods(node)))
                yield "attributes of a class", f"{where}.{node.name}", len(_attributes(node))


def _methods(node: ast.ClassDef) -> Iterator[ast.AST]:
    return (
        part
        for part in node.body
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not any(ast.unparse(one) == "overload" for one in part.decorator_list)
    )


def _attributes(node: ast.ClassDef) -> set[str]:
    """Return the names that are set on ``self``, and those that are declared in the class."""
    found = {
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Attribute)
            and isinstance(part.ctx, ast.Store)
            and isinstance(part.value, ast.Name)
            and part.value.id == "self"
        ):
            found.add(part.attr)
    return found


def private_uses(root: Path = ROOT) -> Iterator[tuple[str, str, int]]:
    """Yield ``module, private name, line`` where a module uses what is private to another one.

    That is an attribute of an object other than ``self`` whose name nothing in the same module
    defines, or a name that is imported out of a module.
    """
    for name, file in modules(root).items():
        own = _defined(tree(file))
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            if node.attr not in own:
                yield name, node.attr, node.lineno
    for name, target, line, taken in imports(root):
        for one in taken:
            if _is_private(one) and name.rpartition(".")[0] != target:
                yield name, one, line


def sets_of_others(root: Path = ROOT) -> Iterator[tuple[str, str, int]]:
    """Yield ``module, what is set, line`` where a module sets an attribute of a part of a part.

    That is ``a.b.c = ...`` where nothing in the same module defines ``c``: the state of ``b``,
    changed by somebody who only holds it.
    """
    for name, file in modules(root).items():
        own = _defined(tree(file))
        for node in ast.walk(tree(file)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, (ast.Store, ast.Del))
                and isinstance(node.value, ast.Attribute)
                and node.attr not in own
            ):
                yield name, ast.unparse(node), node.lineno


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(module: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "set_slot":
            found.add(ast.unparse(node.args[1]).strip("'"))
    return found
