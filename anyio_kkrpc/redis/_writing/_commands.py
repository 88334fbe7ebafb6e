"""What a transport says to Redis about envelopes, as packed commands, without any I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter

from ..._exceptions import RPCTimeoutError
from ..._wire_errors import library_error
from ...abc import Envelope
from ...records import Bye, Cancel, Record, Reply, Request
from .._connection._command import pack as pack_command
from .._stream._keys import CONTROL_LENGTH, CONTROL_TTL_MS, Keys
from ..dialects import Dialects
from ..dialects._base import check_size
from ..dialects._signing import FRESH, Signer
from ..dialects.native import MARK, MARK_OF_SEVERAL, UNMARKED, NativeDialect
from ._inboxes import PACKED_MARK, Inbox, Inboxes, fields_of, packed_parts
from ._kinds import again, is_control
from ._ledger import Post
from ._scripts import ADD_BOUNDED, BRING_BACK

__all__ = ("Commands",)

# Bytes of a record that leaves together with others; what has more is worth an entry of its own.
_SMALL = 8192
# What stands alone: it is withdrawn, or written again in another form.
_ALONE = frozenset((Request, Cancel, Bye))
_PACKED = attrgetter("packed")
# Parts of an entry of one record in the stream, and in an inbox, up to the mark.
_TO_STREAM, _TO_INBOX = 6, 8


class Commands:
    """Makes the posts of a writer.

    :param group: the group whose entries are acknowledged, if any
    :param consumer: this peer's name in it
    :param epoch: what no run of this peer, or of another one, had before
    :param added: told how many entries are added to the stream or acknowledged, if not ``None``
    :ivar keys: of the stream
    :ivar sent: records that were put into posts
    """

    def __init__(
        self,
        keys: Keys,
        dialects: Dialects,
        group: bytes | None,
        consumer: bytes,
        max_message_size: int,
        max_backlog: int | None,
        signer: Signer | None,
        epoch: bytes,
        added: Callable[[int], object] | None,
    ) -> None:
        self.keys = keys
        self._dialects = dialects
        self._native = dialects.native
        self._group = group
        self._consumer = consumer
        self._max_size = max_message_size
        self._backlog = None if max_backlog is None else b"%d" % max_backlog
        self._signer = signer
        self._added = added
        # Whether nothing is added to commands, so that they may be put together the quick way.
        self._plain = signer is None and max_backlog is None
        name = self._native.codec.name.encode()
        head = (b"XADD", keys.stream, b"*", b"from", self._native.sender, name)
        # The beginning of the command that adds a request: then come the record, and the mark.
        self._request_head = b"*%d\r\n%s" % (len(head) + 3, packed_parts(*head))
        self._inboxes = Inboxes(keys, epoch)
        self._by_peer = self._inboxes.by_peer
        self._small = min(_SMALL, max_message_size)
        self._control = self._inboxes.open(keys.control)
        # What keeps XADD from making an inbox: a peer that has gone must not get it back.
        self._if_there: tuple[bytes, ...] = (b"NOMKSTREAM",)
        self.sent = 0

    def meet_server(self, *, modern: bool) -> None:
        """Note whether the server is Redis 6.2 or later, which knows NOMKSTREAM."""
        self._if_there = (b"NOMKSTREAM",) if modern else ()
        self._inboxes.begin_anew()

    def make(
        self, envelope: Envelope, answers: bytes | None = None, attempt: int = 1
    ) -> Post | None:
        """Return what is to be written; ``None`` if its recipient knows nothing of the kind, or if
        it is the cancel of a request to the group: see `Cancels`.

        :param answers: the entry of the group that it is the reply to
        :param attempt: how often that was delivered
        """
        record, recipient = envelope.record, envelope.recipient
        if recipient is not None and record.__class__ not in _ALONE:
            inbox = self._by_peer.get(recipient)
            if (
                inbox is None
                or inbox.known != self._native.changes
                or recipient.__class__ is not str
            ):
                inbox = self._meet(recipient)
            if inbox is not None and inbox.codec is not None:
                # The quick way of most: what its owner reads was found out before.
                data = inbox.codec.encode(record)
                size = len(data)
                if size > self._small or not inbox.several:
                    post = self._make_alone(envelope, inbox, data)
                    post.answers, post.attempt = answers, attempt
                    return post
                self.sent += 1
                inbox.last = count = inbox.last + 1
                packed = b"%s$%d\r\n%s\r\n" % (inbox.codec_name, size, data)
                return Post(packed, envelope, 1, False, inbox, count, answers, attempt)
        other = self._make_other(envelope, record, recipient)
        if other is not None and answers is not None:
            other.answers, other.attempt = answers, attempt
        return other

    def _make_other(self, envelope: Envelope, record: Record, recipient: str | None) -> Post | None:
        """Return what `make` does for what isn't on the quick way of replies."""
        if recipient is not None:
            inbox = self._meet(recipient) if self._plain else None
            if inbox is not None and inbox.codec is not None:
                return self._make_alone(envelope, inbox, inbox.codec.encode(record))
        elif self._plain and record.__class__ is Request and self._dialects.own is self._native:
            return self._make_request(envelope, record)
        dialect = self._dialects.of(recipient)
        control = recipient is None and is_control(record)
        if dialect is not self._native and not control:
            shared = dialect.encode(record, recipient)
            if shared is None:
                return None
            post = Post(b"", envelope, 1, True, data=shared[1])
            return self._add_to_stream(shared, post, bounded=isinstance(record, Request))
        if control:
            grouped = self._group is not None and record.__class__ is Cancel
            return None if grouped else self.make_control(envelope)
        if recipient is None:
            fields = self._native.encode(record, None)
            post = envelope.token = Post(b"", envelope, to_stream=True)
            return self._add_to_stream(fields, post)
        post = Post(b"", envelope)
        self.number_anew(post)
        self.sent += 1
        return post

    def make_control(self, envelope: Envelope) -> Post:
        """Return what tells all peers."""
        keys, control = self.keys, self._control
        fields = self._encode(envelope, b"%s.%d" % (control.epoch, control.last + 1))
        control.last += 1
        self.sent += 1
        pack = partial(self._pack, key=keys.control, fields=fields)
        add = (b"XADD", keys.control, b"MAXLEN", b"~", CONTROL_LENGTH, b"*")
        expire = pack_command((b"PEXPIRE", keys.control, CONTROL_TTL_MS))
        return self._sealed(partial(pack, add, behind=expire), Post(b"", envelope, 2))

    def forward(self, entry_id: bytes, attempt: int, recipient: str, fields: list[bytes]) -> Post:
        """Return what hands an entry of the group on to the inbox of the peer that it is for."""
        command = (b"XADD", self._inboxes.of(recipient).key, *self._if_there, b"*", *fields)
        packed = pack_command(command)
        return Post(packed, answers=entry_id, attempt=attempt, forwarded_to=recipient)

    def acknowledge(self, entries: Mapping[bytes, Post | None]) -> Post:
        """Return what acknowledges entries of the group, which are given with their replies."""
        assert self._group is not None
        if self._added is not None:
            self._added(len(entries))
        command = (b"XACK", self.keys.stream, self._group, *entries)
        return Post(pack_command(command), ids=entries)

    def bring_back(self, entries: list[tuple[bytes, int]]) -> Post:
        """Return what makes entries of the group pending again.

        :param entries: their ids, with the number of their deliveries
        """
        assert self._group is not None
        flat: list[bytes] = []
        for entry_id, attempt in entries:
            flat += (entry_id, b"%d" % attempt)
        command = (b"EVAL", BRING_BACK, b"1", self.keys.stream, self._group, self._consumer)
        ids: dict[bytes, Post | None] = dict.fromkeys(entry_id for entry_id, _ in entries)
        return Post(pack_command((*command, *flat)), ids=ids, brings_back=True)

    def renew(self, post: Post, left: int | None = None) -> None:
        """Write a request anew into its post, where its dialect has a budget and repetitions.

        :param left: its budget in milliseconds from now on, if that changes
        """
        envelope = post.envelope
        assert envelope is not None
        assert isinstance(envelope.record, Request)
        if left is not None and post.data is None:
            envelope.record.d = left
        if post.to_stream and post.data is None:
            fields = _as_written(post, self._native, left)
            fields = fields or self._native.encode(envelope.record, None)
            fields += again(envelope)
            self._sealed(self._adding(fields, bounded=envelope.attempt == 1), post)
        elif post.number is not None:
            inbox = self._inboxes.of(str(envelope.recipient))
            self._add(inbox, _as_written(post, self._native, left) + again(envelope), post)

    def repeat(self, envelope: Envelope) -> Post:
        """Return what writes a request once more, marked as repeated where its dialect has a mark.
        It was accepted before, and isn't refused by ``max_backlog``.
        """
        envelope.attempt += 1
        envelope.token = None
        recipient = envelope.recipient
        dialect = self._dialects.of(recipient)
        if dialect is not self._native:
            fields = dialect.encode(envelope.record, recipient)
            assert fields is not None
            post = Post(b"", envelope, 1, True, data=fields[1])
            return self._add_to_stream(fields, post, bounded=False)
        self.sent += 1
        if recipient is not None:
            post = Post(b"", envelope)
            self.number_anew(post)
            return post
        if self._added is not None:
            self._added(1)
        post = envelope.token = Post(b"", envelope, to_stream=True)
        self.renew(post)
        return post

    def mark_repeated(self, post: Post) -> None:
        """Mark a request that waits as repeated: another server may have had it."""
        if post.envelope is not None and isinstance(post.envelope.record, Request):
            post.envelope.attempt += 1
            self.renew(post)

    def refresh(self, post: Post) -> None:
        """Sign anew what has waited: a signature is good for the time in which it was made."""
        if post.signed is not None and self._signer is not None:
            pack, signed_at = post.signed
            if abs(self._signer.now() - signed_at) > FRESH:
                self._sealed(pack, post)

    def small(self, post: Post) -> Post | None:
        """Return what takes the place of something for an inbox that nobody waits for any more.

        Its number is not left out, since its recipient would wait for it.

        :return: ``None`` if nothing can
        """
        envelope, number = post.envelope, post.number
        if envelope is None or envelope.recipient is None or number is None:
            return None
        record: Record
        if isinstance(envelope.record, Request):
            record = Cancel(envelope.record.id)
        elif isinstance(envelope.record, Reply):
            error = RPCTimeoutError("its time ran out before it could be sent")
            record = Reply(envelope.record.id, e=library_error(error))
        else:
            return None
        inbox, small = self._inboxes.of(envelope.recipient), Post(b"", number=number)
        fields = self._encode(Envelope(record, None, envelope.recipient), number)
        return self._add(inbox, fields, small)

    def take_back(self, post: Post) -> None:
        """Note that the post that was made last won't be written: the next one has its number."""
        if post.number is not None and post.envelope is not None:
            self._inboxes.of(str(post.envelope.recipient)).last -= 1

    def takes_late(self, recipient: str) -> bool:
        """Whether a peer is known to take what comes behind a greater number."""
        return self._native.version_of(recipient) != UNMARKED

    def begin_anew(self, recipient: str) -> None:
        """Count anew for a peer for which a number is left out."""
        self._inboxes.forget(recipient)

    def number_anew(self, post: Post) -> None:
        """Give a post for an inbox the next number."""
        envelope = post.envelope
        assert envelope is not None
        inbox = self._inboxes.of(str(envelope.recipient))
        post.number = number = b"%s.%d" % (inbox.epoch, inbox.last + 1)
        fields = _as_written(post, self._native)
        if fields:
            fields = (*fields[:5], number, *fields[6:], *again(envelope))
        else:
            fields = self._encode(envelope, number)
        self._add(inbox, fields, post)
        inbox.last += 1

    def key_of(self, post: Post) -> bytes:
        """Return the key that a post writes to."""
        if post.to_stream or post.envelope is None:
            return self.keys.stream
        recipient = post.envelope.recipient
        return self.keys.control if recipient is None else self.keys.inbox(recipient)

    def _make_request(self, envelope: Envelope, record: Record) -> Post:
        """The quick way of most: the constant beginning of the command is made once."""
        data = self._native.codec.encode(record)
        size = len(data)
        if size > self._max_size:
            check_size(size, self._max_size)
        self.sent += 1
        if self._added is not None:
            self._added(1)
        packed = b"%s$%d\r\n%s\r\n%s" % (self._request_head, size, data, PACKED_MARK)
        post = envelope.token = Post(packed, envelope, 1, True)
        return post

    def _meet(self, recipient: str) -> Inbox | None:
        """Find out what a peer reads; return its inbox unless it speaks another dialect."""
        native = self._native
        if self._dialects.of(recipient) is not native:
            return None
        inbox = self._inboxes.of(recipient)
        codec = native.codec_for(recipient)
        if inbox.codec is not codec:
            inbox.begin(codec, self._if_there, native.sender)
        inbox.several, inbox.known = recipient in native.read_several, native.changes
        return inbox

    def _make_alone(self, envelope: Envelope, inbox: Inbox, data: bytes) -> Post:
        """Make a command of a record that doesn't leave together with others."""
        size, codec = len(data), inbox.codec
        if size > self._max_size:
            check_size(size, self._max_size)
        self.sent += 1
        inbox.last = last = inbox.last + 1
        post = Post(b"", envelope)
        number = post.number = b"%s.%d" % (inbox.epoch, last)
        if self._signer is None:
            # One copy of what may be large.
            parts = (inbox.codec_name, b"$%d\r\n" % size, data, b"\r\n")
            post.packed = inbox.pack(number, 1, parts)
            return post
        assert codec is not None
        fields = (b"from", self._native.sender, codec.name.encode(), data, b"n", number, *MARK)
        return self._add(inbox, fields, post)

    def alone(self, post: Post) -> None:
        """Make a command of a record that doesn't leave together with others any more."""
        inbox, post.inbox = post.inbox, None
        if inbox is not None:
            post.number = b"%s.%d" % (inbox.epoch, post.count)
            records = [post.packed]
            if self._signer is None:
                post.packed = inbox.pack(post.number, 1, records)
            else:
                self._sealed(partial(self._join_signed, inbox, post.number, records), post)

    def join(self, posts: list[Post]) -> bytes:
        """Return what adds the records of posts to the inbox that they are for, as one entry."""
        first = posts[0]
        inbox: Inbox = first.inbox
        number, records = b"%s.%d" % (inbox.epoch, first.count), [*map(_PACKED, posts)]
        if self._signer is None:
            return inbox.pack(number, len(records), records)
        return self._join_signed(inbox, number, records)

    def _join_signed(self, inbox: Inbox, number: bytes, records: list[bytes]) -> bytes:
        """Return what adds an entry that is signed.

        :param number: the first record's
        :param records: each with its codec, packed
        """
        first, *others = (_unpacked(record) for record in records)
        mark = MARK_OF_SEVERAL if others else MARK
        fields = (b"from", self._native.sender, *first, b"n", number, *mark, *chain(*others))
        return self._pack((b"XADD", inbox.key, *self._if_there, b"*"), inbox.key, fields)

    def _add(self, inbox: Inbox, fields: tuple[bytes, ...], post: Post) -> Post:
        """Put what adds an entry to an inbox into a post."""
        command = (b"XADD", inbox.key, *self._if_there, b"*")
        return self._sealed(partial(self._pack, command, inbox.key, fields), post)

    def _add_to_stream(
        self, fields: tuple[bytes, ...], post: Post, *, bounded: bool = True
    ) -> Post:
        """Put what adds an entry to the stream into a post."""
        check_size(max(map(len, fields)), self._max_size)
        self.sent += 1
        if self._added is not None:
            self._added(1)
        return self._sealed(self._adding(fields, bounded=bounded), post)

    def _adding(self, fields: tuple[bytes, ...], *, bounded: bool = True) -> Callable[[], bytes]:
        """Return what packs the command that adds fields to the stream."""
        stream = self.keys.stream
        command: tuple[bytes, ...] = (b"XADD", stream, b"*")
        if self._backlog is not None and self._group is not None and bounded:
            command = (b"EVAL", ADD_BOUNDED, b"1", stream, self._group, self._backlog)
        return partial(self._pack, command, stream, fields)

    def _pack(
        self, command: tuple[bytes, ...], key: bytes, fields: tuple[bytes, ...], behind: bytes = b""
    ) -> bytes:
        """Pack a command that ends with fields, which are signed if there is a key."""
        if self._signer is not None:
            fields = self._signer.sign(key, fields)
        return pack_command((*command, *fields)) + behind

    def _sealed(self, pack: Callable[[], bytes], post: Post) -> Post:
        """Put commands into a post, and how they are packed again if they are signed."""
        post.packed = pack()
        if self._signer is not None:
            post.signed = pack, self._signer.now()
        return post

    def _encode(self, envelope: Envelope, number: bytes) -> tuple[bytes, ...]:
        """Return the fields of a native entry with a number."""
        fields = self._native.encode(envelope.record, envelope.recipient, number)
        fields += again(envelope)
        check_size(max(map(len, fields)), self._max_size)
        return fields


def _unpacked(record: bytes) -> tuple[bytes, bytes]:
    """Return the name of a record's codec, and the record."""
    _, name, _, rest = record.split(b"\r\n", 3)
    return name, rest[:-2]


def _as_written(post: Post, native: NativeDialect, left: int | None = None) -> tuple[bytes, ...]:
    """Return the fields that a post adds, as far as they don't depend on when it is written; none
    if it is new. What was given to be sent may have been changed since.

    :param left: the budget of the request that it is, if that changes
    """
    fields = fields_of(post.packed)[: _TO_STREAM if post.to_stream else _TO_INBOX]
    if left is not None:
        codec = native.codec_named(fields[2])
        record = codec.decode(fields[3])
        assert isinstance(record, Request)
        record.d = left
        fields[3] = codec.encode(record)
    return tuple(fields)
