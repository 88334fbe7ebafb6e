"""What it means to speak to a peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, TypeAlias

from ..records import Record, Reply, Request

DialectName: TypeAlias = Literal["native", "kkrpc-2", "kkrpc-0"]


class Spoken(ABC):
    """How peers of one dialect are spoken to. It does no I/O, and reads no clock.

    Peers are given by their ids, ``None`` where there is one only.

    :ivar dialect: its name
    :ivar native: whether peers know what kkrpc lacks: keyword arguments, cancels, deadlines. Then
        all but `encode` and `decode` does nothing, and need not be called.
    :ivar pause: seconds from one `tick` to the next, as long as it is `busy`
    """

    dialect: DialectName = "native"
    native: bool = False
    pause: float = 1.0

    @property
    def busy(self) -> bool:
        """Whether time brings something: `tick` and `due` are to be called now and then."""
        return False

    @abstractmethod
    def encode(self, record: Record, recipient: str | None) -> bytes | None:
        """Return the message that says this.

        :return: ``None`` if the dialect has nothing of the kind, or has it said later, see `due`
        :raises TypeError: if the dialect can't carry it
        """

    @abstractmethod
    def decode(self, message: bytes) -> Record:
        """Return what a message says.

        :raises ProtocolError: if it isn't valid
        """

    def begin(self, request: Request, sender: str | None) -> None:  # noqa: B027 - few have to
        """Note a request that is about to be served."""

    def take(self, record: Record, sender: str | None, size: int) -> Record | None:
        """Return what the core is to get for a record that isn't a request, if anything.

        :param size: bytes of the message
        """
        return record

    def answer(self, request: Request, reply: Reply) -> Reply:
        """Return the reply as peers of this dialect expect it."""
        return reply

    def tick(self) -> None:  # noqa: B027 - few have to
        """Let go on what must not go on faster."""

    def due(self, now: float) -> Iterable[tuple[Record, str | None]]:
        """Return what is to be said now by itself: records, each with its recipient."""
        return ()
