"""Making a connection: where to, and what is said first."""

from __future__ import annotations

import logging

from anyio import aclose_forcefully, move_on_after

from ..._exceptions import TransportConnectionError
from ._address import Address
from ._command import Argument
from ._errors import Meaning, ResponseError, meaning_of, named, parse_error, parse_moving_error
from ._resp import Connection
from ._role import read_role

logger = logging.getLogger("anyio_kkrpc")


async def open_connection(
    address: Address,
    *,
    client_name: str | None = None,
    timeout: float = 5.0,
    silence: float = 5.0,
    ask_role: bool = False,
    follows: bool = False,
) -> Connection:
    """Connect and log in.

    :param client_name: shown by CLIENT LIST, if the server allows that; one in the URL has priority
    :param timeout: seconds for all of it; ``socket_connect_timeout`` in the URL has priority
    :param silence: the connection's `Connection.silence`, in seconds
    :param ask_role: whether to find out its `Connection.role`
    :param follows: whether its stream is gone after where it moves to
    :raises TransportConnectionError: if it fails; the text says why and what to check
    """
    if address.connect_timeout is not None:
        timeout = address.connect_timeout
    try:
        with move_on_after(timeout):
            credentials = await address.credentials()
            stream = await address.dial()
            parse = parse_moving_error if follows else parse_error
            connection = Connection(stream, address, silence=silence, parse=parse)
            try:
                name = address.client_name or client_name
                await _log_in(connection, credentials, name, ask_role=ask_role)
            except BaseException:
                await aclose_forcefully(stream)
                raise
            return connection
    except TransportConnectionError as exc:
        raise address.cannot_connect(exc.__cause__ or exc)
    except Exception as exc:
        raise address.cannot_connect(exc)
    raise address.cannot_connect(TimeoutError(f"no answer within {timeout:g} seconds"))


async def _log_in(
    connection: Connection, credentials: tuple[str, ...], name: str | None, *, ask_role: bool
) -> None:
    commands: list[tuple[Argument, ...]] = []
    if credentials:
        commands.append((b"AUTH", *credentials))
    if connection.address.db:
        commands.append((b"SELECT", connection.address.db))
    if name is not None:
        commands.append((b"CLIENT", b"SETNAME", name))
    # Shows that a server is there which takes commands, also where there is nothing to set.
    commands.append((b"PING",))
    if ask_role:
        commands.append((b"ROLE",))
    for command, reply in zip(commands, await connection.execute_many(commands), strict=True):
        if not isinstance(reply, Exception):
            if command[0] == b"ROLE":
                connection.role = read_role(reply)
            continue
        # A server that can't write to its disk refuses even this.
        refused = meaning_of(reply)
        there = command[0] == b"PING" and (refused is Meaning.RIGHTS or refused.passes)
        spare = command[0] in (b"CLIENT", b"ROLE") and isinstance(reply, ResponseError)
        if there or spare:
            logger.debug("%s refused %s: %s", connection.address, command[0], reply)
        else:
            raise named(reply, command)
