"""When kkrpc 2 is told that a callback won't be called again. No I/O.

There a callback has one id, and one release is the end of it, however often it was passed. So it is
told once all that was got of it is gone, and not before it has been so for a while: a release must
not cross a call that passes the same function again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from .._protocol._values import ARGUMENT
from ..records import Request

# Seconds for which a callback must not have been passed again.
DELAY = 10.0
# Callbacks that are remembered; the oldest are never released.
_MAX_KNOWN = 100_000

_Key = tuple[str | None, str]


class Releases:
    """Counts what was got of each callback, and tells which are to be released."""

    def __init__(self) -> None:
        self._uses: OrderedDict[_Key, int] = OrderedDict()
        self._gone: OrderedDict[_Key, float] = OrderedDict()

    @property
    def pending(self) -> bool:
        """Whether `due` will have something to tell."""
        return bool(self._gone)

    def received(self, request: Request, sender: str | None) -> None:
        """Note the callbacks that a request passes."""
        for item in request.a or ():
            if item.__class__ is dict and item.get(ARGUMENT) == "callback":
                self._note((sender, str(item.get("id"))))

    def _note(self, key: _Key) -> None:
        self._uses[key] = self._uses.pop(key, 0) + 1
        self._gone.pop(key, None)
        if len(self._uses) > _MAX_KNOWN:
            self._uses.popitem(last=False)

    def released(self, ids: Iterable[str], sender: str | None, now: float) -> None:
        """Note that callbacks were dropped here, each once."""
        for callback_id in ids:
            key = (sender, callback_id)
            uses = self._uses.get(key, 0) - 1
            if uses > 0:
                self._uses[key] = uses
            elif self._uses.pop(key, None) is not None:
                self._gone[key] = now

    def due(self, now: float) -> dict[str | None, list[str]]:
        """Return what is to be released now: for each peer, ids."""
        due: dict[str | None, list[str]] = {}
        while self._gone:
            key, since = next(iter(self._gone.items()))
            if now - since < DELAY:
                break
            del self._gone[key]
            due.setdefault(key[0], []).append(key[1])
        return due
