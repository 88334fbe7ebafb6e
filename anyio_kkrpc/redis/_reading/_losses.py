"""What becomes of those who waited for what was in this peer's inbox, once that is gone.

An outage, after which all peers connect again, and an inbox that was deleted while its owner was
connected are told apart. After an outage other peers keep what finds no inbox, and nearly all that
had been in it was read before. Where only the inbox is gone, what was on its way is lost.

Whose reply is lost is told at once. In a group Redis knows of each request whether it was answered;
where it doesn't know, all are told who may have lost something. When another server answers than
before, one that isn't there may have been lost before it was answered: it is sent again then.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from anyio import current_time, move_on_after, sleep

from ..._exceptions import DeliveryError, TransportClosedError, TransportConnectionError
from ..._runtime._bell import Bell
from ...abc import Envelope
from ...kit._inbound import Inbound
from .._connection._command import Execute
from .._connection._errors import RedisError, reason
from .._connection._link import Link
from .._stream._entries import order
from .._stream._scripts import BEFORE, BY_NAME
from ._by_id import select_ids
from ._reader import Reader, last_id
from ._repeats import PATIENCE, Repeats

__all__ = ("Losses",)

logger = logging.getLogger("anyio_kkrpc")

# Returns those of some requests that the group, or each group there is, has taken and acknowledged;
# with a minus those that aren't in the stream, so that it may never have had them. What isn't in a
# stream from which nothing was ever deleted was in another one: it may still run.
_ANSWERED = (
    BEFORE
    + BY_NAME
    + b"""
local groups, whole = {}, false
if redis.call('EXISTS', KEYS[1]) == 1 then
  local stream = by_name(redis.call('XINFO', 'STREAM', KEYS[1]))
  whole = stream['entries-added'] == stream['length']
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = by_name(flat)
    if ARGV[1] == '' or group['name'] == ARGV[1] then groups[#groups + 1] = group end
  end
end
local answered = {}
if ARGV[1] ~= '' and #groups == 0 then return answered end
for i = 2, #ARGV do
  local id, open = ARGV[i], false
  for _, group in ipairs(groups) do
    if before(group['last-delivered-id'], id)
      or #redis.call('XPENDING', KEYS[1], group['name'], id, id, 1) > 0 then
      open = true
      break
    end
  end
  local there = open or #redis.call('XRANGE', KEYS[1], id, id) > 0
  if not there and ARGV[1] ~= '' and whole then open = true end
  if not open then answered[#answered + 1] = there and id or '-' .. id end
end
return answered
"""
)
# Seconds after which an inbox that somebody waits for, and that nothing came into, is looked for.
_LOOK = 2.0
# Looks whether the new inbox was read, while it is waited for that.
_LOOKS = 1000
# Seconds from one question to the next about what was pending when an inbox was gone: a reply that
# found none is given up, and its request may be acknowledged only after the question.
_AGAIN = (2.0, 10.0, 60.0)
_STREAM = "the inbox of this peer was deleted from Redis, and what was in it is lost"
# A request, and its place in the stream as it was.
_Sent: TypeAlias = tuple[Envelope, Any]
_CALL = f"{_STREAM}: the reply may be part of it"


class Losses:
    """Sees to what is lost with an inbox. `run` must run beside it.

    :param stream: key of the stream
    :param group: the group that this peer's requests are for, ``None`` in a broadcast
    :param inbox: key of this peer's inbox
    :param inbound: has the listener
    :param repeats: knows what came before
    :param link: the connection that this peer writes on
    :param reader: reads the inbox
    :param told: are told, on AnyIO's clock, when other inboxes may be gone, too
    :param sent_again: whether a request is, or will be, if the server lacks it
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        stream: bytes,
        group: bytes | None,
        inbox: bytes,
        inbound: Inbound,
        repeats: Repeats,
        link: Link,
        reader: Reader,
        told: Sequence[Callable[[float], object]],
        sent_again: Callable[[Envelope], bool],
    ) -> None:
        self._stream = stream
        self._group = group
        self._inbox = inbox
        self._inbound = inbound
        self._repeats = repeats
        self._link = link
        self._positions = reader.positions
        self._told = told
        self._sent_again = sent_again
        self._sudden = self._complained = False
        # Whether the server that answers now is known to have had the inbox.
        self._restored = True
        self.bell = Bell()

    def connecting(self) -> None:
        """Note that a connection is new: what is missing there needn't have been deleted."""
        self._restored = False

    def restored(self) -> None:
        """Note that the inbox is there."""
        self._restored = True

    def lost(self, made: bytes) -> None:
        """Note that the inbox was gone, with what was in it, and was made again.

        :param made: the id since which it is there
        """
        self._repeats.lose()
        for tell in self._told:
            tell(current_time())
        position = self._position
        if position is not None:
            # What was written by a server whose clock is behind comes before what was read.
            behind = order(made) < order(position)
            self._positions[self._inbox] = b"0-0" if behind else made
        # While the connection is made again, `connection` is None.
        deleted = self._restored and self._link.connection is not None
        self._sudden = self._sudden or deleted
        self.bell.set()

    async def look(self, keep: Callable[[Execute], Awaitable[object]]) -> None:
        """Look for the inbox, sooner than housekeeping does, as long as somebody waits for it.

        :param keep: `Inbox.keep`
        """
        position = None
        while True:
            await sleep(_LOOK)
            before, position = position, self._position
            if position == before and self._inbound.expects():
                try:
                    await keep(self._link.request)
                    self.restored()
                except RedisError as exc:
                    logger.debug("looking for the inbox: %s", exc)  # housekeeping says it

    async def run(self) -> None:
        """Tell those who wait in vain."""
        while True:
            await self.bell.wait()
            self.bell.clear()
            sudden, self._sudden = self._sudden, False
            if sudden:
                self._inbound.lose(DeliveryError(_STREAM))
            pending = await self._tell_callers(sudden)
            if sudden:
                await self._ask_again(pending)

    async def _ask_again(self, pending: Sequence[_Sent]) -> None:
        """Ask about what was pending until it is known; another loss asks about all there is."""
        for pause in _AGAIN:
            with move_on_after(pause):
                await self.bell.wait()
            waiting = {id(one): one.token for one in self._inbound.waiting()}
            pending = [sent for sent in pending if waiting.get(id(sent[0])) is sent[1]]
            if not pending or self.bell.is_set():
                return
            answered, missing = await self._find_answered(pending)
            lost, pending = _split(pending, answered | missing)
            await self._lose(lost, missing)

    async def _tell_callers(self, sudden: bool) -> Sequence[_Sent]:
        """Tell those whose reply is lost; return what nobody has answered."""
        waiting = self._inbound.waiting()
        # Those without an id were not in the stream yet.
        sent = [(one, one.token) for one in waiting if one.recipient is None and _is_id(one.token)]
        lost: list[_Sent] = []
        if sudden:
            lost = [(one, one.token) for one in waiting if one.recipient is not None]
        missing: set[object] = set()
        if sudden or self._group is not None:
            answered, missing = await self._find_answered(sent)
            known, sent = _split(sent, answered | missing)
            lost += known
        await self._lose(lost, missing)
        return sent

    async def _lose(self, lost: Sequence[_Sent], missing: set[object]) -> None:
        """Tell those that their reply is lost, unless it is in the inbox as it is now."""
        if not lost:
            return
        await self.read_on()
        still = {id(one) for one in self._inbound.waiting()}
        for one, token in lost:
            # Meanwhile it may have been sent again, or be about to.
            gone = one.token is not token or (token in missing and self._sent_again(one))
            if id(one) in still and not gone:
                error = DeliveryError(_CALL)
                back = Envelope(
                    one.record, None, one.recipient, error=error, token=token or b"sent"
                )
                self._inbound.deliver(back)

    async def _find_answered(self, sent: Sequence[_Sent]) -> tuple[set[object], set[object]]:
        """Return the ids of those that nobody will answer any more, and of those of them that the
        stream lacks; all, if that can't be found.
        """
        ids = [(token,) for _, token in sent]
        group = self._group or b""
        try:
            found = await select_ids(self._link, _ANSWERED, self._stream, group, ids)
        except RedisError as exc:
            if not self._complained:
                self._complained = True
                logger.warning("which replies were lost can't be found: %s", reason(exc))
            return {token for _, token in sent}, set()
        missing = {one[1:] for one in found if one.startswith(b"-")}
        return {one for one in found if not one.startswith(b"-")}, {*missing}

    async def read_on(self) -> bool:
        """Wait until what is in the inbox now was read: replies may be among it.

        :return: false if it took too long, or the connection was lost; true also if nothing tells
        """
        try:
            end = await last_id(self._link.ask, self._inbox)
        except RedisError:
            return True
        except (TransportConnectionError, TransportClosedError):
            if self._link.ended:
                raise
            return False
        for _ in range(_LOOKS):
            if self._has_read(end):
                return True
            await sleep(2 * PATIENCE / _LOOKS)
        return False

    @property
    def _position(self) -> bytes | None:
        return self._positions.get(self._inbox)

    def _has_read(self, end: bytes) -> bool:
        position = self._position
        if position is None:
            return True
        return order(position) >= order(end) and not self._repeats.disorder


def _is_id(token: object) -> bool:
    """Whether a request is known to be in the stream."""
    return isinstance(token, bytes) and bool(token)


def _split(sent: Sequence[_Sent], known: set[object]) -> tuple[list[_Sent], list[_Sent]]:
    """Return those requests whose ids are known to be lost, and the others."""
    return [one for one in sent if one[1] in known], [one for one in sent if one[1] not in known]
