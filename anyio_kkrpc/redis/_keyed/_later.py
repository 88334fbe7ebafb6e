"""Calls that are to begin later: those whose time has come become requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from typing import Any

from ..._exceptions import ProtocolError
from .._connection._errors import Meaning, RedisError, meaning_of
from .._connection._link import Link
from .._connection._patience import Outages
from .._stream._keys import Keys
from ..dialects._signing import Signer
from ._kept import Sealer, parse_kept, unpack_fields
from ._script import run_script
from ._scripts import DUE, LATER

__all__ = ("Later",)

logger = logging.getLogger("anyio_kkrpc")

# Calls that one script finds.
_PAGE = 50
_PART = "calls that are to begin later"


class Later:
    """Looks for them when the next one is due, and when it is told that there are some.

    :param now: a clock in seconds
    :ivar at: when it is to look, on that clock
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        sealer: Sealer,
        signer: Signer | None,
        outages: Outages,
        now: Callable[[], float],
    ) -> None:
        self._link = link
        self._keys = keys
        self._sealer = sealer
        self._signer = signer
        self._outages = outages
        self._now = now
        self.at = inf

    def look(self) -> None:
        """Have it look at once."""
        self.at = 0.0

    async def go_on(self) -> None:
        """Move those whose time has come, if it is time to look."""
        while self._now() >= self.at:
            self.at = inf  # who has it look meanwhile is heard
            try:
                keys, left = await self._find()
                for key in keys:
                    await self._move(key)
            except RedisError as exc:
                self._outages.leave_out(_PART, exc)
                self.at = self._now() + 1.0
                return
            self._outages.end(_PART)
            if left >= 0:
                self.at = min(self.at, self._now() + left / 1000)

    async def _find(self) -> tuple[list[bytes], int]:
        """Return what may begin now, and in how many milliseconds the next one may, or -1.

        Who may do nothing with calls with keys finds none.
        """
        due = self._keys.due
        try:
            if not await self._link.request(b"EXISTS", due):
                return [], -1
        except RedisError as exc:
            if meaning_of(exc) is Meaning.RIGHTS:
                return [], -1
            raise
        keys, left = await run_script(self._link, LATER, (due,), b"%d" % _PAGE)
        return keys, left

    async def _move(self, key: bytes) -> None:
        place = self._keys.call(key)
        value: Any = await self._link.request(b"GET", place)
        fields: tuple[bytes, ...] = ()
        try:
            if value is not None:
                kept = parse_kept(value)
                if kept.state == b"z":
                    fields = unpack_fields(self._sealer.open(place, kept.digest, kept.rest))
        except ProtocolError as exc:
            logger.warning("a call that is to begin later is left out: %s", exc)
            await self._link.request(b"ZREM", self._keys.due, key)
            return
        if self._signer is not None and fields:
            fields = self._signer.sign(self._keys.stream, fields)
        names = (self._keys.due, self._keys.stream, place)
        await run_script(self._link, DUE, names, key, value or b"", *(fields or (b"", b"")))
