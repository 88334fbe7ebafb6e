"""How many entries to ask a server for at once."""

from __future__ import annotations

import logging

logger = logging.getLogger("anyio_kkrpc")


class Portion:
    """The number of entries that a read asks for.

    Redis closes the connection of a client for whom more waits than ``client-output-buffer-limit``
    allows, so a reply that is too large is never seen. When a connection is lost in a read, half is
    asked for next, down to one entry; after reads that succeed it becomes more again.

    :param most: the usual number
    :ivar size: the present number
    """

    def __init__(self, most: int) -> None:
        self._most = self.size = most

    def cut(self, what: str) -> None:
        """Note that the connection was lost while entries were asked for.

        :param what: what is read, for the log
        """
        if self.size == 1:
            logger.warning(
                "the connection that reads %s was lost though one entry was asked for; if that "
                "goes on, the entry exceeds client-output-buffer-limit of the server",
                what,
            )
        self.size = max(self.size // 2, 1)

    def came(self, count: int) -> None:
        """Note how many entries came; needed only while `size` isn't the usual one."""
        # Fewer than asked for: nothing more waits, so the crowd of large ones is over.
        larger = self.size + 1 if count >= self.size else self.size * 2
        self.size = min(larger, self._most)
