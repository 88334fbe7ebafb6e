"""What envelopes become on their way to Redis, without Redis."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc import OverloadedError
from anyio_kkrpc._protocol._records import (
    Bye,
    CallbackCall,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
)
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._writing._commands import Commands
from anyio_kkrpc.redis._writing._kinds import is_control
from anyio_kkrpc.redis._writing._ledger import Post
from anyio_kkrpc.redis.dialects import SharedPeer
from anyio_kkrpc.redis.dialects._signing import FRESH, Signer
from anyio_kkrpc.redis.dialects.native import MARK
from tests.strategies import records, texts

from .pure import CALLER, GROUP, KEYS, STREAM, commands, dialects, parsed

KEY = b"a secret of sixteen bytes"
INBOX = KEYS.inbox(CALLER)


def made(maker: Commands, record: Record, recipient: str | None = None) -> Post:
    post = maker.make(Envelope(record, None, recipient))
    assert post is not None
    return post


def fields_of(post: Post) -> list[bytes]:
    """Return what stands behind the id of the entry that a post adds."""
    command = parsed(post.packed)[0]
    return command[command.index(b"*") + 1 :]


@settings(max_examples=30)
@given(record=records(st.integers() | texts), recipient=st.sampled_from([None, CALLER]))
def test_both_ways_are_one(record: Record, recipient: str | None) -> None:
    """What is put together the quick way is what the dialect says, and is read as what it was."""
    quick = commands(GROUP, max_message_size=100_000)
    # With a signature, nothing goes the quick way.
    signer = Signer(KEY, lambda: 1.0, lambda: b"nonce")
    long = commands(GROUP, max_message_size=100_000, signer=signer)
    try:
        post = quick.make(Envelope(record, None, recipient))
    except TypeError:
        with pytest.raises(TypeError):
            long.make(Envelope(record, None, recipient))
        return
    other = long.make(Envelope(record, None, recipient))
    assert (post is None) is (other is None)
    if post is None or other is None:
        assert isinstance(record, Cancel)
        return
    ours, signed = parsed(post.packed), parsed(other.packed)
    assert ours[0][:-1] == signed[0][: len(ours[0]) - 1]
    assert ours[1:] == signed[1:]
    assert (post.number, post.to_stream, post.replies) == (
        other.number,
        other.to_stream,
        other.replies,
    )
    entry = dialects(session_id="reader").decode(fields_of(post))
    assert entry is not None
    assert (entry.record, entry.sender) == (record, "me")
    numbered = recipient is not None or is_control(record)
    assert (entry.number is not None) is numbered
    assert post.number == (None if recipient is None else entry.number)


def test_where_each_goes() -> None:
    """Requests to the stream, what is for one peer to its inbox, the rest to the control stream."""
    maker = commands()
    request = made(maker, Request("1", "call", ["f"], []))
    assert parsed(request.packed)[0][:4] == [b"XADD", STREAM, b"*", b"from"]
    assert request.to_stream
    assert request.number is None
    reply = made(maker, Reply("1", 2), CALLER)
    assert parsed(reply.packed)[0][:4] == [b"XADD", INBOX, b"NOMKSTREAM", b"*"]
    for record in (Cancel("1"), Bye()):
        assert is_control(record)
        post = made(maker, record)
        add, expire = parsed(post.packed)
        assert add[:2] == [b"XADD", KEYS.control]
        assert expire[:2] == [b"PEXPIRE", KEYS.control]
        assert post.replies == 2
    assert maker.sent == 4
    assert [maker.key_of(post) for post in (request, reply, post)] == [STREAM, INBOX, KEYS.control]


def test_cancel_of_a_request_to_the_group() -> None:
    """It is made where it is known who has the request."""
    assert commands(GROUP).make(Envelope(Cancel("1"))) is None


def test_old_servers_make_inboxes() -> None:
    """Also where another one has answered before, as when servers are upgraded one by one."""
    maker = commands()
    for modern in (False, True, False):
        maker.meet_server(modern=modern)
        expected = [b"XADD", INBOX, *([b"NOMKSTREAM"] if modern else []), b"*", b"from"]
        for _ in range(2):
            (command,) = parsed(made(maker, Reply("1", 2), CALLER).packed)
            assert command[: len(expected)] == expected
            assert len(command) == len(expected) + 7


RECORDS = [
    Reply("1", 1),
    CallbackCall("c", [1]),
    StreamReply("s", "1", v=1),
    Request("2", "get", ["x"]),
]


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["add", "anew", "back"]))))
def test_numbers_have_no_gaps(steps: list[tuple[str, str]]) -> None:
    """Each inbox counts from 1, anew in a new epoch; what won't be written leaves its number."""
    maker = commands()
    expected: dict[str, int] = {}
    epochs: dict[str, set[bytes]] = {"a": set(), "b": set()}
    for number, (peer, step) in enumerate(steps):
        if step == "anew":
            maker.begin_anew(peer)
            expected[peer] = 0
            continue
        post = made(maker, RECORDS[number % len(RECORDS)], peer)
        assert post.number is not None
        epoch, _, count = post.number.partition(b".")
        assert int(count) == expected.get(peer, 0) + 1
        assert epoch.startswith(b"e+")
        if int(count) == 1:
            epochs[peer].add(epoch)
        assert epoch in epochs[peer]
        if step == "back":
            maker.take_back(post)
        else:
            expected[peer] = int(count)
    assert not epochs["a"] & epochs["b"]


@pytest.mark.parametrize("recipient", [None, CALLER])
@pytest.mark.parametrize("signed", [False, True])
def test_what_is_too_large_leaves_nothing_behind(recipient: str | None, signed: bool) -> None:
    """It isn't counted, and takes no number."""
    added: list[int] = []
    signer = Signer(KEY, lambda: 1.0, lambda: b"nonce") if signed else None
    maker = commands(max_message_size=100, signer=signer, added=added.append)
    large, small = Request("1", "call", ["f"], ["x" * 100]), Request("2", "call", ["f"], [])
    with pytest.raises(OverloadedError, match="max_message_size"):
        maker.make(Envelope(large, None, recipient))
    assert maker.sent == 0
    assert added == []
    post = made(maker, small, recipient)
    assert post.number == (None if recipient is None else b"e+2.1")
    assert maker.sent == 1
    assert added == ([1] if recipient is None else [])


def test_backlog() -> None:
    """A request to the group asks first; nothing else does."""
    maker = commands(GROUP, max_backlog=7)
    (command,) = parsed(made(maker, Request("1", "call", ["f"], [])).packed)
    assert command[0] == b"EVAL"
    assert command[2:6] == [b"1", STREAM, GROUP, b"7"]
    assert command[6:8] == [b"from", b"me"]
    assert parsed(made(maker, Reply("1", 1), CALLER).packed)[0][0] == b"XADD"
    alone = commands(max_backlog=7)
    assert parsed(made(alone, Request("1", "call", ["f"], [])).packed)[0][0] == b"XADD"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("recipient", [None, CALLER])
def test_signatures_are_renewed(recipient: str | None) -> None:
    """What waits for longer than a signature is good for is signed anew, and is the same else."""
    clock, nonces = Clock(), iter([b"n1", b"n2", b"n3"])
    maker = commands(signer=Signer(KEY, clock, lambda: next(nonces)))
    post = made(maker, Request("1", "call", ["f"], []), recipient)
    before = fields_of(post)
    key = maker.key_of(post)
    reader = Signer(KEY, clock, lambda: b"")
    reader.check(key, b"1000000-0", before)
    clock.now += FRESH
    maker.refresh(post)
    assert fields_of(post) == before
    clock.now += 1
    maker.refresh(post)
    after = fields_of(post)
    assert after[:-1] == before[:-1]
    assert b".n2." in after[-1]
    reader.check(key, b"%d-0" % (clock.now * 1000), after)


def test_what_takes_the_place_of_what_is_of_no_use() -> None:
    """It has the same number and is small: a cancel for a request, an error for a reply."""
    maker = commands()
    places: list[tuple[Record, type[Any]]] = [
        (Request("1", "call", ["f"], ["x" * 500]), Cancel),
        (Reply("2", "x" * 500), Reply),
    ]
    for record, kind in places:
        post = made(maker, record, CALLER)
        small = maker.small(post)
        assert small is not None
        entry = dialects(session_id="reader").decode(fields_of(small))
        assert entry is not None
        assert type(entry.record) is kind
        assert entry.number == post.number == small.number
        assert len(small.packed) < len(post.packed)
    assert maker.small(made(maker, CallbackCall("c", [1]), CALLER)) is None
    assert maker.small(made(maker, Request("3", "call", ["f"], []))) is None


@pytest.mark.parametrize("recipient", [None, CALLER])
def test_budgets_are_renewed(recipient: str | None) -> None:
    """A request that has waited leaves with the time that its caller has left."""
    maker = commands(signer=Signer(KEY, lambda: 1.0, lambda: b"n"))
    post = made(maker, Request("1", "call", ["f"], [], d=5000), recipient)
    number = post.number
    maker.renew(post, 70)
    entry = dialects(session_id="reader").decode(fields_of(post)[:-2])
    assert entry is not None
    assert isinstance(entry.record, Request)
    assert entry.record.d == 70
    assert entry.number == number


@pytest.mark.parametrize("recipient", [None, CALLER])
@pytest.mark.parametrize("own", ["native", "kkrpc-2", "kkrpc-0"])
def test_written_once_more(own: str, recipient: str | None) -> None:
    """It is marked where its dialect has a mark, and `max_backlog` doesn't keep it out."""
    maker = commands(GROUP, dialects(own), max_backlog=1)
    sent = Envelope(Request("1", "call", ["f"], []), None, recipient, token=b"1-0")
    for times in (1, 2):
        post = maker.repeat(sent)
        fields = fields_of(post)
        entry = dialects(own, session_id="reader").decode(fields)
        assert entry is not None
        assert entry.record == Request("1", "call", ["f"], [])
        assert entry.again == (times if own == "native" else 0)
        assert sent.token is (post if own == "native" and recipient is None else None)
        assert sent.attempt == times + 1
    if own == "native":
        maker.renew(post, 70)
        entry = dialects(session_id="reader").decode(fields_of(post))
        assert entry is not None
        assert entry.again == 2


def test_the_group() -> None:
    """What is said about its entries."""
    added: list[int] = []
    maker = commands(GROUP, added=added.append)
    ids = [b"1-0", b"2-0"]
    post = maker.acknowledge(ids)
    assert parsed(post.packed) == [[b"XACK", STREAM, GROUP, *ids]]
    assert post.ids == ids
    assert added == [2]
    back = maker.bring_back([(b"1-0", 1), (b"2-0", 3)])
    (command,) = parsed(back.packed)
    assert command[2:] == [b"1", STREAM, GROUP, b"consumer", b"1-0", b"1", b"2-0", b"3"]
    assert back.brings_back
    fields = [b"data", b"x", b"sessionId", b"y"]
    handed = maker.forward(b"3-0", 2, CALLER, fields)
    assert parsed(handed.packed) == [[b"XADD", INBOX, b"NOMKSTREAM", b"*", *fields]]
    assert (handed.answers, handed.attempt) == (b"3-0", 2)


def test_what_typescript_peers_are_told() -> None:
    """All of it goes to the stream, under no number."""
    maker = commands(speaks=dialects("kkrpc-2"))
    post = made(maker, Request("1", "call", ["f"], []))
    (command,) = parsed(post.packed)
    assert command[:4] == [b"XADD", STREAM, b"*", b"data"]
    assert b'"sentAt":1500' in command[4]
    assert post.data == command[4]
    assert post.number is None
    with pytest.raises(TypeError, match="keyword arguments"):
        maker.make(Envelope(Request("2", "call", ["f"], [], k={"a": 1})))


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_known_of_a_peer_changes(signed: bool) -> None:
    """Each answer is in the codec and the form that its peer has shown to read last."""
    speaks = dialects()
    signer = Signer(KEY, lambda: 1.0, lambda: b"nonce") if signed else None
    maker = commands(GROUP, speaks, signer=signer)

    def comes(codec: str, *mark: bytes) -> None:
        data = get_codec(codec).encode(Cancel("x"))
        speaks.decode([b"from", CALLER.encode(), codec.encode(), data, b"n", b"e+1.1", *mark])

    def answer() -> tuple[bool, bytes]:
        """Return whether it may leave together with others, and its codec."""
        post = made(maker, Reply("1", v=1), CALLER)
        loose = post.inbox is not None
        maker.alone(post)
        return loose, fields_of(post)[2]

    assert answer() == (False, b"json")  # nothing is known of it
    for codec, mark in (("json", MARK), ("cbor", MARK), ("json", (b"v", b"2")), ("cbor", MARK)):
        comes(codec, *mark)
        for _ in range(2):
            assert answer() == (mark == MARK, codec.encode())


def test_two_of_one_id() -> None:
    """A TypeScript peer has the id of a native one: each is answered in its own dialect."""
    speaks = dialects()
    maker = commands(GROUP, speaks)
    speaks.decode([b"from", CALLER.encode(), b"json", b'{"t":"x","id":"1"}', *MARK])
    shared = SharedPeer.of(CALLER, speaks.compact)
    for _ in range(2):
        assert made(maker, Reply("1", v=1), CALLER).inbox is not None
        assert made(maker, Reply("1", v=1), shared).to_stream
