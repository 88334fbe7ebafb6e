"""The lanes of one transport: made, opened when they are needed, ended together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from anyio import CancelScope
from anyio.abc import TaskGroup

from ..._exceptions import RPCError, TransportConnectionError
from ..._runtime._at_once import at_once
from .._connection._entering import Entering
from .._connection._errors import RedisError
from .._connection._patience import Outages
from .._group._held import HeldEntry
from .._group._room import SharedRoom
from .._lane import Lane
from .._making import make_dialects
from .._options import Options
from .._reading._reception import Reception
from ._parts import part_of

__all__ = ("Lanes",)


class Lanes:
    """Has one for each shard that something was asked of.

    :param options: of the transport
    :param reception: where what was read waits to be served, from whatever shard
    :param room: how much may be held, of all shards together
    :param failed: told of the error of Redis after which nothing goes on
    :param destroyed: told why a destroy signal ends this peer
    :param made: told of each new lane and its shard
    :param opened: told of each that was opened and its shard
    """

    def __init__(
        self,
        options: Options,
        reception: Reception,
        room: SharedRoom,
        *,
        failed: Callable[[Exception], object],
        destroyed: Callable[[Exception], object],
        made: Callable[[int, Lane], object],
        opened: Callable[[int, Lane], object],
    ) -> None:
        self._options = options
        self._reception = reception
        self._room = room
        self._failed, self._destroyed = failed, destroyed
        self._tell_made, self._tell_opened = made, opened
        self._made: dict[int, Lane] = {}
        # Those that are open, or about to be; and those that are to be, once this peer has entered.
        self._opened: set[int] = set()
        self._asked_for: set[int] = set()
        self._opening: set[CancelScope] = set()
        self._tasks: TaskGroup | None = None
        self._ended: Exception | None = None

    @property
    def made(self) -> Sequence[Lane]:
        """Those that there are."""
        return [*self._made.values()]

    @property
    def numbered(self) -> Sequence[tuple[int, Lane]]:
        """The same, each with its shard."""
        return [*self._made.items()]

    @property
    def begun(self) -> bool:
        """Whether this peer has entered."""
        return self._tasks is not None

    def of(self, held: HeldEntry) -> Lane:
        """Return the one that an entry was taken from."""
        return self._made[held.shard]

    def connected(self, shard: int) -> bool:
        """Whether this peer is connected to a shard."""
        lane = self._made.get(shard)
        return lane is not None and lane.link.connection is not None

    def make(self, shard: int) -> Lane:
        """Return the lane of a shard, opened or not."""
        lane = self._made.get(shard)
        if lane is None:
            options = self._options.of_shard(shard)
            part = part_of(self._reception)
            dialects = make_dialects(options, part.inbound.deliver)
            lane = self._made[shard] = Lane(
                options,
                dialects,
                part,
                Outages(options.target),
                failed=partial(self._fail, options),
                destroyed=self._destroyed,
                room=self._room,
            )
            self._tell_made(shard, lane)
            if self._ended is not None:  # whoever asks now is told, and doesn't wait
                self._end(lane, self._ended)
                lane.close(self._ended)
        return lane

    def open(self, shard: int) -> Lane:
        """Return the lane of a shard, and see to it that it is opened."""
        lane = self.make(shard)
        if self._tasks is None:
            self._asked_for.add(shard)
        elif shard not in self._opened and self._ended is None:
            self._opened.add(shard)
            name = f"anyio_kkrpc redis shard {shard}"
            self._tasks.start_soon(self._open, shard, lane, self._tasks, name=name)
        return lane

    async def _open(self, shard: int, lane: Lane, tasks: TaskGroup) -> None:
        """Open a lane, however long that takes."""
        options = self._options
        entering = Entering(options.target, options.connect_timeout, lane.link, lane.outages)
        with CancelScope() as scope:
            self._opening.add(scope)
            try:
                await lane.start(tasks, entering, patient=True)
            except (RPCError, RedisError) as exc:
                self._fail(self._options.of_shard(shard), exc)
            else:
                self._tell_opened(shard, lane)
            finally:
                self._opening.discard(scope)

    def _fail(self, options: Options, exc: Exception) -> None:
        """Tell of an error, with the name of the shard's stream: the others are in order."""
        if not isinstance(exc, TransportConnectionError):
            exc = options.target.refuses(exc, options.stream)
        self._failed(exc)

    def begin(self, shard: int, tasks: TaskGroup) -> None:
        """Open those that something was asked of before this peer had entered.

        :param shard: the one that it has entered by
        :param tasks: where their tasks run
        """
        self._tasks = tasks
        self._opened.add(shard)
        for asked_for in self._asked_for:
            self.open(asked_for)

    def stop(self, reason: Exception) -> None:
        """Read no more, and let nobody wait, without awaiting."""
        self._ended = self._ended or reason
        for scope in self._opening:
            scope.cancel()
        for lane in self._made.values():
            self._end(lane, reason)

    def _end(self, lane: Lane, reason: Exception) -> None:
        lane.reception.inbound.end(reason)
        lane.stop(reason)

    async def farewell(self) -> None:
        """Give back what was taken, and remove this peer's keys. To be bounded."""
        await at_once(*(lane.farewell for lane in self._made.values()))

    def close(self, reason: Exception) -> None:
        """Write no more."""
        for lane in self._made.values():
            lane.close(reason)
