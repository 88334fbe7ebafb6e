"""Nothing is accepted that nobody looks at: each option is read, and each parameter with a default.

Read from the source. Options are the fields of classes whose names end in ``Options``; they are read
as ``options.name`` in the room where they are, or by their name where they are checked. Of
functions, parameters count that may be left out: those can be forgotten without anybody noticing.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .source import ROOT, modules, tree

# Names of variables and attributes that hold options.
HOLDERS = ("options", "given")


def _fields(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield ``module, class, option``."""
    for name, file in modules(root).items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        yield name, node.name, part.target.id


def _read(module: ast.Module) -> set[str]:
    """Return the options that a module reads as attributes."""
    return {
        node.attr
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).rpartition(".")[2].lower().endswith(HOLDERS)
    }


def _named(module: ast.Module) -> set[str]:
    """Return the texts in a module that are handed to something, or gone through."""
    return {
        inner.value
        for node in ast.walk(module)
        if isinstance(node, (ast.Call, ast.Tuple))
        for inner in ast.iter_child_nodes(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }


def unread(root: Path = ROOT) -> list[str]:
    """Return the options that no module of the same room reads."""
    files, read = modules(root), defaultdict(set)
    for name, file in files.items():
        read[name.partition(".")[0]] |= _read(tree(file))
    return [
        f"{module}.{kind}: {option}"
        for module, kind, option in _fields(root)
        if option not in read[module.partition(".")[0]] | _named(tree(files[module]))
    ]


def unused(root: Path = ROOT) -> list[str]:
    """Return the parameters with defaults, and those by name, that a function doesn't look at."""
    found = []
    for name, file in modules(root).items():
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _has_body(node):
                used = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
                if "locals" not in used:
                    left = [one for one in _optional(node.args) if one not in used]
                    found += [f"{name}.{node.name}: {one}" for one in left]
    return found


def _optional(args: ast.arguments) -> list[str]:
    by_place = [*args.posonlyargs, *args.args]
    with_default = by_place[len(by_place) - len(args.defaults) :]
    return [one.arg for one in (*with_default, *args.kwonlyargs)]


def _has_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is more than a signature: not abstract, an overload, or a Protocol's."""
    marks = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    last = node.body[-1]
    is_empty = isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant)
    return not marks & {"abstractmethod", "overload"} and not is_empty


def test_each_option_is_read() -> None:
    assert len(list(_fields(ROOT))) > 50
    assert unread() == []


def test_each_parameter_is_used() -> None:
    assert unused() == []


def test_what_is_found(tmp_path: Path) -> None:
    """A deliberate one of each kind."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "a.py").write_text(
        "class SomeOptions(Base):\n"
        "    '''forgotten'''\n"
        "    read: int = 1\n    popped: int = 2\n    forgotten: int = 3\n    elsewhere: int = 4\n"
        "def check(given):\n    values.pop('popped')\n    given.forgotten = 1\n"
    )
    (tmp_path / "other.py").write_text("def f(options):\n    return options.elsewhere\n")
    (room / "b.py").write_text(
        "def f(self):\n    return self._options.read + some.elsewhere\n"
        "def g(options, a, b=1, *, c, d=2, **rest):\n    return [b, d, options.x]\n"
        "@overload\ndef h(a=1): return None\n"
        "class P(Protocol):\n    def i(self, a=1): ...\n"
    )
    assert unread(tmp_path) == ["room.a.SomeOptions: forgotten", "room.a.SomeOptions: elsewhere"]
    assert unused(tmp_path) == ["room.b.g: c"]
