"""No module uses what is private to another one, or changes the state of another one's part."""

from __future__ import annotations

from pathlib import Path

from .source import private_uses, sets_of_others

# What is made to be set: AnyIO's scopes, and messages, which are no parts.
SCOPES = {"deadline", "shield"}
MESSAGES = {"envelope", "record", "progress"}
# May only shrink.
KNOWN = {
    "self._connection.before_write": "a hook, called for each write: a method would cost a call",
}


def test_private_names_stay_private() -> None:
    assert [f"{module}:{line}: {name}" for module, name, line in private_uses()] == []


def test_what_counts(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        "_x = 1\nclass A:\n    def __init__(self):\n        self._own = 1\n        self.__dict__\n"
    )
    (package / "b.py").write_text(
        "from .a import A, _x\nfrom . import a\n"
        "class B:\n    def f(self, a: A) -> None:\n        self._mine = a._own\n        a._mine\n"
    )
    found = list(private_uses(package))
    assert found == [("b", "_own", 5), ("b", "_x", 1)]


def test_state_belongs_to_its_part() -> None:
    found = {}
    for module, what, line in sets_of_others():
        *_, owner, attribute = what.split(".")
        if attribute not in SCOPES and owner not in MESSAGES:
            found[what] = f"{module}:{line}"
    assert {what: where for what, where in found.items() if what not in KNOWN} == {}
    assert set(KNOWN) <= set(found), "take them out of KNOWN"


def test_what_counts_as_set(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text(
        "class Own:\n    x: int\n"
        "def f(self, part):\n    part.y = self.y = 1\n    self.part.x = 2\n"
        "    part.inner.v, z = 1, 2\n    self.part.v += 1\n    del self.part.z\n"
        "    print(part.inner.z)\n"
    )
    assert {(what, line) for _, what, line in sets_of_others(package)} == {
        ("part.inner.v", 6),
        ("self.part.v", 7),
        ("self.part.z", 8),
    }
