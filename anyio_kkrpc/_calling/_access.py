"""Whether a call with a key may be made, looked at or ended, before anything is asked for."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Literal, Protocol

from anyio import sleep
from msgspec import Struct

from .._driver._core import Core
from .._exceptions import CallNotFoundError, DeliveryError, KeyNotAllowedError
from ..abc import Envelope, Explanation, KeyedCalls, KeyedRequest
from ._explaining import LOOK, explain

__all__ = ("KeyAccess", "KeyGuard", "KeyUse", "check_guard")


Action = Literal["start", "attach", "cancel", "forget"]


class KeyUse(Struct, frozen=True, kw_only=True):
    """What somebody wants to do with a key, as the ``key_guard`` of a channel sees it.

    :ivar action: ``"start"`` makes the call, ``"attach"`` learns its state, progress, items or
        result, ``"cancel"`` and ``"forget"`` do that. Whoever waits for a call that he makes is
        asked for ``"start"`` and ``"attach"``, and with ``cancel_when_left`` for ``"cancel"``, too.
    :ivar key: the call's
    :ivar method: dotted name of what is to be called; empty but for ``"start"``
    :ivar metadata: that of the call, or what `RPCChannel.attach` was given
    """

    action: Action
    key: str
    method: str
    metadata: Mapping[str, Any]


class KeyGuard(Protocol):
    """Decides who may use which key; an ``async def`` with this parameter."""

    def __call__(self, use: KeyUse, /) -> Awaitable[bool]:
        """Return ``True`` if it is allowed; whatever else is returned, it isn't."""
        ...


def check_guard(guard: KeyGuard | None) -> KeyGuard | None:
    """Refuse what can't be a guard; return it."""
    if guard is not None and not callable(guard):
        raise TypeError(f"key_guard: needs an async function, not {guard!r:.80}")
    return guard


class KeyAccess:
    """Asks the guard of a channel, and whether anybody serves what is to be called.

    :param guard: of the channel, if it has one
    """

    __slots__ = ("_core", "_guard")

    def __init__(self, core: Core, guard: KeyGuard | None) -> None:
        self._core = core
        self._guard = guard

    @property
    def guarded(self) -> bool:
        """Whether there is a guard."""
        return self._guard is not None

    async def check(
        self, action: Action, key: str, metadata: Mapping[str, Any], method: str = ""
    ) -> None:
        """Ask the guard, if there is one.

        :raises KeyNotAllowedError: if it doesn't allow that
        """
        if self._guard is None:
            return
        use = KeyUse(action=action, key=key, method=method, metadata=metadata)
        if await self._guard(use) is not True:
            raise KeyNotAllowedError(f"{action}: not allowed with the key {key!r}")

    async def check_call(
        self,
        keeps: KeyedCalls,
        call: KeyedRequest,
        *,
        attaches: bool,
        cancels: bool,
        fail_fast: bool,
    ) -> None:
        """Refuse a call before it is made.

        :param attaches: whether the caller waits for it
        :param cancels: whether it may cancel the call
        :param fail_fast: whether somebody has to serve it
        :raises KeyNotAllowedError: if the guard doesn't allow it
        :raises DeliveryError: if nobody serves it
        """
        meta = call.request.meta or {}
        await self.check("start", call.key, meta, ".".join(call.request.p))
        if attaches:
            await self.check("attach", call.key, meta)
        if cancels:
            await self.check("cancel", call.key, meta)
        if fail_fast:
            await self._check_served(keeps, call)

    async def _check_served(self, keeps: KeyedCalls, call: KeyedRequest) -> None:
        """Refuse a call that nobody would run, unless what it came to is kept.

        Nothing was sent then, and so nothing runs later.
        """
        found = await self._look(call)
        if found is not None and found.unserved and not await self._is_kept(keeps, call):
            raise DeliveryError(found.text)

    async def _look(self, call: KeyedRequest) -> Explanation | None:
        while True:
            found = await explain(self._core, [Envelope(call.request, route=call.key)])
            explanation = found[0] if found else None
            if explanation is None or not explanation.unknown:
                return explanation
            await sleep(LOOK)

    async def _is_kept(self, keeps: KeyedCalls, call: KeyedRequest) -> bool:
        """Whether the next call gets what is there."""
        try:
            kind = (await keeps.state(call.key)).kind
        except CallNotFoundError:
            return False
        return kind in ("done", "dead") or (kind == "failed" and call.keep_errors > 0)
