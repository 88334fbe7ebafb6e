"""What becomes of calls whose requests another server may have lost.

A replica that is promoted hasn't all that the server before it had accepted, and one that is
started again may have nothing. What is missing there nobody will run, and only its caller can know.
So when another server answers than before, the requests that wait for their replies are looked for
by their ids. What isn't there was lost, or was answered and trimmed; in that case its reply, which
was written before, is in the inbox. So that is read to its end before a request is written once
more. What is for one peer alone may have been read from its inbox: nothing tells, and it is sent in
any case. Who runs a request already doesn't begin it again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain
from typing import TypeAlias

from anyio import move_on_after

from ..._runtime._bell import Bell
from ...abc import Envelope
from ...kit._inbound import Inbound
from .._connection._errors import RedisError, reason
from .._connection._link import Link
from .._stream._server import Identity
from ._by_id import select_ids
from ._reader import Reader

__all__ = ("OpenCalls",)

logger = logging.getLogger("anyio_kkrpc")

# Returns which of some requests aren't in the stream, given the ids of their entries and their own.
# An entry's id names it on one server only: what has it there may be another one. It is the request
# if it has that one's id, as JSON has it, also within a text, or CBOR, where its length stands
# before it; and this sender, in the native dialect. Others have that elsewhere.
_MISSING = b"""
local function has(text, id)
  local from, to = string.find(text, id, 1, true)
  while from do
    local behind = string.byte(text, to + 1)
    local length = #id < 24 and 96 + #id or #id
    if behind == 34 or behind == 92 or string.byte(text, from - 1) == length then return true end
    from, to = string.find(text, id, to + 1, true)
  end
  return false
end
local missing = {}
for i = 2, #ARGV, 2 do
  local entry, there = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1], false
  if entry and (entry[2][1] ~= 'from' or entry[2][2] == ARGV[1]) then
    for value = 2, #entry[2], 2 do
      there = there or has(entry[2][value], ARGV[i + 1])
    end
  end
  if not there then missing[#missing + 1] = ARGV[i] end
end
return missing
"""
# A request, and its id in the stream; without one it is for one peer alone.
_Accepted: TypeAlias = tuple[Envelope, bytes | None]
# Seconds between two looks whether the inbox is read on the server that answers now, at most.
_LOOK = 1.0
# Seconds for which the inbox is waited for. A request that is sent again needlessly is marked as
# repeated; one that waits for longer may be out of time.
_CATCH_UP = 15.0
# Seconds until a server that refused to tell what it has is asked again, and how often it is asked.
_AGAIN = 5.0
_ATTEMPTS = 60


class OpenCalls:
    """Looks for them. `run` must run beside it.

    :param stream: its key
    :param sender: this peer, as its entries in the native dialect have it
    :param inbound: has the listener
    :param link: the connection that this peer writes on
    :param reader: reads the inbox
    :param read_on: returns once what is in the inbox now was read; false if that took too long
    :param send_again: writes requests once more; returns how many
    :param kept: returns the requests that its writer has still to write, or to look for
    :param forget: told the ids of all requests that are open, now and then
    :ivar identity: of the server that answers
    :ivar looked_up: how many were looked for
    :ivar sent_again: how many of these were lost, and were written once more
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        stream: bytes,
        sender: bytes,
        inbound: Inbound,
        link: Link,
        reader: Reader,
        read_on: Callable[[], Awaitable[bool]],
        send_again: Callable[[Sequence[Envelope]], Awaitable[int]],
        kept: Callable[[], Collection[Envelope]],
        forget: Callable[[Collection[str]], object],
    ) -> None:
        self._stream = stream
        self._sender = sender
        self._inbound = inbound
        self._link = link
        self._reader = reader
        self._read_on = read_on
        self._send_again = send_again
        self._kept = kept
        self._forget = forget
        self._open: list[_Accepted] = []
        # What is looked for at present.
        self._looked_for: list[_Accepted] = []
        self.bell = Bell()
        self.identity = Identity()
        self.looked_up = self.sent_again = 0

    def note(self) -> None:
        """Note that another server answers: what was accepted before may not be there."""
        waiting = self._inbound.waiting()
        self._forget({one.record.id for one in waiting})  # type: ignore[union-attr]
        kept = {id(one) for one in self._kept()}
        self._open = [(one, one.token) for one in waiting if _was_accepted(one, kept)]
        self.bell.set()

    def looks_for(self, request: Envelope) -> bool:
        """Whether a request is sent again if the server lacks it, which isn't known yet."""
        return any(one is request for one, _ in chain(self._open, self._looked_for))

    async def run(self) -> None:
        """Look for those that were open, each time that another server answers."""
        while True:
            await self.bell.wait()
            self.bell.clear()
            self._looked_for, self._open = self._open, []
            self._inbound.doubt()
            if self._looked_for:
                await self._look_for(self._looked_for)
                self._looked_for = []

    async def _look_for(self, found: list[_Accepted]) -> None:
        """Send those again that the server lacks."""
        self.looked_up += len(found)
        missing = await self._find_missing(found)
        if not missing:
            logger.info("another server answers than before: it has what this peer waits for")
            return
        await self._read_to_the_end()
        count = await self._send_again(self._still_open(missing))
        self.sent_again += count
        logger.warning(
            "another server answers than before: %d requests were open, and %d of them that it has "
            "lost, or may have, were sent again",
            len(found),
            count,
        )

    async def _find_missing(self, requests: Sequence[_Accepted]) -> list[_Accepted]:
        """Return those that the server doesn't have, or that nothing tells of: what was in an inbox
        may have been read. If it can't be asked, or the next server is to be, return none.
        """
        for attempt in range(_ATTEMPTS):
            asked = [
                (entry_id, one.record.id)  # type: ignore[union-attr]
                for one, entry_id in requests
                if entry_id is not None
            ]
            try:
                found = await select_ids(self._link, _MISSING, self._stream, self._sender, asked)
            except RedisError as exc:
                if not attempt:
                    logger.warning("which requests were lost can't be found: %s", reason(exc))
                with move_on_after(_AGAIN):
                    await self.bell.wait()
                requests = self._waiting(requests)
                if self.bell.is_set() or not requests:
                    break
            else:
                return [one for one in requests if one[1] is None or one[1] in found]
        return []

    async def _read_to_the_end(self) -> None:
        """Wait until what is in the inbox now, on the server that answers now, was read.

        That may never be: two connections to one address may lead to two servers for good.
        """
        with move_on_after(_CATCH_UP):
            while True:
                moved = self._reader.moved
                if not self._is_at_server():
                    with move_on_after(_LOOK):
                        await moved.wait()
                elif await self._read_on():
                    return
        logger.warning(
            "this peer's inbox isn't read to its end%s: requests whose replies are there may be "
            "sent again",
            ""
            if self._is_at_server()
            else ", but on another server than the one that is written to",
        )

    def _is_at_server(self) -> bool:
        """Whether the inbox is read there, as far as the server tells."""
        current, reading = self.identity.current, self._reader.server
        return current == reading or current is None or reading is None

    def _still_open(self, requests: Sequence[_Accepted]) -> list[Envelope]:
        """Return those that still wait for a reply, and that nobody has written once more."""
        return [one for one, _ in self._waiting(requests)]

    def _waiting(self, requests: Sequence[_Accepted]) -> list[_Accepted]:
        waiting = {id(one) for one in self._inbound.waiting()}
        return [one for one in requests if id(one[0]) in waiting and one[0].token == one[1]]


def _was_accepted(request: Envelope, kept: Collection[int]) -> bool:
    """Whether Redis is known to have taken a request, into the stream or another peer's inbox."""
    if request.token is None:
        return request.recipient is not None and id(request) not in kept
    return isinstance(request.token, bytes) and bool(request.token)
