"""What became of the requests for each name that is exposed: counted, and failures logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from time import monotonic

from msgspec import Struct

from .._runtime._sparing import Sparing

logger = logging.getLogger("anyio_kkrpc")


class MethodStatistics(Struct, frozen=True):
    """What became of the requests for one name; each is counted once, when it is over.

    One whose result can't be sent has been served, and then fails. The numbers never decrease.

    :ivar served: ran, and were answered with a result; a stream when it has ended, or was left
    :ivar failed: whose handler, source or middleware raised, or gave what can't be sent
    :ivar cancelled: given up by their callers, or out of time, before they were answered
    :ivar expired: out of time when they came, and not started
    :ivar refused: whose arguments don't fit, and which were not started
    """

    served: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0


class ChannelStatistics(Struct, frozen=True):
    """What a channel holds and has seen.

    :ivar calls: calls of this side that wait for their answer
    :ivar handlers: requests that run here
    :ivar callbacks: functions that the other side may call
    :ivar incoming_streams: streams that this side reads
    :ivar outgoing_streams: streams that the other side reads
    :ivar served: requests that were answered with a result here
    :ivar expired: requests that were out of time when they came, and were not started
    :ivar refused: records that were not legal, and were skipped
    :ivar ignored: records that came too late to matter
    :ivar undelivered: records of this side that the transport gave back, or that were thrown away
        since too many waited to be sent
    :ivar lost_streams: streams, in either direction, that ended because the other peer was gone
    :ivar dropped_callbacks: calls of this side's functions that were thrown away, since they came
        faster than the functions ran
    :ivar references_given: objects of this side that other peers hold by reference
    :ivar references_held: objects of other peers that are held here
    :ivar failed: requests whose handler, source or middleware raised, or gave what can't be sent
    :ivar cancelled: requests that were given up by their callers, or ran out of time
    :ivar unknown: requests for names that aren't exposed here
    :ivar methods: what became of the requests for each name that was asked for
    :ivar unread_items: items of calls with keys that went to make room for more, as
        ``when_unread="go on"`` has it, though nobody was known to have read them
    """

    calls: int
    handlers: int
    callbacks: int
    incoming_streams: int
    outgoing_streams: int
    served: int
    expired: int
    refused: int
    ignored: int
    undelivered: int
    lost_streams: int
    dropped_callbacks: int
    references_given: int
    references_held: int
    failed: int
    cancelled: int
    unknown: int
    methods: dict[str, MethodStatistics]
    unread_items: int = 0


class Counted:
    """A name that is exposed, and what became of the requests for it; see `MethodStatistics`."""

    __slots__ = ("cancelled", "expired", "failed", "name", "refused", "served")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.begin_to_count()

    def begin_to_count(self) -> None:
        """Count from 0."""
        self.served: int = 0
        self.failed: int = 0
        self.cancelled: int = 0
        self.expired: int = 0
        self.refused: int = 0


_NOTHING = (0,) * len(MethodStatistics.__struct_fields__)


def tell(names: Iterable[Counted]) -> dict[str, MethodStatistics]:
    """Return the numbers of those that were asked for, by their dotted names.

    What stands at ``["a.b"]`` and at ``["a", "b"]`` has one such name, and is counted together.
    """
    found: dict[str, list[int]] = {}
    for one in names:
        numbers = (one.served, one.failed, one.cancelled, one.expired, one.refused)
        if any(numbers):
            found[one.name] = [*map(sum, zip(numbers, found.get(one.name, _NOTHING), strict=True))]
    return {name: MethodStatistics(*numbers) for name, numbers in found.items()}


class FailureLog:
    """Logs what handlers raise, of each name as often as `Sparing` lets it.

    :param now: seconds
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._names: dict[str, Sparing] = {}

    def note(self, name: str, request_id: str, caller: str | None, exc: BaseException) -> None:
        """Log a failure, or count it.

        :param name: one of those that are exposed, which bounds how many are kept
        """
        sparing = self._names.get(name)
        if sparing is None:
            sparing = self._names[name] = Sparing()
        more = sparing.admit(self._now(), "counted only")
        if more is None:
            return
        caller = "its peer" if caller is None else caller
        logger.warning(
            "%s failed: request %s of %s%s", name, request_id, caller, more, exc_info=exc
        )
