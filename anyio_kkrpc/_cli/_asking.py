"""Blocking clients of Redis, for commands that ask it something and end.

The server that has a stream is found by what the transport finds it by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from socket import socket
from typing import Any, TypeVar

import anyio
import redis
from anyio import move_on_after
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from ..redis._connection._address import Address
from ..redis._connection._errors import OF_CONNECTION, parse_error
from ..redis._connection._resolver import Finder
from ..redis._connection._target import Target
from ..redis._connection._tls import CertificateFileError, Tls
from ..redis._making import make_finder

T = TypeVar("T")

_CODES: dict[type[RedisError], str] = {
    AskError: "ASK",
    AuthenticationError: "WRONGPASS",
    BusyLoadingError: "LOADING",
    ClusterDownError: "CLUSTERDOWN",
    MasterDownError: "MASTERDOWN",
    MovedError: "MOVED",
    NoPermissionError: "NOPERM",
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
    TryAgainError: "TRYAGAIN",
}


class Servers:
    """The servers that a URL leads to. They are asked once: whoever asks wants to know at once.

    :param timeout: seconds to connect, and for each answer
    :ivar target: what the URL means
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.target = Target.parse(url)
        self._timeout = timeout
        self._clients: dict[Address, redis.Redis] = {}
        self._finders: dict[str, Finder] = {}
        self._last = (self.target.seeds or (self.target.node,))[0]

    def of(self, stream: str) -> redis.Redis:
        """Return a client of the server that has a stream.

        :raises TransportConnectionError: if it can't be found
        """
        return self._client(self._find(stream))

    def every(self) -> list[redis.Redis]:
        """Return clients of all servers that may have streams.

        :raises redis.exceptions.RedisError: if the nodes of a Cluster can't be asked
        :raises TransportConnectionError: if the server can't be found
        """
        if self.target.kind != "cluster":
            return [self.of("")]
        return self._first(self._ask_node)

    def _find(self, stream: str) -> Address:
        if self.target.kind == "server":
            return self.target.node
        key = stream if self.target.kind == "cluster" else ""
        finder = self._finders.get(key)
        if finder is None:
            finder = self._finders[key] = make_finder(self.target, key.encode(), self._timeout)
        return anyio.run(self._ask_finder, finder)

    async def _ask_finder(self, finder: Finder) -> Address:
        with move_on_after(self._timeout):
            return await finder.find()
        error = f"nobody told where the server is within {self._timeout:g} seconds"
        raise self._last.cannot_connect(TimeoutError(error))

    def _ask_node(self, node: Address) -> list[redis.Redis]:
        """Return clients of all masters of the Cluster."""
        slots = self._execute(node, "CLUSTER", "SLOTS")
        masters = [
            (_text(master[0] or b"").strip("?"), int(master[1])) for _, _, master, *_ in slots
        ]
        found = dict.fromkeys(
            replace(node, host=host or node.host, port=port) for host, port in masters
        )
        return [self._client(address) for address in sorted(found, key=lambda found: found.where)]

    def _first(self, ask: Callable[[Address], T]) -> T:
        """Return what the first one answers that can be asked; who has been asked comes first."""
        failure: RedisError | None = None
        for seed in sorted(self.target.seeds, key=lambda seed: seed not in self._clients):
            try:
                return ask(seed)
            except RedisError as exc:
                failure = failure or exc
                self._drop(seed)
        assert failure is not None
        raise failure

    def _client(self, address: Address) -> redis.Redis:
        self._last = address
        client = self._clients.get(address)
        if client is None:
            client = self._clients[address] = _make_client(address, self._timeout)
        return client

    def _execute(self, address: Address, *command: Any) -> Any:
        return self._client(address).execute_command(*command)  # type: ignore[no-untyped-call]

    def _drop(self, address: Address) -> None:
        client = self._clients.pop(address, None)
        if client is not None:
            client.close()

    def error(self, exc: RedisError) -> Exception:
        """Return the error for servers that can't be asked: why, and what to check."""
        # redis-py's own error hides that of the operating system, which tells what to check.
        cause = exc.__cause__ or exc.__context__
        return self._last.cannot_connect(cause if isinstance(cause, OSError) else as_reply(exc))

    def close(self) -> None:
        """Close all connections."""
        for address in list(self._clients):
            self._drop(address)


def as_reply(exc: RedisError) -> Exception:
    """Return an error of redis-py as the transport has it; redis-py may have taken its code away.

    What is no reply stays as it is.
    """
    text, code = str(exc), _CODES.get(type(exc))
    if code is not None:
        return parse_error(text if text.startswith(code) else f"{code} {text}")
    replied = isinstance(exc, ResponseError) or text.startswith(OF_CONNECTION)
    return parse_error(text) if replied else exc


@contextmanager
def asking(url: str, timeout: float, stream: str) -> Iterator[redis.Redis]:
    """Give a client of the server that has a stream, for the block.

    :raises TransportConnectionError: if it can't be asked
    """
    servers = Servers(url, timeout)
    try:
        yield servers.of(stream)
    except RedisError as exc:
        raise servers.error(exc) from exc
    finally:
        servers.close()


def _make_client(address: Address, timeout: float) -> redis.Redis:
    options: dict[str, Any] = {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "client_name": address.client_name,
        "socket_connect_timeout": address.connect_timeout or timeout,
        "socket_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    if address.path is not None:
        return redis.Redis(unix_socket_path=address.path, **options)
    if address.tls is None:
        return redis.Redis(str(address.host), address.port, **options)
    options |= {"host": str(address.host), "port": address.port, "tls": address.tls}
    pool = redis.ConnectionPool(connection_class=_TlsConnection, **options)
    client = redis.Redis(connection_pool=pool)
    client.auto_close_connection_pool = True
    return client


class _TlsConnection(redis.Connection):
    """A connection that is encrypted as the transport's are. redis-py's own takes no name for the
    servers' certificates.
    """

    def __init__(self, *, tls: Tls, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> socket:
        try:
            context = self._tls.load()
        except CertificateFileError as exc:
            raise OSError(str(exc)) from exc
        plain: socket = super()._connect()  # type: ignore[no-untyped-call]
        try:
            return context.wrap_socket(plain, server_hostname=self._tls.name_of(self.host))
        except OSError:
            plain.close()
            raise


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
