"""Connections to replicas, for what is only read: the server that they copy has less to do then.

Which there are, and how far each of them has come, the server tells itself (ROLE), however it was
found. So one that is cut off, or that lags, is noticed though it answers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from functools import partial
from random import shuffle
from typing import Any

from anyio import current_time, sleep

from ..._exceptions import RPCError, TransportConnectionError
from ._command import Argument, Command
from ._dials import Dials
from ._errors import RedisError
from ._link import Dialer, Link
from ._patience import Outages
from ._resp import Connection
from ._role import Copies, Node, read_copies

__all__ = ("Replicas",)

logger = logging.getLogger("anyio_kkrpc")

# Seconds between two looks at the one that is read from. Each says once a second how far it is.
_INTERVAL = 1.0
# Seconds that it may be behind.
_LAG = 5.0
# Seconds for which one that was left isn't tried again.
_AVOIDED = 30.0
_PART = "reading from replicas"


class Replicas:
    """Makes the connections on which one peer reads from replicas, or from the server itself.

    `run` must run beside it.

    :param link: asks the server
    :param outages: told of what it refuses
    """

    def __init__(self, dials: Dials, link: Link, outages: Outages) -> None:
        self._dials = dials
        self._link = link
        self._outages = outages
        self._connection: Connection | None = None
        # Which one that leads to, ``None`` for the server.
        self._node: Node | None = None
        self._avoided: dict[Node, float] = {}
        self._alone = False
        # How far the server had come, and when.
        self._ends: deque[tuple[float, int]] = deque()

    def dialer(self, what: str) -> Dialer:
        """Return what makes one connection after the other.

        :param what: what they are for
        """
        return self._dials.dialer(what, partial(self._dial, what))

    async def execute_many(self, commands: Iterable[Command]) -> list[Any]:
        """Ask the server what no replica may know yet."""
        return [await self._ask(*command) for command in commands]

    async def _ask(self, *command: Argument) -> Any:
        try:
            return await self._link.request(*command)
        except RedisError as exc:
            return exc

    async def _copies(self) -> Copies | None:
        """Ask what there is; ``None`` if the server doesn't tell."""
        reply = await self._ask(b"ROLE")
        if isinstance(reply, Exception):
            self._outages.leave_out(_PART, reply)
            return None
        return read_copies(reply)

    async def _dial(self, what: str) -> Connection:
        copies = await self._copies()
        self._connection, self._node = None, None
        self._ends.clear()
        for node in self._candidates(copies):
            try:
                connection = await self._dials.dial_replica(what, node)
            except TransportConnectionError as exc:
                self._avoid(node)
                logger.debug("a replica can't be read from: %s", exc)
            else:
                self._alone = False
                self._connection, self._node = connection, node
                return connection
        if copies is not None and not self._alone:
            self._alone = True
            logger.warning("there is no replica to read from: reading from the server that has all")
        self._connection = await self._dials.dial(what)
        return self._connection

    def _candidates(self, copies: Copies | None) -> list[Node]:
        """Return those that may be tried, in any order, so that all get readers."""
        now = current_time()
        self._avoided = {node: until for node, until in self._avoided.items() if until > now}
        nodes = [] if copies is None else [node for node in copies.nodes if self._may(node)]
        shuffle(nodes)
        return nodes

    def _may(self, node: Node) -> bool:
        return node not in self._avoided

    def _avoid(self, node: Node) -> None:
        self._avoided[node] = current_time() + _AVOIDED

    async def run(self) -> None:
        """Look again and again whether what is read from is the best that there is."""
        while True:
            await sleep(_INTERVAL)
            try:
                await self._look()
            except RPCError:
                return  # nothing is written any more, and soon nothing read

    async def _look(self) -> None:
        connection = self._connection
        if connection is None or connection.closed:
            return
        copies = await self._copies()
        if copies is None or connection is not self._connection:
            return
        reason = self._judge(copies)
        if reason is not None:
            self._connection = None
            await connection.give_up(reason)

    def _judge(self, copies: Copies) -> str | None:
        """Return why the present connection is to be left."""
        node = self._node
        if node is None:
            return "there is a replica to read from" if self._candidates(copies) else None
        progress = copies.nodes.get(node)
        if progress is None:
            reason = "the replica is cut off from its server"
        elif self._lags(copies.offset, progress):
            reason = f"the replica is more than {_LAG:g} seconds behind its server"
        else:
            return None
        self._avoid(node)
        return reason

    def _lags(self, end: int, progress: int) -> bool:
        """Whether a replica hasn't come by now where its server was `_LAG` seconds ago."""
        now, ends = current_time(), self._ends
        if ends and end < ends[-1][1]:
            ends.clear()  # it counts anew
        ends.append((now, end))
        while len(ends) > 1 and ends[1][0] <= now - _LAG:
            ends.popleft()
        return ends[0][0] <= now - _LAG and progress < ends[0][1]
