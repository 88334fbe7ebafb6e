"""Whether the peers at the other ends of streams are still there.

Who has the source of a stream says so in a key of its own, `SignOfLife`, which is gone some time
after its owner. Who reads is there as long as its inbox is. Nothing is written or asked by those
who have no stream open. What is missing isn't taken for gone before it was looked for twice, and
not soon after a server was away or has lost its data: the others have to come back, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from anyio import Event, current_time, move_on_after
from msgspec import Struct

from ..._exceptions import DeliveryError, RPCError, TransportClosedError, TransportConnectionError
from ..._runtime._bell import Bell
from ...abc import Role
from .._connection._command import Argument, Execute
from .._connection._command import pack as pack_command
from .._connection._errors import RedisError, leads_elsewhere
from .._connection._link import Link
from .._connection._patience import Outages
from .._stream._clock import ServerClock
from .._stream._entries import order
from .._stream._keys import Keys
from .._stream._scripts import add_briefly
from ._reader import last_id

# Seconds until the first look for a peer, between two looks, and until what is missing is looked
# for once more.
_FIRST_LOOK = 0.1
_LOOK = 1.0
_AGAIN = 0.2
# Seconds behind the end of a key at which to look whether it has come.
_MARGIN = 0.05
# Seconds that peers have at least, to come back to a server that was away.
_COMING_BACK = 2.0
# Keys that one command looks for.
_CHUNK = 250
# What Redis may refuse, in words.
_PART = "looking for the peers of streams"
_LOST = (TransportConnectionError, TransportClosedError)


class SignOfLife:
    """The key that says that a peer is there, kept as long as there is somebody who may look.

    :param key: its name
    :param ttl: seconds after which it is gone unless it is kept
    """

    def __init__(self, key: bytes, ttl: float, link: Link, outages: Outages) -> None:
        ttl_ms = b"%d" % max(round(ttl * 1000), 1)
        entry = (b"MAXLEN", b"1", b"*", b"alive", ttl_ms)
        self._key = key
        self._command = add_briefly(key, ttl_ms, *entry)
        self._packed = pack_command(self._command)
        self._each = ttl / 3
        self._link = link
        self._outages = outages
        self._kept_at = -inf
        self._written = self._left = False
        self._wanted = False

    @property
    def due(self) -> float:
        """When it is to be kept again, on AnyIO's clock."""
        return self._kept_at + self._each if self._wanted and not self._left else inf

    def give(self) -> None:
        """Keep it, from now on: it is written before whatever is written next."""
        self._wanted = True
        now, connection = current_time(), self._link.connection
        if now < self.due or connection is None or connection.error is not None:
            return
        connection.post(self._packed, 1, self._on_answer)
        self._note(now)

    def stop(self) -> None:
        """Keep it no more: nobody looks."""
        self._wanted = False

    async def keep(self, execute: Execute) -> None:
        """Write it again if that is due.

        :param execute: sends a command
        """
        now = current_time()
        if now < self.due:
            return
        self._note(now)
        try:
            self._on_answer(await execute(*self._command))
        except RedisError as exc:
            if leads_elsewhere(exc):
                raise
            self._on_answer(exc)

    def lose(self) -> None:
        """Note that it may be gone: the server was away, or has lost its data."""
        self._kept_at = -inf

    async def remove(self) -> None:
        """Remove it: this peer leaves."""
        self._left = True
        if self._written:
            await self._link.request(b"DEL", self._key)

    def _note(self, now: float) -> None:
        self._kept_at = now
        self._written = True

    def _on_answer(self, answer: Any) -> None:
        if not isinstance(answer, Exception):
            self._outages.end("the sign of life")
        elif not isinstance(answer, _LOST):
            self._outages.leave_out("the sign of life", answer)


class _Source(Struct):
    """What is known of a peer whose stream is read here.

    :ivar due: when to look for its sign of life
    :ivar ttl: seconds for which that lives; 0 if it was never seen: an older peer has none
    :ivar missed: whether it was missing at the last look
    """

    due: float
    ttl: float = 0.0
    missed: bool = False


class Presence:
    """Looks after the peers that the streams of this one need. `run` must run beside it.

    :param session_id: of this peer
    :param times: seconds for which its sign of life lives; and for which those whose inboxes are
        gone with the server's data have the chance to make them again
    :param gone: told of a peer that is gone, as what, and the error for those who need it
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        keys: Keys,
        session_id: str,
        times: tuple[float, float],
        link: Link,
        clock: ServerClock,
        outages: Outages,
        gone: Callable[[str, Role, Exception], object],
    ) -> None:
        self._keys = keys
        self._own_inbox = keys.inbox(session_id)
        ttl, self._chance = times
        self._link = link
        self._redis_now = clock.now
        self._outages = outages
        self._positions: Mapping[bytes, bytes] = {}
        self._gone = gone
        self.sign = SignOfLife(keys.alive(session_id), ttl, link, outages)
        self._sources: dict[str, _Source] = {}
        self._readers: dict[str | None, None] = {}
        self._missed: set[str] = set()  # whose inbox was missing at the last look
        self._inboxes_due = 0.0
        self._lost_at = -inf
        self.bell = Bell()

    # What is needed

    def watch(self, peer: str | None, role: Role, wanted: bool) -> None:
        """See `Transport.watch`. TypeScript peers have no keys of their own."""
        if peer.__class__ is not str and peer is not None:
            return
        table: dict[Any, Any] = self._sources if role == "source" else self._readers
        if not wanted:
            table.pop(peer, None)
            if not self._readers:
                self.sign.stop()
            return
        if peer is None and role == "source":
            return
        first = current_time() + _FIRST_LOOK
        if not self._sources and not self._readers:
            self._inboxes_due = first
        table[peer] = _Source(first) if role == "source" else None
        if role == "reader":
            self.sign.give()
        self.bell.set()

    def forget(self) -> None:
        """Look after nobody any more."""
        self._sources.clear()
        self._readers.clear()
        self._missed.clear()
        self.sign.stop()

    def lose(self) -> None:
        """Note that the server was away, or has lost its data."""
        self._lost_at = current_time()
        self.sign.lose()
        self.bell.set()

    def tell(self, peer: str, error: Exception) -> None:
        """Tell that a peer is gone, as whatever it is needed."""
        self._missed.discard(peer)
        if self._sources.pop(peer, None) is not None:
            self._gone(peer, "source", error)
        if peer in self._readers:
            del self._readers[peer]
            self._gone(peer, "reader", error)

    # Looking

    async def run(self, positions: Mapping[bytes, bytes]) -> None:
        """Look again and again, as long as there is somebody to look for.

        :param positions: how far keys are read, this peer's inbox among them
        :raises TransportConnectionError: if there will be no connection any more
        """
        self._positions = positions
        while True:
            self.bell.clear()
            with move_on_after(max(self._due() - current_time(), 0.01)):
                await self.bell.wait()
            if self._link.connection is None:
                continue  # `lose` wakes it
            try:
                await self.sign.keep(self._link.attempt)
                await self._look(current_time())
            except (RPCError, RedisError) as exc:
                if self._link.ended:
                    raise
                if not isinstance(exc, _LOST):
                    self._outages.leave_out(_PART, exc)

    def _due(self) -> float:
        due = min((source.due for source in self._sources.values()), default=inf)
        if self._sources or self._readers:
            due = min(due, self._inboxes_due)
        due = min(due, self.sign.due)
        return due if self._link.connection is not None else max(due, current_time() + _LOOK)

    async def _look(self, now: float) -> None:
        sources = [peer for peer, source in self._sources.items() if source.due <= now]
        peers: list[str] = []
        if self._inboxes_due <= now:
            self._inboxes_due = now + _LOOK
            readers = (peer for peer in self._readers if peer is not None)
            peers = list(dict.fromkeys((*self._sources, *readers)))
        if not sources and not peers:
            return
        for peer in sources:
            self._sources[peer].due = now + _LOOK
        alive = self._keys.alive
        signs: list[Any] = [(b"XREVRANGE", alive(p), b"+", b"-", b"COUNT", b"1") for p in sources]
        chunks = [peers[start : start + _CHUNK] for start in range(0, len(peers), _CHUNK)]
        found = await self._ask([*signs, *map(self._exist, chunks)])
        if found is None:
            return
        gone = [
            (peer, f"it has not been heard of for {self._sources[peer].ttl:g} s")
            for peer, reply in zip(sources, found, strict=False)
            if self._has_gone(peer, reply, now)
        ]
        counts = found[len(sources) :]
        missing = [
            peer
            for chunk, count in zip(chunks, counts, strict=True)
            if count.__class__ is int and count < len(chunk)
            for peer in chunk
        ]
        if peers:
            gone += [(peer, "its inbox is") for peer in await self._without_inbox(missing, now)]
        if gone and await self._all_read():
            for peer, why in gone:
                self.tell(peer, DeliveryError(f"peer {peer!r} is gone: {why}"))

    def _has_gone(self, peer: str, reply: Any, now: float) -> bool:
        """Take what was found of a sign of life; return whether its peer is gone."""
        source = self._sources.get(peer)
        if source is None:
            return False  # not needed any more
        try:
            if isinstance(reply, Exception):
                raise reply
            for entry_id, fields in reply:
                source.ttl, source.missed = int(fields[1]) / 1000, False
                end = int(entry_id.partition(b"-")[0]) / 1000 + source.ttl - self._redis_now()
                source.due = now + min(max(end, 0.0) + _MARGIN, _LOOK)
                return False
        except (RedisError, ArithmeticError, ValueError, TypeError, IndexError) as exc:
            self._outages.leave_out(_PART, exc)
            return False
        if not source.ttl or now < self._lost_at + max(source.ttl, _COMING_BACK):
            return False
        missed, source.missed = source.missed, True
        source.due = now + _AGAIN
        return missed

    async def _all_read(self) -> bool:
        """Whether nothing waits in this peer's inbox: the end of a stream might."""
        last = await last_id(self._link.ask, self._own_inbox)
        return order(last) <= order(self._positions[self._own_inbox])

    async def _without_inbox(self, peers: list[str], now: float) -> list[str]:
        """Return those of some peers whose inbox is missing not for the first time."""
        missing: set[str] = set()
        if peers:
            found = await self._ask([self._exist([peer]) for peer in peers])
            if found is not None and now >= self._lost_at + self._chance:
                missing = {peer for peer, count in zip(peers, found, strict=True) if count == 0}
        again = missing & self._missed
        self._missed = missing
        if missing:
            self._inboxes_due = now + _AGAIN
        return [peer for peer in peers if peer in again]

    def _exist(self, peers: list[str]) -> tuple[Argument, ...]:
        return (b"EXISTS", *map(self._keys.inbox, peers))

    async def _ask(self, commands: list[tuple[Argument, ...]]) -> list[Any] | None:
        """Send commands in one write; return their replies, errors of Redis among them.

        :return: ``None`` if the server can't be asked now, or has lost its data
        """
        connection = self._link.connection
        if connection is None or connection.error is not None:
            return None
        replies: list[Any] = []
        answered = Event()
        # The own inbox is looked for last: what was lost before that is missing, too.
        commands = [*commands, (b"EXISTS", self._own_inbox)]

        def take(reply: Any) -> None:
            replies.append(reply)
            if len(replies) == len(commands):
                answered.set()

        connection.post(b"".join(map(pack_command, commands)), len(commands), take)
        await connection.flush()
        await answered.wait()
        if any(isinstance(reply, _LOST) for reply in replies):
            return None
        if replies.pop() == 0:
            self.lose()
            return None
        return replies
