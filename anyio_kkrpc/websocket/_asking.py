"""What isn't the same for all who speak over a WebSocket: ends of lines, and signs of life.

The ends of a WebSocket that an ASGI server holds can't send pings. Peers of this library ask by an
empty text, and are answered by empty bytes. Those of kkrpc are asked for what does nothing: a
reference that doesn't exist to be released, a method that doesn't exist.
"""

from __future__ import annotations

from typing import final

import msgspec

from ..kit._messages import Messages

PING = b'"anyio-kkrpc:ping"'
ANSWER = b'"id":' + PING
# Bytes that an answer may have.
LARGEST_ANSWER = 2000
COMPACT_PING = b'{"t":"q","id":%b,"op":"ref","p":[%b,"release"]}' % (PING, PING)
CLASSIC_PING = b'{"id":%b,"method":%b,"args":[],"type":"request","version":"json"}\n' % (PING, PING)


@final
class Asking:
    """Knows how the other side of a WebSocket is spoken to.

    :param messages: those of the connection
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._asked = self._answers = False
        self._rest = bytearray()

    @property
    def end_of_line(self) -> bytes:
        """What stands behind a message: kkrpc 0.x needs a newline, kkrpc 2 takes it, but of one
        that has said nothing it isn't known which one it is.
        """
        return b"\n" if self.may_be_classic else b""

    def parts(self, message: bytes) -> list[bytes]:
        """Return the messages that a frame completes.

        Most are whole, and alone. kkrpc 0.x reads lines: several in a frame, or one in several.
        """
        if self._asked and len(message) < LARGEST_ANSWER and ANSWER in message:
            self._asked, self._answers = False, True
            return []
        if self._messages.dialect == "native" or (message[-1:] == b"}" and not self._rest):
            return [message]
        goes_on = message[-1:] not in b"\n}" and self.may_be_classic
        if self._rest and not _is_whole(message):
            self._rest += message
            if goes_on:
                return []
            message = bytes(self._rest)
        self._rest.clear()
        if goes_on and message[:1] == b"{":
            self._rest += message
            return []
        lines = [line for line in message.splitlines() if line]
        if all(line[:1] == b"{" and line[-1:] == b"}" for line in lines):
            return lines
        return [message]

    @property
    def may_be_classic(self) -> bool:
        """Whether the other side is of kkrpc 0.x, or has said nothing yet."""
        dialect = self._messages.dialect
        return dialect == "kkrpc-0" or (dialect == "kkrpc-2" and not self._messages.received)

    @property
    def unread(self) -> int:
        """Bytes of a message that isn't whole."""
        return len(self._rest)

    def questions(self) -> tuple[list[bytes], bool]:
        """Return what is to be sent as a question, and whether it is certain to be answered.

        kkrpc 0.2 answers only if it exposes something.
        """
        dialect = self._messages.dialect
        if dialect == "native":
            return [b""], True
        self._asked = True
        if dialect == "kkrpc-0":
            return [CLASSIC_PING], self._answers
        if self._messages.received:
            return [COMPACT_PING], True
        return [COMPACT_PING + b"\n", CLASSIC_PING], self._answers


def _is_whole(message: bytes) -> bool:
    try:
        msgspec.json.decode(message, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        return False
    return True
