"""Objects of other peers that are held here: used, and released."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .._exceptions import DeliveryError
from .._protocol._records import CallbackRelease
from .._references._held import Handle, HeldTable
from .._references._marking import Reference
from .._runtime._clock import scheduler
from ._asking import ask
from ._core import Core
from ._remote_object import RemoteMember, RemoteObject, Root

# Ids in one release.
_BATCH = 1000


class Holding:
    """Those of one channel.

    :ivar held: what they are
    :ivar relayed: whether they may be passed to other channels: who gets one uses it through this
        side
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.held: HeldTable = HeldTable()
        self.relayed: bool = False
        self._owners: set[str | None] = set()
        self._dropped: deque[Handle] = deque()
        self._collecting = False
        self._soon: Callable[[Callable[[], object]], None] | None = None
        self._dependencies = core.conversation.functions.dependencies

    def open(self) -> None:
        """Find out what event loop there is."""
        self._soon = scheduler()

    def relay(self) -> None:
        """Let them be passed to other channels."""
        self.relayed = True

    def take(self, reference: Reference, owner: str | None) -> RemoteObject | RemoteMember:
        """Return what stands for an object that came."""
        handle = self.held.received(reference.id, owner)
        if owner not in self._owners:
            self._owners.add(owner)
            self._dependencies.add(owner, "source", self)
        root = Root(self, handle, is_function=reference.function)
        return RemoteMember(root, reference.path) if reference.path else RemoteObject(root)

    async def ask(
        self,
        root: Root,
        what: str,
        path: tuple[str, ...],
        args: Iterable[Any],
        kwargs: dict[str, Any],
        *,
        undefined: bool = False,
    ) -> Any:
        """Have its owner do something to it; raises as `anyio_kkrpc._driver._asking.ask`."""
        self.check(root)
        core, handle, name = self._core, root.handle, ".".join(path) or "a function"
        what_path, to = [what, *path], handle.owner
        return await ask(
            core, handle.id, args, kwargs, to, name, path=what_path, undefined=undefined
        )

    def check(self, root: Root) -> None:
        """Raise `DeliveryError` if an object was released, or its owner is gone."""
        if not self.held.is_held(root.handle):
            raise DeliveryError("the reference was released, or its owner is gone")

    # It isn't needed any more

    def release(self, handle: Handle) -> None:
        """Tell the owner of an object at once that it isn't needed any more."""
        pair = self.held.release(handle)
        if pair is not None:
            self._tell_at_once(handle.owner, pair)
            self._look_after(handle.owner)

    def drop(self, handle: Handle) -> None:
        """Note that one use of an object was collected. From any thread."""
        if not self._core.is_open:
            return
        self._dropped.append(handle)
        if not self._collecting and self._soon is not None:
            self._collecting = True
            self._soon(self._collect)

    def _collect(self) -> None:
        self._collecting = False
        handles = [self._dropped.popleft() for _ in range(len(self._dropped))]
        for owner, pairs in self.held.dropped(handles).items():
            for start in range(0, len(pairs), _BATCH):
                batch = pairs[start : start + _BATCH]
                ids, times = [one for one, _ in batch], [count for _, count in batch]
                self._core.post(CallbackRelease(ids, times=times), owner)
            self._look_after(owner)

    def _tell_at_once(self, owner: str | None, pair: tuple[str, int]) -> None:
        # By itself: kkrpc 2 releases one at a time.
        self._core.post(CallbackRelease([pair[0]], all=True, times=[pair[1]]), owner)

    def _look_after(self, owner: str | None) -> None:
        """Find out no more whether a peer is there of which nothing is held."""
        if owner in self._owners and not self.held.has(owner):
            self._forget(owner)

    def _forget(self, owner: str | None) -> None:
        self._owners.discard(owner)
        self._dependencies.remove(owner, "source", self)

    # Peers that are gone, and the end

    def lose_owner(self, owner: str | None) -> None:
        """Forget what a peer owns that is gone."""
        self.held.lose_owner(owner)
        if owner in self._owners:
            self._forget(owner)

    def close(self) -> None:
        """Tell others what is not needed any more: all of it."""
        for owner in [*self._owners]:
            for handle in self.held.lose_owner(owner):
                self._tell_at_once(owner, (handle.id, handle.times))
            self._forget(owner)

    def lose(self) -> None:
        """Forget all, because the link is gone."""
        self._dropped.clear()
        for owner in [*self._owners]:
            self.held.lose_owner(owner)
