"""Where a Redis server is and how to log in there: the URL, checked before any I/O."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import quote

from anyio import BrokenResourceError, EndOfStream, aclose_forcefully, create_task_group, sleep
from anyio.abc import ByteStream

from ..._exceptions import TransportConnectionError
from ..._runtime._lone import lone_error
from . import _socket
from ._errors import Meaning, RedisError, ResponseError, code_of, meaning_of, reason
from ._role import WrongRoleError
from ._threads import in_thread
from ._tls import CertificateFileError, Tls
from ._url import CredentialProvider, check_context, check_provider, read_url

_DEFAULT_PORT = 6379
# Seconds that a server may think about a TLS handshake before it is asked whether it speaks TLS.
_DOUBT_AFTER = 1.0


@dataclass(frozen=True, repr=False)
class Address:
    """Where a server is and how to log in. Its text never shows the password.

    :ivar host: name or IP address; ``None`` with a Unix socket
    :ivar path: path of the Unix socket, else ``None``
    :ivar username: user of Redis' access control list; ``None`` for the default one
    :ivar credential_provider: asked for user and password at each connect, if not ``None``
    :ivar connect_timeout: the URL's ``socket_connect_timeout`` in seconds, ``None`` if it has none
    :ivar tls: how the connection is encrypted, ``None`` if it isn't
    """

    host: str | None = "localhost"
    port: int = _DEFAULT_PORT
    path: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = None
    credential_provider: CredentialProvider | None = None
    client_name: str | None = None
    connect_timeout: float | None = None
    tls: Tls | None = None

    @property
    def where(self) -> tuple[str, int | None]:
        """Host and port, or the path of the Unix socket and ``None``."""
        return (self.host or "", self.port) if self.path is None else (self.path, None)

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        credential_provider: CredentialProvider | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> Address:
        """Read a URL as redis-py does, but refuse what redis-py would ignore.

        :param url: ``redis://user:password@host:port/db``, the same with ``rediss://`` for TLS, or
            ``unix:///path?db=0``; parts may be left out. What is in the query: ``client_name``,
            ``db``, ``username``, ``password``, ``socket_connect_timeout`` (seconds), and for TLS
            ``ssl_cert_reqs`` (``required``, ``optional``, ``none``), ``ssl_check_hostname``,
            ``ssl_server_hostname``, ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``.
        :param credential_provider: in place of user and password in the URL
        :param ssl_context: for ``rediss://``, in place of the ``ssl_`` options
        :raises ValueError: if something is wrong; the text names the option, and no password
        :raises TypeError: if an option has the wrong type
        """
        found = read_url(url)
        encrypted = url.startswith("rediss://")
        if credential_provider is not None:
            check_provider(credential_provider, found)
        if ssl_context is not None:
            check_context(ssl_context, found, encrypted)
        options = {name: found.pop(name) for name in list(found) if name.startswith("ssl_")}
        tls = Tls(ssl_context, **options) if encrypted else None
        return cls(**found, credential_provider=credential_provider, tls=tls)

    def __str__(self) -> str:
        user = "" if self.username is None else quote(self.username, safe="")
        if self.password is not None:
            user += ":***"
        if user:
            user += "@"
        if self.path is not None:
            return f"unix://{user}{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in str(self.host) else self.host
        return f"{'rediss' if self.tls else 'redis'}://{user}{host}:{self.port}/{self.db}"

    def __repr__(self) -> str:
        return f"<Address {self}>"

    async def credentials(self) -> tuple[str, ...]:
        """Return what AUTH takes, nothing if there is nobody to log in as."""
        if self.credential_provider is not None:
            # It may ask a service and block, so a connect that is given up doesn't wait for it.
            return tuple(await in_thread(self.credential_provider.get_credentials))
        if self.username is not None:
            # A user may have no password (nopass); AUTH takes one still.
            return self.username, self.password or ""
        return () if self.password is None else (self.password,)

    async def dial(self) -> ByteStream:
        """Open a byte stream to the server, with TLS if the URL says so.

        :raises OSError: if that fails; `ssl.SSLError` is one too
        """
        if self.path is not None:
            return await _socket.connect_unix(self.path)
        assert self.host is not None
        if self.tls is None:
            return await _socket.connect_tcp(self.host, self.port)
        context, name = await self.tls.context(), self.tls.name_of(self.host)
        stream = await _socket.connect_tcp(self.host, self.port)
        try:
            with lone_error():
                return await self._encrypt(stream, context, name)
        except BaseException:
            await aclose_forcefully(stream)
            raise

    async def _encrypt(self, stream: ByteStream, context: ssl.SSLContext, name: str) -> ByteStream:
        from anyio.streams.tls import TLSStream

        # A server that doesn't speak TLS waits for the rest of what looks like a command to it.
        async with create_task_group() as group:
            group.start_soon(self._doubt)
            stream = await TLSStream.wrap(
                stream, hostname=name, ssl_context=context, standard_compatible=False
            )
            group.cancel_scope.cancel()
        return stream

    async def _doubt(self) -> None:
        """Ask the server whether it speaks plain TCP.

        :raises _PlainPortError: if it does
        """
        assert self.host is not None
        await sleep(_DOUBT_AFTER)
        try:
            async with await _socket.connect_tcp(self.host, self.port) as stream:
                await stream.send(b"PING\r\n")
                answer = await stream.receive()
        except (OSError, BrokenResourceError, EndOfStream):
            return
        if answer[:1] in (b"+", b"-"):
            raise _PlainPortError("this port speaks plain TCP")

    def cannot_connect(self, exc: BaseException) -> TransportConnectionError:
        """Return the error for a connect that failed: why, and what to check."""
        error = TransportConnectionError(
            f"Redis Streams connection error: cannot connect to {self} ({describe(exc)}). "
            f"Check {self._advice(exc)}."
        )
        error.__cause__ = exc
        return error

    def _advice(self, exc: BaseException) -> str:
        while isinstance(exc, BrokenResourceError) and exc.__cause__ is not None:
            exc = exc.__cause__
        if isinstance(exc, RedisError) and meaning_of(exc) is Meaning.LOGIN:
            if self.credential_provider is not None:
                return "user and password that the credential_provider gives"
            if self.username is None and self.password is None:
                return "user and password: the url has none, and the server asks for them"
            return "user and password in the url, and that the server knows them"
        if isinstance(exc, RedisError) and code_of(exc) == "LOADING":
            return "whether the server has loaded its data meanwhile"
        if isinstance(exc, ResponseError):
            return "the number of the database in the url, and what the user may do"
        if isinstance(exc, RedisError):
            return "maxclients of the server, and what else is connected to it"
        if isinstance(exc, WrongRoleError):
            return (
                "the url: with sentinels it is redis+sentinel://host1,host2/service; and with "
                "those, that they agree (SENTINEL CKQUORUM) which server is the master"
            )
        if isinstance(exc, CertificateFileError):
            return "the files that the ssl_ options in the url name"
        if self.tls is not None and isinstance(exc, ssl.SSLError):
            return self.tls.advice(exc)
        if isinstance(exc, _PlainPortError):
            return "the port, and that it speaks TLS (if not, the url begins with redis://)"
        if isinstance(exc, socket.gaierror):
            return "the host name in the url"
        if self.path is not None:
            return "that a Redis server is running with this Unix socket, and its permissions"
        speaks = "plain TCP (if it is TLS, the url begins with rediss://)"
        if self.tls:
            speaks = "TLS (if not, the url begins with redis://)"
        if isinstance(exc, (EndOfStream, ConnectionResetError, BrokenPipeError)):
            return f"the port, that it speaks {speaks}, and maxclients of the server"
        return (
            "that a Redis server is running there, the port, the firewall, and that this port "
            f"speaks {speaks}"
        )


class _PlainPortError(OSError):
    """The server at a port that was to speak TLS does not."""


def describe(exc: BaseException) -> str:
    """Return the reason of a failed connect or lost connection in a few words."""
    several: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    if several:
        return "; ".join(dict.fromkeys(map(describe, several)))
    if isinstance(exc, (OSError, BrokenResourceError)) and exc.__cause__ is not None:
        return describe(exc.__cause__)
    if isinstance(exc, EndOfStream):
        return "closed by the server"
    # The event loops word errors of the operating system differently. Those of TLS and of name
    # resolution have numbers of their own.
    if (
        isinstance(exc, OSError)
        and not isinstance(exc, (ssl.SSLError, socket.gaierror))
        and exc.errno is not None
    ):
        return os.strerror(exc.errno)
    return reason(exc) or type(exc).__name__
