"""How one peer connects: to wherever its server is now, by a name, and watched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from random import random

from anyio import CancelScope, aclose_forcefully, current_time, move_on_after, sleep

from ..._exceptions import TransportConnectionError
from ._address import Address
from ._errors import Meaning, ResponseError, meaning_of
from ._link import Dial, Dialer
from ._login import open_connection
from ._patience import Outages, Patience
from ._resolver import Probe, Topology
from ._resp import Connection
from ._role import Node, WrongRoleError, longest_silence, wrong_role
from ._target import host_and_port
from ._watch import Watch

logger = logging.getLogger("anyio_kkrpc")

# Seconds after which one that doesn't answer is asked for again, at first; twice as many each time.
# Longer, and one that was frozen meanwhile might take what is lost when it goes on.
_SOON = 1.0
# Seconds between two attempts to reach a server that may be somewhere else, at most.
_PAUSE = 0.2
# Seconds that a replica has to answer, at most; there are others.
_QUICK = 1.0


class Dials:
    """Makes the connections of one peer. `run` must run beside it.

    :param find: returns what tells where to, in the event loop
    :param name: what CLIENT LIST shows of the peer
    :param outages: told of what is refused
    :param connect_timeout: seconds to connect within
    :param silence: a connection's `Connection.silence`, in seconds, until who uses it sets another
    :param limit: seconds of failures after which the last one is final, ``None`` for never
    :param patient: whether a login that is refused may be known to the server soon
    """

    def __init__(
        self,
        find: Callable[[], Topology],
        name: str,
        outages: Outages,
        *,
        connect_timeout: float,
        silence: float,
        limit: float | None,
        patient: bool,
    ) -> None:
        self._find = find
        self._found: Topology | None = None
        self._name = name
        self._outages = outages
        self._timeout = connect_timeout
        self._silence = silence
        self._limit = limit
        self._heals = (Meaning.LOGIN,) if patient else ()
        self._watch = Watch(silence)
        self._is_replica = False
        # The connections, and the attempts to make one, with the generation each belongs to.
        self._made: dict[Connection, int] = {}
        self._attempts: dict[CancelScope, int] = {}

    @property
    def _topology(self) -> Topology:
        if self._found is None:
            self._found = self._find()
        return self._found

    @property
    def address(self) -> Address | None:
        """Where the server was when it was last asked for, ``None`` before that."""
        return None if self._found is None else self._found.address

    def dialer(self, what: str, dial: Dial | None = None) -> Dialer:
        """Return what makes one connection after the other.

        :param what: what they are for
        :param dial: makes one, `dial` unless given
        """
        patience = Patience("the login", self._outages, heals=self._heals)
        return Dialer(dial or partial(self.dial, what), self._limit, patience, self._lost)

    async def first(
        self, what: str, unused: AsyncExitStack, *, patient: bool = False
    ) -> Connection:
        """Connect; so far, the connection is closed with ``unused``.

        :param patient: whether to go on until it is connected
        """
        dialer = self.dialer(what)
        connection = await (dialer.again() if patient else dialer.first())
        unused.push_async_callback(aclose_forcefully, connection)
        return connection

    async def dial(self, what: str) -> Connection:
        """Connect to wherever the server is.

        If it may move, what fails is tried again, and asked where it is, as long as that may take
        for one connection: it may be moving.

        :raises TransportConnectionError: if it fails
        """
        end = current_time() + self._timeout
        moves, failed = self._topology.moves, None
        bound = min(_SOON, self._timeout) if moves else self._timeout
        while True:
            try:
                connection = await self._attempt(what, bound, end, failed)
            except TransportConnectionError as exc:
                failed = exc
                final = not moves or meaning_of(exc) is not Meaning.ELSEWHERE
                if final or current_time() >= end:
                    raise
                bound = min(bound * 2, self._timeout)
                await sleep(_PAUSE * random())
            else:
                if connection is not None:
                    return connection

    async def _attempt(
        self, what: str, bound: float, end: float, failed: TransportConnectionError | None
    ) -> Connection | None:
        """Connect to where the server is; ``None`` if it has left there meanwhile."""
        topology = self._topology
        address = await self._resolve(end, failed)
        try:
            return await self._open(what, address, topology.generation, bound)
        except TransportConnectionError as exc:
            topology.note(address, exc)
            raise

    async def _resolve(self, end: float, failed: TransportConnectionError | None = None) -> Address:
        """Return where the server is. Who shares the question asks on once this one's time is over.

        :param end: when it is, on AnyIO's clock
        :param failed: the error of the attempt before, which says more
        """
        with move_on_after(end - current_time()):
            return await self._topology.resolve()
        if failed is not None:
            raise failed
        raise TransportConnectionError(
            "Redis Streams connection error: nobody told where the server is within "
            f"{self._timeout:g} seconds (connect_timeout). Check that those in the url are running."
        ) from TimeoutError()

    async def _open(
        self, what: str, address: Address, generation: int, bound: float
    ) -> Connection | None:
        connection = None
        with move_on_after(bound) as scope:
            self._attempts[scope] = generation
            try:
                connection = await open_connection(
                    address,
                    client_name=f"anyio_kkrpc:{what}:{self._name}",
                    timeout=self._timeout,
                    silence=self._silence,
                    ask_role=True,
                    follows=self._topology.follows,
                )
            finally:
                del self._attempts[scope]
        if connection is None:
            if generation == self._topology.generation:
                raise address.cannot_connect(TimeoutError(f"no answer within {bound:g} seconds"))
            return None
        wrong = wrong_role(connection.role, moves=self._topology.moves)
        if wrong is not None or generation != self._topology.generation:
            await aclose_forcefully(connection)
            if wrong is not None:
                raise address.cannot_connect(wrong)
            return None
        self._keep(connection, generation)
        return connection

    async def dial_replica(self, what: str, node: Node) -> Connection:
        """Connect to what copies the server, only to read.

        :raises TransportConnectionError: if that fails
        """
        topology = self._topology
        server = await self._resolve(current_time() + self._timeout)
        generation = topology.generation
        address = replace(server, host=node[0], port=node[1], path=None)
        connection = await open_connection(
            address,
            client_name=f"anyio_kkrpc:{what}:{self._name}",
            timeout=min(self._timeout, _QUICK),
            silence=self._silence,
            ask_role=True,
            follows=topology.moves,
        )
        try:
            await self._read_only(connection)
        except BaseException:
            await aclose_forcefully(connection)
            raise
        self._look_after(connection, generation)
        return connection

    async def _read_only(self, connection: Connection) -> None:
        role = connection.role
        if role is None or not role.is_replica:
            raise connection.address.cannot_connect(WrongRoleError("it is no replica"))
        try:
            await connection.execute(b"READONLY")
        except ResponseError as exc:
            # Only in a Cluster a replica serves nothing without it.
            if "cluster support disabled" not in str(exc):
                raise connection.address.cannot_connect(exc) from exc

    def _keep(self, connection: Connection, generation: int) -> None:
        role = connection.role
        if role is not None:
            if role.replicas:
                connection.silence = longest_silence(role, connection.silence)
            if role.master is not None and not self._is_replica:
                where = host_and_port(*role.master)
                logger.warning(
                    "%s is a replica of %s, and takes no writes", connection.address, where
                )
            self._is_replica = role.is_replica
        self._look_after(connection, generation)

    def _look_after(self, connection: Connection, generation: int) -> None:
        self._made = {made: n for made, n in self._made.items() if not made.closed}
        self._made[connection] = generation
        self._watch.add(connection)

    def _lost(self, connection: Connection, exc: Exception) -> None:
        self._topology.note(connection.address, exc)

    async def run(self) -> None:
        """Give up connections that are dead, or lead to where the server is no longer."""
        generation = self._topology.generation
        while True:
            changed = generation
            with move_on_after(self._watch.pause):
                changed = await self._topology.wait_changed(generation)
            if changed == generation:
                await self._watch.look()
            else:
                generation = changed
                await self._leave(generation)

    async def look_around(self, interval: float, probe: Probe) -> None:
        """Look where the server is, for all peers of this process that connect to the same.

        :param interval: seconds between two looks
        :param probe: asks the server what it is, on a connection of this peer
        """
        await self._topology.watch(interval, probe)

    async def _leave(self, generation: int) -> None:
        """Leave what belongs to another generation."""
        for scope, of in self._attempts.items():
            if of < generation:
                scope.cancel()
        for connection, of in list(self._made.items()):
            if of < generation:
                self._made.pop(connection, None)  # meanwhile, new ones are made
                await connection.give_up("the server is somewhere else now")
