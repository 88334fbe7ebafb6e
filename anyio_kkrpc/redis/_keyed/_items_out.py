"""The worker's side of streams that are kept: each attempt writes its items, as `Pacer` says.

What is on its way is written again on a new connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from anyio import Event, current_time, move_on_after

from ..._exceptions import (
    DeliveryError,
    OverloadedError,
    TransportClosedError,
    TransportConnectionError,
)
from ...abc import Envelope, Item
from ...kit._items import Unread, check_left
from ...records import Cancel, Reply, Request
from .._connection._command import pack
from .._connection._errors import RedisError, leads_elsewhere, meaning_of
from .._connection._link import Link
from .._connection._patience import Outages
from .._connection._resp import Connection
from .._group._held import HeldEntry
from .._stream._keys import Keys
from ..dialects._keyed import Keyed
from ._entries import MARK, Entries, epoch_of, is_of, pack_id, parse_id
from ._item_scripts import APPEND, OPEN
from ._kept import split_word
from ._pacing import Batch, Pacer
from ._script import is_unknown, run_script

__all__ = ("READ_WORD", "ItemsOut", "read_word")

# What the hint begins with that tells how far somebody has read.
READ_WORD = b"call-read "
# Attempts of which one looks for the last item; most of them have some.
_FEW = 20
# Milliseconds for which items are kept while they come: a day. Seconds after which that is renewed.
_DAY = 86_400_000
_HOUR = 3600.0
# Seconds after which one tells oneself again.
_HEARD_WITHIN = 5.0
_PART = "items of calls"


class ItemsOut:
    """All attempts of this worker whose results are streams.

    :param deliver: takes a cancel
    :param stir: has `write_again` called, after a pause
    :ivar refused: attempts whose items Redis refuses for now
    :ivar unread: counts what nobody has read
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        names: tuple[bytes, bytes],
        session_id: str,
        entries: Entries,
        *,
        max_message_size: int,
        deliver: Callable[[Envelope], object],
        outages: Outages,
        stir: Callable[[], object],
    ) -> None:
        self._link = link
        self._keys = keys
        self._group, self._consumer = names
        self._session = session_id.encode()
        self._entries = entries
        self._max_size = max_message_size
        self._deliver = deliver
        self._outages = outages
        self._stir = stir
        self.refused: set[Pacer] = set()
        self.unread = Unread()
        self._open: dict[tuple[bytes, int], Pacer] = {}

    # What a handler yields

    async def resume(self, held: HeldEntry) -> Item[Any] | None:
        """See `KeyedItems.resume`."""
        while True:
            writer, last = await self._open_writer(held, anew=False)
            if writer is not None:
                return last

    def take(self, held: HeldEntry, value: Any) -> None:
        """Take an item, which `put` is to have written then.

        :raises TypeError: if it can't be encoded
        :raises OverloadedError: if it is too large, or the handler has waited for too few of them
        """
        assert held.keyed is not None
        early = held.keyed.early
        if early:
            check_left(len(early), sum(len(data) for _, data in early))
        codec = self._entries.codec_for(held.sender or "")
        field = self._entries.field(codec, value)
        size = len(field[1])
        if size > self._max_size:
            raise OverloadedError(
                f"an item of {size} bytes exceeds max_message_size ({self._max_size} bytes)"
            )
        early.append(field)

    async def put(self, held: HeldEntry) -> None:
        """See `KeyedItems.keep_item`."""
        assert held.keyed is not None
        await self._writer_of(held, held.keyed)

    async def flush(self, held: HeldEntry) -> None:
        """See `KeyedItems.keep_rest`."""
        assert held.keyed is not None
        await (await self._writer_of(held, held.keyed)).flush()

    async def _writer_of(self, held: HeldEntry, keyed: Keyed) -> Pacer:
        """Return what writes the items of a request, once it has all that were yielded. If this is
        cancelled, it has them next time.
        """
        writer: Pacer | None = keyed.items
        if writer is None:
            writer, _ = await self._open_writer(held, anew=True)
            assert writer is not None
        while keyed.early:
            await writer.put(keyed.early.pop(0))
        return writer

    async def _open_writer(
        self, held: HeldEntry, *, anew: bool
    ) -> tuple[Pacer | None, Item[Any] | None]:
        """Begin to write; return nothing if that is to be tried again.

        :param anew: whether what is there is removed
        :return: the writer, and the item behind which it goes on
        """
        keyed = held.keyed
        if keyed is None or keyed.items is not None or (keyed.early and not anew):
            raise _too_late()
        place = self._keys.items(keyed.key)
        epoch = epoch_of(held.id, held.attempt)
        last_id, behind, item = b"", 0, None
        if not anew:
            last_id, behind, item = await self._last(place, held)
        begin_id = pack_id(epoch, 0)
        mark = self._session if behind else b""
        names = (self._keys.stream, self._keys.call(keyed.key), place)
        keep = max(keyed.keep, _DAY)
        keyed.opened = True
        done = await run_script(
            self._link,
            OPEN,
            names,
            *(self._group, self._consumer, held.id, b"%d" % held.attempt, last_id),
            *(b"%d" % keep, begin_id),
            *self._entries.begin(place, begin_id, behind, mark),
        )
        if done == -1:
            return None, None
        if done == 0:
            raise _overtaken()
        if keyed.items is not None:  # another task of the handler has begun meanwhile
            raise _too_late()
        cancel = partial(self._cancel, held, keyed)
        catch_up = partial(self._catch_up, keyed.key)
        drop = partial(self.unread.make_room, key=keyed.name)
        rest = (keyed.bounds, keep, self._write, cancel, catch_up, drop)
        writer = Pacer(place, epoch, *rest)
        first = parse_id(done)
        writer.begin(behind, first.number if first.epoch < epoch else behind)
        keyed.items = self._open[keyed.key, epoch] = writer
        return writer, item

    async def _last(self, place: bytes, held: HeldEntry) -> tuple[bytes, int, Item[Any] | None]:
        """Return the last id, the number of the last item, and that, of earlier attempts."""
        found = await self._link.request(b"XREVRANGE", place, b"+", b"-", b"COUNT", b"%d" % _FEW)
        behind: int | None = None
        for entry_id, fields in found:
            at = parse_id(entry_id)
            if not is_of(at.epoch, held.id):
                break
            entry = self._entries.read(place, entry_id, fields)
            if behind is None:
                behind = at.number if entry.behind is None else entry.behind
            if entry.values:
                return found[0][0], behind, Item(str(at), at.number, entry.values[-1])
        return b"", 0, None

    # Writing

    def _write(self, writer: Pacer, batch: Batch) -> None:
        connection = self._link.connection
        if connection is not None and connection.error is None:
            self._write_to(connection, writer, batch)

    def _write_to(
        self, connection: Connection, writer: Pacer, batch: Batch, *, known: bool = True
    ) -> None:
        entry_id = pack_id(writer.epoch, batch.number)
        fields = [*batch.fields, MARK, self._session] if batch.marked else batch.fields
        args = (entry_id, batch.gone, *self._entries.sign(writer.place, entry_id, fields))

        def answered(reply: Any) -> None:
            if isinstance(reply, (TransportConnectionError, TransportClosedError)):
                return  # `attach` writes it again
            if is_unknown(reply):
                if connection.error is None:
                    self._write_to(connection, writer, batch, known=False)
            elif isinstance(reply, RedisError) and leads_elsewhere(reply):
                connection.break_off(reply)  # `attach` writes it again
            elif writer.sent is batch:
                self._answered(writer, reply)

        connection.post(APPEND.packed((writer.place,), args, known=known), 1, answered)
        connection.flush_nowait()

    def _answered(self, writer: Pacer, reply: Any) -> None:
        if isinstance(reply, RedisError) and meaning_of(reply).passes:
            self._outages.begin(_PART, reply)
            self.refused.add(writer)
            self._stir()
            return
        if writer in self.refused:
            self._taken(writer)
        if isinstance(reply, RedisError):
            self._outages.leave_out(_PART, reply)
            writer.fail(DeliveryError(f"Redis refuses an item of the call: {reply}"))
        elif reply == 1:
            writer.written()
        elif reply == 0:
            writer.fail(_overtaken())
        else:
            writer.fail(DeliveryError("the items of the call were removed from Redis"))

    def _taken(self, writer: Pacer) -> None:
        """Note that Redis has taken what it refused, or that it is given up."""
        self.refused.discard(writer)
        if not self.refused:
            self._outages.end(_PART)

    def write_again(self) -> None:
        """Write again what Redis has refused for now."""
        for writer in self.refused:
            if writer.sent is not None:
                self._write(writer, writer.sent)

    def attach(self, connection: Connection) -> None:
        """Write what is on its way to a new connection."""
        for writer in self._open.values():
            if writer.sent is not None and writer.error is None:
                self._write_to(connection, writer, writer.sent)

    def renew(self) -> None:
        """Have Redis keep what is not at its end yet."""
        now, connection = current_time(), self._link.connection
        if connection is None or connection.error is not None:
            return
        for writer in self._open.values():
            if now - writer.renewed_at > _HOUR and not writer.closed:
                writer.renewed_at = now
                connection.post(pack((b"PEXPIRE", writer.place, b"%d" % writer.keep)))
                connection.flush_nowait()

    # Its end

    def end_of(self, keyed: Keyed, peer: str, reply: Reply | None) -> tuple[bytes, bytes]:
        """Return the id of the end of the items, and what it says.

        :param reply: ``None`` if the call was cancelled
        """
        writer: Pacer = keyed.items
        codec = self._entries.codec_for(peer)
        end = writer.close()
        says = None if reply is None else Reply("", e=reply.e)
        return end, self._entries.end(writer.place, end, codec, says)

    def forget(self, keyed: Keyed) -> None:
        """Note that the end of the items is kept, or is somebody else's to write."""
        writer: Pacer | None = keyed.items
        if writer is not None:
            writer.fail(_overtaken())
            if writer in self.refused:
                self._taken(writer)
            self._open.pop((keyed.key, writer.epoch), None)

    def _cancel(self, held: HeldEntry, keyed: Keyed) -> None:
        """Cancel a call whose items nobody reads."""
        keyed.cancelled = True
        if isinstance(held.record, Request):
            self._deliver(Envelope(Cancel(held.record.id), held.sender))

    async def _catch_up(self, key: bytes, writer: Pacer) -> None:
        """Wait until all has come that others had said by now: tell oneself, behind that."""
        inbox = self._keys.inbox("") + self._session
        word = read_word(key, pack_id(writer.epoch, 0))
        writer.caught_up = Event()
        while writer.error is None and not writer.caught_up.is_set():
            await self._link.request(b"XADD", inbox, b"NOMKSTREAM", b"*", b"hint", word)
            with move_on_after(_HEARD_WITHIN):
                await writer.caught_up.wait()

    # What others say

    def take_word(self, word: bytes) -> None:
        """Take a hint that somebody has read a marked item.

        :raises ProtocolError: if it names no key
        """
        key, position = split_word(word)
        epoch, _, number = position.partition(b"-")
        if epoch.isdigit() and number.isdigit() and len(position) <= 40:
            writer = self._open.get((key, int(epoch)))
            if writer is not None:
                writer.read(int(number))


def read_word(key: bytes, position: bytes) -> bytes:
    """Return the hint that somebody has read an item."""
    return b"%b%d:%b%b" % (READ_WORD, len(key), key, position)


def _too_late() -> DeliveryError:
    return DeliveryError("the items of a call can be resumed once, before the first one")


def _overtaken() -> DeliveryError:
    return DeliveryError("the call has ended, or is another worker's by now")
