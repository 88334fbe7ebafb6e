"""No module uses what is private to another one: attributes ``x._name``, and imported names."""

from __future__ import annotations

from pathlib import Path

from .source import private_uses


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
