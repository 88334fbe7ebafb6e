"""The socket between the supervisor and one of its workers.

Options and questions go to the worker, words and reports come from there, a line each.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import anyio
import msgspec
from anyio import Event, move_on_after

from ._restarts import Word
from ._worker import QUESTION, Options, Report

_WORDS = {word.value.encode(): word for word in Word}
# Bytes of the longest line, which is a report.
_LONGEST = 1024 * 1024


class Line:
    """One end: the supervisor's.

    :ivar theirs: the worker's end
    :ivar words: what the worker has told
    :ivar serving: set when it serves
    """

    def __init__(self) -> None:
        self._own, self.theirs = socket.socketpair()
        self._own.setblocking(False)
        self._rest = b""
        self._report: Report | None = None
        # Of the question that waits for its answer.
        self._answered: Event | None = None
        self.words: set[Word] = set()
        self.serving = Event()

    def send(self, options: Options) -> None:
        """Tell the options; they are far smaller than what a socket takes at once."""
        with suppress(OSError):
            self._own.send(msgspec.json.encode(options) + b"\n")

    async def ask(self, within: float) -> Report | None:
        """Return how the worker is; ``None`` if it doesn't tell within so many seconds.

        One question waits at a time: who asks meanwhile gets the same answer.
        """
        if self._answered is None:
            try:
                self._own.send(QUESTION)
            except OSError:
                return None
            self._answered = Event()
        with move_on_after(within):
            await self._answered.wait()
            return self._report
        return None

    async def listen(self) -> None:
        """Take what it says until it is cancelled, or the line ends."""
        with suppress(anyio.ClosedResourceError):
            while self.take():
                await anyio.wait_readable(self._own)

    def take(self) -> bool:
        """Take what has come; return false if nothing more will."""
        while True:
            try:
                data = self._own.recv(65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[-_LONGEST:]
            for line in lines:
                self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        word = _WORDS.get(line)
        if word is not None:
            self.words.add(word)
            if word is Word.serving:
                self.serving.set()
            return
        # A handler may write there, too: what is none of these is nothing.
        with suppress(msgspec.DecodeError):
            self._report = msgspec.json.decode(line, type=Report)
            if self._answered is not None:
                self._answered.set()
                self._answered = None

    def close(self) -> None:
        """Let the worker know that nobody listens."""
        self._own.close()
        self.theirs.close()
