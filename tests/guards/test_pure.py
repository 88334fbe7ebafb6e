"""What decides knows no clock, no chance and no I/O: it is handed them, or what they told.

Read from the source: what these rooms import, of Python, of others and of the package, late imports
and those for type checkers included, and what of the rest they call.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .source import imports, modules, tree

# With all that is below them.
PURE = (
    "_protocol",
    "typescript",
    "_spoken",
    "redis.dialects",
    "redis._stream",
    "redis._writing._commands",
    "redis._group._held",
    "redis._group._findings",
)
# Asks the server about itself.
ASKS = {"redis._stream._server"}

# Of Python and of others; nothing else that has a clock, chance or I/O is a dependency.
OUTSIDE = {
    *("anyio", "asyncio", "hiredis", "trio", "uvloop", "sniffio"),
    *("random", "secrets", "time", "uuid", "sched", "locale", "platform"),
    *("_thread", "concurrent", "multiprocessing", "queue", "signal", "subprocess", "threading"),
    *("ctypes", "fileinput", "http", "io", "logging", "mmap", "os", "pathlib", "select"),
    *("selectors", "shutil", "socket", "sqlite3", "ssl", "sys", "tempfile", "warnings"),
    *("importlib", "redis"),
}
# Methods of `datetime` and `date`, and built-in functions.
CALLS = {"now", "utcnow", "today", "open", "print", "input", "breakpoint", "__import__"}
# What is handed in may have such a name, and is called by it.
OWN = {"self", "cls"}

# Rooms that do, and what in them does not.
ROOMS = ("_runtime", "redis._connection", "_driver", "kit", "transports", "testing", "_cli")
HARMLESS_ROOMS = {
    "_runtime._fresh",
    "_runtime._log",
    "redis._connection._command",
    "redis._connection._errors",
}


def _is_in(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _foreign(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield what is imported from elsewhere, each with its line."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno


def _calls(module: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            yield function.id, node.lineno
        elif isinstance(function, ast.Attribute):
            root = function.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if not (isinstance(root, ast.Name) and root.id in OWN):
                yield function.attr, node.lineno


def impure(file: Path) -> list[str]:
    """Return what a module has of the world, as lines of text."""
    module = tree(file)
    found = [
        f"imports {name} in line {line}"
        for name, line in _foreign(module)
        if name.partition(".")[0] in OUTSIDE
    ]
    return found + [
        f"calls {name} in line {line}" for name, line in _calls(module) if name in CALLS
    ]


DECIDING = [name for name in modules() if _is_in(name, PURE) and name not in ASKS]


@pytest.mark.parametrize("name", DECIDING)
def test_nothing_of_the_world(name: str) -> None:
    assert impure(modules()[name]) == []


def test_nothing_by_way_of_other_rooms() -> None:
    found = {
        (name, target)
        for name, target, _, _ in imports()
        if name in DECIDING and _is_in(target, ROOMS) and target not in HARMLESS_ROOMS
    }
    assert found == set()


def test_the_rules_name_what_there_is() -> None:
    """A room that is renamed isn't forgotten."""
    known = set(modules())
    assert known >= ASKS
    assert known >= HARMLESS_ROOMS
    for room in (*PURE, *ROOMS):
        assert any(_is_in(name, (room,)) for name in known), room


def test_each_way_is_seen(tmp_path: Path) -> None:
    ways = {
        "import time": "imports time",
        "import os.path": "imports os.path",
        "from time import monotonic": "imports time",
        "def f():\n    from secrets import token_hex": "imports secrets",
        "if TYPE_CHECKING:\n    from anyio.abc import TaskGroup": "imports anyio.abc",
        "x = datetime.now()": "calls now",
        "x = datetime.datetime.now(timezone.utc)": "calls now",
        "def f():\n    return open('x')": "calls open",
        "print(1)": "calls print",
    }
    for number, (source, text) in enumerate(ways.items()):
        file = tmp_path / f"{number}.py"
        file.write_text(source)
        assert [line.partition(" in ")[0] for line in impure(file)] == [text]
    file = tmp_path / "handed.py"
    file.write_text("x = self.now()\ny = self.clock.now()")
    assert impure(file) == []
