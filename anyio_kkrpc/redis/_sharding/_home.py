"""In which shard a peer is at home: there go all its calls that need not be in another one.

So they are written together, which costs half of what single ones do. If that shard is away, new
calls go to another one until it is back; if it is far behind, too, as `_behind` finds. Those that
went there wait for it, until their time is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from anyio import current_time, sleep
from anyio.abc import TaskGroup

from .._options import Options
from .._stream._places import homes_of

__all__ = ("Home",)

logger = logging.getLogger("anyio_kkrpc")

# Seconds without a connection after which a shard is left, and with one after which it is gone back
# to: a connection that is made again at once is none that was lost.
_AWAY = 1.0
_BACK = 5.0


class Home:
    """Moves from one to the other.

    :param connected: whether this peer is connected to a shard
    :param open: has it connect to one
    :ivar shard: where new calls go
    :ivar first: where they are to go
    :ivar order: all shards, in the order in which this peer is at home there
    :ivar connected: the same
    :ivar behind: whether the first one was left since it was far behind: then it isn't gone back to
        because it is there
    :ivar moved: how often they went elsewhere, or back
    """

    def __init__(
        self,
        options: Options,
        connected: Callable[[int], bool],
        open: Callable[[int], object],
    ) -> None:
        self._options = options
        self.connected = connected
        self._open = open
        self._away_since: float | None = None
        self._back_since: float | None = None
        self._open_at = 0.0
        self._turn = 0
        # Looked through several times a second while all are away.
        self.order = homes_of(options.session_id, options.shards)
        self.shard = self.first = options.home
        self.behind = False
        self.moved = 0

    def begin(self, shard: int, tasks: TaskGroup) -> None:
        """Be at home in a shard to begin with.

        :param tasks: where it is looked whether that is still there
        """
        self.shard = shard
        self._open(self.first)
        tasks.start_soon(self.run, name="anyio_kkrpc redis home")

    async def run(self) -> None:
        """Look again and again. Goes on for ever."""
        while True:
            await sleep(self._options.watch_interval)
            self.look(current_time())

    def look(self, now: float) -> None:
        """Move, if that is called for.

        :param now: on AnyIO's clock, in seconds
        """
        first, here = self.first, self.shard
        if not self.connected(here):
            if self._away_since is None:
                self._away_since, self._open_at = now, now + _AWAY
            if now - self._away_since >= _AWAY:
                self._leave(now)
            return
        self._away_since, self._turn = None, 0
        if here != first and self.connected(first) and not self.behind:
            if self._back_since is None:
                self._back_since = now
            if now - self._back_since >= _BACK:
                self._move(first, "it is back")
            return
        self._back_since = None

    def _leave(self, now: float) -> None:
        """Go to the next one that is there; one that isn't open yet is opened meanwhile.

        Each takes twice as long to come as the one before: while all are away, every peer would
        open one after the other, and have connections to all of them from then on. Where all are
        on one server, none is.
        """
        options = self._options
        there = [one for one in self.order if one != self.shard and self.connected(one)]
        if there:  # one that is far behind is better than none
            found = next((one for one in there if one != self.first or not self.behind), there[0])
            self._move(found, f"shard {self.shard} is away")
            return
        if options.target.kind != "cluster":
            return
        if now >= self._open_at and self._turn + 1 < options.shards:
            self._turn += 1
            self._open_at = now + _AWAY * 2**self._turn
            self._open(self.order[self._turn])

    def leave_behind(self, shard: int) -> None:
        """Go to another one, since where they went is far behind."""
        self.behind = self.behind or self.shard == self.first
        self._move(shard, f"shard {self.shard} is far behind")

    def go_back(self) -> None:
        """Go back to the first one, which has caught up."""
        self._move(self.first, "it has caught up")

    def _move(self, shard: int, why: str) -> None:
        logger.warning(
            "new calls go to shard %d, and no longer to shard %d: %s", shard, self.shard, why
        )
        self.shard = shard
        self.moved += 1
        self.behind = self.behind and shard != self.first
        self._away_since = self._back_since = None
