"""How one peer connects: to wherever its server is now, by a name, and watched."""

from __future__ import annotations

from functools import partial

from ._errors import Meaning
from ._link import Dialer
from ._login import open_connection
from ._patience import Outages, Patience
from ._resolver import Resolver
from ._resp import Connection
from ._watch import Watch


class Dials:
    """Makes the connections of one peer. `run` must run beside it.

    :param resolver: tells where to
    :param name: what CLIENT LIST shows of the peer
    :param outages: told of what is refused
    :param connect_timeout: seconds to connect within
    :param silence: a connection's `Connection.silence`, in seconds, until who uses it sets another
    :param shortest_silence: the shortest one that any of them gets
    :param limit: seconds of failures after which the last one is final, ``None`` for never
    :param patient: whether a login that is refused may be known to the server soon
    """

    def __init__(
        self,
        resolver: Resolver,
        name: str,
        outages: Outages,
        *,
        connect_timeout: float,
        silence: float,
        shortest_silence: float,
        limit: float | None,
        patient: bool,
    ) -> None:
        self._resolver = resolver
        self._name = name
        self._outages = outages
        self._timeout = connect_timeout
        self._silence = silence
        self._limit = limit
        self._heals = (Meaning.LOGIN,) if patient else ()
        watch = Watch(shortest_silence)
        self._watch, self.run = watch.add, watch.run

    def dialer(self, what: str) -> Dialer:
        """Return what makes one connection after the other.

        :param what: what they are for
        """
        patience = Patience("the login", self._outages, heals=self._heals)
        return Dialer(partial(self.dial, what), self._limit, patience)

    async def dial(self, what: str) -> Connection:
        """Connect once.

        :raises TransportConnectionError: if it fails
        """
        connection = await open_connection(
            await self._resolver.resolve(),
            client_name=f"anyio_kkrpc:{what}:{self._name}",
            timeout=self._timeout,
            silence=self._silence,
        )
        self._watch(connection)
        return connection
