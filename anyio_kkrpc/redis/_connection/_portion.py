"""How many entries to ask a server for at once."""

from __future__ import annotations

import logging

logger = logging.getLogger("anyio_kkrpc")

# Reads that succeed before more is asked for, after many that failed.
_MOST_READS = 64
# Entries that a blocking read asks for at first, and at most.
_FIRST_ENTRIES = 8
MOST_ENTRIES = 100
# Reads that bring few before less is asked for.
_FEW_READS = 8
# Bytes of a reply that are many, and the most that the reply to a blocking read may have for each
# stream, however large its entries are.
MANY_BYTES = 4 * 1024 * 1024
MOST_BYTES = 1024 * 1024 * 1024


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


class ReadPortion(Portion):
    """The number of entries that a blocking read asks for, such that its reply is no flood.

    Redis has no bound for the bytes of a reply, and nobody knows what will be written. So a reader
    begins with few, asks for twice as many as long as all of them come and are small, for fewer
    again when they come one by one, and never for so many that the largest ones would be more than
    `MOST_BYTES`. After a reply of more than `MANY_BYTES` it asks for as many as would have been
    that, and from then on for more in small steps only.

    :param largest: bytes that one entry may have
    :ivar few: so many entries are fewer than were expected
    :ivar many: so many are reason to ask for more
    :ivar wary: whether `took` must be told of each read, and not only of those that bring few,
        many, or many bytes
    """

    def __init__(self, largest: int) -> None:
        super().__init__(max(min(MOST_ENTRIES, MOST_BYTES // largest), 1))
        self._first = min(_FIRST_ENTRIES, self._most)
        self._few_reads = 0
        self.wary = False
        self._ask_for(self._first)

    def cut(self, what: str) -> None:
        """See `Portion.cut`."""
        super().cut(what)
        self.wary = True

    def took(self, count: int, received: int) -> None:
        """Note how many entries a read has brought, and how many bytes."""
        if received > MANY_BYTES:
            self._reads = self._left = min(self._reads * 2, _MOST_READS)
            self.wary = True
            self._ask_for(max(MANY_BYTES * count // received, 1))
        elif self.wary:
            self.came(count)
            self.wary = self.size < self._most
            self._ask_for(self.size)
        elif count >= self.many:
            self._ask_for(min(self.size * 2, self._most))
        elif count <= self.few:
            self._few_reads += 1
            if self._few_reads >= _FEW_READS:
                self._ask_for(max(self.size // 2, self._first))

    def _ask_for(self, size: int) -> None:
        self.size = size
        self._few_reads = 0
        self.few = 1 if size > self._first else 0
        self.many = size if size < self._most else self._most + 1
