"""The URL of a Redis server: what it means, what is refused, and that the password isn't shown."""

from __future__ import annotations

import socket
import ssl
import threading
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import parse_url
from redis.credentials import CredentialProvider, UsernamePasswordCredentialProvider

from anyio_kkrpc.redis._connection._address import Address, describe
from anyio_kkrpc.redis._connection._url import read_url
from tests.bounds import BOUND


@pytest.mark.parametrize(
    ("url", "expected", "text"),
    [
        ("redis://", {"host": "localhost", "port": 6379, "db": 0}, "redis://localhost:6379/0"),
        ("redis://redis.example:7000/3", {"port": 7000, "db": 3}, "redis://redis.example:7000/3"),
        ("redis://h/2/", {"db": 2}, "redis://h:6379/2"),
        ("redis://h/?db=4", {"db": 4}, "redis://h:6379/4"),
        ("redis://[::1]:6380", {"host": "::1", "port": 6380}, "redis://[::1]:6380/0"),
        ("redis://:s3cret@h", {"username": None, "password": "s3cret"}, "redis://:***@h:6379/0"),
        (
            "redis://al%40ice:s3%2Fcret@h",
            {"username": "al@ice", "password": "s3/cret"},
            "redis://al%40ice:***@h:6379/0",
        ),
        (
            "redis://h?username=u&password=s3cret",
            {"username": "u", "password": "s3cret"},
            "redis://u:***@h:6379/0",
        ),
        ("redis://u@h", {"username": "u", "password": None}, "redis://u@h:6379/0"),
        ("redis://h?client_name=me", {"client_name": "me"}, "redis://h:6379/0"),
        ("redis://h?socket_connect_timeout=1.5", {"connect_timeout": 1.5}, "redis://h:6379/0"),
        (
            "rediss://h?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
            {"host": "h"},
            "rediss://h:6379/0",
        ),
        (
            "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=False",
            {"port": 6379},
            "rediss://h:6379/0",
        ),
        (
            "unix://u:s3cret@/run/redis.sock?db=2",
            {"host": None, "path": "/run/redis.sock", "db": 2, "password": "s3cret"},
            "unix://u:***@/run/redis.sock?db=2",
        ),
    ],
)
def test_url(url: str, expected: dict[str, Any], text: str) -> None:
    """A URL means what it means to redis-py, and its text shows all but the password."""
    address = Address.parse(url)
    assert {name: getattr(address, name) for name in expected} == expected
    assert str(address) == text
    assert repr(address) == f"<Address {text}>"
    assert address.where == ((address.host, address.port) if address.host else (address.path, None))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://u:s3cret@h",
        "redis:/h",
        "redis://u:s3cret@h:port",
        "redis://u:s3cret@h:0",
        "redis://u:s3cret@h:65536",
        "redis://u:s3cret@h:-1",
        "redis://u:s3cret@[::1",
        "redis://u:s3/cret@h",
        "redis://u:1?s3cret@h",
        "redis://u:1#s3cret@h",
        "redis://u:s3cret@h/one",
        "redis://u:s3cret@h/1/2",
        "redis://u:s3cret@h/-1",
        "redis://h?db=-1&password=s3cret",
        "redis://h?db=one&password=s3cret",
        "redis://h?pasword=s3cret",
        "redis://h?max_connections=10",
        "redis://h?decode_responses=",
        "redis://h?socket_connect_timeout=0",
        "redis://h?socket_connect_timeout=nan",
        "redis://h?client_name=two%20words",
        "redis://h?ssl_cert_reqs=none",
        "rediss://h?ssl_cert_reqs=some",
        "rediss://h?ssl_keyfile=/k.pem",
        "redis://h?ssl_server_hostname=name",
        "rediss://h?ssl_server_hostname=.name",
        "rediss://h?ssl_server_hostname=two..dots",
        "unix://",
        "unix:///",
        "unix://run/redis.sock",
        "unix:///run/redis.sock?ssl_ca_certs=/ca.pem",
    ],
)
def test_wrong_url(url: str) -> None:
    """A wrong URL is a ValueError that names the option url and shows nothing of the password."""
    with pytest.raises(ValueError, match=r"\burl\b") as caught:
        Address.parse(url)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_unknown_option_is_named() -> None:
    """The error for an unknown option in the query says which one it is."""
    with pytest.raises(ValueError, match="url: unknown option 'max_connections'"):
        Address.parse("redis://h?max_connections=10")


def test_wrong_type() -> None:
    """Options of the wrong type are TypeErrors that name them."""
    with pytest.raises(TypeError, match="url"):
        Address.parse(b"redis://h")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="credential_provider"):
        Address.parse("redis://h", credential_provider="me")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ssl_context"):
        Address.parse("rediss://h", ssl_context=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["redis://:s3cret@h", "redis://u@h", "redis://h?password=s3cret"])
def test_provider_and_url(url: str) -> None:
    """A credential provider beside a user or password in the URL is refused."""
    with pytest.raises(ValueError, match="credential_provider") as caught:
        Address.parse(url, credential_provider=UsernamePasswordCredentialProvider("a", "b"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h", "unix:///s", "rediss://h?ssl_cert_reqs=none"])
def test_context_and_url(url: str) -> None:
    """A TLS context is refused where it would not, or only partly, be used."""
    with pytest.raises(ValueError, match="ssl_context"):
        Address.parse(url, ssl_context=ssl.create_default_context())


# No characters that also stand in other parts of the text.
_SECRETS = st.text("@#?%&é+ \n\u4e2d;=", min_size=2, max_size=20)


@given(user=st.text(min_size=1).filter(lambda text: "\x00" not in text), password=_SECRETS)
def test_any_user_and_password(user: str, password: str) -> None:
    """Any user and password survive the way through a URL, and the password isn't in its text."""
    try:
        quoted = quote(user, safe="")
    except UnicodeEncodeError:  # lone surrogates
        return
    address = Address.parse(f"redis://{quoted}:{quote(password, safe='')}@h")
    assert (address.username, address.password) == (user, password)
    assert str(address) == f"redis://{quoted}:***@h:6379/0"


class TestCredentials:
    pytestmark = pytest.mark.anyio

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://h", ()),
            ("redis://:p@h", ("p",)),
            ("redis://u:p@h", ("u", "p")),
            ("redis://u@h", ("u", "")),
        ],
    )
    async def test_of_url(self, url: str, expected: tuple[str, ...]) -> None:
        """AUTH gets what the URL has."""
        assert await Address.parse(url).credentials() == expected

    async def test_of_provider(self) -> None:
        """A provider, which may block, is asked each time in a worker thread."""
        threads: list[int] = []

        class Provider(CredentialProvider):
            def get_credentials(self) -> tuple[str, str]:
                threads.append(threading.get_ident())
                return ("u", f"p{len(threads)}")

        address = Address.parse("redis://h", credential_provider=Provider())
        assert await address.credentials() == ("u", "p1")
        assert await address.credentials() == ("u", "p2")
        assert threading.get_ident() not in threads
        assert "p1" not in repr(address)

    async def test_blocking_provider_is_left(self) -> None:
        """A connect that is cancelled doesn't wait for a provider that hangs."""
        asked, release = threading.Event(), threading.Event()

        class Provider(CredentialProvider):
            def get_credentials(self) -> tuple[str]:
                asked.set()
                release.wait(20)
                return ("p",)

        address = Address.parse("redis://h", credential_provider=Provider())
        try:
            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as group:
                    group.start_soon(address.credentials)
                    await anyio.to_thread.run_sync(asked.wait, BOUND)
                    group.cancel_scope.cancel()
            assert not release.is_set()
        finally:
            release.set()


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('::1', 1)"), "Connection refused"),
        (anyio.EndOfStream(), "closed by the server"),
        (anyio.BrokenResourceError(), "BrokenResourceError"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (TimeoutError("no answer within 5 seconds"), "no answer within 5 seconds"),
        (OSError("All connection attempts failed"), "All connection attempts failed"),
    ],
)
def test_describe(exc: Exception, expected: str) -> None:
    """The reason in an error's text says the same on every event loop."""
    assert expected in describe(exc)


def test_describe_causes() -> None:
    """The reason of what merely wraps an error is that error's, each named once."""

    class Several(OSError):
        exceptions = (ConnectionRefusedError(111, "a"), ConnectionRefusedError(111, "b"))

    outer = OSError("All connection attempts failed")
    outer.__cause__ = Several()
    assert describe(outer) == "Connection refused"
    broken = anyio.BrokenResourceError()
    broken.__cause__ = ConnectionResetError(104, "whatever")
    assert describe(broken) == "Connection reset by peer"


TEXTS = st.text("aZ0-_.~%/@:?&= é", max_size=6)
QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "db": st.sampled_from(["0", "7", "", "x"]),
        "client_name": st.sampled_from(["me", "a%62c", ""]),
        "socket_connect_timeout": st.sampled_from(["1", "2.5", "", "soon"]),
        "username": TEXTS,
        "password": TEXTS,
    },
)


@given(
    user=st.none() | st.tuples(TEXTS, st.none() | TEXTS),
    host=st.sampled_from(["", "h", "Redis.example", "[::1]", "127.0.0.1", "h:7000"]),
    path=st.sampled_from(["", "/", "/3", "/3/"]),
    query=QUERIES,
    raw=st.booleans(),
)
def test_urls_are_read_as_by_another_client(
    user: tuple[str, str | None] | None, host: str, path: str, query: dict[str, str], raw: bool
) -> None:
    """What redis-py makes of a URL is in it, unless it is refused."""
    write = str if raw else partial(quote, safe="")
    login = "" if user is None else ":".join(write(one) for one in user if one is not None) + "@"
    more = "&".join(f"{name}={write(value)}" for name, value in query.items())
    url = f"redis://{login}{host}{path}{'?' if more else ''}{more}"
    try:
        found = read_url(url)
    except ValueError:
        return
    theirs = {"host": "localhost", "connect_timeout": None, **parse_url(url)}
    if "socket_connect_timeout" in theirs:
        theirs["connect_timeout"] = theirs.pop("socket_connect_timeout")
    # Versions differ in how often they take the quoting off what is in the query.
    for name in ("client_name", "username", "password"):
        if name in query and name in theirs:
            assert unquote(found.pop(name)) == unquote(theirs.pop(name))
    assert found == theirs
