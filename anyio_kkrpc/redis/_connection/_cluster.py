"""Finds the node of a Redis Cluster that has a stream.

Any node is asked for the stream's length: one that has the stream tells it, any other one says
which node has it (MOVED), a replica that its master has it. That is one line however large the
Cluster is, and takes no right but to the stream itself.
"""

from __future__ import annotations

from dataclasses import replace
from random import random, shuffle
from re import search
from typing import Any, NamedTuple

from anyio import move_on_after, sleep

from ..._exceptions import TransportConnectionError
from ._address import Address
from ._errors import Meaning, RedisError, meaning_of, moved_to
from ._login import open_connection
from ._resolver import Probe, Told
from ._resp import Connection
from ._target import Target

__all__ = ("ClusterFinder",)

# Seconds that a node has to answer before another one is asked, at first; twice as many each time
# that none has answered at all.
_QUICK = 0.5
# Nodes that lead to one another before somebody else is asked.
_HOPS = 5
# Nodes that are remembered beside those of the URL.
_MOST = 100
_NAME = "anyio_kkrpc:finder"


class _Said(NamedTuple):
    """What a node says when it is asked for a stream.

    :ivar there: which node has it, ``None`` if it has it itself
    :ivar identity: of the process, whatever name led to it; ``None`` if it doesn't tell
    :ivar forbidden: whether the user may not ask, so that ``there`` says nothing
    """

    there: Address | None
    identity: bytes | None
    forbidden: bool


class ClusterFinder:
    """Asks the nodes of the URL, and those that it hears of.

    :param target: what the URL says
    :param stream: the key of the stream
    :param timeout: seconds that a node has to answer, at most
    """

    moves = follows = True

    def __init__(self, target: Target, stream: bytes, timeout: float) -> None:
        self._target = target
        self._stream = stream
        self._longest = timeout if target.connect_timeout is None else target.connect_timeout
        self._bound = min(_QUICK, self._longest)
        self._owner: Address | None = None
        # What copies it: one of these has the stream when that node fails.
        self._replicas: list[Address] = []
        self._heard_of: dict[Address, None] = {}
        self._forbidden = False
        # Those that could not be asked when they were last.
        self._silent: set[Address] = set()

    async def find(self) -> Address:
        """Ask one node after the other.

        Who had it last is asked when another one leads there, or at the end: after it was frozen or
        cut off it says for a moment that it has the stream, and takes what is lost.
        """
        failed: dict[Address, TransportConnectionError] = {}
        nodes = self._nodes()
        for address in nodes:
            found = await self._follow(address, failed)
            if found is not None:
                self._bound = min(_QUICK, self._longest)
                self._take(found)
                return found
        if failed.keys() >= set(nodes):
            self._bound = min(self._bound * 2, self._longest)
        raise self._nobody(failed)

    def hint(self, address: Address, exc: Exception) -> Address | None:
        """Return where MOVED leads, if the error says that."""
        there = self._led(address, exc)
        if there is not None:
            self._take(there)
        return there

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        """Ask a node that hasn't the stream, again and again: it learns who has it now."""
        while not self._forbidden:
            for address in self._others():
                try:
                    async with await self._open(address) as connection:
                        while not self._forbidden:
                            await self._look(connection, told)
                            await sleep(interval * (0.5 + random()))
                except TransportConnectionError:
                    await sleep(interval * random())

    async def _look(self, connection: Connection, told: Told) -> None:
        """Ask once. It is another node if that knows it, and the one of before knows no better."""
        said = await self._question(connection, identify=False)
        there, before = said.there or connection.address, self._owner
        self._forbidden = said.forbidden
        if there == before or said.forbidden:
            return
        claims = await self._claim(there)
        if claims is None:
            return  # it doesn't know yet, or is a rumour
        if before is not None and (other := await self._claim(before)) is not None:
            if other.identity == claims.identity is not None:
                self._owner = there  # another name of the same node
            return
        self._take(there)
        told.found(there)

    async def _claim(self, address: Address) -> _Said | None:
        """Return what a node says, if it says that it has the stream."""
        try:
            said = await self._ask(address)
        except TransportConnectionError:
            return None
        return said if said.there is None else None

    async def _follow(
        self, address: Address, failed: dict[Address, TransportConnectionError]
    ) -> Address | None:
        """Go where one node leads; return which one has it, ``None`` if that can't be told."""
        for _ in range(_HOPS):
            if address in failed:
                break
            self._silent.add(address)  # unless it answers, also if who asks has no time for that
            try:
                there = (await self._ask(address)).there
            except TransportConnectionError as exc:
                failed[address] = exc
                break
            self._silent.discard(address)
            if there is None:
                return address
            address = there
        return None

    async def _ask(self, address: Address) -> _Said:
        """Ask one node on a connection of its own.

        :raises TransportConnectionError: if it doesn't tell
        """
        async with await self._open(address) as connection:
            said = await self._question(connection, identify=True)
            if said.there is None and connection.role is not None:
                self._replicas = [self._target.at(*node) for node in connection.role.nodes]
            return said

    async def _open(self, address: Address) -> Connection:
        quick = replace(address, connect_timeout=self._bound)
        connection = await open_connection(quick, client_name=_NAME, follows=True, ask_role=True)
        connection.address = address
        return connection

    async def _question(self, connection: Connection, *, identify: bool) -> _Said:
        """Ask for the stream.

        :param identify: whether the node is to tell its identity, too
        """
        address = connection.address
        commands: list[tuple[bytes, ...]] = [(b"XLEN", self._stream)]
        if identify:
            commands.append((b"INFO", b"server"))
        replies: list[Any] = [TimeoutError(f"no answer within {self._bound:g} seconds")]
        with move_on_after(self._bound):
            replies = await connection.execute_many(commands)
        length, info = replies[0], replies[-1]
        there = self._led(address, length) if isinstance(length, Exception) else None
        # Whatever else a node says of the stream, that it is elsewhere it would have said first.
        if there is None and not _tells(length):
            raise address.cannot_connect(length)
        found = search(rb"run_id:(\w+)", info) if isinstance(info, bytes) else None
        forbidden = isinstance(length, Exception) and meaning_of(length) is Meaning.RIGHTS
        return _Said(there, None if found is None else found[1], forbidden)

    def _led(self, address: Address, exc: Exception) -> Address | None:
        moved = moved_to(exc)
        if moved is None:
            return None
        return self._target.at(moved.host or str(address.host), moved.port)

    # Who is there

    def _take(self, owner: Address) -> None:
        """Note who has the stream."""
        if owner != self._owner:
            self._owner = owner
            self._replicas = [address for address in self._replicas if address != owner]
        heard_of = self._heard_of
        for address in (owner, *self._replicas):
            heard_of.pop(address, None)
            heard_of[address] = None
        while len(heard_of) > _MOST:
            del heard_of[next(iter(heard_of))]
        self._silent.intersection_update((*heard_of, *self._target.seeds))

    def _nodes(self) -> list[Address]:
        """Return all that are known in the order in which they are asked."""
        nodes = list({**dict.fromkeys(self._target.seeds), **self._heard_of})
        shuffle(nodes)
        return sorted(dict.fromkeys((*self._replicas, *nodes)), key=self._rank)

    def _rank(self, address: Address) -> tuple[bool, bool]:
        return address in self._silent, address == self._owner

    def _others(self) -> list[Address]:
        """Return them without who has it, if there are others."""
        nodes = self._nodes()
        return [address for address in nodes if address != self._owner] or nodes

    def _nobody(self, failed: dict[Address, TransportConnectionError]) -> TransportConnectionError:
        """Return the error for a stream that no node seems to have."""
        text = f"Redis Streams connection error: no node of {self._target} has the stream now"
        if not failed:
            return TransportConnectionError(f"{text}: they lead to each other")
        # Who looks after users and passwords is to know that one of those is wrong.
        errors = list(failed.values())
        exc = next((error for error in errors if meaning_of(error).heals), errors[0])
        why = str(exc).removeprefix("Redis Streams connection error: ")
        error = TransportConnectionError(f"{text}: {len(failed)} can't be asked, as {why}")
        error.__cause__ = exc.__cause__
        return error


def _tells(answer: Any) -> bool:
    """Whether an answer shows that a node knows where the stream is."""
    if not isinstance(answer, Exception):
        return True
    return isinstance(answer, RedisError) and meaning_of(answer) not in (
        Meaning.ELSEWHERE,
        Meaning.LOGIN,
    )
