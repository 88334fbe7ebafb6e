"""How records become the fields of a Redis stream entry, and entries become records.

A peer begins what it has to say in its own dialect, and answers each other peer in the one that
this used: the fields of an entry tell which it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec
from msgspec import Struct

from ..._exceptions import ProtocolError
from ...abc import Codec
from ...codecs._weight import LARGE, weight_of_json
from ...records import Record, Request
from ._base import ANY_SIZE, leave_out
from ._base import Dialect as Dialect
from ._base import Entry as Entry
from ._base import LargeEntry as LargeEntry
from ._base import Several as Several
from ._base import SharedPeer as SharedPeer
from .kkrpc0 import ClassicDialect
from .kkrpc2 import MARK, CompactDialect
from .native import NativeDialect

# Peers of another dialect than this side's own, by their ids as text.
_PEERS = 4096


class _Protocol(Struct):
    protocol: object = None


_probe = msgspec.json.Decoder(_Protocol)


class Dialects:
    """All dialects, for one peer.

    :param skips_own: whether this peer has no interest in what it wrote itself to the stream
    :param deliver: hands a record to the core as if a peer had sent it, see `ClassicDialect.pair`
    :param now: tells the time in seconds, on the clock of `CompactDialect.due`
    :param time_of_day: tells the time in seconds since the epoch
    :ivar own: the dialect of what this peer begins
    :ivar classic: kkrpc 0.x's
    :ivar compact: kkrpc 2's
    :ivar only_native: whether all peers speak this side's own dialect, the native one
    :ivar classic_seen: whether a kkrpc 0.x peer has written something
    """

    def __init__(
        self,
        dialect: str,
        session_id: str,
        codec: Codec,
        *,
        superjson: bool,
        remote_peer_id: str | None,
        skips_own: bool,
        max_queue_size: int,
        max_queue_bytes: int,
        deliver: Callable[[Record, str | None], object],
        now: Callable[[], float],
        time_of_day: Callable[[], float],
    ) -> None:
        self._session_id = session_id
        self.native: NativeDialect = NativeDialect(session_id, codec)
        self.compact: CompactDialect
        self.compact = CompactDialect(
            session_id, remote_peer_id, skips_own=skips_own, now=now, time_of_day=time_of_day
        )
        plain, rich = ClassicDialect.pair(
            session_id,
            deliver,
            max_items=max_queue_size,
            max_bytes=max_queue_bytes,
            skips_own=skips_own,
        )
        self.classic: ClassicDialect = rich if superjson else plain
        self.classic_seen: bool = dialect == "kkrpc-0"
        by_name: dict[str, Dialect] = {
            "native": self.native,
            "kkrpc-2": self.compact,
            "kkrpc-0": self.classic,
        }
        self.own: Dialect = by_name[dialect]
        self._dialect_of: OrderedDict[str, Dialect] = OrderedDict()
        self.only_native: bool = self.own is self.native

    def of(self, peer: str | None) -> Dialect:
        """Return the dialect in which a peer is spoken to."""
        if peer is None:
            return self.own
        if isinstance(peer, SharedPeer):
            return peer.dialect
        return self._dialect_of.get(peer, self.own)

    def decode(self, fields: list[bytes], most: int = ANY_SIZE) -> Entry | None:
        """Return what an entry holds; ``None`` if it is none of this peer's affair.

        :param most: see `NativeDialect.try_decode`
        :raises ProtocolError: if it isn't valid, or of no dialect
        """
        native = self.native
        entry = native.try_decode(fields, most)
        if entry is not None:
            if not self.only_native:
                self._remember(entry.sender, native)
            return entry
        data = _field(fields, b"data")
        if data is None:
            raise ProtocolError("an entry of no known dialect")
        if MARK in data and _is_bus(data):
            shared = self.compact.decode(fields)
        else:
            shared = self.classic.decode(fields)
            self.classic_seen = self.classic_seen or shared is not None
        if shared is not None:
            if shared.size > LARGE and isinstance(shared.record, Request):
                shared = leave_out(shared, fields, weight_of_json(data))
            assert isinstance(shared.sender, SharedPeer)
            self._remember(str(shared.sender), shared.sender.dialect)
        return shared

    def decode_whole(self, fields: list[bytes]) -> Record:
        """Return the record of an entry that was decoded before, with nothing left out.

        :raises ProtocolError: if it isn't valid
        """
        if self.native.matches(fields):
            return self.native.decode_whole(fields)
        data = _field(fields, b"data") or b""
        entry = (self.compact if MARK in data and _is_bus(data) else self.classic).decode(fields)
        if entry is None:
            raise ProtocolError("an entry that is none of this peer's affair any more")
        return entry.record

    def _remember(self, peer: str, dialect: Dialect) -> None:
        if peer == self._session_id:
            return
        known = self._dialect_of
        if self.of(peer) is dialect:
            return
        self.native.note_change()
        if dialect is self.own:
            del known[peer]
            self.only_native = self.own is self.native and not known
            return
        if peer not in known and len(known) >= _PEERS:
            known.popitem(last=False)
        known[peer] = dialect
        self.only_native = False


def _field(fields: list[bytes], name: bytes) -> bytes | None:
    for index in range(0, len(fields) - 1, 2):
        if fields[index] == name:
            return fields[index + 1]
    return None


def _is_bus(data: bytes) -> bool:
    try:
        return _probe.decode(data).protocol == "kkrpc.bus.v1"
    except Exception:  # whatever the bytes are
        return False
