"""Where the server is now: found out once for all peers of this process, and watched.

How it is found depends on what the URL leads to: a `Finder` knows that, one for each kind of URL. A
`Topology` knows the answer. The peers of one event loop that connect to the same have one together,
so that however many connections are lost at once, one question is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import random
from typing import Protocol, TypeAlias
from weakref import WeakValueDictionary

from anyio import Event, Lock, current_time, sleep
from anyio.lowlevel import RunVar

from ..._exceptions import TransportConnectionError
from ..._runtime._fresh import fresh_copy
from ._address import Address
from ._errors import Meaning, code_of, meaning_of
from ._role import Role, WrongRoleError

__all__ = ("Finder", "Fixed", "Probe", "Topology", "Told", "shared_topology")

# Asks the server, on a connection that is there anyway, what it is; ``None`` if it doesn't tell.
# It waits while there is no connection.
Probe: TypeAlias = Callable[[], Awaitable[Role | None]]

# Seconds between two questions where the server is, at least, and those that chance adds at most.
_APART = 0.1
# Seconds between two looks at a server that nothing copies, and at one that was a master once. The
# former is a little less than two rounds of a peer that only calls: each of them asks one thing.
_ALONE, _DEMOTED = 14.0, 1.0


class Told(Protocol):
    """What a finder tells while it watches."""

    @property
    def address(self) -> Address | None:
        """Where the server is as far as is known."""

    def found(self, address: Address) -> None:
        """Note where the server is."""

    def lose(self) -> None:
        """Note that it is no longer where it was."""


class Finder(Protocol):
    """Finds the server that has a stream. All keys of a stream are in one Cluster slot, so there
    is one at a time.

    :ivar moves: whether it may be somewhere else when it is asked again. If so, only a server that
        doesn't say that it is a replica is the right one.
    :ivar follows: whether a server that hasn't the stream tells which one has it (MOVED)
    """

    moves: bool
    follows: bool

    async def find(self) -> Address:
        """Ask where the server is. One asks at a time.

        :raises TransportConnectionError: if it can't be found out; it is tried again
        """
        ...

    def hint(self, address: Address, exc: Exception) -> Address | None:
        """Return where the server is, if the error of a connection tells (MOVED).

        :param address: where the connection led, which is of no use any more
        """
        ...

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        """Ask again and again while all seems well. One does it at a time.

        It ends when it is cancelled, or if the server doesn't tell what it is.

        :param interval: seconds between two questions
        """
        ...


class Fixed:
    """Finds the server of a URL that names it, which stays where it is."""

    moves = follows = False

    def __init__(self, address: Address) -> None:
        self._address = address

    async def find(self) -> Address:
        """Return the address."""
        return self._address

    def hint(self, address: Address, exc: Exception) -> Address | None:
        """Tell nothing."""
        return None

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        """Tell when the server becomes a replica, as long as it is one, and when it is none again.

        Its name may lead to another one by now, for some of those who have connected meanwhile. One
        that always was a replica is what was asked for.
        """
        was_master = was_demoted = False
        while True:
            role = await probe()
            if role is None:
                return
            demoted = was_master and role.is_replica
            if demoted or was_demoted:
                told.lose()
            was_master, was_demoted = was_master or not role.is_replica, demoted
            await sleep(_DEMOTED if demoted else interval if role.replicas else _ALONE)


class _Flight:
    """A question under way, for those who wait for its answer."""

    def __init__(self) -> None:
        self.done = Event()
        self.error: TransportConnectionError | None = None


class Topology:
    """Where the server is, as far as it is known.

    :ivar generation: grows whenever all connections made before lead to the wrong server
    """

    def __init__(self, finder: Finder) -> None:
        self._finder = finder
        self._address: Address | None = None
        self._stale = False
        self._flight: _Flight | None = None
        self._asked_at: float | None = None
        self._turn = Lock()
        self._watchable = True
        self._changed = Event()
        self.generation = 0

    @property
    def moves(self) -> bool:
        """Whether it may be somewhere else after a connection was lost."""
        return self._finder.moves

    @property
    def follows(self) -> bool:
        """Whether a server that hasn't the stream tells which one has it (MOVED)."""
        return self._finder.follows

    @property
    def address(self) -> Address | None:
        """Where it was when somebody last found out, ``None`` if nobody has."""
        return self._address

    async def resolve(self) -> Address:
        """Return the address to connect to. What is known is asked for again after `note` only.

        Whoever comes first asks, others wait for the answer.

        :raises TransportConnectionError: if it can't be found out; it is tried again
        """
        while self._address is None or self._stale:
            flight = self._flight
            if flight is None:
                await self._ask()
            else:
                await flight.done.wait()
                if flight.error is not None:
                    raise fresh_copy(flight.error)
        return self._address

    async def _ask(self) -> None:
        flight = self._flight = _Flight()
        try:
            if self._asked_at is not None:
                now = current_time()
                await sleep(max(self._asked_at + _APART - now, 0) + random() * _APART)
            self._asked_at = current_time()
            self.found(await self._finder.find())
        except TransportConnectionError as exc:
            flight.error = exc
            raise
        finally:
            self._flight = None
            flight.done.set()  # if this is cancelled, the next one asks

    def note(self, address: Address, exc: Exception) -> None:
        """Note that a connection was lost, couldn't be made, or led to a server that can't help.

        :param address: where it led
        """
        if address != self._address:
            return  # by now it is known to be somewhere else
        there = self._finder.hint(address, exc)
        if there is not None:
            self.found(there)
        elif self.moves and _is_wrong(exc):
            self.lose()
        else:
            self._stale = True

    def found(self, address: Address) -> None:
        """Note where the server is."""
        self._stale = False
        if address == self._address:
            return
        moved = self._address is not None
        self._address = address
        if moved:
            self._change()

    def lose(self) -> None:
        """Note that the server is no longer where it was, so that each connection is of no use."""
        if self._address is not None:
            self._address = None
            self._change()

    def _change(self) -> None:
        self.generation += 1
        self._changed.set()
        self._changed = Event()

    async def wait_changed(self, generation: int) -> int:
        """Return another `generation` than this one, as soon as there is one."""
        while generation == self.generation:
            await self._changed.wait()
        return self.generation

    async def watch(self, interval: float, probe: Probe) -> None:
        """Look where it is, again and again, as long as this is the first who wants to.

        :param interval: seconds between two looks
        :param probe: asks the server on a connection of this peer
        """
        async with self._turn:
            if self._watchable:
                await self._finder.watch(interval, probe, self)
                self._watchable = False  # it doesn't tell, whoever asks


def _is_wrong(exc: BaseException) -> bool:
    """Whether a server said that what is needed is somewhere else."""
    found: BaseException | None = exc
    if isinstance(exc, TransportConnectionError):
        found = exc.__cause__
    if found is None:
        return False
    return (
        isinstance(found, WrongRoleError)
        or meaning_of(found) is Meaning.MOVED
        or code_of(found) == "READONLY"
    )


_topologies: RunVar[WeakValueDictionary[object, Topology]] = RunVar("anyio_kkrpc.redis.topologies")


def shared_topology(key: object, make: Callable[[], Finder]) -> Topology:
    """Return the one that peers of this event loop have together.

    :param key: equal for those who look for the same server
    :param make: makes what finds it, if this is the first one
    """
    try:
        known = _topologies.get()
    except LookupError:
        known = WeakValueDictionary()
        _topologies.set(known)
    found = known.get(key)
    if found is None:
        found = known[key] = Topology(make())
    return found
