"""What a transport writes: requests, replies with acknowledgements, controls.

Each write is kept until Redis has taken or refused it; what it refuses for now is written again.
When the connection is lost in between, nobody knows which of them arrived. On the next connection a
request to the stream is looked up before it is written again; what goes to an inbox or the control
stream has a number, by which its reader recognizes what it has read already; and an acknowledgement
may be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import Any

from anyio import Event
from msgspec import UNSET

from ..._exceptions import DeliveryError, OverloadedError, RPCTimeoutError
from ..._runtime._fresh import fresh_copy
from ..._runtime._log import quoted
from ..._wire_errors import library_error
from ...abc import Envelope
from ...records import Cancel, Reply, Request
from .._connection._errors import Meaning, RedisError, meaning_of, named, no_memory, reason
from .._connection._patience import Patience
from .._connection._resp import Connection
from .._stream._entries import order
from ..dialects.native import NativeDialect
from ._commands import Commands
from ._kinds import is_control, lost_request, note_unsent
from ._ledger import Post
from ._lookup import Lookup
from ._outgoing import Outgoing

logger = logging.getLogger("anyio_kkrpc")

# How far, in seconds, a lookup goes back behind the moment of writing: clocks aren't exact.
_MARGIN = 2.0


class Writer:
    """Writes to the connection that it is attached to. `run` must run beside it.

    :param commands: makes what is written
    :param native: reads what is looked up
    :param returned: told of envelopes that could not be delivered
    :param patience: with what Redis refuses
    :param given_up: told of entries of the group, with the number of their deliveries, that can't
        be answered from here: somebody else is to have them
    :param failed: told of an error that makes it of no use
    :param chance: seconds in which peers make inboxes again that Redis has lost
    :param replicas: how many are to have what `send_and_confirm` writes
    :param absent: told of a peer that has no inbox
    :ivar commands: the same
    :ivar undelivered: what waits for inboxes that are gone; its `run` must run, too
    :ivar waiting: has who writes wait
    :ivar undeliverable: records that Redis refused, or whose recipient was gone
    """

    def __init__(
        self,
        commands: Commands,
        native: NativeDialect,
        *,
        returned: Callable[[Envelope], object],
        patience: Patience,
        given_up: Callable[[bytes, int], object],
        failed: Callable[[Exception], object],
        chance: float = 60.0,
        replicas: int = 0,
        absent: Callable[[str, Exception], object] = lambda peer, error: None,
    ) -> None:
        self.commands = commands
        self._lookup = Lookup(commands.keys.stream, native)
        self._returned = returned
        self._absent = absent
        outgoing = self._outgoing = Outgoing(
            commands,
            patience,
            finished=self._finish,
            too_late=self._is_too_late,
            given_up=given_up,
            failed=failed,
            chance=chance,
            replicas=replicas,
        )
        self.undelivered, self.waiting = outgoing.undelivered, outgoing.waiting
        # Asked for each message, and so without a detour.
        self._make, self._post = commands.make, outgoing.post
        self.flush_nowait, self.expect_more = outgoing.flush_nowait, outgoing.expect_more
        self.run, self.detach = outgoing.run, outgoing.detach
        self.will_acknowledge = outgoing.will_acknowledge
        self._reason: Exception | None = None
        # Which requests were written once more, since another server had lost them.
        self._repeated: set[str] = set()
        # Whether another server answers, since something was written whose outcome isn't known.
        self._elsewhere = False
        # The greatest of the last connections' clock offsets, for the same time.
        self._offset = -inf
        # Whether Redis doesn't tell who has a request.
        self._blind = False
        self.undeliverable = 0

    @property
    def unanswered(self) -> Mapping[bytes, int]:
        """Entries of the group whose reply waits or is repeated, with how often they came."""
        return self._outgoing.acks.unanswered

    def unfinished(self) -> list[bytes]:
        """Return the entries of the group that this worker holds until they are acknowledged, those
        whose acknowledgement is on its way among them: it may be lost with its connection.
        """
        acks, written = self._outgoing.acks, self._outgoing.ledger.written
        leaving = [entry for post in written if post.ids is not None for entry in post.ids]
        return [*acks.unanswered, *acks.settled, *leaving]

    def answering(self) -> list[tuple[str | None, str | None]]:
        """Return the requests that are answered by what waits: whose each is, and its id."""
        return [
            (post.envelope.recipient, post.envelope.record.id)
            for post in self._outgoing.ledger.waiting()
            if post.envelope is not None and isinstance(post.envelope.record, Reply)
        ]

    def kept(self) -> list[Envelope]:
        """Return what waits to be written or looked for."""
        posts = (*self._outgoing.ledger.waiting(), *self.undelivered)
        return [post.envelope for post in posts if post.envelope is not None]

    # Writing

    async def send(self, envelope: Envelope) -> None:
        """Write a record that isn't a reply to an entry of a group."""
        post = self.send_nowait(envelope)
        if post is not None:
            await self.wait_flushed(post, envelope.deadline)

    def send_nowait(self, envelope: Envelope) -> Post | None:
        """Write a record; return what `wait_flushed` is to be given, ``None`` if it need not be.

        :raises OverloadedError: for a request while Redis is known to take none
        """
        post = self._make(envelope)
        if envelope.record.__class__ is Cancel:
            if post is not None:
                self._outgoing.cancels.remember(envelope)
            elif envelope.recipient is None:
                self._outgoing.cancels.add(envelope)
        if post is None:
            return None
        self._post(post)
        return None if self.flush_nowait() else post

    async def send_and_confirm(self, envelope: Envelope) -> None:
        """Write a record, and wait until Redis has it, a request also until enough replicas have.
        If that is cancelled before it was begun to be written, it won't be; if it only lacked
        replicas, the envelope has the error that says so.

        :raises DeliveryError: if it doesn't take it, or the recipient isn't there
        :raises OverloadedError: if Redis takes no requests now
        """
        post = self._make(envelope)
        if post is None:
            return
        post.event = Event()
        self._post(post)
        confirmations = self._outgoing.confirmations
        confirmations.expect()
        try:
            await self.flush()
            await post.event.wait()
        except BaseException:
            envelope.error = confirmations.error(post)  # for who has no more time
            confirmations.forget(post)
            self._outgoing.withdraw(post)
            raise
        error = self._error(post)
        if error is not None:
            raise error

    async def send_again(self, requests: Sequence[Envelope]) -> int:
        """Write requests once more, in their order, that the server has lost; those whose time is
        over are left out. Return how many.
        """
        count = 0
        for request in requests:
            record, deadline = request.record, request.deadline
            assert isinstance(record, Request)
            if deadline is not None:
                left = int((deadline - self._outgoing.now()) * 1000)
                if left <= 0:
                    continue  # its caller knows
                if record.d is not UNSET:
                    record.d = left
            try:
                self._post(self.commands.repeat(request))
            except Exception as exc:  # no memory for requests, or arguments that were changed since
                self._give_back(request, lost_request(exc))
                continue
            self._repeated.add(record.id)
            count += 1
        await self.flush()
        return count

    def forget_repeated(self, but: Collection[str]) -> None:
        """Forget which requests were written once more, except for some."""
        self._repeated.intersection_update(but)

    def settle(self, entry_id: bytes, reply: Envelope | None, attempt: int = 1) -> Post | None:
        """Queue the acknowledgement of an entry of the group behind its reply, for one write.

        :param attempt: how often the entry was delivered
        :return: the reply's post, for `wait_flushed`
        """
        post = None if reply is None else self._make(reply, entry_id, attempt)
        if post is None:
            self._outgoing.acks.settled[entry_id] = None
            self._outgoing.acknowledge()
        else:
            self._post(post)  # the write that takes it asks for the acknowledgement, too
        return post

    def forward(self, entry_id: bytes, attempt: int, recipient: str, fields: list[bytes]) -> None:
        """Queue an entry of the group for the inbox of the peer that it is for, if there is one."""
        self._post(self.commands.forward(entry_id, attempt, recipient, fields))

    async def flush(self) -> None:
        """Write what is queued. While nothing can be written, wait only if much is queued."""
        if not self.flush_nowait():
            await self.wait_flushed()

    async def wait_flushed(self, post: Post | None = None, deadline: float | None = None) -> None:
        """Wait for what `flush_nowait` has left.

        :param post: what isn't worth being written after the deadline
        :param deadline: when to wait no longer, on AnyIO's clock
        """
        if deadline is not None and post is not None and post.envelope is not None:
            post.envelope.deadline = deadline
        in_time = await self._outgoing.wait_room(deadline)
        if not in_time and post is not None and self._outgoing.withdraw(post):
            envelope = post.envelope
            # Who waits for a request knows the time by itself.
            if envelope is None or envelope.record.__class__ is not Request:
                self._expire(post)
        if self._reason is not None:
            raise fresh_copy(self._reason)

    # Outcomes

    def _finish(self, post: Post) -> None:
        """Tell who is concerned that a post was answered, and not as most are."""
        result, envelope = post.result, post.envelope
        self._outgoing.cancels.leave(post)
        if post.cancels is not None:
            self._cancel(post.cancels, result)
            return
        if isinstance(result, Exception) and meaning_of(result) is not Meaning.FULL:
            name = b"XADD" if post.ids is None else b"XACK"
            post.result = result = named(result, (name, self.commands.key_of(post)))
            if post.answers is not None:
                self._replace(post, post.answers, result)
                return
        error = self._error(post)
        if post.event is not None:
            post.event.set()
        elif post.forwarded_to is not None:
            self.undeliverable += 1
            logger.info("an entry for %s could not be delivered", quoted(post.forwarded_to))
        elif envelope is None or is_control(envelope.record):
            if error is not None:
                logger.warning("Redis refused an acknowledgement or a control: %s", error)
        elif error is not None:
            if result is None:
                self._absent(str(envelope.recipient), error)
            self._give_back(envelope, error)

    def _cancel(self, cancels: Sequence[Cancel], holders: Any) -> None:
        """Send cancels to the sessions that have the requests; an empty one stands for all."""
        if isinstance(holders, list) and len(holders) == len(cancels):
            self._blind = False
        else:
            if not self._blind:
                why = reason(holders) if isinstance(holders, Exception) else quoted(holders)
                logger.warning("cancels go to all peers: Redis doesn't tell who runs what: %s", why)
            holders, self._blind = [[b""]] * len(cancels), True
        for cancel, sessions in zip(cancels, holders, strict=True):
            if cancel.id in self._repeated:
                sessions = [b""]  # who had it before the server lost it runs it still
            for session in set(sessions):
                envelope = Envelope(cancel, None, session.decode(errors="replace") or None)
                post = self._make(envelope) if session else self.commands.make_control(envelope)
                if post is not None:
                    self._post(post)
        self._outgoing.stir()

    def _error(self, post: Post) -> Exception | None:
        """Return the error for a post that was answered, if it was in vain."""
        result, envelope = post.result, post.envelope
        if isinstance(result, Exception):
            if meaning_of(result) is Meaning.FULL:
                repeated = envelope is not None and envelope.attempt > 1
                return lost_request(result) if repeated else no_memory(result)
            return refusal(result)
        if result is None and envelope is not None:
            return DeliveryError(f"peer {envelope.recipient!r} is not there: it has no inbox")
        if post.to_stream and isinstance(result, int):
            return OverloadedError(f"max_backlog is reached: {result} requests wait for the group")
        return None

    def _replace(self, post: Post, entry_id: bytes, exc: Exception) -> None:
        """Answer with a small error where Redis takes no reply; if that is in vain too, give up."""
        logger.warning("Redis refused a reply, and its request stays unacknowledged: %s", exc)
        self.undeliverable += 1
        envelope = post.envelope
        if (
            envelope is not None
            and envelope.error is None
            and isinstance(envelope.record, Reply)
            and meaning_of(exc) is not Meaning.RIGHTS
        ):
            error = DeliveryError(f"Redis refused the reply: {quoted(exc)}")
            reply = Reply(envelope.record.id, e=library_error(error))
            answer = Envelope(reply, None, envelope.recipient, error=error)
            small = self._make(answer, entry_id, post.attempt)
            if small is not None:
                self._post(small)
                return
        self._outgoing.acks.abandon(entry_id)

    def _give_back(self, envelope: Envelope, error: Exception) -> None:
        self.undeliverable += 1
        self._returned(Envelope(envelope.record, None, envelope.recipient, error=error))

    def _is_too_late(self, post: Post) -> bool:
        """Whether nobody waits for what waited; if not, a request's budget is made right."""
        envelope = post.envelope
        if envelope is None or envelope.deadline is None or post.unknown:
            return False
        left = int((envelope.deadline - self._outgoing.now()) * 1000)
        if left <= 0:
            self._expire(post)
            return True
        record = envelope.record
        if isinstance(record, Request) and record.d is not UNSET:
            self.commands.renew(post, left)
        return False

    def _expire(self, post: Post) -> None:
        """Let go of what nobody waits for any more. An entry that it answers is done with."""
        if post.answers is not None:
            self._outgoing.acks.answer(post.answers)
            self._outgoing.stir()
        error = RPCTimeoutError("its caller's time ran out before it could be sent")
        if post.event is not None:
            post.result = error
            post.event.set()
        elif post.envelope is not None:
            self._give_back(post.envelope, error)

    # Connections

    def meet_another(self, *, sure: bool = True) -> None:
        """Note that another server answers than before: it may have lost what this peer wrote.

        :param sure: whether it is known to be another one
        """
        outgoing, self._elsewhere = self._outgoing, True
        if sure:
            outgoing.cancels.repeat()
        self._lookup.begin_anew()
        replies = outgoing.acks.doubt()
        for post in replies:
            self.commands.alone(post)
        outgoing.ledger.repeat(replies)

    async def attach(self, connection: Connection, clock_offset: float) -> None:
        """Write to this connection from now on; first what is still open from the last one.

        :param clock_offset: AnyIO's clock less Redis', in seconds
        """
        # Each server's own clock is in the ids of what was written there.
        self._offset = max(self._offset, clock_offset)
        outgoing = self._outgoing
        if self._elsewhere and outgoing.last_added:
            # It may have lost its last entries, and its clock may be behind.
            end = await self._lookup.last_id(connection)
            outgoing.last_added = min(outgoing.last_added, end, key=order)
        await self._look_up(connection)
        self._offset, self._elsewhere = clock_offset, False
        outgoing.attach(connection)

    async def _look_up(self, connection: Connection) -> None:
        """Take those of unknown outcome that are in the stream already."""
        outgoing = self._outgoing
        unknown = [post for post in outgoing.ledger.waiting() if post.unknown and post.to_stream]
        if not unknown:
            return
        first = min(post.written_at for post in unknown if post.written_at is not None)
        start = b"%d" % max(int((first - self._offset - _MARGIN) * 1000), 0)
        # What replicas haven't confirmed may be there, before what is known to be; so may replies.
        unsure = any(post.entry_id or post.answers for post in unknown)
        last_added = b"" if unsure else outgoing.last_added
        found = await self._lookup.find(connection, unknown, start, last_added)
        outgoing.ledger.remove(post for post, _ in found)
        for post in unknown:
            post.unknown = False
            if self._elsewhere and post.waits:
                # A worker may have read it from the server before.
                outgoing.ledger.rewrite(post, self.commands.mark_repeated)
                if post.envelope is not None and isinstance(post.envelope.record, Request):
                    self._repeated.add(post.envelope.record.id)
        for post, entry_id in found:
            if post.event is not None:
                post.entry_id = entry_id
                outgoing.confirmations.take(post, entry_id)
            elif post.envelope is not None and isinstance(post.envelope.record, Request):
                outgoing.cancels.place(post, entry_id)
            if post.answers is not None:
                outgoing.acks.answer(post.answers, post)

    def end(self, reason: Exception) -> None:
        """Fail what is open: there will be no connection any more."""
        self._reason, posts = reason, self._outgoing.end()
        for post in posts:
            if post.event is not None:
                post.result = reason
                post.event.set()
        self.undeliverable += note_unsent(posts, self._outgoing.ledger.written)


def refusal(exc: Exception) -> Exception:
    """Return the error for an entry that Redis did not take."""
    if not isinstance(exc, RedisError):
        return exc
    error = DeliveryError(f"Redis refused the message: {quoted(exc)}")
    error.__cause__ = exc
    return error
