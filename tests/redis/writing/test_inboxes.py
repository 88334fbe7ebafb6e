"""What is known of the inboxes that a writer adds to."""

from __future__ import annotations

from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._writing import _inboxes
from anyio_kkrpc.redis._writing._inboxes import Inbox, Inboxes

from .pure import KEYS, parsed


def test_epochs() -> None:
    """Each inbox has one; whoever is forgotten, asked for or not for a long time, gets another."""
    inboxes = Inboxes(KEYS, b"run")
    first, second = inboxes.of("a"), inboxes.of("b")
    assert inboxes.of("a") is first
    assert (first.key, second.key) == (KEYS.inbox("a"), KEYS.inbox("b"))
    inboxes.forget("a")
    inboxes.forget("never seen")
    third = inboxes.of("a")
    for number in range(_inboxes._PEERS):
        inboxes.of(f"{number}")
    assert len(inboxes.by_peer) == _inboxes._PEERS
    epochs = [one.epoch for one in (first, second, third, inboxes.of("b"))]
    assert len(set(epochs)) == 4
    assert all(epoch.startswith(b"run+") for epoch in epochs)


def test_commands() -> None:
    """One record may come in pieces; of several each is a piece, in whatever codec."""
    inbox = Inbox(b"key", b"run+1")
    inbox.begin(get_codec("cbor"), (b"NOMKSTREAM",), b"me")
    assert inbox.codec_name == b"$4\r\ncbor\r\n"
    begin = [b"XADD", b"key", b"NOMKSTREAM", b"*", b"from", b"me"]
    records = [b"$4\r\ncbor\r\n$1\r\n1\r\n", b"$4\r\njson\r\n$1\r\n2\r\n"]
    pieces = [records[0][:5], records[0][5:]]
    alone = [*begin, b"cbor", b"1", b"n", b"run+1.7", b"v", b"3"]
    assert parsed(inbox.pack(b"run+1.7", 1, pieces)) == [alone]
    several = [*alone[:-1], b"3 3", b"json", b"2"]
    assert parsed(inbox.pack(b"run+1.7", 2, records)) == [several]
