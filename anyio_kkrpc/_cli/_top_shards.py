"""How ``top`` shows a stream in several shards: all of them together, and then each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..redis._stream._places import MOST_SHARDS, shard_of, stream_of_shard
from ._top_look import GroupLook, StreamLook, Worker

__all__ = ("with_totals",)


def with_totals(streams: Iterable[StreamLook]) -> list[StreamLook]:
    """Return them with one more before the shards of each stream that has several: their sums."""
    shards: dict[str, dict[int, StreamLook]] = defaultdict(dict)
    for one in streams:
        name, shard = stream_of_shard(one.name)
        shards[name][shard] = one
    found: list[StreamLook] = []
    for name, of in sorted(shards.items()):
        looks = [look for _, look in sorted(of.items())]
        if {*of} != {0}:
            found.append(_together(name, looks))
        found += looks
    return found


def _together(name: str, looks: Sequence[StreamLook]) -> StreamLook:
    groups: dict[str, list[GroupLook]] = defaultdict(list)
    for look in looks:
        for group in look.groups:
            groups[group.name].append(group)
    return StreamLook(
        f"{name} in all",
        sum(look.length for look in looks),
        _sum(look.written for look in looks),
        _sum(look.dead for look in looks),
        [_group(group, of) for group, of in sorted(groups.items())],
        sum(look.delayed for look in looks),
        total=True,
    )


def _group(name: str, of: Sequence[GroupLook]) -> GroupLook:
    workers: dict[str, Worker] = {}
    for worker in (worker for one in of for worker in one.workers):
        # A worker of several shards has a name in each.
        shard = shard_of(worker.name, MOST_SHARDS)
        own = worker.name.removesuffix(f"@{shard}") if shard else worker.name
        known = workers.get(own)
        holds, idle = (0, worker.idle) if known is None else (known.holds, known.idle)
        workers[own] = Worker(own, holds + worker.holds, min(idle, worker.idle))
    return GroupLook(
        name,
        _sum(one.waiting for one in of),
        sum(one.running for one in of),
        max((one.oldest for one in of if one.oldest is not None), default=None),
        _sum(one.taken for one in of),
        [*workers.values()],
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    """Return the sum; ``None`` if one of them isn't known."""
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total
