"""What a peer does on entering, and on each new connection of its link before others use that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from anyio import Event, sleep

from .._runtime._at_once import at_once
from ._connection._command import Execute
from ._connection._entering import Entering
from ._connection._errors import RedisError, leads_elsewhere
from ._connection._patience import Patience
from ._connection._resp import Connection
from ._connection._target import Target
from ._group._worker import Worker
from ._reading._addressed import Addressed
from ._reading._presence import Presence
from ._reading._requests import Requests
from ._stream._clock import ServerClock
from ._stream._server import check_server
from ._upkeep import Step
from ._writing._writer import Writer

# Of so many rounds, one does what is done seldom.
_SELDOM = 2


class Restoring:
    """Makes again what the server may have lost, and tells the parts if it is another one.

    :param patience: of housekeeping, which makes what can't be made now
    :param attached: told of each new connection, last
    :ivar patience: the same
    """

    def __init__(
        self,
        clock: ServerClock,
        writer: Writer,
        addressed: Addressed,
        worker: Worker,
        presence: Presence,
        patience: Patience,
        attached: Callable[[Connection], object],
    ) -> None:
        self._clock = clock
        self._writer = writer
        self._addressed = addressed
        self._worker = worker
        self._presence = presence
        self.patience = patience
        self._attached = attached
        self._entered = self._early = False
        # Whether what Redis might have lost is looked for in each round of housekeeping.
        self._acts = True
        self._rounds, self._interval = 0, 0.0
        self._connection: Connection | None = None
        self._prepared = Event()

    async def meet(self, entering: Entering, target: Target, groups: bool, shared: bool) -> bytes:
        """Find out what the server is, and where to read on; return the last id of the stream.

        :param groups: whether it has to know them
        :param shared: whether this peer is spoken to on the stream from the beginning
        """
        if self._early:
            await self._prepared.wait()
        find = self._addressed.find_start
        modern, start = await at_once(
            partial(check_server, entering.execute, target, groups=groups),
            partial(find, entering.execute, entering.ask, shared=shared),
        )
        self._writer.commands.meet_server(modern=modern)
        self._addressed.inbox.meet_server(modern=modern)
        return bytes(start)

    def answer_early(self) -> None:
        """Note that what is sent before this peer has entered is to be answered."""
        self._early = True

    def enter(self) -> None:
        """Note that this peer has its keys: from now on they are to be there."""
        self._entered = True

    async def prepare(self, connection: Connection) -> None:
        """Make a connection ready; from then on it is the writer's."""
        self._connection, open_calls = connection, self._addressed.open_calls
        if await open_calls.identity.ask(connection, self._clock.read):
            self._writer.meet_another(sure=open_calls.identity.is_sure)
            open_calls.note()
            self._worker.meet_another()
        if self._early and not self._entered:
            await self._addressed.make_inbox(connection.execute)
        if self._entered:
            self._acts = True
            self._presence.lose()
            self._addressed.losses.connecting()
            try:
                await self._restore(connection.execute)
                await self._presence.sign.keep(connection.execute)
            except RedisError as exc:
                if leads_elsewhere(exc):
                    raise
                self.patience.pause(exc)
        self._prepared.set()
        await self._writer.attach(connection, self._clock.offset)
        self._attached(connection)

    async def rest(self, requests: Requests, silence: float, most: float) -> None:
        """Return when the next round is due. While this peer doesn't serve and waits for nothing,
        that is only once nothing else was asked on its connection for so long.

        :param silence: seconds that a server may be silent; a connection that is dead is given up
            after two and a half times that at the latest, or less where its own silence is shorter
        :param most: seconds between two rounds at most, while there is something to do
        """
        connection = self._connection
        assert connection is not None
        self._interval = interval = min(silence + connection.silence / 2, most)
        await sleep(interval)
        if not (requests.wanted or self._addressed.expects()):
            await sleep(max(interval - connection.traffic.asked, 0))

    def steps(self, requests: Requests, execute: Execute) -> tuple[Step, ...]:
        """Return what is to be done in each round: making again what the server has lost, which is
        looked for seldom while this peer serves and has nothing to do.
        """
        return (
            self._look,
            partial(self._read_clock, requests, execute),
            partial(self._keep_keys, requests, execute),
        )

    async def _look(self) -> None:
        """Find out whether this peer serves, and had nothing to do since this was done last: then
        its worker's reads tell what Redis might have lost.
        """
        idles = self._worker.idles() and not self._addressed.expects()
        self._acts = not (idles and self.patience.calm)  # what was refused is tried again
        self._rounds += 1

    def _is_seldom(self) -> bool:
        return self._rounds % _SELDOM == 1

    async def _read_clock(self, requests: Requests, execute: Execute) -> None:
        if self._is_seldom() or (requests.wanted and self._acts):
            await self._clock.read(execute)

    async def _keep_keys(self, requests: Requests, execute: Execute) -> None:
        """Keep them. A peer that waits for nothing, and has just asked for the time, which shows as
        well that its connection lives, leaves it to the next round if they last until then.
        """
        if requests.wanted:
            spare = not (self._acts or self._is_seldom())
        else:
            spare = self._is_seldom() and not self._addressed.expects() and self.patience.calm
            spare = spare and self._addressed.inbox.is_kept(2 * self._interval)
        if not spare:
            await self._restore(execute)

    async def _restore(self, execute: Execute) -> None:
        """Make again what this peer needs, should the server have lost it."""
        await self._addressed.inbox.keep(execute)
        self._addressed.losses.restored()
        worker = self._worker
        if worker.made:
            await (worker.make if self._acts else worker.groups.introduce)(execute)
