"""Finds connections that are dead though nobody has closed them."""

from __future__ import annotations

from msgspec import Struct

from ._resp import Connection

# Seconds between two looks, at least; and what is as good as none.
_SHORTEST, _LEAST = 0.02, 0.001
# Bytes per second of the slowest connection that isn't taken for a dead one, if what has left waits
# somewhere on its way; and the seconds that this makes at most.
_SLOWEST = 500_000
_LONGEST = 30
# Bytes that leave in a moment: of more, nobody knows when the last has left.
_LITTLE = 16 * 1024


class _Seen(Struct):
    """What a connection showed when it last gave a sign of life, and since.

    :ivar owed: whether the server owed an answer then
    :ivar before: bytes that had left a look earlier, so that the server may have answered them
    :ivar gone: bytes that have left by now, of those that were to leave then
    :ivar given: bytes that were to leave then
    :ivar still: seconds for which nothing has moved
    """

    owed: bool = False
    received: int = 0
    before: int = 0
    gone: int = 0
    given: int = 0
    still: float = 0.0


class Watch:
    """Gives up connections on which nothing moves while the server owes an answer.

    However slow a connection is, bytes that come show that it lives; so do bytes that leave, if
    what waits for an answer was written after them. What counts are the pauses between looks, not
    what a clock says: while this process stands still it doesn't look, and what has come meanwhile
    isn't taken for silence. Only of the first pause the clock tells how much has passed since the
    command was written; the last one is as long as it has to be.

    :param shortest: the shortest silence, in seconds, that any of the connections is given up for,
        unless one is added whose own is shorter
    :ivar pause: seconds until the next look
    """

    def __init__(self, shortest: float) -> None:
        self.pause = self._usual = max(shortest / 2, _SHORTEST)
        self._watched: dict[Connection, _Seen] = {}

    def add(self, connection: Connection) -> None:
        """Watch a connection until it is closed."""
        self._watched[connection] = _Seen()
        self._usual = min(self._usual, max(connection.silence / 2, _SHORTEST))
        self.pause = min(self.pause, self._usual)

    async def look(self) -> None:
        """Look once, `pause` seconds after the last time."""
        pause, self.pause = self.pause, self._usual
        for connection, seen in list(self._watched.items()):
            if connection.closed:
                del self._watched[connection]
                continue
            now, owed = connection.traffic, connection.owed
            if not (owed and seen.owed) or now.received != seen.received:
                seen = self._watched[connection] = _Seen(
                    owed, now.received, seen.gone, now.gone, now.given
                )
                if not now.answered and seen.gone - seen.before <= _LITTLE:
                    seen.still = min(now.asked, pause)
            elif seen.gone < min(now.gone, seen.given):
                seen.gone, seen.still = now.gone, 0.0
            else:
                seen.still += pause
            if not owed:
                continue
            unseen = min((seen.gone - seen.before) // _SLOWEST, _LONGEST)
            left = connection.silence + unseen - seen.still
            if left > _LEAST:
                self.pause = max(min(self.pause, left), _SHORTEST)
            else:
                del self._watched[connection]
                await connection.give_up(
                    f"nothing moved for {connection.silence:g} seconds, though an answer is due"
                )
