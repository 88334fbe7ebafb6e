"""How many entries to ask a server for at once."""

from __future__ import annotations

import logging

logger = logging.getLogger("anyio_kkrpc")

# Reads that succeed before more is asked for, after many that failed.
_MOST_READS = 64


class Portion:
    """The number of entries that a read asks for.

    Redis closes the connection of a client for whom more waits than ``client-output-buffer-limit``
    allows, so a reply that is too large is never seen. When a connection is lost in a read, half is
    asked for next, down to one entry; after reads that succeed it becomes more again, the later the
    more often that failed.

    :param most: the usual number
    :param least: the smallest number, if they aren't entries
    :ivar size: the present number
    """

    def __init__(self, most: int, least: int = 1) -> None:
        self._most = self.size = most
        self._least = least
        # Reads in full before more is asked for, and how many of them are left.
        self._reads = self._left = 1

    @property
    def is_least(self) -> bool:
        """Whether it can't be cut any more."""
        return self.size == self._least

    def cut(self, what: str) -> None:
        """Note that the connection was lost while entries were asked for.

        :param what: what is read, for the log
        """
        if self.is_least:
            logger.warning(
                "the connection that reads %s was lost though one entry was asked for; if that "
                "goes on, the entry exceeds client-output-buffer-limit of the server",
                what,
            )
        self.size = max(self.size // 2, self._least)
        self._reads = self._left = min(self._reads * 2, _MOST_READS)

    def came(self, count: int) -> None:
        """Note how many entries came; needed only while `size` isn't the usual one."""
        if count < self.size:  # nothing more waits, so the crowd of large ones is over
            self.size = min(self.size * 2, self._most)
            self._reads = self._left = 1
            return
        self._left -= 1
        if not self._left:
            self._left = self._reads
            self.size = min(self.size + max(self.size // 8, 1), self._most)
