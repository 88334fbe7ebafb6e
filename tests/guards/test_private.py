"""No module uses what is private to another one: attributes ``x._name``, and imported names.

`KNOWN` has how often each module still does so; the numbers may only shrink.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .source import private_uses

_INFLOW = "asks a RemoteStream for its inflow; a public name of the driver is missing"
KNOWN = {
    "_channel": (3, "looks into a question that broadcast() was given"),
    "_values._conversion": (1, _INFLOW),
    "_calling._gathering": (13, "takes a call of a proxy to pieces"),
    "_calling._typed": (1, _INFLOW),
    "otel": (1, "a transport has no public property that tells its address"),
}

FOUND = Counter(module for module, _, _ in private_uses())


def test_private_names_stay_private() -> None:
    where = [f"{module}:{line}: {name}" for module, name, line in private_uses()]
    known = {module: number for module, (number, _) in KNOWN.items()}
    assert dict(FOUND) == known, "\n".join(["may only become fewer; lower the numbers:", *where])


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
