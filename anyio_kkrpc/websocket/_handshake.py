"""How a WebSocket begins: who asks, from which page, and what the two sides will speak."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct

from .._spoken._base import DialectName
from ..abc import Codec
from ..codecs import get_codec

__all__ = ("Handshake", "Origins", "Refused", "protocol_of")

Origins: TypeAlias = Literal["same", "any"] | Sequence[str]
PORTS = {"http": 80, "https": 443}


class Refused(Exception):
    """Raised by ``authenticate`` to let nobody in.

    :param reason: told to the other side, as text
    :param status: of HTTP, which programs can see, and browsers don't tell pages
    :param code: accept the WebSocket, and close it with this code and the reason at once, so that
        pages can see it: 3000 to 4999
    :param headers: of the response, such as ``WWW-Authenticate``
    """

    def __init__(
        self,
        reason: str = "refused",
        *,
        status: int = 403,
        code: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        if not 400 <= status <= 599:
            raise ValueError(f"status: 400 to 599, not {status!r}")
        if code is not None and code != 1008 and not 3000 <= code <= 4999:
            raise ValueError(f"code: 1008 or 3000 to 4999, not {code!r}")
        self.reason = reason
        self.status = status
        self.code = code
        self.headers: dict[str, str] = dict(headers or {})


class Handshake(Struct, frozen=True):
    """What is known of who opens a WebSocket.

    :ivar path: of the URL
    :ivar query: what stands behind its question mark, as it was sent
    :ivar headers: by their names in lower case; of several with one name the values are joined by
        commas
    :ivar origin: of the page whose script connects; ``None`` if it isn't a browser
    :ivar client: address of the other side, or of the proxy in between
    :ivar subprotocols: that it offers
    :ivar scope: all that ASGI's server tells
    """

    path: str
    query: str
    headers: Mapping[str, str]
    origin: str | None
    client: str | None
    subprotocols: Sequence[str]
    scope: MutableMapping[str, Any]

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies; what makes no sense among them is left out."""
        pairs = [one.partition("=") for one in self.headers.get("cookie", "").split(";")]
        return {name.strip(): value.strip().strip('"') for name, is_one, value in pairs if is_one}


def handshake_of(scope: MutableMapping[str, Any]) -> Handshake:
    """Return what an ASGI scope tells."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope.get("headers", ()):
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        comma = "; " if name == "cookie" else ", "
        headers[name] = f"{headers[name]}{comma}{value}" if name in headers else value
    client = scope.get("client")
    return Handshake(
        path=scope.get("path", ""),
        query=scope.get("query_string", b"").decode("latin-1"),
        headers=headers,
        origin=headers.get("origin"),
        client=client[0] if client else None,
        subprotocols=tuple(scope.get("subprotocols") or ()),
        scope=scope,
    )


# Origins


def origins_of(name: str, value: Any) -> Origins:
    """Take what `may_come` takes."""
    if value in ("same", "any"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: 'same', 'any' or a list of origins, not {value!r:.80}")
    return tuple(_origin(name, one) for one in value)


def _origin(name: str, value: Any) -> str:
    if value == "null":
        return "null"
    if not isinstance(value, str):
        raise TypeError(f"{name}: needs text, not {value!r:.80}")
    if not value.isascii():
        raise ValueError(f"{name}: browsers write {value!r:.80} in ASCII, with 'xn--'")
    parts = urlsplit(value)
    if not parts.scheme or not parts.netloc or parts.path or parts.query or parts.username:
        raise ValueError(f"{name}: needs 'https://host' or 'https://host:port', not {value!r:.80}")
    return _as_browsers_write(value)


def _as_browsers_write(origin: str) -> str:
    """Return an origin in lower case, without the port that its scheme has anyway."""
    origin = origin.lower()
    port = PORTS.get(origin.partition(":")[0])
    return origin if port is None else origin.removesuffix(f":{port}")


def may_come(handshake: Handshake, origins: Origins) -> bool:
    """Whether a page of that origin may connect. Who is no browser has none, and may."""
    origin = handshake.origin
    if origin is None or origins == "any":
        return True
    if origins == "same":
        return _is_same(origin, handshake)
    return _as_browsers_write(origin) in origins


def _is_same(origin: str, handshake: Handshake) -> bool:
    """Whether a page is of the host that it connects to. TLS may have ended at a proxy."""
    try:
        page, here = urlsplit(origin), urlsplit("//" + handshake.headers.get("host", ""))
        default = PORTS.get(page.scheme)
        if default is None or not page.hostname:
            return False
        if handshake.scope.get("scheme") == "wss" and page.scheme != "https":
            return False
        return (page.hostname, page.port or default) == (here.hostname, here.port or default)
    except ValueError:  # a port that is none
        return False


# What is spoken


def protocol_of(codec: Codec) -> str:
    """Return the name of the sub-protocol in which peers of this library talk."""
    return f"anyio-kkrpc.{codec.name}"


def known_protocols(codec: Codec) -> dict[str, Codec]:
    """Return all codecs that peers of this library may ask for, the given one among them."""
    known: list[Codec] = [codec, get_codec("json")]
    try:
        known.append(get_codec("cbor"))
    except ImportError:
        pass
    return {protocol_of(one): one for one in reversed(known)}


def choose(
    offered: Sequence[str],
    own: Mapping[str, Codec],
    others: Sequence[str],
    dialect: DialectName,
    codec: Codec,
) -> tuple[str | None, DialectName, Codec]:
    """Return sub-protocol, dialect and codec for what the other side offers.

    :param own: names of this library's sub-protocols
    :param others: those of the application, in the order in which it prefers them
    :param dialect: what is spoken where the other side offers none of ``own``
    :param codec: likewise
    """
    for name in offered:
        if name in own:
            return name, "native", own[name]
    chosen = next((name for name in others if name in offered), None)
    return chosen, dialect, codec if dialect == "native" else get_codec("json")
