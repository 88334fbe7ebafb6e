"""Words to all peers: what one says, the other takes, and nothing else ends anybody."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc import ProtocolError
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._reading._hints import TURN_WORD, Hints

pytestmark = pytest.mark.anyio


class Peer:
    """One that has heard what others said."""

    def __init__(self, *, signed: bool = False) -> None:
        self.heard: list[str] = []
        self.written: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.outages = Outages(Target.parse("redis://nowhere"))
        self.hints = Hints(
            b"{s}:control",
            self.request,
            self.outages,
            "me",
            signed=signed,
            work=lambda word: self.heard.append(word.decode()),
            destroy=lambda sender: self.heard.append(f"destroyed by {sender}"),
            call=lambda word: self.heard.append(word.decode()),
        )

    async def request(self, *command: Any) -> bytes:
        if self.error is not None:
            raise self.error
        self.written.append(command)
        return b"1-0"


@pytest.mark.parametrize("signed", [False, True])
async def test_said_and_taken(signed: bool) -> None:
    """Who signs isn't ended by what nobody has signed."""
    speaker, peer = Peer(signed=signed), Peer(signed=signed)
    await speaker.hints.tell_claim()
    await speaker.hints.tell_destroyed("it")
    await speaker.hints.tell_destroyed("me")
    for command in speaker.written:
        assert command[3] == b"{s}:control"
        assert command[-2] == b"hint"
        peer.hints.take(command[-1])
    assert peer.heard == (["claim"] if signed else ["claim", "destroyed by it"])


async def test_a_turn() -> None:
    """Workers are told in their inboxes; who signs is, too, since it does no harm."""
    for peer in (Peer(), Peer(signed=True)):
        peer.hints.take(TURN_WORD)
        assert peer.heard == ["turn"]


async def test_other_words() -> None:
    """What newer peers may say is left out; what names no peer is counted by who reads it."""
    peer = Peer()
    for word in (b"", b"hello", b"wake", b"claims", b"destroyed", b"turns"):
        peer.hints.take(word)
    with pytest.raises(ProtocolError):
        peer.hints.take(b"destroy \xff")
    assert peer.heard == []


async def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    """It is lost, which is said once."""
    peer = Peer()
    peer.error = ResponseError("OOM no")
    await peer.hints.tell_claim()
    await peer.hints.tell_claim()
    assert caplog.text.count("words to all peers") == 1
    assert peer.outages.refused == 2
