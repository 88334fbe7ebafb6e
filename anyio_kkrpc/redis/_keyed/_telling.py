"""Who waits for a call is told that it has ended, and workers that one is to begin later."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .._connection._command import Argument
from .._connection._link import Link
from .._stream._keys import CONTROL_LENGTH, CONTROL_TTL_MS, Keys
from .._stream._scripts import add_briefly
from ._kept import LATER_WORD, word_of
from ._script import Script, is_unknown, run_script
from ._scripts import TELL

__all__ = ("Teller",)

logger = logging.getLogger("anyio_kkrpc")

# Who is told by one script.
_MANY = 500


class Teller:
    """Tells them.

    :param stir: has `go_on` called soon
    """

    def __init__(self, link: Link, keys: Keys, stir: Callable[[], object]) -> None:
        self._link = link
        self._keys = keys
        self._stir = stir
        self._to_tell: deque[tuple[bytes, bytes]] = deque()

    def tell_soon(self, key: bytes, value: bytes = b"") -> None:
        """Tell who waits for a call that it has ended, in a moment.

        :param value: what is kept of it, if that is to go along
        """
        self._to_tell.append((key, value))
        self._stir()

    async def go_on(self) -> None:
        """Do so."""
        while self._to_tell:
            await self.tell(*self._to_tell[0])
            self._to_tell.popleft()

    async def tell(self, key: bytes, value: bytes = b"") -> None:
        """Tell who waits for a call that it has ended, now."""
        waits, word = self._keys.waits(key), word_of(key, value)
        sessions = await self._link.request(b"ZRANGE", waits, b"0", b"-1")
        for start in range(0, len(sessions), _MANY):
            some = sessions[start : start + _MANY]
            beginning = self._keys.inbox("")
            await run_script(self._link, TELL, (waits,), word, beginning, *some)

    async def tell_later(self) -> None:
        """Tell the workers that a call is to begin later."""
        entry = (b"MAXLEN", b"~", CONTROL_LENGTH, b"*", b"hint", LATER_WORD)
        await self._link.request(*add_briefly(self._keys.control, CONTROL_TTL_MS, *entry))

    def post(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument],
        done: Callable[[Any], object],
    ) -> None:
        """Run a script without awaiting it. It may be lost with the connection.

        :param done: given its reply
        """
        connection = self._link.connection
        if connection is None or connection.error is not None:
            return

        def answered(reply: Any, *, known: bool) -> None:
            if is_unknown(reply) and known and connection.error is None:
                write(known=False)
            elif isinstance(reply, Exception):
                logger.debug("a script of a call with a key: %s", reply)
            else:
                done(reply)

        def write(*, known: bool) -> None:
            packed = script.packed(keys, args, known=known)
            connection.post(packed, 1, lambda reply: answered(reply, known=known))
            connection.flush_nowait()

        write(known=True)
