"""The methods of a transport that look at its stream, and trim it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ._admin import Admin, StreamEntry, StreamInfo, check_max_len
from ._group._dead_letters import DeadLetter
from ._sharding._admin import ShardedAdmin

__all__ = ("Administering",)


class Administering(ABC):
    """Has them done by what knows how many shards there are."""

    @property
    @abstractmethod
    def _admin(self) -> Admin | ShardedAdmin:
        """What does it."""

    async def get_stream_info(self) -> StreamInfo:
        """Return length, number of groups, newest entry and last id of the stream.

        Of a stream in several shards, here and below: of all of them, which are all to be there.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        return await self._admin.get_stream_info()

    async def trim_stream(self, max_len: int) -> int:
        """Trim the stream to exactly ``max_len`` entries, read or not, each of several shards to
        its part; return how many went.

        :raises ValueError: if ``max_len`` is negative
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        check_max_len(max_len)
        return await self._admin.trim_stream(max_len)

    async def get_all_entries(self) -> list[StreamEntry]:
        """Return all entries of the stream, read page by page.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        return await self._admin.get_all_entries()

    async def delete_stream(self) -> None:
        """Delete the stream with its groups, destroy signals and dead letters. Inboxes stay.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        await self._admin.delete_stream()

    async def dead_letters(self, count: int = 1000) -> list[DeadLetter]:
        """Return the oldest dead letters: requests given up after ``max_deliveries``.

        What is there and can't be read as one, or isn't signed by who has the ``signing_key``, is
        counted as invalid, logged and skipped.

        Their ids begin with the number of the shard, where that isn't 0.

        :param count: how many at most
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        return await self._admin.dead_letters(count)

    async def retry_dead_letter(self, letter_id: str) -> str:
        """Put a dead letter back into the stream, as a new request; return its new id.

        :raises LookupError: if there is no dead letter with this id, or what has it can't be read
            as one or isn't signed as it must be
        :raises KeyConflictError: if another call has its key by now, or has had it
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        return await self._admin.retry_dead_letter(letter_id)

    async def purge_dead_letters(self) -> int:
        """Remove all dead letters; return how many there were.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        return await self._admin.purge_dead_letters()
