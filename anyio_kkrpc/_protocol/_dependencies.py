"""Which other peers have to stay, so that what is open here comes to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

# What the other peer is: it has the source of a stream that is read here; or it reads one of here,
# or runs a function that is called here.
Role: TypeAlias = Literal["source", "reader"]
Depend: TypeAlias = Callable[["str | None", Role, bool], object]


class Dependencies:
    """What is open with each peer.

    :param depend: told of a peer (``None``: one that isn't known yet) when the first of a kind is
        opened with it, and when the last one has ended
    """

    def __init__(self, depend: Depend) -> None:
        self._depend = depend
        self._open: dict[tuple[str | None, Role], dict[Any, None]] = {}

    def add(self, peer: str | None, role: Role, what: object) -> None:
        """Note that something was opened with a peer."""
        key = (peer, role)
        found = self._open.get(key)
        if found is not None:
            found[what] = None
        else:
            self._open[key] = {what: None}
            self._depend(peer, role, True)

    def remove(self, peer: str | None, role: Role, what: object) -> None:
        """Note that it has ended."""
        key = (peer, role)
        found = self._open[key]
        del found[what]
        if not found:
            del self._open[key]
            self._depend(peer, role, False)

    def of(self, peer: str | None, role: Role) -> list[Any]:
        """Return what is open with a peer."""
        return list(self._open.get((peer, role), ()))
