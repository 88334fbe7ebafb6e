"""What stands in a URL, read as redis-py reads it; what that would ignore is refused. No I/O."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

CERT_REQS = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
_OPTIONS = frozenset(("client_name", "db", "password", "socket_connect_timeout", "username"))
# What an `ssl.SSLContext` has, and the name of the server, which it hasn't.
_CONTEXT_OPTIONS = frozenset(
    ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
)
# What isn't a text.
_TYPES: dict[str, Callable[[str], Any]] = {
    "db": int,
    "socket_connect_timeout": float,
    "ssl_check_hostname": lambda text: text.upper() not in ("0", "F", "FALSE", "N", "NO"),
}
# Of the number of a database.
_MOST_DIGITS = 10
_SSL_OPTIONS = _CONTEXT_OPTIONS | {"ssl_server_hostname"}
_BEGINNINGS = (
    "redis://, rediss:// or unix://, redis+sentinel://, rediss+sentinel://, redis+cluster:// or "
    "rediss+cluster://"
)
# What has several hosts: its scheme, and what else is pasted here as such a one.
_SEVERAL = re.compile(
    r"(rediss?)(\+sentinel|\+cluster|-sentinel)://([^/?#]*)([^?#]*)(.*)", re.DOTALL
)
# What others write for it: Celery, and clients of other languages.
_FOREIGN = {
    "sentinel": "redis+sentinel://host1,host2/service",
    "redis-cluster": "redis+cluster://host1,host2",
    "rediss-cluster": "rediss+cluster://host1,host2",
}
_PORTS = {"sentinel": 26379, "cluster": 6379}


class CredentialProvider(Protocol):
    """Who knows user and password at each login, as redis-py's ``CredentialProvider`` does."""

    def get_credentials(self) -> tuple[str, ...]:
        """Return user and password, or the password alone; may block, and is called in a thread."""
        ...


class Parts(NamedTuple):
    """What a URL consists of.

    :ivar node: the URL as if the first host were the only server, without what is for sentinels
    :ivar hosts: whom to ask where the server is: host and port of each
    """

    kind: Literal["server", "sentinel", "cluster"]
    node: str
    hosts: tuple[tuple[str, int], ...] = ()
    service: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None


def split_url(url: str) -> Parts:
    """Take a URL apart that may have several hosts.

    :raises ValueError: if that can't be; no text repeats what may be of a password
    :raises TypeError: if it is no text
    """
    if not isinstance(url, str):
        raise TypeError(f"url: needs a str, not {type(url).__name__}")
    found = _SEVERAL.fullmatch(url)
    if found is None:
        return Parts("server", url)
    scheme, what, netloc, path, rest = found.groups()
    kind: Literal["sentinel", "cluster"] = "cluster" if what == "+cluster" else "sentinel"
    query, _, fragment = rest.removeprefix("?").partition("#")
    user, at, hosts = netloc.rpartition("@")
    options = parse_qsl(query, keep_blank_values=True)
    own: dict[str, str] = {}
    service = None
    if kind == "sentinel":
        names = {"sentinel_username", "sentinel_password"}
        if what == "-sentinel":  # as lettuce has it: the path is the database
            names.add("sentinelMasterId")
        own = {name: value for name, value in options if name in names}
        options = [(name, value) for name, value in options if name not in names]
        if what == "-sentinel":
            service, fragment = own.pop("sentinelMasterId", unquote(fragment)), ""
        else:
            service, path = _split_path(path)
        if not service or not service.isprintable():
            raise ValueError(_no_service(what))
    if fragment:
        raise ValueError("url: has a '#'; in user and password it is written %23")
    rest = f"?{urlencode(options)}" if options else ""
    found_hosts = tuple(_host(host, _PORTS[kind]) for host in hosts.split(","))
    if len(found_hosts) > 1 and not all(hosts.split(",")):
        raise ValueError("url: a host between commas is missing")
    return Parts(kind, f"{scheme}://{user}{at}h{path}{rest}", found_hosts, service, **own)


def _split_path(path: str) -> tuple[str, str]:
    """Return the service, and the path of the database."""
    service, slash, db = path.removeprefix("/").partition("/")
    return unquote(service), slash + db


def _no_service(what: str) -> str:
    if what == "-sentinel":
        return (
            "url: what the sentinels call the server is missing: "
            "redis-sentinel://host1,host2/0?sentinelMasterId=service"
        )
    return (
        "url: what the sentinels call the server is missing: redis+sentinel://host1,host2/service"
    )


def _host(text: str, port: int) -> tuple[str, int]:
    parts = _split(f"redis://{text}")
    return parts.hostname or "localhost", parts.port or port


def read_url(url: str) -> dict[str, Any]:
    """Return what a URL says, by the names of `Address`.

    :raises ValueError: if something in it is wrong; no text repeats what may be of a password
    :raises TypeError: if it is no text
    """
    if not isinstance(url, str):
        raise TypeError(f"url: needs a str, not {type(url).__name__}")
    parts = _split(url)
    _check_query(parts, parts.scheme == "rediss")
    found = _query(parts)
    for name, text in (("username", parts.username), ("password", parts.password)):
        if text:
            found[name] = unquote(text)
    if parts.scheme == "unix":
        found |= {"host": None, "path": unquote(parts.path)}
    else:
        found["host"] = unquote(parts.hostname or "localhost")
        if parts.port is not None:
            found["port"] = parts.port
        _take_path(parts, found)
    found["connect_timeout"] = found.pop("socket_connect_timeout", None)
    _check_values(found)
    return found


def _split(url: str) -> SplitResult:
    """Split the URL; no error text repeats a part of it, which might be of the password."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        meant = _FOREIGN.get(url.partition("://")[0])
        if meant is not None:
            raise ValueError(f"url: is written {meant} here")
        raise ValueError(f"url: needs to begin with {_BEGINNINGS}")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise ValueError(
            "url: host or port is not valid; the port is a number from 1 to 65535, and special "
            "characters in user and password are percent-encoded"
        ) from None
    if port == 0:
        raise ValueError("url: the port must be a number from 1 to 65535")
    if parts.fragment:
        raise ValueError("url: has a '#'; in user and password it is written %23")
    if parts.scheme == "unix" and (host or port or len(parts.path) < 2):
        raise ValueError("url: the path of a Unix socket is absolute: unix:///run/redis.sock")
    return parts


def _check_query(parts: SplitResult, tls: bool) -> None:
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name in _SSL_OPTIONS:
            if not tls:
                raise ValueError(f"url: {name} needs rediss://")
        elif name not in _OPTIONS:
            shown = repr(name) if name.isidentifier() else "in the query"
            raise ValueError(f"url: unknown option {shown}")


def _query(parts: SplitResult) -> dict[str, Any]:
    """Return the options of the query; of those with one name the first, and none without value."""
    found: dict[str, Any] = {}
    for name, text in parse_qsl(parts.query):
        try:
            found.setdefault(name, _TYPES.get(name, str)(text))
        except ValueError:
            raise ValueError(f"url: the value of {name} is not valid") from None
    return found


def _take_path(parts: SplitResult, found: dict[str, Any]) -> None:
    """Take the database from the path; one in the query has priority."""
    db = parts.path.strip("/")
    if db and not (db.isascii() and db.isdigit() and len(db) <= _MOST_DIGITS):
        raise ValueError("url: what follows the port is the number of the database")
    if db:
        found.setdefault("db", int(db))


def _check_values(found: dict[str, Any]) -> None:
    if found.get("db", 0) < 0:
        raise ValueError("url: the database number must not be negative")
    timeout = found["connect_timeout"]
    if timeout is not None and not 0 < timeout < 1e7:
        raise ValueError("url: socket_connect_timeout needs seconds above 0")
    name = found.get("client_name")
    if name is not None and not all("!" <= char <= "~" for char in name):
        raise ValueError("url: client_name takes visible ASCII characters without spaces")
    if found.get("ssl_cert_reqs", "required") not in CERT_REQS:
        raise ValueError(f"url: ssl_cert_reqs is one of {', '.join(CERT_REQS)}")
    _check_server_name(found.get("ssl_server_hostname"))
    if "ssl_keyfile" in found and "ssl_certfile" not in found:
        raise ValueError("url: ssl_keyfile needs ssl_certfile")


def _check_server_name(name: str | None) -> None:
    """Refuse what no certificate can be for; an IP address is fine."""
    try:
        valid = name is None or (name and name[0] != "." and name.encode("idna"))
    except UnicodeError:
        valid = False
    if not valid:
        raise ValueError("url: ssl_server_hostname needs the name of a host")


def check_provider(provider: Any, found: dict[str, Any]) -> None:
    """Refuse what gives no credentials, and a URL that has some already."""
    if not callable(getattr(provider, "get_credentials", None)):
        raise TypeError(
            "credential_provider: needs a method get_credentials, as redis-py's CredentialProvider "
            f"has; not {type(provider).__name__}"
        )
    if "username" in found or "password" in found:
        raise ValueError("credential_provider: the url has a user or password already")


def check_context(context: Any, found: dict[str, Any], tls: bool) -> None:
    """Refuse what is no context of TLS, and a URL without TLS or with options for it."""
    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"ssl_context: not {type(context).__name__}")
    if not tls:
        raise ValueError("ssl_context: TLS needs a url that begins with rediss://")
    if not _CONTEXT_OPTIONS.isdisjoint(found):
        raise ValueError("ssl_context: the url has ssl_ options already")
