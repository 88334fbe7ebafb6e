"""Finds connections that are dead though nobody has closed them."""

from __future__ import annotations

from msgspec import Struct

from ._resp import Connection

# Seconds between two looks, at least.
_SHORTEST = 0.02
# Bytes per second of the slowest connection that isn't taken for a dead one, if what has left waits
# somewhere on its way; and the seconds that this makes at most.
_SLOWEST = 500_000
_LONGEST = 30


class _Seen(Struct):
    """What a connection showed when it last gave a sign of life, and since.

    :ivar owed: whether the server owed an answer then
    :ivar before: bytes that had left a look earlier, so that the server may have answered them
    :ivar gone: bytes that have left by now, of those that were to leave then
    :ivar given: bytes that were to leave then
    :ivar looks: how often nothing had moved
    """

    owed: bool = False
    received: int = 0
    before: int = 0
    gone: int = 0
    given: int = 0
    looks: int = 0


class Watch:
    """Gives up connections on which nothing moves while the server owes an answer.

    However slow a connection is, bytes that come show that it lives; so do bytes that leave, if
    what waits for an answer was written after them. What counts are looks, not seconds: while this
    process stands still it doesn't look, and what has come meanwhile isn't taken for silence.

    :param shortest: the shortest silence, in seconds, that any of the connections is given up for,
        unless one is added whose own is shorter
    :ivar pause: seconds between two looks
    """

    def __init__(self, shortest: float) -> None:
        self.pause = max(shortest / 2, _SHORTEST)
        self._watched: dict[Connection, _Seen] = {}

    def add(self, connection: Connection) -> None:
        """Watch a connection until it is closed."""
        self._watched[connection] = _Seen()
        self.pause = min(self.pause, max(connection.silence / 2, _SHORTEST))

    async def look(self) -> None:
        """Look once, `pause` seconds after the last time."""
        for connection, seen in list(self._watched.items()):
            if connection.closed:
                del self._watched[connection]
                continue
            now, owed = connection.traffic, connection.owed
            if not (owed and seen.owed) or now.received != seen.received:
                self._watched[connection] = _Seen(
                    owed, now.received, seen.gone, now.gone, now.given
                )
            elif seen.gone < min(now.gone, seen.given):
                seen.gone, seen.looks = now.gone, 0
            else:
                seen.looks += 1
                unseen = min((seen.gone - seen.before) // _SLOWEST, _LONGEST)
                if seen.looks * self.pause >= connection.silence + unseen:
                    del self._watched[connection]
                    await connection.give_up(
                        f"nothing moved for {connection.silence:g} seconds, though an answer is due"
                    )
