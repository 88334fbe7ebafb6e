"""What a URL means: one server, one that sentinels look after, or a Cluster. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import quote

from ..._exceptions import RPCError, TransportConnectionError
from ._address import Address
from ._errors import Meaning, code_of, meaning_of, reason
from ._url import CredentialProvider, Parts, split_url

if TYPE_CHECKING:
    import ssl

Kind: TypeAlias = Literal["server", "sentinel", "cluster"]


@dataclass(frozen=True, repr=False)
class Target:
    """What a URL leads to. Its text never shows a password.

    :ivar kind: ``"server"`` for one that stays where it is
    :ivar node: how to log in at each of its servers; of a ``"server"``, where it is
    :ivar seeds: whom to ask first where it is: sentinels, or nodes of the Cluster
    :ivar service: what the sentinels call it, ``None`` without them
    """

    kind: Kind
    node: Address
    seeds: tuple[Address, ...] = ()
    service: str | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        credential_provider: CredentialProvider | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> Target:
        """Read a URL.

        :param url: what `Address.parse` takes, or ``redis+sentinel://user:password@host:port,host/
            service/db``, or ``redis+cluster://user:password@host:port,host``, both with
            ``rediss+`` for TLS. Options of the query are those of `Address.parse`, and with
            sentinels ``sentinel_username`` and ``sentinel_password``, with which to log in there;
            user and password of the URL are those of the servers.
        :param credential_provider: for the servers
        :param ssl_context: for TLS, with servers and sentinels
        :raises ValueError: if something is wrong; the text names the option, and no password
        :raises TypeError: if an option has the wrong type
        """
        parts = split_url(url)
        node = Address.parse(
            parts.node, credential_provider=credential_provider, ssl_context=ssl_context
        )
        if parts.kind == "server":
            return cls("server", node)
        if parts.kind == "sentinel":
            return cls("sentinel", node, _sentinels(parts, node), parts.service)
        if node.db:
            raise ValueError("url: a Redis Cluster has no numbered databases but 0")
        return cls("cluster", node, tuple(replace(node, host=h, port=p) for h, p in parts.hosts))

    @property
    def connect_timeout(self) -> float | None:
        """The URL's ``socket_connect_timeout`` in seconds, ``None`` if it has none."""
        return self.node.connect_timeout

    @property
    def where(self) -> tuple[str, int | None]:
        """Host and port, or the path of the Unix socket and ``None``; of who is asked first."""
        return (self.seeds or (self.node,))[0].where

    def at(self, host: str, port: int) -> Address:
        """Return the address of one of its servers."""
        return replace(self.node, host=host, port=port)

    def __str__(self) -> str:
        if self.kind == "server":
            return str(self.node)
        text = str(self.node)
        scheme, _, rest = text.partition("://")
        user = rest.rpartition("@")[0]
        hosts = ",".join(host_and_port(*seed.where) for seed in self.seeds)
        found = f"{scheme}+{self.kind}://{user}{'@' if user else ''}{hosts}"
        if self.service is None:
            return found
        return f"{found}/{quote(self.service, safe='')}/{self.node.db}"

    def __repr__(self) -> str:
        return f"<Target {self}>"

    # Errors

    def refuses(self, exc: BaseException, stream: str) -> TransportConnectionError:
        """Return the error for a server that refuses what a peer can't do without."""
        advice = "what its user may do: the docs about security have the rights that a peer needs"
        code, meaning = code_of(exc), meaning_of(exc)
        if code == "WRONGTYPE":
            advice = f"the name of the stream: {stream!r}, or one of its keys, holds something else"
        elif meaning is Meaning.MOVED:
            advice = "the url: that of a Redis Cluster begins with redis+cluster://"
        elif meaning is not Meaning.RIGHTS:
            advice = "what the server is, and its log"
        error = TransportConnectionError(
            f"Redis Streams connection error: {self} refuses to serve the stream {stream!r} "
            f"({reason(exc)}). Check {advice}."
        )
        error.__cause__ = exc
        return error

    def too_old(self, version: tuple[int, ...]) -> TransportConnectionError:
        """Return the error for a server without the consumer groups that are needed."""
        return TransportConnectionError(
            f"Redis Streams connection error: consumer groups need Redis 6.2 or later, "
            f"{self} is {'.'.join(map(str, version))}"
        )

    def refusal(self, exc: BaseException) -> RPCError:
        """Return the error for one command that the server refuses."""
        error = RPCError(f"{self} refused a command: {reason(exc)}")
        error.__cause__ = exc
        return error


def host_and_port(host: str, port: int | None) -> str:
    """Return them in one text; only a Unix socket has no port."""
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _sentinels(parts: Parts, node: Address) -> tuple[Address, ...]:
    """Return where the sentinels are, with the credentials for them."""
    common = replace(
        node,
        db=0,
        username=parts.sentinel_username,
        password=parts.sentinel_password,
        credential_provider=None,
        connect_timeout=None,
    )
    return tuple(replace(common, host=host, port=port) for host, port in parts.hosts)
