"""A lane is entered, within the time that this may take."""

from __future__ import annotations

from anyio.abc import TaskGroup

from .._exceptions import TransportConnectionError
from ._connection._entering import Entering
from ._connection._errors import RedisError
from ._connection._resp import Connection
from ._lane import Lane
from ._options import Options

__all__ = ("enter",)


async def enter(
    lane: Lane, options: Options, tasks: TaskGroup, connection: Connection | None = None
) -> TransportConnectionError | None:
    """Connect, and start the tasks of a lane; return the error if that takes too long.

    :param options: of the lane
    :param tasks: where they run
    :param connection: the first one, if there is one already
    :raises TransportConnectionError: if it can't connect, or the server refuses this peer
    """
    target = options.target
    entering = Entering(target, options.connect_timeout, lane.link, lane.outages)
    try:
        with entering.scope:
            await lane.start(tasks, entering, connection)
            return None
    except RedisError as exc:
        raise target.refuses(exc, options.stream) from exc
    return entering.error()
