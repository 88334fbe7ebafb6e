"""What is done now and then as long as a peer lives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from math import inf
from typing import TypeAlias

from anyio import current_time, move_on_after

from ..abc import Envelope
from ..records import Record
from ._connection._errors import RedisError, meaning_of
from ._connection._patience import Patience

Step: TypeAlias = Callable[[], Awaitable[None]]


class Upkeep:
    """Does its steps in rounds. A step that Redis refuses keeps no other one from being done.

    :param steps: to be done in each round
    :param rest: returns when the next round is due
    :param patience: with a server that refuses some of it
    """

    def __init__(self, steps: Sequence[Step], rest: Step, patience: Patience) -> None:
        self._steps = steps
        self._rest = rest
        self._patience = patience

    async def run(self) -> None:
        """Go on for ever.

        :raises RedisError: if no further attempt is of use
        """
        most = inf
        while True:
            with move_on_after(most):
                await self._rest()
            most, refused = inf, await self._do()
            if refused is not None:
                most = self._patience.pause(refused)
            elif not self._patience.calm:
                self._patience.worked()

    async def _do(self) -> RedisError | None:
        """Do one round; return the gravest refusal."""
        gravest: RedisError | None = None
        for step in self._steps:
            try:
                await step()
            except RedisError as exc:
                if gravest is None or not meaning_of(exc).passes:
                    gravest = exc
        return gravest


async def release_callbacks(
    due: Callable[[float], Iterable[tuple[Record, str | None]]],
    send: Callable[[Envelope], Awaitable[object]],
) -> None:
    """Send the releases that are due."""
    for record, peer in due(current_time()):
        await send(Envelope(record, None, peer))
