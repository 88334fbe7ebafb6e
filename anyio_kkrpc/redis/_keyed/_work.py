"""The worker's side: which requests with keys may begin, and what they came to is kept.

A request stays held until Redis has said that what it came to is kept, so that it is kept from
others, and given back, as any other is. What it came to is written again on each new connection
until then.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Literal

from anyio import current_time, move_on_after, sleep
from msgspec import UNSET, Struct

from ..._exceptions import (
    DeliveryError,
    TransportClosedError,
    TransportConnectionError,
)
from ..._runtime._bell import Bell
from ..._wire_errors import library_error
from ...abc import Envelope
from ...kit._keyed import BRIEFLY, PAUSE, ended_state, ran_too_long
from ...records import Cancel, Reply, Request
from .._connection._errors import RedisError, leads_elsewhere
from .._connection._link import Link
from .._connection._patience import Outages, Patience
from .._connection._resp import Connection
from .._group._findings import Died
from .._group._held import HeldEntry
from .._group._keeping import Keeper
from .._stream._keys import Keys
from ..dialects._base import check_size
from ..dialects._keyed import Keyed
from ..dialects.native import NativeDialect
from ._item_scripts import EXPIRE, FINISH_ITEMS
from ._items_out import READ_WORD, ItemsOut
from ._kept import CANCEL_WORD, LATER_WORD, Sealer, is_to_cancel, split_word
from ._later import Later
from ._script import Script, is_unknown, run_script
from ._scripts import BEGIN, DIE, FINISH, HINTED, PROGRESS
from ._telling import Teller

__all__ = ("Work", "kind_of")

# Seconds after which what Redis refused is written again.
_AGAIN = 1.0
# What FINISH adds to its reply where another attempt may have left items.
_ITEMS = 4
# Milliseconds for which progress is kept, at least: a day.
_DAY = 86_400_000
_PART = "keeping what calls came to"


class _Finish(Struct, eq=False):
    """What a request came to, until Redis has it.

    :ivar args: of FINISH, which name the request by the id that it had then: the entry may have
        lost that since, to another one of a server that knows nothing of it
    :ivar refused: whether Redis has refused it
    """

    script: Script
    held: HeldEntry
    keyed: Keyed
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    refused: bool = False

    def value(self) -> bytes:
        """Return what is kept, if it may be handed on with a hint."""
        _, entry_id, state, digest, rest = self.args[:5]
        return b"" if len(rest) > HINTED else b"%b%b%b|%b" % (state, digest, entry_id, rest)


class Work:
    """What this peer does for calls with keys. `run` must run beside it.

    :param keeper: keeps what is held
    :param items: writes those of results that are streams
    :param interval: seconds between two looks whether what runs was cancelled
    :param deliver: takes a cancel
    :param added: told how many entries are acknowledged, if not ``None``
    :ivar teller: tells who waits
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        names: tuple[bytes, bytes],
        native: NativeDialect,
        sealer: Sealer,
        keeper: Keeper,
        outages: Outages,
        later: Later,
        items: ItemsOut,
        *,
        interval: float,
        max_message_size: int,
        deliver: Callable[[Envelope], object],
        added: Callable[[int], object] | None,
    ) -> None:
        self._link = link
        self._keys = keys
        self._group, self._consumer = names
        self._native = native
        self._sealer = sealer
        self._keeper = keeper
        self._held = keeper.held
        self._outages = outages
        self._later = later
        self._items = items
        self._interval = interval
        self._max_size = max_message_size
        self._deliver = deliver
        self._added = added
        self.teller = Teller(link, keys, self.stir)
        self._open: dict[_Finish, None] = {}
        self._died: list[Died] = []
        self._left: list[bytes] = []
        self._doubted: set[bytes] = set()
        self._look_at = inf
        self._serves = False
        self.bell = Bell()

    # What begins

    async def may_begin(self, held: HeldEntry) -> bool:
        """Return whether a request that is held may begin. What was delivered before may have come
        to something meanwhile, or may have been cancelled. If this is cancelled, it goes back.
        """
        keyed = held.keyed
        if keyed is None or (held.attempt == 1 and not keyed.cancelled):
            return True
        keys = (self._keys.stream, self._keys.call(keyed.key))
        args = (self._group, self._consumer, held.id, keyed.digest)
        try:
            verdict = await run_script(self._link, BEGIN, keys, *args)
        except RedisError as exc:
            self._outages.leave_out(_PART, exc)
            self._held.drop(held)
            self._keeper.stir()
            return False
        except BaseException:
            self._held.drop(held)
            self._keeper.stir()
            raise
        if verdict == 2:
            keyed.cancelled = True
            self.finish(held, None)
        elif verdict == 0:
            self._let_go(held)
        return bool(verdict == 1)

    def begin(self, envelope: Envelope, held: HeldEntry) -> None:
        """Note that a request begins."""
        keyed, record, now = held.keyed, envelope.record, current_time()
        assert keyed is not None
        assert isinstance(record, Request)
        envelope.key, envelope.sent_at, record.d = keyed.name, now, UNSET
        if keyed.run_within:
            record.d = keyed.run_within
            keyed.ends = now + keyed.run_within / 1000
        if self._look_at == inf:
            self._look_at = now + self._interval
            self.stir()

    # What it came to

    def finish(self, held: HeldEntry, reply: Envelope | None) -> None:
        """Have Redis keep what a request came to, without awaiting.

        :raises TypeError: if it can't be encoded
        :raises OverloadedError: if it is too large
        """
        keyed = held.keyed
        assert keyed is not None
        record = self._reply_of(keyed, reply)
        state, keep = self._state_of(keyed, record)
        codec = self._native.codec_for(held.sender or "")
        data = b"" if record is None else self._sealer.reply(codec, record)
        check_size(len(data), self._max_size)
        keys, key = self._keys, keyed.key
        place, inbox = keys.call(key), keys.inbox(held.sender or "")
        rest = self._sealer.seal(place, state, keyed.digest, held.id, data) if data else b""
        own: tuple[bytes, ...] = ()
        if state != b"d" or keyed.items is not None:
            own = (self._consumer, b"%d" % held.attempt)
        more = held.attempt > 1 or keyed.opened
        told = b"%d" % (keyed.told > 0 or more)
        script, names = FINISH, [keys.stream, place, keys.waits(key), keys.progress(key)]
        if more:
            names.append(keys.items(key))
        if keyed.items is not None:
            script = FINISH_ITEMS
            own += self._items.end_of(keyed, held.sender or "", record)
        finish = _Finish(
            script,
            held,
            keyed,
            tuple(names),
            (
                *(self._group, held.id, state, keyed.digest, rest),
                *(b"%d" % keep, key, inbox, told, *own),
            ),
        )
        keyed.settled, self._open[finish] = True, None
        self._write(finish)

    def _reply_of(self, keyed: Keyed, reply: Envelope | None) -> Reply | None:
        """Return what a request is answered with, ``None`` if it was cancelled."""
        if reply is not None:
            assert isinstance(reply.record, Reply)
            return reply.record
        if keyed.cancelled:
            return None
        if keyed.ends is not None and current_time() >= keyed.ends:
            return ran_too_long(keyed.run_within / 1000)
        return Reply("", e=library_error(DeliveryError("the handler was not run to its end")))

    def _state_of(self, keyed: Keyed, record: Reply | None) -> tuple[bytes, int]:
        """Return the letter for what a request came to, and for how long that is kept."""
        briefly = round(BRIEFLY * 1000)
        if record is None:
            return b"k", briefly
        state = ended_state(record)
        if state == "done":
            return b"d", keyed.keep
        if state == "failed" and keyed.keep_errors:
            return b"f", keyed.keep_errors
        return b"e", briefly

    def _write(self, finish: _Finish, *, known: bool = True) -> None:
        connection = self._link.connection
        if connection is not None and connection.error is None:
            self._write_to(connection, finish, known=known)

    def _write_to(self, connection: Connection, finish: _Finish, *, known: bool = True) -> None:
        packed = finish.script.packed(finish.keys, finish.args, known=known)

        def answered(reply: Any) -> None:
            if isinstance(reply, RedisError) and leads_elsewhere(reply):
                connection.break_off(reply)  # `attach` writes it again
            else:
                self._answered(finish, reply)

        connection.post(packed, 1, answered)
        connection.flush_nowait()

    def _answered(self, finish: _Finish, reply: Any) -> None:
        """Take Redis' answer."""
        if isinstance(reply, (TransportConnectionError, TransportClosedError)):
            return  # `attach` writes it again
        if is_unknown(reply):
            self._write(finish, known=False)
            return
        if isinstance(reply, Exception):
            self._outages.leave_out(_PART, reply)
            finish.refused = True
            self.stir()
            return
        if finish not in self._open:
            return
        del self._open[finish]
        self._outages.end(_PART)
        if reply >= _ITEMS:
            reply -= _ITEMS
            self._left.append(finish.keyed.key)
            self.stir()
        if reply == 2:
            self.teller.tell_soon(finish.keyed.key, finish.value())
        if reply and self._added is not None:
            self._added(1)
        self._let_go(finish.held)

    def _let_go(self, held: HeldEntry) -> None:
        if held.keyed is not None:
            self._items.forget(held.keyed)
        if self._held.entries.get(held.id) is held:
            del self._held.entries[held.id]
            self._keeper.room.notify()

    def attach(self, connection: Connection) -> None:
        """Write what is open to a new connection."""
        self._items.attach(connection)
        for finish in self._open:
            self._write_to(connection, finish)
        if self._serves:
            self.serve()

    # How far it has come

    async def report(self, envelope: Envelope, value: Any) -> None:
        """Keep how far a request has come; not more often than ten times a second.

        :raises OverloadedError: if that is too large
        """
        held: HeldEntry | None = envelope.token
        keyed = None if held is None else held.keyed
        if held is None or keyed is None or current_time() - keyed.told_at < PAUSE:
            return
        keyed.told_at = current_time()
        keyed.told += 1
        position = b"%d-%d" % (held.attempt, keyed.told)
        place = self._keys.progress(keyed.key)
        data = self._sealer.progress(self._native.codec, value)
        check_size(len(data), self._max_size)
        keep = b"%d" % max(keyed.keep, _DAY)
        args = (self._group, self._consumer, held.id, position, keep)
        sealed = self._sealer.seal(place, position, data)
        await run_script(self._link, PROGRESS, (self._keys.stream, place), *args, sealed)

    # What others say

    def take_word(self, word: bytes) -> None:
        """Take a hint that is for workers.

        :raises ProtocolError: if it names no key
        """
        if word == LATER_WORD:
            if self._serves:
                self.serve()
        elif word.startswith(READ_WORD):
            self._items.take_word(word)
        elif word.startswith(CANCEL_WORD):
            self._doubted.add(split_word(word)[0])
            self.stir()

    def serve(self) -> None:
        """Note that requests are taken here; look whether there is what may begin by now."""
        self._serves = True
        self._later.look()
        self.stir()

    def died(self, died: Died) -> None:
        """Note that a request became a dead letter."""
        self._died.append(died)
        self.stir()

    # What is done beside

    def stir(self) -> None:
        """Have `run` look now what is to be done."""
        self.bell.set()

    async def run(self, ask: Callable[[], float]) -> None:
        """Tell who waits, end what was cancelled, begin what is due. Goes on for ever.

        :param ask: has those ask who have waited long enough; returns when it is to do so again

        :raises RedisError: if no further attempt is of use
        """
        patience = Patience("calls with keys", self._outages, spare=True)
        while True:
            due = min(self._look_at, self._later.at, ask())
            with move_on_after(max(due - current_time(), 0)):
                await self.bell.wait()
            self.bell.clear()
            try:
                await self._bury()
                await self.teller.go_on()
                await self._sweep()
                await self._look()
                await self._later.go_on()
                await self._write_again()
            except RedisError as exc:
                await sleep(patience.pause(exc))
                self.stir()
            else:
                if not patience.calm:
                    patience.worked()

    async def _write_again(self) -> None:
        refused = [finish for finish in self._open if finish.refused]
        if not refused and not self._items.refused:
            return
        with move_on_after(_AGAIN):
            await self.bell.wait()
        for finish in refused:
            finish.refused = False
            self._write(finish)
        self._items.write_again()

    async def _bury(self) -> None:
        while self._died:
            died = self._died[0]
            keyed = died.keyed
            keys, key = self._keys, keyed.key
            names = (keys.call(key), keys.waits(key), keys.progress(key), keys.items(key))
            keep = b"%d" % max(keyed.keep_errors, round(BRIEFLY * 1000))
            args = (died.entry_id, keyed.digest, keep, died.why.encode())
            if await run_script(self._link, DIE, names, *args):
                self.teller.tell_soon(key)
            self._died.pop(0)

    async def _sweep(self) -> None:
        """Have items of attempts that were too late go with what the calls came to."""
        while self._left:
            keys, key = self._keys, self._left[0]
            await run_script(self._link, EXPIRE, (keys.call(key), keys.items(key)))
            self._left.pop(0)

    async def _look(self) -> None:
        """Cancel what runs here and is to be cancelled."""
        due = current_time() >= self._look_at
        if not due and not self._doubted:
            return
        doubted = set(self._doubted)  # more may come meanwhile
        running = [one for one in self._held.entries.values() if one.keyed is not None]
        for held in running:
            keyed = held.keyed
            if keyed is None or keyed.cancelled or not (due or keyed.key in doubted):
                continue
            value = await self._link.request(b"GET", self._keys.call(keyed.key))
            if is_to_cancel(value, held.id):
                self._cancel(held, keyed)
        self._doubted -= doubted
        if due:
            self._items.renew()
            self._look_at = current_time() + self._interval if running else inf

    def _cancel(self, held: HeldEntry, keyed: Keyed) -> None:
        keyed.cancelled = True
        if held.started and not keyed.settled and isinstance(held.record, Request):
            self._deliver(Envelope(Cancel(held.record.id), held.sender))


def kind_of(reply: Reply) -> Literal["failed", "refused"]:
    """Return whether a handler has raised the error of a reply, or did not run."""
    return "failed" if ended_state(reply) == "failed" else "refused"
