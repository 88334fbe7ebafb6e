"""What is done now and then as long as a peer lives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count

from anyio import current_time, sleep

from ..abc import Envelope
from ..records import Record
from ._connection._errors import RedisError, meaning_of
from ._connection._patience import Patience

Step = Callable[[], Awaitable[None]]

_SELDOM = 4


class Upkeep:
    """Does its steps in rounds. A step that Redis refuses keeps no other one from being done.

    :param steps: to be done in each round
    :param interval: seconds between two rounds
    :param patience: with a server that refuses some of it
    """

    def __init__(self, steps: Sequence[Step], interval: float, patience: Patience) -> None:
        self._steps = steps
        self._interval = interval
        self._patience = patience

    async def run(self) -> None:
        """Go on for ever.

        :raises RedisError: if no further attempt is of use
        """
        pause = self._interval
        while True:
            await sleep(pause)
            pause, refused = self._interval, await self._do()
            if refused is not None:
                pause = min(pause, self._patience.pause(refused))
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


def seldom(step: Step, each_time: Callable[[], bool]) -> Step:
    """Return what does a step in the first of four rounds, unless it is to be done each time."""
    rounds = count()

    async def do() -> None:
        if each_time() or next(rounds) % _SELDOM == 0:
            await step()

    return do


async def release_callbacks(
    due: Callable[[float], Iterable[tuple[Record, str | None]]],
    send: Callable[[Envelope], Awaitable[object]],
) -> None:
    """Send the releases that are due."""
    for record, peer in due(current_time()):
        await send(Envelope(record, None, peer))
