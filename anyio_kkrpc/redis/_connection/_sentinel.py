"""The server that sentinels call the master: asked for at each of them until one answers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from random import random, shuffle
from typing import Any

from anyio import fail_after, sleep

from ..._exceptions import TransportConnectionError
from ..._runtime._log import quoted
from ._address import Address, describe
from ._command import Command
from ._errors import Meaning, RedisError, meaning_of
from ._login import open_connection
from ._resolver import Probe, Told
from ._resp import Connection
from ._role import wrong_role
from ._target import Target, host_and_port

__all__ = ("Sentinel",)

logger = logging.getLogger("anyio_kkrpc")

# Seconds for each sentinel to answer within, and for those that didn't, once all were asked.
_SOON, _LATE = 0.5, 2.0
# How many sentinels are known at most, besides those of the URL.
_MOST = 32


class Sentinel:
    """Finds the master of a service. The sentinel that answered last is asked first.

    :param target: with the sentinels that the URL names; they tell of others
    """

    moves, follows = True, False

    def __init__(self, target: Target) -> None:
        self._target = target
        self._service = str(target.service)
        self._known = [*target.seeds]
        shuffle(self._known)

    async def find(self) -> Address:
        """Return the first answer of a sentinel.

        :raises TransportConnectionError: if none of them tells; the text has what each said
        """
        failures: dict[Address, Exception] = {}
        for seconds in (_SOON, _LATE):
            for sentinel in list(self._known):
                if sentinel not in failures or _is_late(failures[sentinel]):
                    self._ask_last(sentinel)  # unless it answers, also if who asks has no time
                    try:
                        return await self._ask_once(sentinel, seconds)
                    except _FAILURES as exc:
                        failures[sentinel] = exc
        raise self._not_found(failures)

    def hint(self, address: Address, exc: Exception) -> Address | None:
        """Ask another sentinel first next time: what this one said was of no use."""
        self._ask_last(self._known[0])
        return None

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        """Ask one of the sentinels, on one connection as long as it answers."""
        failures: dict[Address, Exception] = {}
        said = False
        while True:
            sentinel = self._known[0]
            try:
                async with await self._connect(sentinel, _LATE) as connection:
                    while True:
                        (reply,) = await self._ask(connection, _LATE, self._question)
                        address = self._read(reply)
                        if said:
                            logger.warning("%s: a sentinel answers again", self._target)
                        said = False
                        failures.clear()
                        if address != told.address:
                            await self._check(address)
                            told.found(address)
                        await sleep(_around(interval))
            except _FAILURES as exc:
                failures[sentinel] = exc
                self._ask_last(sentinel)
                if not said and failures.keys() >= set(self._known):
                    said = True
                    logger.warning("%s It isn't watched meanwhile.", self._not_found(failures))
            await sleep(_around(interval))

    # One sentinel

    async def _connect(self, sentinel: Address, seconds: float) -> Connection:
        return await open_connection(sentinel, client_name="anyio_kkrpc:sentinel", timeout=seconds)

    async def _ask_once(self, sentinel: Address, seconds: float) -> Address:
        """Ask a sentinel where the server is, and who else may be asked."""
        others = (b"SENTINEL", b"SENTINELS", self._service)
        async with await self._connect(sentinel, seconds) as connection:
            replies = await self._ask(connection, seconds, self._question, others)
        address = self._read(replies[0])
        if sentinel in self._known:
            self._known.remove(sentinel)
        self._known.insert(0, sentinel)
        self._learn(replies[1])
        return address

    @property
    def _question(self) -> Command:
        return (b"SENTINEL", b"get-master-addr-by-name", self._service)

    async def _ask(self, connection: Connection, seconds: float, *commands: Command) -> list[Any]:
        with fail_after(seconds):
            return await connection.execute_many(commands)

    def _read(self, reply: Any) -> Address:
        if isinstance(reply, Exception):
            raise reply
        if reply is None:
            raise _UnknownServiceError("it doesn't know this service")
        found = _host_and_port(*reply) if isinstance(reply, list) and len(reply) == 2 else None
        if found is None:
            raise _UnknownServiceError(f"it answered {quoted(reply)}")
        return self._target.at(*found)

    def _learn(self, reply: Any) -> None:
        """Take up the sentinels that another one knows; what makes no sense is left out."""
        like = self._target.seeds[0]
        for flat in reply if isinstance(reply, list) else ():
            facts = flat if isinstance(flat, list) else []
            pairs = zip(facts[::2], facts[1::2], strict=False)
            named = {name: value for name, value in pairs if isinstance(name, bytes)}
            where = _host_and_port(named.get(b"ip"), named.get(b"port"))
            if where is not None:
                sentinel = replace(like, host=where[0], port=where[1])
                if sentinel not in self._known:
                    self._known.append(sentinel)
        learned = [one for one in self._known if one not in self._target.seeds]
        for one in learned[_MOST:]:  # those that failed last
            self._known.remove(one)

    async def _check(self, address: Address) -> None:
        """Look whether what a sentinel calls the master says so itself.

        :raises WrongRoleError: if it is a replica: the sentinel is behind, or ahead
        """
        async with await open_connection(address, timeout=_LATE, ask_role=True) as connection:
            wrong = wrong_role(connection.role, moves=True)
        if wrong is not None:
            raise wrong

    def _ask_last(self, sentinel: Address) -> None:
        if sentinel in self._known:
            self._known.remove(sentinel)
            self._known.append(sentinel)

    def _not_found(self, failures: dict[Address, Exception]) -> TransportConnectionError:
        said = "; ".join(
            f"{host_and_port(*sentinel.where)}: {describe(_cause(exc))}"
            for sentinel, exc in failures.items()
        )
        error = TransportConnectionError(
            f"Redis Streams connection error: no sentinel tells where {self._target} is ({said}). "
            f"Check {self._advice(failures.values())}."
        )
        causes = [_cause(exc) for exc in failures.values()]
        # What all must have said to be final comes last.
        error.__cause__ = min(causes, key=lambda exc: isinstance(exc, RedisError))
        return error

    def _advice(self, failures: Iterable[Exception]) -> str:
        causes = [_cause(exc) for exc in failures]
        if any(isinstance(exc, _UnknownServiceError) for exc in causes):
            return "the service in the url: SENTINEL MASTERS lists those that a sentinel knows"
        meanings = {meaning_of(exc) for exc in causes if isinstance(exc, RedisError)}
        if Meaning.LOGIN in meanings or Meaning.RIGHTS in meanings:
            return (
                "sentinel_username and sentinel_password in the url, and that this user may use "
                "SENTINEL: the user and password before the hosts are for the servers"
            )
        if Meaning.REFUSED in meanings:
            return "that sentinels listen at these ports, which are 26379 by default"
        speaks = "plain TCP (rediss+sentinel:// is for TLS)"
        if self._target.node.tls:
            speaks = "TLS (redis+sentinel:// is for plain TCP)"
        return (
            "that sentinels are running there, the ports, which are 26379 by default, the "
            f"firewall, and that these ports speak {speaks}"
        )


class _UnknownServiceError(LookupError):
    """A sentinel doesn't tell where the server is."""


# What may come of asking one sentinel.
_FAILURES = (TransportConnectionError, RedisError, OSError, _UnknownServiceError)


def _host_and_port(host: Any, port: Any) -> tuple[str, int] | None:
    """Return where a sentinel says that something is; ``None`` if it makes no sense."""
    if not isinstance(host, bytes) or not isinstance(port, bytes) or not port.isdigit():
        return None
    name, number = host.decode(errors="replace"), int(port[:6])
    return (name, number) if name.isprintable() and name and 0 < number < 65536 else None


def _cause(exc: Exception) -> Exception:
    """Return what is behind the error of a connection, which says more than is needed here."""
    cause = exc.__cause__
    return (
        cause if isinstance(exc, TransportConnectionError) and isinstance(cause, Exception) else exc
    )


def _is_late(exc: Exception) -> bool:
    return isinstance(_cause(exc), TimeoutError)


def _around(seconds: float) -> float:
    """Return a time around this one, so that processes don't all ask at once."""
    return seconds * (0.75 + random() / 2)
