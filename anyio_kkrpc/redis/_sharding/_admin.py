"""Looking at a stream in several shards, and at its dead letters, and trimming it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from heapq import merge
from typing import TypeVar

from msgspec.structs import replace

from ..._runtime._at_once import at_once
from .._admin import Admin, StreamEntry, StreamInfo
from .._group._dead_letters import DeadLetter
from .._stream._entries import order
from .._stream._places import parse_shard

__all__ = ("ShardedAdmin",)

T = TypeVar("T")


class ShardedAdmin:
    """Does in each shard what `Admin` does in one. Ids of dead letters have the shard before them,
    as in `3:1795420521577-0`, but for those in shard 0.

    :param admins: one for each shard
    """

    def __init__(self, admins: Sequence[Admin]) -> None:
        self._admins = admins

    async def _each(self, ask: Callable[[Admin], Awaitable[T]]) -> list[T]:
        return await at_once(*(partial(ask, admin) for admin in self._admins))

    async def get_stream_info(self) -> StreamInfo:
        """Return what all have together, and what each has."""
        shards = await self._each(Admin.get_stream_info)
        last = [one.last_entry for one in shards if one.last_entry is not None]
        return StreamInfo(
            sum(one.length for one in shards),
            max(one.groups for one in shards),
            max(last, key=_place, default=None),
            max((one.last_generated_id for one in shards), key=_order),
            tuple(shards),
        )

    async def trim_stream(self, max_len: int) -> int:
        """Trim each to its part, and return how many entries went."""
        count, more = divmod(max_len, len(self._admins))
        return sum(
            await at_once(
                *(
                    partial(admin.trim_stream, count + (number < more))
                    for number, admin in enumerate(self._admins)
                )
            )
        )

    async def get_all_entries(self) -> list[StreamEntry]:
        """Return the entries, by the time at which each was added."""
        return [*merge(*await self._each(Admin.get_all_entries), key=_place)]

    async def delete_stream(self) -> None:
        """Delete them all."""
        await self._each(Admin.delete_stream)

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        """Return the oldest ones of all."""
        found = await self._each(partial(_dead_letters, count=count))
        letters = [
            [
                (_order(one.id), replace(one, id=f"{shard}:{one.id}" if shard else one.id))
                for one in of
            ]
            for shard, of in enumerate(found)
        ]
        return [letter for _, letter in merge(*letters, key=lambda one: one[0])][:count]

    async def retry_dead_letter(self, letter_id: str) -> str:
        """Put one back where it was; return its new id."""
        text, _, own = letter_id.rpartition(":")
        shard = parse_shard(text or "0", len(self._admins))
        if shard is None:
            raise LookupError(f"there is no dead letter {letter_id!r:.80}")
        new = await self._admins[shard].retry_dead_letter(own)
        return f"{shard}:{new}" if text else new

    async def purge_dead_letters(self) -> int:
        """Remove all; return how many there were."""
        return sum(await self._each(Admin.purge_dead_letters))


async def _dead_letters(admin: Admin, count: int) -> list[DeadLetter]:
    return await admin.dead_letters(count)


def _order(entry_id: str) -> tuple[int, int]:
    return order(entry_id.encode())


def _place(entry: StreamEntry) -> tuple[int, int]:
    return _order(entry.id)
