"""What this side holds by reference of other peers, and what of that is to be released. No I/O.

An id may come again while what was made of it is still there: there is one handle for each id,
which counts how often it came. A handle that is dropped is released with that count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Owner: TypeAlias = "str | None"


class Handle:
    """An object of another peer.

    :ivar times: how often its id came and was not released
    :ivar uses: how many use it here
    """

    __slots__ = ("id", "owner", "times", "uses")

    def __init__(self, reference_id: str, owner: Owner) -> None:
        self.id: str = reference_id
        self.owner: Owner = owner
        self.times: int = 0
        self.uses: int = 0


class HeldTable:
    """The objects of other peers that this side holds."""

    def __init__(self) -> None:
        self._handles: dict[Owner, dict[str, Handle]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._handles.values()))

    def has(self, owner: Owner) -> bool:
        """Whether anything is held of a peer."""
        return owner in self._handles

    def received(self, reference_id: str, owner: Owner) -> Handle:
        """Note that a reference came; whoever uses it drops it once."""
        handles = self._handles.setdefault(owner, {})
        handle = handles.get(reference_id)
        if handle is None:
            handle = handles[reference_id] = Handle(reference_id, owner)
        handle.times += 1
        handle.uses += 1
        return handle

    def is_held(self, handle: Handle) -> bool:
        """Whether its owner still has it for this side, as far as is known here."""
        return self._handles.get(handle.owner, {}).get(handle.id) is handle

    def dropped(self, handles: Iterable[Handle]) -> dict[Owner, list[tuple[str, int]]]:
        """Note that uses of handles ended.

        :return: what is to be released: for each owner, ids with their counts
        """
        told: dict[Owner, list[tuple[str, int]]] = {}
        for handle in handles:
            if not self.is_held(handle):
                continue
            handle.uses -= 1
            if not handle.uses:
                told.setdefault(handle.owner, []).append(self._end(handle))
        return told

    def release(self, handle: Handle) -> tuple[str, int] | None:
        """End a handle at once, whoever uses it; return what is to be released, if it is held."""
        return self._end(handle) if self.is_held(handle) else None

    def lose_owner(self, owner: Owner) -> list[Handle]:
        """Forget what a peer owns that is gone, or isn't needed; return it."""
        return list(self._handles.pop(owner, {}).values())

    def _end(self, handle: Handle) -> tuple[str, int]:
        handles = self._handles[handle.owner]
        del handles[handle.id]
        if not handles:
            del self._handles[handle.owner]
        return handle.id, handle.times
