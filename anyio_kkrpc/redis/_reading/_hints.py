"""Words to all peers of a stream that are no records: written and read here.

``claim`` says that there is something to take for the workers of a group, ``destroy <id>`` passes
on a destroy signal that only one worker got, ``turn``, in an inbox, has a worker that rests wait
at the stream. What is said of calls with keys, in an inbox or to all
peers, begins with ``call``. What else is said so, such as ``hello`` in an inbox,
only makes a key, or ends a read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._connection._errors import RedisError
from .._connection._patience import Outages
from .._stream._keys import CONTROL_LENGTH, CONTROL_TTL_MS
from .._stream._scripts import add_briefly
from ..dialects.native import peer_id

__all__ = ("CLAIM_WORD", "TURN_WORD", "Hints")

CLAIM_WORD = b"claim"
TURN_WORD = b"turn"
_DESTROY = b"destroy "
_CALL = b"call"
_PART = "words to all peers"


class Hints:
    """Says them, and takes those that others said.

    :param control: key of the stream that all peers read
    :param request: `Link.request`
    :param outages: told of what is refused
    :param session_id: this peer's
    :param signed: whether peers sign what they write; a word isn't signed, so it ends nobody then
    :param work: given what is said to workers: `CLAIM_WORD` when there is something to take, and
        `TURN_WORD`
    :param destroy: told who has sent a destroy signal
    :param call: given what is said of calls with keys
    """

    def __init__(
        self,
        control: bytes,
        request: Callable[..., Awaitable[Any]],
        outages: Outages,
        session_id: str,
        *,
        signed: bool,
        work: Callable[[bytes], object],
        destroy: Callable[[str], object],
        call: Callable[[bytes], object],
    ) -> None:
        self._call = call
        self._control = control
        self._request = request
        self._outages = outages
        self._session_id = session_id
        self._signed = signed
        self._work = work
        self._destroy = destroy

    def take(self, word: bytes) -> None:
        """Take a word that was read.

        :raises ProtocolError: if it names a peer that can't be one
        """
        if word.startswith(_CALL):
            self._call(word)
        elif word in (CLAIM_WORD, TURN_WORD):
            self._work(word)
        elif word.startswith(_DESTROY) and not self._signed:
            sender = peer_id(word[len(_DESTROY) :])
            if sender != self._session_id:
                self._destroy(sender)

    async def tell_claim(self) -> None:
        """Tell the workers that there is something to take."""
        await self._tell(CLAIM_WORD)

    async def tell_destroyed(self, sender: str) -> None:
        """Pass on the destroy signal of a peer."""
        await self._tell(_DESTROY + sender.encode())

    async def _tell(self, word: bytes) -> None:
        """Say a word, which may be lost."""
        entry = (b"MAXLEN", b"~", CONTROL_LENGTH, b"*", b"hint", word)
        try:
            await self._request(*add_briefly(self._control, CONTROL_TTL_MS, *entry))
        except RedisError as exc:
            self._outages.leave_out(_PART, exc)
        else:
            self._outages.end(_PART)
