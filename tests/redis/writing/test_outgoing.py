"""What is on its way, with connections that only note what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_kkrpc._protocol._records import Reply
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._writing._outgoing import Outgoing
from tests.bounds import BOUND

from .pure import CALLER, GROUP, STREAM, commands, parsed

pytestmark = pytest.mark.anyio


class Connection:
    """Notes commands, and hands their answers out when it is told to."""

    error = None
    has_room = True
    before_write: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.posted: list[tuple[list[bytes], Callable[[Any], None]]] = []

    def post(self, packed: bytes, replies: int, on_reply: Callable[[Any], None]) -> None:
        (command,) = parsed(packed)
        self.posted.append((command, on_reply))

    def flush_nowait(self) -> bool:
        return True

    async def wait_flushed(self) -> None:
        await checkpoint()

    @property
    def names(self) -> list[bytes]:
        return [command[0] for command, _ in self.posted]

    def answer(self, answer: Any) -> None:
        """Answer the oldest command."""
        self.posted.pop(0)[1](answer)

    async def until(self, names: list[bytes]) -> None:
        with anyio.fail_after(BOUND):
            while self.names != names:
                await checkpoint()


def outgoing(given_up: Callable[[bytes, int], object]) -> Outgoing:
    patience: Any = None  # nothing is refused here
    return Outgoing(
        commands(GROUP),
        patience,
        finished=lambda post: None,
        too_late=lambda post: False,
        given_up=given_up,
        failed=lambda exc: None,
        chance=60.0,
        replicas=0,
    )


async def test_an_acknowledgement_goes_behind_its_reply() -> None:
    parts = outgoing(lambda *entry: None)
    connection: Any = Connection()
    parts.attach(connection)
    post = parts_reply(parts)
    parts.acknowledge()
    assert connection.names == [b"XADD", b"XACK"]
    assert connection.posted[1][0] == [b"XACK", STREAM, GROUP, b"1-0"]
    connection.answer(b"5-0")
    connection.answer(1)
    assert not parts.ledger.written
    assert not post.unknown


async def test_what_was_given_up_is_not_acknowledged() -> None:
    """An entry is brought back, and told so twice; the second answer is lost with its connection.

    Meanwhile it belongs to the others: an acknowledgement would lose it for all.
    """
    given_up: list[tuple[bytes, int]] = []
    parts = outgoing(lambda *entry: given_up.append(entry))
    connections: list[Any] = [Connection() for _ in range(3)]
    parts.attach(connections[0])
    post = parts_reply(parts)
    parts.acknowledge()
    parts.detach()  # nobody knows whether the reply is there, and the entry acknowledged
    parts.ledger.drop(post)
    parts.ledger.remove([post])
    parts.acks.abandon(b"1-0")
    parts.attach(connections[1])
    async with anyio.create_task_group() as group:
        group.start_soon(parts.run)
        parts.stir()
        await connections[1].until([b"EVAL", b"EVAL"])
        connections[1].answer(1)
        assert given_up == [(b"1-0", 1)]
        group.cancel_scope.cancel()
    parts.detach()
    parts.attach(connections[2])
    parts.acknowledge()
    assert connections[2].names == []


def parts_reply(parts: Outgoing) -> Any:
    """Write the reply to the entry 1-0."""
    make = commands(GROUP)
    post = make.make(Envelope(Reply("r", 1), None, CALLER))
    assert post is not None
    post.answers = b"1-0"
    parts.post(post)
    return post
