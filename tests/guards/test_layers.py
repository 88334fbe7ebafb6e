"""Who may import whom, read from the source; imports for type checkers and in functions count.

`ROOMS` says what each room may import of the package; a room includes what is below it, and a rule
for a longer name comes first.
What is broken today is in `KNOWN`, and `CIRCLES` has the modules that import each other: both may
only shrink.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .source import ROOT, circles, imports, modules

GROUND = {"_protocol", "_runtime", "_exceptions"}
WORDS = GROUND | {"abc", "records", "_wire_errors"}
# What transports speak of: the protocol is hidden from them but for its records.
SEAM = {"_runtime", "_exceptions", "abc", "records", "_wire_errors"}
SPOKEN = SEAM | {"codecs", "typescript", "_spoken"}

ROOMS: dict[str, set[str]] = {
    "_protocol": set(),
    "_runtime": set(),
    "_exceptions": {"_protocol"},
    "records": {"_protocol"},
    "abc": {"_protocol", "records"},
    "_wire_errors": {"_exceptions", "_protocol"},
    "middleware": {"_exceptions", "_runtime"},
    "_values": {"_exceptions", "_protocol"},
    "codecs": WORDS | {"_values"},
    "typescript": WORDS | {"_values", "_references", "codecs"},
    "_spoken": SEAM | {"codecs", "typescript"},
    "kit": SEAM | {"codecs", "_spoken"},
    "transports": SEAM | {"codecs", "_spoken", "kit"},
    "redis": SPOKEN | {"kit"},
    "redis._connection": {"_exceptions", "_runtime"},
    "redis._stream": {"redis._connection"},
    "redis.dialects": SPOKEN | {"redis._stream", "_protocol"},
    "redis._writing": SEAM | {"redis.dialects", "redis._stream", "redis._connection"},
    "redis._reading": SPOKEN | {"kit", "redis.dialects", "redis._stream", "redis._connection"},
    "redis._group": SEAM
    | {"redis._reading", "redis._writing", "redis.dialects", "redis._stream", "redis._connection"},
    "redis._keyed": SEAM
    | {"kit", "redis._group", "redis.dialects", "redis._stream", "redis._connection"},
    # What has several lanes, and does with them what the transport does with one.
    "redis._sharding": SEAM | {"kit", "redis"},
    "_references": {"_exceptions", "_protocol"},
    "_driver": WORDS | {"_values", "_references"},
    "_calling": WORDS | {"_values", "_references", "_driver", "middleware"},
    "_serving": WORDS | {"_values", "_references", "_driver", "middleware"},
    "_reactions": WORDS | {"_driver", "_calling", "_serving"},
    "_channel": WORDS | {"_driver", "_calling", "_serving", "_reactions", "middleware"},
    "_signals": {"_channel", "_runtime"},
    "otel": {"_calling", "_exceptions", "middleware", "redis"},
    "relay": WORDS | {"_driver", "_calling", "_channel", "_serving"},
    # Transports; only the application that serves an API knows the channel.
    "websocket": SEAM | {"codecs", "_spoken", "kit"},
    "websocket._endpoint": SEAM
    | {"websocket", "codecs", "_spoken", "kit", "_channel", "_serving", "middleware"},
    "asgi": WORDS | {"_values", "_calling", "_channel", "kit"},
    "sse": {"_exceptions", "_driver", "_values", "asgi"},
    # The public names; transports are loaded on first use.
    "": WORDS
    | {"_channel", "_calling", "_serving", "_driver", "_signals", "kit", "transports", "redis"}
    | {"_references"},
    # They use the library as anybody does, and may know of everything.
    "testing": {""},
    "_cli": {"", "testing"},
    "__main__": {"_cli"},
}

# What the rule of a whole folder is for: everything else in it has a room of its own.
OPEN = {
    "redis": {
        "",
        "_admin",
        "_administering",
        "_enter",
        "_lane",
        "_life",
        "_making",
        "_options",
        "_restoring",
        "_statistics",
        "_transport",
        "_upkeep",
    }
}

KNOWN: dict[tuple[str, str], str] = {}

# Each with what holds it together.
CIRCLES: list[set[str]] = []


def room_of(module: str) -> str | None:
    """Return the name of the rule for a module."""
    rule = module
    while rule not in ROOMS:
        if not rule:
            return None
        rule = rule.rpartition(".")[0]
    if not rule and module:
        return None
    rest = module.removeprefix(rule).lstrip(".")
    return rule if rest in OPEN.get(rule, (rest,)) else None


def _is_inside(name: str, place: str) -> bool:
    return not place or name == place or name.startswith(place + ".")


def broken(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the imports that no rule allows."""
    found = set()
    for module, target in arrows:
        rule, end = room_of(module), room_of(target)
        if rule is None or end is None or end == rule:
            continue
        if "." not in rule and rule and _is_inside(end, rule):
            continue  # a folder's own page puts its parts together
        if not any(_is_inside(end, one) for one in ROOMS[rule]):
            found.add((module, target))
    return found


@cache
def arrows() -> set[tuple[str, str]]:
    """Return who imports whom; each process that collects tests would wait for it otherwise."""
    return {(module, target) for module, target, _, _ in imports()}


def test_each_module_has_a_room() -> None:
    assert [name for name in modules() if room_of(name) is None] == []
    assert [room for room in ROOMS if room not in modules()] == [], "there is no such module"


def test_each_room_is_on_the_map() -> None:
    page = ROOT.parent / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("the package was not imported from its checkout")
    named = set(re.findall(r"`([\w.]+)`", page.read_text().partition("## Layers")[2]))
    rooms = {room for room in ROOMS if room}
    assert rooms - named == set()


def test_imports_follow_the_rules() -> None:
    found = broken(arrows())
    assert found - KNOWN.keys() == set(), "these imports break the rules above"
    assert KNOWN.keys() - found == set(), "these are mended: take them out of KNOWN"


def test_no_circles() -> None:
    found = sorted(circles(arrows()), key=len)
    assert found == CIRCLES, "circles of imports may only become fewer and smaller"


def test_the_table_has_no_circle() -> None:
    table = {(room, one) for room, ones in ROOMS.items() for one in ones if room and one}
    assert circles(table) == []


def test_absolute_and_late_imports_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "low" / "__init__.py").write_text("")
    (package / "high.py").write_text("def f() -> None:\n    from package.low import a\n")
    (package / "low" / "a.py").write_text("import package.high\nfrom .. import high\n")
    found = {(start, end) for start, end, _, _ in imports(package)}
    assert found == {("high", "low.a"), ("low.a", "high")}
    assert circles(found) == [{"high", "low.a"}]


def test_the_core_loads_nothing_of_the_transports() -> None:
    program = (
        "import sys, anyio_kkrpc._protocol._conversation\n"
        "print(*[name for name in ('redis', 'cbor2') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "redis" not in loaded
    assert "cbor2" not in loaded
