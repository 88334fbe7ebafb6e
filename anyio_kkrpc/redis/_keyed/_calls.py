"""The caller's side: calls are claimed, waited for, looked at and cancelled.

A claim is one script, which may be repeated: who finds its own claim joins it. What a call came to
is told by a hint in the inbox of who waits; since a hint may be lost, with a worker that is killed
or a server that fails over, each who waits asks again now and then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from math import inf
from typing import Any, Literal

from anyio import CancelScope, current_time
from msgspec.structs import replace

from ..._exceptions import (
    DeliveryError,
    OverloadedError,
    TransportClosedError,
    TransportConnectionError,
)
from ..._runtime._clock import OneShot, clock, one_shots
from ..._runtime._fresh import fresh_copy
from ..._runtime._timer import Timer
from ...abc import CallState, Envelope, KeyedCalls, KeyedRequest
from ...kit._keyed import BRIEFLY, conflict, not_found, too_many_wait, was_cancelled
from ...records import Reply
from .._connection._command import Argument
from .._connection._errors import Meaning, RedisError, meaning_of, no_memory
from .._connection._link import Link
from .._connection._resp import Connection
from .._stream._holders import PREFIX
from .._stream._keys import DELAYED, HANDED_BACK, Keys
from ._claim import Claim, Claims
from ._kept import Kept, Sealer, cancel_word, parse_kept
from ._script import Script, ask_patiently, is_unknown, run_script
from ._scripts import ATTACH, CANCEL_CALL, CHECK, CLAIM_LATER, FORGET, LEAVE_CALL, STATE
from ._telling import Teller
from ._waits import Waiter, Waiting
from ._work import kind_of

__all__ = ("RedisCalls",)

# How often it asks before it looks whether the request is there at all.
_PATIENCE = 3
# Characters of an id that a server takes.
_MAX_ID = 256
_KINDS: dict[bytes, str] = {
    b"z": "delayed",
    b"d": "done",
    b"f": "failed",
    b"e": "failed",
    b"x": "dead",
    b"k": "cancelled",
}


class RedisCalls(KeyedCalls):
    """Implements `KeyedCalls` on one stream.

    :param link: asks
    :param group: the one whose workers run the calls
    :param claims: makes what claims a key
    :param sealer: reads what is kept
    :param teller: tells who waits
    :param report: see `KeyedCalls.report`
    :param stir: has `ask` called soon
    :param refusal: returns the error of this library for what Redis refuses
    :param added: told how many entries are added, if not ``None``
    :ivar waiting: who waits here
    :ivar timer: ends waits; its `run` must run beside
    :ivar lost: calls that had to be made again, since the server had lost them
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        group: bytes,
        session_id: str,
        claims: Claims,
        sealer: Sealer,
        teller: Teller,
        *,
        report: Callable[[Envelope, Any], Awaitable[None]],
        stir: Callable[[], object],
        refusal: Callable[[Exception], Exception],
        added: Callable[[int], object] | None,
    ) -> None:
        self._link = link
        self._keys = keys
        self._group = group
        self._session = session_id.encode()
        self._claims = claims
        self._sealer = sealer
        self._teller = teller
        self._report = report
        self._refusal = refusal
        self._added = added
        self._stir = stir
        self._one_shot: Callable[[], OneShot] | None = None
        self._now: Callable[[], float] = current_time
        self._ask_at = inf
        self.waiting = Waiting()
        self.timer = Timer()
        self.lost = 0

    def end(self, reason: Exception) -> None:
        """Let nobody wait any more."""
        self.waiting.end(reason)

    def ask(self) -> float:
        """Wake those who have waited long enough to ask; return when to do so again."""
        self._ask_at = self.waiting.ask(self._now())
        return self._ask_at

    # See `KeyedCalls`

    async def start(self, call: KeyedRequest) -> None:
        """See `KeyedCalls.start`."""
        await self._claim(call.key, self._claims.make(call, call.key.encode(), waits=False))

    async def call(
        self, call: KeyedRequest, *, cancel_when_left: bool = False, deadline: float | None = None
    ) -> Reply | None:
        """See `KeyedCalls.call`."""
        key = call.key.encode()
        waiter = self._join(key)
        timer = None if deadline is None else self.timer.at(deadline, waiter.wake)
        ended = False
        try:
            claim = self._claims.make(call, key, waits=True)
            to, kept = await self._first_word(waiter, claim)
            if kept is None:
                if deadline is not None and self._now() >= deadline:
                    return None
                # From here on the deadline bounds what asks Redis, too.
                with CancelScope(deadline=inf if deadline is None else deadline):
                    kept = await self._go_on(call, key, waiter, claim, to)
                if kept is None:
                    return None
            ended = True
            return self.value(call.key, key, kept)
        finally:
            if timer is not None:
                self.timer.cancel(timer)
            if self.waiting.leave(key, waiter) and not ended:
                self._leave(key, call.digest.encode(), cancel=cancel_when_left)

    async def wait(self, key: str) -> Reply:
        """See `KeyedCalls.wait`."""
        name = key.encode()
        waiter = self._join(name)
        ended = False
        try:
            known = await self._attach(key, name)
            if known is None:
                ended = True
                raise not_found(key)
            kept = await self._end_of(key, name, waiter, known)
            ended = True
            if kept is None:
                raise not_found(key)
            return self.value(key, name, kept)
        finally:
            if self.waiting.leave(name, waiter) and not ended:
                self._leave(name, b"", cancel=False)

    async def state(self, key: str) -> CallState:
        """See `KeyedCalls.state`."""
        keys = (self._keys.stream, self._keys.call(key.encode()))
        found = await self._run(STATE, keys, self._group)
        if found is None:
            raise not_found(key)
        state, left, *held = found
        expires = left / 1000 if left >= 0 else None
        kind: Any = _KINDS.get(state)
        if state == b"e":
            kind = await self._unkept(key)
        if kind is not None:
            return CallState(kind, expires=expires)
        if not held or held[0] in (HANDED_BACK, DELAYED):
            return CallState("waiting", attempt=held[2] if held else 0)
        worker, idle, attempt = held
        return CallState("running", worker.decode(errors="replace"), idle / 1000, attempt)

    async def cancel(self, key: str) -> bool:
        """See `KeyedCalls.cancel`."""
        name = key.encode()
        while True:
            known = await self.get(name)
            if known is None or known.ended:
                return False
            keys, args = self._cancelling(name, known.entry_id)
            done = await self._run(CANCEL_CALL, keys, *args)
            if done == 1:
                return True
            if done != 0:
                await self._teller.tell(name)
                return True
            # It has just ended, or begun another time.

    async def forget(self, key: str) -> bool:
        """See `KeyedCalls.forget`."""
        keys, name = self._keys, key.encode()
        names = (keys.call(name), keys.waits(name), keys.progress(name), keys.items(name))
        done = await self._run(FORGET, names)
        if done < 0:
            raise ValueError(f"forget: the call with the key {key!r} hasn't ended; cancel it")
        return bool(done)

    async def report(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedCalls.report`."""
        await self._ask(lambda: self._report(envelope, value))

    async def progress(self, key: str) -> tuple[str, Any] | None:
        """See `KeyedCalls.progress`."""
        name = key.encode()
        command = (b"XREVRANGE", self._keys.progress(name), b"+", b"-", b"COUNT", b"1")
        found = await self._ask(lambda: self._link.request(*command))
        if not found:
            if await self.get(name) is None:
                raise not_found(key)
            return None
        position, fields = found[0]
        data = self._sealer.open(self._keys.progress(name), position, bytes(fields[1]))
        return position.decode(), self._sealer.progress_of(data)

    async def metadata(self, key: str) -> Mapping[str, Any]:
        """See `KeyedCalls.metadata`. The request is there until the stream is trimmed."""
        kept = await self.get(key.encode())
        if kept is None:
            return {}
        command = (b"XRANGE", self._keys.stream, kept.entry_id, kept.entry_id)
        found = await self._ask(lambda: self._link.request(*command))
        return self._claims.metadata_of(found[0][1]) if found else {}

    # Claiming

    async def _first_word(
        self, waiter: Waiter, claim: Claim
    ) -> tuple[Connection | None, Kept | None]:
        """Claim, without waiting for the answer: mostly the next that comes is the end.

        :return: to what it was written, and what it came to, unless that is to be asked for
        """
        connection = self._link.connection
        if connection is None or connection.error is not None:
            return None, None
        connection.post(claim.packed(), 1, waiter.take_claim)
        if not connection.flush_nowait():
            return connection, None
        await waiter.word.wait()
        return connection, self._told(waiter)

    def _told(self, waiter: Waiter) -> Kept | None:
        """Return what the first word has told, if that is the end of what was claimed here."""
        told = waiter.kept
        if told is None or waiter.claimed is not None or not told.is_end_of(waiter.entry_id):
            return None
        if self._added is not None:
            self._added(1)
        return told

    async def _go_on(
        self, call: KeyedRequest, key: bytes, waiter: Waiter, claim: Claim, to: Connection | None
    ) -> Kept:
        """Return what a call comes to, whatever Redis has answered to its claim.

        :param to: what that was written to, if it was
        """
        if to is None:
            known = await self._claim(call.key, claim)
        else:
            with suppress(TransportConnectionError, TransportClosedError):  # `claimed` tells
                await to.wait_flushed()
            await waiter.word.wait()
            known = await self._answered(call.key, waiter, claim)
        kept = await self._end_of(call.key, key, waiter, known)
        while kept is None:
            # What was lost may run yet, where two requests of one id would be taken for one.
            self.lost += 1
            other = f"{call.request.id}+"[-_MAX_ID:]
            call = replace(call, request=replace(call.request, id=other))
            known = await self._claim(call.key, self._claims.make(call, key, waits=True))
            kept = await self._end_of(call.key, key, waiter, known)
        return kept

    async def _answered(self, name: str, waiter: Waiter, claim: Claim) -> Kept:
        """Return what is known of a call once its claim, or something else, was answered."""
        if waiter.failed is not None:
            raise fresh_copy(waiter.failed)
        if (told := self._told(waiter)) is not None:
            return told
        reply, entry_id = waiter.claimed, waiter.entry_id
        if isinstance(reply, (TransportConnectionError, TransportClosedError)):
            claim.again = b"1"
        elif reply is None and entry_id is None:
            claim.again = b"1"  # woken by a word about an older call; the answer is on its way
        if isinstance(reply, Exception) or claim.again == b"1":
            known = await self._claim(name, claim)
        else:
            known = await self._known(name, claim, entry_id if reply is None else reply)
        waiter.renew(self._now())
        return known

    async def _claim(self, name: str, claim: Claim) -> Kept:
        """Have a call made, unless it is there; return what is known of it."""
        return await self._known(name, claim, await self._ask(lambda: self._attempt(claim)))

    async def _known(self, name: str, claim: Claim, reply: Any) -> Kept:
        """Return what is known of a call as Redis has answered its claim."""
        if isinstance(reply, int):
            if reply == 0:
                raise conflict(name)
            if reply < 0:
                raise too_many_wait(name)
            raise OverloadedError(f"{reply} requests wait for the group (max_backlog)")
        if not reply[:1].isdigit():
            return parse_kept(reply)
        if claim.script is CLAIM_LATER:
            await self._ask(self._teller.tell_later)
        elif self._added is not None:
            self._added(1)
        return Kept(b"w", claim.head[0], reply, b"")

    async def _attempt(self, claim: Claim) -> Any:
        """Claim, and return the answer; after a connection was lost, by which it may have been
        done, once more.
        """
        known = True
        while True:
            try:
                return await self._link.attempt(*claim.command(known=known))
            except (TransportConnectionError, TransportClosedError):
                if self._link.ended:
                    raise
                claim.again = b"1"
            except RedisError as exc:
                if not is_unknown(exc) or not known:
                    if meaning_of(exc) is Meaning.FULL:
                        raise no_memory(exc) from exc
                    raise
                known = False

    # Waiting

    def _join(self, key: bytes) -> Waiter:
        if self._one_shot is None:
            self._one_shot, self._now = one_shots(), clock()
        if self._ask_at == inf:
            self._stir()
        return self.waiting.join(key, self._one_shot, self._now())

    async def _end_of(self, name: str, key: bytes, waiter: Waiter, known: Kept) -> Kept | None:
        """Return what a call came to; ``None`` if the server has lost it.

        :raises DeliveryError: if its request is gone without an end
        """
        asked = 0
        while not known.ended:
            await waiter.word.wait()
            if waiter.failed is not None:
                raise fresh_copy(waiter.failed)
            told, late = waiter.kept, waiter.late
            waiter.renew(self._now())
            if told is not None and told.is_end_of(known.entry_id):
                return told
            found = await self._attach(name, key)
            if found is None:
                return None
            if found.digest != known.digest:
                # Nobody tells that the server has lost it, and another one has its key now.
                raise conflict(name) if late or told is not None else was_cancelled(name)
            # If it has another request now, that is the same call, made again.
            known = found
            asked += late
            if asked == _PATIENCE and not found.ended:
                asked = 0
                await self._check(name, key, found)
        return known

    async def _check(self, name: str, key: bytes, known: Kept) -> None:
        names = self._keys
        keys = (names.stream, names.call(key), names.progress(key), names.items(key))
        if await self._run(CHECK, keys, self._group, known.entry_id):
            raise DeliveryError(
                f"the request with the key {name!r} is gone from the stream, and nothing was kept "
                "of it: it was removed, or its worker doesn't know of keys"
            )

    async def _attach(self, name: str, key: bytes) -> Kept | None:
        keys = (self._keys.call(key), self._keys.waits(key))
        found = await self._run(ATTACH, keys, self._session)
        if found == -1:
            raise too_many_wait(name)
        return None if found is None else parse_kept(found)

    async def get(self, key: bytes) -> Kept | None:
        """Return what is known of a call."""
        found = await self._ask(lambda: self._link.request(b"GET", self._keys.call(key)))
        return None if found is None else parse_kept(found)

    async def _unkept(self, key: str) -> Literal["failed", "refused"]:
        """Return which of the two a call has come to whose error isn't kept."""
        name = key.encode()
        kept = await self.get(name)
        if kept is None or not kept.ended or kept.state != b"e":
            return "failed"
        return kind_of(self.value(key, name, kept))

    def value(self, name: str, key: bytes, kept: Kept) -> Reply:
        """Return what a call came to; see `Sealer.value_of`."""
        return self._sealer.value_of(self._keys.call(key), name, kept)

    # Leaving

    def _leave(self, key: bytes, digest: bytes, *, cancel: bool) -> None:
        """Note in Redis that nobody waits here any more, without awaiting; it may be lost."""

        def left(done: Any) -> None:
            if isinstance(done, list) or done == 2:
                self._teller.tell_soon(key)

        keys, args = self._cancelling(key, b"")
        more = (self._session, b"%d" % cancel, digest)
        self._teller.post(LEAVE_CALL, keys, (*args, *more), left)

    def _cancelling(
        self, key: bytes, entry_id: bytes
    ) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Return the keys and the arguments of CANCEL_CALL."""
        keys = self._keys
        names: tuple[bytes, ...] = (keys.stream, keys.call(key), keys.due, keys.waits(key))
        names += (keys.progress(key), keys.items(key))
        beginnings = (keys.inbox(""), keys.worker(b"", b""), PREFIX)
        nobodies = (HANDED_BACK, DELAYED)
        briefly = b"%d" % (BRIEFLY * 1000)
        word = cancel_word(key)
        return names, (*beginnings, *nobodies, self._group, entry_id, key, word, briefly)

    # Asking

    async def _run(self, script: Script, keys: tuple[bytes, ...], *args: Argument) -> Any:
        return await self._ask(lambda: run_script(self._link, script, keys, *args))

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        return await ask_patiently(ask, self._refusal)
