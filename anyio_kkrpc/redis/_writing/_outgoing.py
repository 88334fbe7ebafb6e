"""Posts on their way: over one connection after the other, and again where Redis refused them.

A connection is given no more than it has room for; the rest waits here, where it can still be taken
back. What Redis refuses for a while waits here too, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from anyio import Event, current_time, move_on_after, sleep

from ..._exceptions import TransportClosedError, TransportConnectionError
from ..._runtime._clock import clock
from ...records import Request
from .._connection._errors import Meaning, RedisError, meaning_of, named, no_memory
from .._connection._patience import Patience
from .._connection._resp import Connection
from ._acks import Acknowledgements
from ._again import Again
from ._cancels import Cancels
from ._commands import Commands
from ._confirmations import Confirmations
from ._ledger import Ledger, Phase, Post
from ._numbers import Numbers
from ._packs import Packs
from ._undelivered import Undelivered
from ._waiting import Waiting

__all__ = ("Outgoing",)

# Entries that one script makes pending again.
_CHUNK = 500


class Outgoing:
    """Writes posts to the connection that it is attached to. `run` must run beside it.

    :param commands: makes acknowledgements
    :param patience: with what Redis refuses
    :param finished: told of each post whose answer, in its ``result``, isn't that of most
    :param too_late: whether a post that waited isn't worth being written; it may change it
    :param given_up: told of entries of the group that can't be answered here, and their deliveries
    :param failed: told of an error that makes it of no use
    :param chance: seconds in which peers make inboxes again that Redis has lost
    :param replicas: how many are to have what somebody waits for
    :ivar ledger: its posts
    :ivar acks: what it acknowledges
    :ivar cancels: what it cancels, and which requests can be taken back
    :ivar last_added: id of the last entry of the stream that is known to be this peer's
    :ivar waiting: has who posts wait
    :ivar undelivered: what waits for inboxes
    :ivar confirmations: what waits until replicas have it
    :ivar now: AnyIO's clock
    """

    def __init__(
        self,
        commands: Commands,
        patience: Patience,
        *,
        finished: Callable[[Post], object],
        too_late: Callable[[Post], bool],
        given_up: Callable[[bytes, int], object],
        failed: Callable[[Exception], object],
        chance: float,
        replicas: int,
    ) -> None:
        self._commands = commands
        self._finished, self._too_late = finished, too_late
        self._given_up, self._failed = given_up, failed
        self.ledger = Ledger()
        self._numbers, self.waiting = Numbers(commands, self.ledger), Waiting(self.ledger)
        self.acks = Acknowledgements()
        self.cancels = Cancels(commands, self.withdraw, self.stir, lambda: self.now())
        self.last_added = b""
        self.now: Callable[[], float] = current_time
        self._written, self._unanswered = self.ledger.written, self.acks.unanswered
        self._on_answer = self._take
        self._packs = Packs(commands, self.ledger, self._unanswered, self._take)
        self._connection: Connection | None = None
        self._again, self._acks_refused = Again(patience), False
        self._stirred = Event()
        parts = (commands, self.ledger, self.acks, self._numbers, finished, too_late)
        self.undelivered = Undelivered(*parts, self.stir, chance)
        self._gone = self.undelivered.peers
        self.confirmations = Confirmations(replicas, lambda: self.now(), self.stir)

    # What comes

    def post(self, post: Post) -> None:
        """Write a post with the next flush, or when it may be written.

        :raises OverloadedError: if it is a request, and Redis is known to take none
        """
        connection = self._connection
        if self._gone or post.event is not None:
            self._commands.alone(post)
            if self._gone and self.undelivered.take(post):
                return
        if self.ledger.flowing and connection is not None and connection.error is None:
            answers = post.answers
            if answers is not None:
                if self.acks.careful:
                    self._write_carefully(answers, post)
                else:
                    self.acks.settled[answers] = post
            if post.inbox is not None:
                self._packs.add(post, connection)
                return
            post.written_at = self.now()
            if self._packs.open and not post.to_stream:
                self._packs.seal(connection)
            self._written.append(post)
            connection.post(post.packed, post.replies, self._on_answer)
        else:
            self._hold(post)

    def flush_nowait(self) -> bool:
        """Write what was posted; return whether nothing is to be waited for, by `wait_room`."""
        connection = self._connection
        return self.ledger.flowing and connection is not None and connection.flush_nowait()

    async def wait_room(self, deadline: float | None) -> bool:
        """Wait until those who post may go on; return false if that took too long."""
        connection = self._connection
        if connection is not None:
            if not connection.has_room:
                self.ledger.crowd()
                self._stirred.set()
            else:
                with suppress(TransportConnectionError, TransportClosedError):  # all is kept then
                    await connection.wait_flushed()
        return await self.waiting.wait(deadline)

    def expect_more(self) -> None:
        """Note that several posts will come presently, such as answers to what was read."""
        if self._connection is not None:
            self._connection.expect_more()

    def will_acknowledge(self) -> None:
        """Note that entries of the group will be taken here: writes take acknowledgements along."""
        self.confirmations.take_along(self.acknowledge)

    def acknowledge(self) -> None:
        """Queue the acknowledgement of what was settled, behind the replies."""
        connection = self._connection
        if self._packs.open:
            self._packs.seal(connection)
        if self.acks.settled and connection is not None and connection.error is None:
            if self._acks_refused and self.ledger.phase is Phase.STOPPED:
                return
            if entries := self.acks.take():
                self._write_beside(self._commands.acknowledge(entries), connection)

    def withdraw(self, post: Post) -> bool:
        """Take back what waits here; return false if it was written, or may have been."""
        if not post.waits or post.unknown:
            return self.undelivered.withdraw(post)
        if post.number is None:
            self.ledger.drop(post)
        else:
            small = self._commands.small(post)
            if small is None:
                return False
            self.ledger.replace(post, small)
        self.cancels.forget(post)
        self.cancels.leave(post)
        self.waiting.notify()
        return True

    def stir(self) -> None:
        """Have `run` look what is to be done."""
        self._stirred.set()

    def _hold(self, post: Post) -> None:
        """Let something wait until it may be written."""
        self._commands.alone(post)
        envelope = post.envelope
        if envelope is not None:
            if isinstance(envelope.record, Request):
                refusal = self._again.refusal
                if refusal is not None and meaning_of(refusal) is Meaning.FULL:
                    self._commands.take_back(post)
                    self.cancels.leave(post)
                    raise no_memory(refusal)
                self.cancels.let_wait(envelope.record.id, post)
            elif self.cancels.take_back(envelope):
                self._commands.take_back(post)
                return
        if post.answers is not None:
            self.acks.hold(post.answers, post.attempt)
        self.ledger.hold(post)
        self._stirred.set()

    def _write_carefully(self, entry_id: bytes, reply: Post) -> None:
        """Acknowledge an entry only when its reply was taken, unless that is long past."""
        now = self.now()
        if not self._unanswered and now > self.undelivered.until:
            self.acks.be_careful(not self._again.is_long_past(now))
        self.acks.write(entry_id, reply)

    def _write_beside(self, post: Post, connection: Connection) -> None:
        """Write what has no place in the order."""
        self._written.append(post)
        connection.post(post.packed, 1, self._on_answer)

    # What is answered

    def _take(self, answer: Any) -> None:
        """Take Redis' next answer. They come in the order of writing."""
        written = self._written
        if not written:
            return
        post = written[0]
        if answer.__class__ is bytes and post.replies == 1:
            written.popleft()
            if post.to_stream:
                self.last_added = answer
                envelope = post.envelope
                if envelope is not None and envelope.record.__class__ is Request:
                    envelope.token = post.entry_id = answer
                    if post.cancel is not None:
                        self.cancels.place(post, answer)
            if post.event is not None:
                self.confirmations.take(post, answer)
            if self._unanswered and post.answers is not None:
                self.acks.answer(post.answers, post)
                self._stirred.set()
        elif answer.__class__ is int and post.ids is not None:
            self._written.popleft()
            self._take_acknowledgement(post.ids, post.brings_back)
        elif not self._take_other(post, answer):
            return
        if not self.ledger.flowing:
            if self.ledger.done(post):
                self._again.recover(self.now())
            self._stirred.set()

    def _take_acknowledgement(self, entries: Iterable[bytes], brought_back: bool) -> None:
        if brought_back:
            for entry, attempt in self.acks.brought_back(entries):
                self._given_up(entry, attempt)
            return
        if self._acks_refused:
            self._acks_refused = False
            self._again.recover(self.now())
        if self._unanswered and self.acks.acknowledged(entries):
            self._stirred.set()

    def _take_other(self, post: Post, answer: Any) -> bool:
        """Take what isn't the usual answer; return whether the post is done with."""
        if isinstance(answer, (TransportConnectionError, TransportClosedError)):
            return False  # the outcome isn't known; it stays in the ledger
        self._commands.alone(post)
        if not post.left:
            post.left, post.result = post.replies, answer
        post.left -= 1
        if post.left:
            return False
        self._written.popleft()
        if isinstance(post.result, Exception):
            return self._take_refusal(post, post.result)
        if post.result is None and self.undelivered.keep(post, self.now()):
            return True
        self._numbers.leave_out(post)
        self._finished(post)
        if post.answers is not None:
            self.acks.answer(post.answers)
            self._stirred.set()
        return True

    def _take_refusal(self, post: Post, exc: Exception) -> bool:
        """Note that Redis refused something; return whether it is done with."""
        record, meaning = None if post.envelope is None else post.envelope.record, meaning_of(exc)
        request = record.id if isinstance(record, Request) else None
        lost = meaning in (Meaning.REFUSED, Meaning.GONE, Meaning.FINAL)
        if lost or (meaning is Meaning.RIGHTS and post.cancels is not None):
            self._numbers.leave_out(post)
            if post.brings_back:  # there is no group to bring it back to
                self._take_acknowledgement(post.ids or (), brought_back=True)
            self._finish(post)
            return True
        if meaning is Meaning.FULL and request is not None and not post.unknown:
            self._finish(post)
            small = self._commands.small(post)
            if small is None:
                return True
            post, request = small, None
        self._numbers.come_late(post)
        if meaning is Meaning.RIGHTS and post.ids is None:
            may_wait = request is None or post.unknown or bool(self.last_added)
            if self._again.forbid(post, self.now(), may_wait=may_wait):
                self._be_careful(post)
                self._stirred.set()
            else:
                self._numbers.leave_out(post)
                self._finish(post)
            return True
        self._be_careful(post)
        self.ledger.refuse(post)
        self._stirred.set()
        if request is not None:
            self.cancels.let_wait(request, post)
        if meaning is Meaning.RIGHTS or meaning.passes:
            name = b"XADD" if post.ids is None else b"XACK"
            exc = named(exc, (name, self._commands.key_of(post)))
            self._again.refuse(self.now(), self._again.refusal or exc)
        elif self._connection is not None:
            self._connection.break_off(exc)
        return False

    def _finish(self, post: Post) -> None:
        """Let a post fail. What it is the reply to stays unacknowledged."""
        if post.answers is not None:
            self._be_careful(post)
            self._stirred.set()
        self._finished(post)

    def _be_careful(self, post: Post) -> None:
        """Acknowledge nothing that isn't answered, from now on for a while."""
        self.acks.be_careful(True)
        self._again.refuse(self.now())
        if post.answers is not None:
            self.acks.hold(post.answers, post.attempt)
        elif post.ids is not None and not post.brings_back:
            self._acks_refused = True
            self.acks.not_acknowledged(post.ids)

    # What waits

    async def run(self) -> None:
        """Write what waits, and what was refused, when it may be written."""
        while True:
            with move_on_after(min(self._again.next_look, self.confirmations.due) - self.now()):
                await self._stirred.wait()
            self._stirred = Event()
            self.confirmations.look()
            for post in self._again.look(self.now()):
                self.ledger.hold(post)
            for post in self.cancels.posts():
                self.post(post)
            try:
                await self._go_on()
            except (TransportConnectionError, TransportClosedError):
                pass  # `attach` goes on
            except RedisError as exc:
                self._failed(exc)
                return

    async def _go_on(self) -> None:
        connection, ledger = self._connection, self.ledger
        if connection is None or connection.error is not None:
            return
        if ledger.drained:
            # What was acknowledged in vain isn't left so for longer than this took.
            self._bring_back(connection)
            self.acknowledge()
            connection.flush_nowait()
            await sleep(self._again.pause())
            await connection.wait_flushed()
            if not (ledger.drained and self._connection is connection):
                return  # its answer, or the next connection, stirs this
            ledger.probe()
            self._feed(connection)
        if ledger.phase is not Phase.STOPPED:
            self._bring_back(connection)
            self.acknowledge()
        # Also what an answer has called forth, before the one behind it was a refusal.
        connection.flush_nowait()
        while self._connection is connection and ledger.phase is Phase.FEEDING:
            await connection.wait_flushed()
            self._feed(connection)

    def _feed(self, connection: Connection) -> None:
        """Write what waits, as far as it may be and the connection has room."""
        ledger = self.ledger
        self._packs.seal(connection)
        if self._numbers.late:
            self._numbers.raise_late()
        while connection.has_room and connection.error is None:
            post = ledger.next()
            if post is None:
                ledger.flow()
                break
            self.cancels.forget(post)
            cancelled = post.cancel is not None and not post.unknown
            if cancelled or self._too_late(post):
                self.cancels.leave(post)
                small = self._commands.small(post)
                if small is None:
                    continue
                post = small
            self._commands.refresh(post)
            post.written_at = post.written_at or self.now()
            if post.answers is not None:
                self.acks.write(post.answers, post)
            ledger.write(post)
            connection.post(post.packed, post.replies, self._on_answer)
        connection.flush_nowait()
        self.waiting.notify()

    def _bring_back(self, connection: Connection) -> None:
        """Make entries pending again that are acknowledged though their reply was refused."""
        entries = self.acks.to_bring_back()
        if connection.error is None:
            for start in range(0, len(entries), _CHUNK):
                chunk = entries[start : start + _CHUNK]
                self._write_beside(self._commands.bring_back(chunk), connection)

    # Connections

    def attach(self, connection: Connection) -> None:
        """Write to this connection from now on; first what is open from the last one."""
        self.now = clock()
        self.undelivered.connected(self.now())
        self._connection = connection
        self.ledger.open()
        self.confirmations.attach(connection)
        self._bring_back(connection)
        self._feed(connection)  # `run` goes on
        self._stirred.set()

    def detach(self) -> None:
        """Note that the connection was lost: what comes now waits for the next one."""
        self._connection = None
        self.undelivered.disconnected()
        self._again.recover(self.now())
        opened = self._packs.take()
        self.ledger.written.extendleft(reversed(self.confirmations.detach()))
        # What was being brought back is no longer this worker's affair once it is given up.
        once = [post.ids or {} for post in self.ledger.lost(opened) if not post.brings_back]
        waiting = self.ledger.waiting()
        replies = [(post.answers, post.attempt) for post in waiting if post.answers is not None]
        self.acks.lose(once, replies)

    def end(self) -> list[Post]:
        """Let nobody wait any more; return the posts that were open."""
        self._packs.seal(self._connection)  # it leaves with the farewell
        for post in self._packs.take():
            self._hold(post)
        posts = self.ledger.clear() + self.undelivered.clear() + self.confirmations.clear()
        for post in posts:
            self.cancels.leave(post)
            if post.answers is not None and post.waits:
                self.acks.hold(post.answers, post.attempt)
        self.waiting.end()
        return posts
