"""What was read from the inbox, which is deleted there many at a time."""

from __future__ import annotations

from ._link import Link
from ._reader import order

# Entries that are worth a command.
MANY = 128


class Consumed:
    """The ids of what was read and isn't deleted yet; it is told of each.

    :ivar ids: those ids, in their order
    :ivar trims: whether the server trims by id (Redis 6.2), in a thirtieth of the time
    """

    def __init__(self, inbox: bytes, link: Link) -> None:
        self._inbox = inbox
        self._link = link
        self.ids: list[bytes] = []
        self.trims = False

    async def delete(self) -> None:
        """Delete them."""
        if not self.ids:
            return
        ids = list(self.ids)
        if self.trims:
            ms, number = order(ids[-1])
            await self._link.request(b"XTRIM", self._inbox, b"MINID", b"%d-%d" % (ms, number + 1))
        else:
            await self._link.request(b"XDEL", self._inbox, *ids)
        self.ids = self.ids[len(ids) :]
