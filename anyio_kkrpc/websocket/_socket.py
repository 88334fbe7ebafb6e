"""What carries the frames of one WebSocket, and the close codes that it ends with."""

from __future__ import annotations

from abc import ABC, abstractmethod

from anyio import BrokenResourceError, EndOfStream, Event

__all__ = ("Ending", "Socket", "end_of")

NORMAL = 1000
GOING_AWAY = 1001
NO_CODE = 1005
POLICY = 1008
TOO_BIG = 1009
FAILED = 1011
RESTARTING = 1012
# With these the other side has ended the connection as it meant to. kkrpc gives no code.
CLEAN = frozenset({NORMAL, GOING_AWAY, NO_CODE, RESTARTING})
# Bytes that the reason in a close frame may have.
MOST_REASON = 123


class Ending(BrokenResourceError):
    """This side gives the connection up.

    :ivar code: that the other side is told
    :ivar reason: likewise
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Socket(ABC):
    """One WebSocket that is open.

    :ivar heard: whether anything has come from the other side since `forget`
    """

    def __init__(self) -> None:
        self.heard: bool = False
        self._sign: Event | None = None

    def hear(self) -> None:
        """Note that something has come."""
        self.heard = True
        if self._sign is not None:
            self._sign.set()
            self._sign = None

    def forget(self) -> None:
        """Forget that something has come, to see whether more comes."""
        self.heard = False

    async def wait_for_a_sign(self) -> None:
        """Wait until something has come since `forget`."""
        if not self.heard:
            if self._sign is None:
                self._sign = Event()
            await self._sign.wait()

    @abstractmethod
    async def receive(self) -> tuple[bytes, bool]:
        """Return the next message, and whether it is text.

        :raises EndOfStream: if the other side has closed it
        :raises BrokenResourceError: if it broke, or was closed with an error
        """

    @abstractmethod
    async def send(self, message: bytes, text: bool) -> None:
        """Send a message whole, as text or as bytes."""

    async def ping(self) -> bool:
        """Send a ping that the other side answers by itself; return false if that can't be done."""
        return False

    @abstractmethod
    async def close(self, code: int, reason: str) -> None:
        """Say goodbye, and close. Idempotent; raises nothing; closes at once if cancelled."""


def end_of(code: int, reason: str) -> Exception:
    """Return what to raise when the other side has closed a WebSocket."""
    if code in CLEAN:
        return EndOfStream()
    said = f"{code}: {reason}" if reason else str(code)
    return BrokenResourceError(f"the other side has closed the WebSocket with {said}")


def short(reason: str) -> str:
    """Return as much of a reason as a close frame may have."""
    return reason.encode()[:MOST_REASON].decode(errors="ignore")
