"""What a transport writes: requests, replies with acknowledgements, controls.

Each write is kept until Redis has answered it. When the connection is lost in between, nobody knows
which of them arrived. On the next connection a request to the stream is looked up before it is
written again; what goes to an inbox or the control stream has a number, by which its reader
recognizes what it has read already; and an acknowledgement may be repeated.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import Any

from anyio import Event, current_time, move_on_after
from msgspec import UNSET
from redis.exceptions import RedisError

from .._exceptions import (
    DeliveryError,
    OverloadedError,
    ProtocolError,
    RPCTimeoutError,
    TransportClosedError,
    TransportConnectionError,
)
from .._log import quoted
from .._loop import clock
from .._protocol._records import Bye, Cancel, Record, Request
from ..abc import Codec, Envelope
from ._connection import Connection
from ._connection import _pack as pack_command
from ._errors import Meaning, meaning_of
from ._keys import Keys
from ._scripts import BEFORE
from ._signing import Signer
from .dialects import Dialects
from .dialects.native import MARK

logger = logging.getLogger("anyio_kkrpc")

# Cancels are of interest for moments; older ones only take up memory.
_CONTROL_LENGTH = b"1000"
_CONTROL_TTL_MS = b"3600000"
# Peers whose key is remembered.
_PEERS = 4096
# Bytes that wait for a connection before those who add more wait too.
HIGH_WATER = 16 * 1024 * 1024
# How far, in seconds, a lookup goes back behind the moment of writing: clocks aren't exact.
_MARGIN = 2.0
_PAGE = b"500"

# The end of each native entry, packed.
_MARK = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in MARK)

# Removes a request that no group has taken yet; one that was taken is cancelled by the record.
_CANCEL = (
    BEFORE
    + b"""
if redis.replicate_commands then redis.replicate_commands() end
local taken = redis.call('EXISTS', KEYS[1]) == 0
if not taken then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' and not before(group[i + 1], ARGV[1]) then taken = true end
    end
  end
end
if not taken then return redis.call('XDEL', KEYS[1], ARGV[1]) end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 4))
return redis.call('PEXPIRE', KEYS[2], ARGV[3])
"""
)

# Adds a request unless the group has too much to do already; returns its id, or the backlog.
_ADD_BOUNDED = b"""
if redis.replicate_commands then redis.replicate_commands() end
local limit = tonumber(ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- Without that group, by the one that has least to do; without any, all entries wait for it.
  local backlog = redis.call('XLEN', KEYS[1])
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
    local waiting = group['lag']
    if not waiting then
      local start = '(' .. group['last-delivered-id']
      waiting = #redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', limit + 1)
    end
    backlog = math.min(backlog, waiting + group['pending'])
    if group['name'] == ARGV[1] then
      backlog = waiting + group['pending']
      break
    end
  end
  if backlog >= limit then return backlog end
end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
"""


class Post:
    """Something written, or to be written, whose outcome isn't known yet.

    :ivar replies: how many of Redis' replies to it are outstanding
    :ivar result: the first of them
    :ivar data: the value that tells it from other entries of the stream, if it isn't a request
    :ivar settled: how many entries of the group it acknowledges
    :ivar event: set once the outcome is known, if somebody waits for that
    :ivar written_at: when it was first written, on AnyIO's clock; ``None`` if it wasn't yet
    """

    __slots__ = (
        "data",
        "envelope",
        "event",
        "packed",
        "replies",
        "result",
        "settled",
        "to_stream",
        "total",
        "writer",
        "written_at",
    )

    def __init__(
        self,
        writer: Writer,
        envelope: Envelope | None,
        packed: bytes,
        replies: int,
        to_stream: bool,
    ) -> None:
        self.writer = writer
        self.envelope = envelope
        self.packed = packed
        self.replies = self.total = replies
        self.to_stream = to_stream
        self.result: Any = None
        self.data: bytes | None = None
        self.settled = 0
        self.event: Event | None = None
        self.written_at: float | None = None

    def __call__(self, reply: Any) -> None:
        """Take one of Redis' replies."""
        self.writer._take(self, reply)


class Writer:
    """Writes to the connection that it is attached to.

    :param returned: told of envelopes that could not be delivered
    :param on_stream: told how many entries are added to the stream or acknowledged, if not ``None``
    :ivar undeliverable: records that Redis refused, or whose recipient was gone
    :ivar repeated: writes of unknown outcome that were written again
    :ivar unacknowledged: acknowledgements of entries that others had taken over meanwhile
    """

    def __init__(
        self,
        keys: Keys,
        dialects: Dialects,
        *,
        group: bytes | None,
        max_message_size: int,
        max_backlog: int | None,
        signer: Signer | None,
        returned: Callable[[Envelope], object],
        on_stream: Callable[[int], object] | None,
    ) -> None:
        self._keys = keys
        self._on_stream = on_stream
        self._dialects = dialects
        self._max_size = max_message_size
        self._returned = returned
        self._signer = signer
        self._group = group
        self._backlog = None if max_backlog is None else b"%d" % max_backlog
        self._inboxes: OrderedDict[str, bytes] = OrderedDict()
        self._native = dialects.native
        # Whether nothing is added to commands, so that they may be put together the quick way.
        self._plain = signer is None and max_backlog is None
        self._heads: OrderedDict[tuple[str, Codec], bytes] = OrderedDict()
        self._request_head = _beginning(
            (b"XADD", keys.stream, b"*", b"from", self._native.sender), self._native.codec, 2
        )
        self._connection: Connection | None = None
        self._now: Callable[[], float] = current_time
        self._ledger: deque[Post] = deque()
        self._waiting_bytes = 0
        self._room: Event | None = None
        self._reason: Exception | None = None
        self._epoch = secrets.token_hex(4).encode()
        self._numbers = count(1)
        self._last_added = b""
        self.no_mkstream = True
        # Entries of the group whose replies have been queued: one command per write for them all.
        self._settled: list[bytes] = []
        self.sent = 0
        self.undeliverable = 0
        self.repeated = 0
        self.unacknowledged = 0

    # Writing

    async def send(self, envelope: Envelope) -> None:
        """Write a record that isn't a reply to an entry of a group."""
        if not self.send_nowait(envelope):
            await self.wait_flushed(envelope.deadline)

    def send_nowait(self, envelope: Envelope) -> bool:
        """Write a record; return whether nothing is to be waited for, by `wait_flushed`."""
        post = self._make(envelope)
        if post is None:
            return True
        self._post(post)
        return self.flush_nowait()

    async def send_and_confirm(self, envelope: Envelope) -> None:
        """Write a record, and wait until Redis has it.

        :raises DeliveryError: if it doesn't take it, or the recipient isn't there
        """
        post = self._make(envelope)
        if post is None:
            return
        post.event = Event()
        self._post(post)
        await self.flush()
        await post.event.wait()
        error = self._error(post)
        if error is not None:
            raise error

    def settle(self, entry_id: bytes, reply: Envelope | None) -> None:
        """Queue the acknowledgement of an entry of the group behind its reply, for one write."""
        post = None if reply is None else self._make(reply)
        self._settled.append(entry_id)  # not before: a reply that can't be made is replaced
        if post is None:
            self._acknowledge()
        else:
            self._post(post)  # the write that takes it asks for the acknowledgement, too

    def forward(self, entry_id: bytes, recipient: str, fields: list[bytes]) -> None:
        """Queue an entry of the group for the inbox of the peer that it is for, if there is one."""
        options = (b"NOMKSTREAM",) if self.no_mkstream else ()
        add = pack_command((b"XADD", self._inbox(recipient), *options, b"*", *fields))
        self._post(Post(self, None, add, 1, False))
        self._settled.append(entry_id)

    def flush_nowait(self) -> bool:
        """Write what is queued; return whether nothing is to be waited for, as `flush` does."""
        connection = self._connection
        return connection is not None and connection.flush_nowait()

    async def flush(self, deadline: float | None = None) -> None:
        """Write what is queued. While there is no connection, wait only if much is queued.

        :param deadline: when to wait no longer, on AnyIO's clock
        """
        if not self.flush_nowait():
            await self.wait_flushed(deadline)

    async def wait_flushed(self, deadline: float | None = None) -> None:
        """Wait for what `flush_nowait` has left."""
        if self._connection is not None:
            try:
                await self._connection.wait_flushed()
            except (TransportConnectionError, TransportClosedError):
                pass  # it is kept, and written to the next connection
        while self._connection is None and self._waiting_bytes > HIGH_WATER:
            room = self._room = self._room or Event()
            with move_on_after(None if deadline is None else deadline - current_time()) as scope:
                await room.wait()
            if scope.cancelled_caught:
                break
        if self._reason is not None:
            raise type(self._reason)(*self._reason.args)

    def expect_more(self) -> None:
        """Note that several records will be sent presently, such as answers to what was read."""
        if self._connection is not None:
            self._connection.expect_more()

    def _acknowledge(self) -> None:
        """Queue the acknowledgement of what was settled, behind the replies."""
        settled, self._settled = self._settled, []
        if settled:
            assert self._group is not None
            if self._on_stream is not None:
                self._on_stream(len(settled))
            command = pack_command((b"XACK", self._keys.stream, self._group, *settled))
            post = Post(self, None, command, 1, False)
            post.settled = len(settled)
            self._post(post)

    def _post(self, post: Post) -> None:
        self._ledger.append(post)
        connection = self._connection
        if connection is not None and connection.error is None:
            post.written_at = self._now()
            connection.post(post.packed, post.replies, post)
        else:
            self._waiting_bytes += len(post.packed)

    # Commands

    def _make(self, envelope: Envelope) -> Post | None:
        """Return what is to be written; ``None`` if its recipient knows nothing of the kind."""
        record, recipient = envelope.record, envelope.recipient
        if self._plain:
            if recipient is None:
                if record.__class__ is Request and self._dialects.own is self._native:
                    return self._make_request(envelope, record)
            elif self._dialects.of(recipient) is self._native:
                return self._make_addressed(envelope, recipient)
        dialect = self._dialects.of(recipient)
        if recipient is None and isinstance(record, (Cancel, Bye)):
            dialect = self._dialects.native  # on the control stream
        if dialect is not self._native:
            shared = dialect.encode(record, recipient)
            if shared is None:
                return None
            self._check_size(max(map(len, shared)))
            self.sent += 1
            return self._make_shared(envelope, shared)
        keys = self._keys
        if recipient is None and not isinstance(record, (Cancel, Bye)):
            fields = self._native.encode(record, None)
            self._check_size(max(map(len, fields)))
            self.sent += 1
            self._note_added()
            return Post(self, envelope, self._add_to_stream(fields), 1, True)
        number = b"%s.%d" % (self._epoch, next(self._numbers))
        fields = self._native.encode(record, recipient, number)
        self._check_size(max(map(len, fields)))
        self.sent += 1
        key = keys.control if recipient is None else self._inbox(recipient)
        if self._signer is not None:
            fields = self._signer.sign(key, fields)
        if recipient is not None:
            # A peer that has gone has no inbox, and must not get one back.
            options = (b"NOMKSTREAM",) if self.no_mkstream else ()
            return Post(
                self, envelope, pack_command((b"XADD", key, *options, b"*", *fields)), 1, False
            )
        bounds = (_CONTROL_LENGTH, _CONTROL_TTL_MS)
        if isinstance(record, Cancel) and envelope.token is not None and self._group is not None:
            command = (b"EVAL", _CANCEL, b"2", keys.stream, keys.control, envelope.token, *bounds)
            return Post(self, envelope, pack_command((*command, *fields)), 1, False)
        add = (b"XADD", keys.control, b"MAXLEN", b"~", _CONTROL_LENGTH, b"*", *fields)
        expire = (b"PEXPIRE", keys.control, _CONTROL_TTL_MS)
        return Post(self, envelope, pack_command(add) + pack_command(expire), 2, False)

    def _make_request(self, envelope: Envelope, record: Record) -> Post:
        """The quick way of most: the constant beginning of the command is made once."""
        data = self._native.codec.encode(record)
        size = len(data)
        if size > self._max_size:
            self._check_size(size)
        self.sent += 1
        if self._on_stream is not None:
            self._on_stream(1)
        packed = b"%s$%d\r\n%s\r\n%s" % (self._request_head, size, data, _MARK)
        return Post(self, envelope, packed, 1, True)

    def _make_addressed(self, envelope: Envelope, recipient: str) -> Post:
        codec = self._native.codec_for(recipient)
        data = codec.encode(envelope.record)
        if len(data) > self._max_size:
            self._check_size(len(data))
        self.sent += 1
        number = b"%s.%d" % (self._epoch, next(self._numbers))
        packed = b"%s$%d\r\n%s\r\n$1\r\nn\r\n$%d\r\n%s\r\n%s" % (
            self._head(recipient, codec),
            len(data),
            data,
            len(number),
            number,
            _MARK,
        )
        return Post(self, envelope, packed, 1, False)

    def _head(self, recipient: str, codec: Codec) -> bytes:
        """Return the beginning of the command that adds to a peer's inbox."""
        head = self._heads.get((recipient, codec))
        if head is None:
            if len(self._heads) >= _PEERS:
                self._heads.popitem(last=False)
            options = (b"NOMKSTREAM",) if self.no_mkstream else ()
            head = self._heads[recipient, codec] = _beginning(
                (b"XADD", self._inbox(recipient), *options, b"*", b"from", self._native.sender),
                codec,
                4,
            )
        return head

    def _note_added(self) -> None:
        if self._on_stream is not None:
            self._on_stream(1)

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            raise OverloadedError(
                f"a message of {size} bytes exceeds max_message_size ({self._max_size} bytes)"
            )

    def _make_shared(self, envelope: Envelope, fields: tuple[bytes, ...]) -> Post:
        bounded = isinstance(envelope.record, Request)
        post = Post(self, envelope, self._add_to_stream(fields, bounded=bounded), 1, True)
        post.data = fields[1]
        self._note_added()
        return post

    def _add_to_stream(self, fields: tuple[bytes, ...], *, bounded: bool = True) -> bytes:
        stream = self._keys.stream
        if self._signer is not None:
            fields = self._signer.sign(stream, fields)
        if self._backlog is None or self._group is None or not bounded:
            return pack_command((b"XADD", stream, b"*", *fields))
        command = (b"EVAL", _ADD_BOUNDED, b"1", stream, self._group, self._backlog)
        return pack_command((*command, *fields))

    def _inbox(self, recipient: str) -> bytes:
        inboxes = self._inboxes
        key = inboxes.get(recipient)
        if key is None:
            if len(inboxes) >= _PEERS:
                inboxes.popitem(last=False)
            key = inboxes[recipient] = self._keys.inbox(recipient)
        return key

    # Outcomes

    def _take(self, post: Post, reply: Any) -> None:
        """Take one of Redis' replies to a write. They come in the order of writing."""
        if isinstance(reply, Exception):
            if isinstance(reply, (TransportConnectionError, TransportClosedError)):
                return  # the outcome isn't known; it stays in the ledger
            if meaning_of(reply) is Meaning.ELSEWHERE:
                if self._connection is not None:
                    self._connection.break_off(reply)
                return
        if post.replies == post.total:
            post.result = reply
            if post.settled and isinstance(reply, int):
                self.unacknowledged += post.settled - reply
        post.replies -= 1
        if post.to_stream and isinstance(post.result, bytes):
            self._last_added = post.result
        if not post.replies and self._reason is None:
            self._ledger.popleft()
            self._finish(post)

    def _finish(self, post: Post) -> None:
        envelope, result = post.envelope, post.result
        if post.event is not None:
            post.event.set()
        elif envelope is None or _is_control(envelope.record):
            if isinstance(result, Exception):
                logger.warning("Redis refused an acknowledgement or a control: %s", result)
        elif result.__class__ is bytes:
            if post.to_stream and envelope.record.__class__ is Request:
                envelope.token = result
        else:
            error = self._error(post)
            if error is not None:
                self._give_back(envelope, error)

    def _error(self, post: Post) -> Exception | None:
        result, envelope = post.result, post.envelope
        if isinstance(result, Exception):
            return refusal(result)
        if result is None and envelope is not None:
            return DeliveryError(f"peer {envelope.recipient!r} is not there: it has no inbox")
        if post.to_stream and isinstance(result, int):
            return OverloadedError(f"max_backlog is reached: {result} requests wait for the group")
        return None

    def _give_back(self, envelope: Envelope, error: Exception) -> None:
        self.undeliverable += 1
        self._returned(Envelope(envelope.record, None, envelope.recipient, error=error))

    # Connections

    def detach(self) -> None:
        """Note that the connection was lost: what comes now waits for the next one."""
        self._connection = None
        self._waiting_bytes = sum(len(post.packed) for post in self._ledger)

    async def attach(self, connection: Connection, clock_offset: float) -> None:
        """Write to this connection from now on; first what is still open from the last one.

        :param clock_offset: AnyIO's clock less Redis', in seconds
        """
        self._now = clock()
        await self._look_up(connection, clock_offset)
        now = self._now()
        for post in tuple(self._ledger):
            if post.to_stream and self._is_too_late(post, now):
                self._drop(post, RPCTimeoutError("the request's time ran out before it was sent"))
                continue
            post.replies, post.result = post.total, None
            if post.written_at is None:
                post.written_at = now
            else:
                self.repeated += 1
            connection.post(post.packed, post.replies, post)
        self._connection = connection
        connection.before_write = self._acknowledge
        self._acknowledge()
        self._waiting_bytes = 0
        if self._room is not None:
            self._room.set()
            self._room = None
        await connection.flush()

    def end(self, reason: Exception) -> None:
        """Fail what is open: there will be no connection any more."""
        self._reason = reason
        if self._room is not None:
            self._room.set()
        while self._ledger:
            post = self._ledger.popleft()
            if post.event is not None:
                post.result = reason
                post.event.set()

    async def _look_up(self, connection: Connection, clock_offset: float) -> None:
        """Take from the ledger the requests that are in the stream already."""
        requests: dict[str, Post] = {}
        others: dict[bytes, deque[Post]] = {}
        first = current_time()
        for post in self._ledger:
            if not post.to_stream or post.written_at is None or post.envelope is None:
                continue
            first = min(first, post.written_at)
            record = post.envelope.record
            if post.data is not None:
                others.setdefault(post.data, deque()).append(post)
            elif isinstance(record, Request):
                requests[record.id] = post
        start = b"%d" % max(int((first - clock_offset - _MARGIN) * 1000), 0)
        if others and self._last_added:
            # An item of a stream may look like the one before, which was answered.
            start = b"(" + self._last_added
        while requests or others:
            entries: Any = await connection.execute(
                b"XRANGE", self._keys.stream, start, b"+", b"COUNT", _PAGE
            )
            for entry_id, fields in entries:
                start = b"(" + entry_id
                found = self._find(fields, requests, others)
                if found is not None:
                    self._ledger.remove(found)
                    found.result = entry_id
                    self._finish(found)
            if len(entries) < int(_PAGE):
                return

    def _find(
        self, fields: list[bytes], requests: dict[str, Post], others: dict[bytes, deque[Post]]
    ) -> Post | None:
        """Return the write that an entry is of, and take it from those that are looked for."""
        same = others.get(fields[1]) if len(fields) > 1 else None
        if same:
            post = same.popleft()
            if not same:
                del others[fields[1]]
            return post
        # Another peer's entry isn't decoded, nor one that isn't valid.
        native = self._dialects.native
        if not requests or native.sender not in fields or not native.matches(fields):
            return None
        try:
            record = native.decode(fields).record
        except ProtocolError:
            return None
        return requests.pop(record.id, None) if isinstance(record, Request) else None

    def _is_too_late(self, post: Post, now: float) -> bool:
        """Whether a request that waited ran out of time; if not, its budget is made right."""
        envelope = post.envelope
        if envelope is None or not isinstance(envelope.record, Request):
            return False
        if envelope.deadline is None or envelope.record.d is UNSET:
            return False
        left = int((envelope.deadline - now) * 1000)
        if left <= 0:
            return True
        if post.data is None:  # other dialects carry no deadline
            envelope.record.d = left
            fields = self._dialects.native.encode(envelope.record, envelope.recipient)
            post.packed = self._add_to_stream(fields)
        return False

    def _drop(self, post: Post, error: Exception) -> None:
        self._ledger.remove(post)
        post.result = error
        if post.event is not None:
            post.event.set()
        elif post.envelope is not None:
            self._give_back(post.envelope, error)


def refusal(exc: Exception) -> Exception:
    """Return the error for an entry that Redis did not take."""
    if not isinstance(exc, RedisError):
        return exc
    error = DeliveryError(f"Redis refused the message: {quoted(exc)}")
    error.__cause__ = exc
    return error


def _beginning(command: tuple[bytes, ...], codec: Codec, more: int) -> bytes:
    """Return a packed command up to its last values: the encoded record, and some more."""
    name = codec.name.encode()
    count = len(command) + 2 + more
    return b"*%d\r\n" % count + b"".join(
        b"$%d\r\n%s\r\n" % (len(part), part) for part in (*command, name)
    )


def _is_control(record: Record) -> bool:
    kind = record.__class__
    return kind is Cancel or kind is Bye
