"""URLs with several hosts: what they mean, what is refused, and that no password is shown."""

from __future__ import annotations

import ssl
from ipaddress import IPv6Address
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.credentials import UsernamePasswordCredentialProvider

from anyio_kkrpc.redis._connection._target import Target


def wheres(target: Target) -> list[tuple[str, int | None]]:
    return [seed.where for seed in target.seeds]


@pytest.mark.parametrize(
    ("url", "seeds", "service", "text"),
    [
        (
            "redis+sentinel://s1,s2:7000,[::1],[::2]:7001/mymaster",
            [("s1", 26379), ("s2", 7000), ("::1", 26379), ("::2", 7001)],
            "mymaster",
            "redis+sentinel://s1:26379,s2:7000,[::1]:26379,[::2]:7001/mymaster/0",
        ),
        (
            "redis+sentinel://u:s3cret@s1/my%20master/3?client_name=me",
            [("s1", 26379)],
            "my master",
            "redis+sentinel://u:***@s1:26379/my%20master/3",
        ),
        (
            "redis+sentinel:///m",
            [("localhost", 26379)],
            "m",
            "redis+sentinel://localhost:26379/m/0",
        ),
        (
            "redis+sentinel://s1/m/?db=2&password=s3cret",
            [("s1", 26379)],
            "m",
            "redis+sentinel://:***@s1:26379/m/2",
        ),
        (
            "rediss+sentinel://s1/m?ssl_cert_reqs=none",
            [("s1", 26379)],
            "m",
            "rediss+sentinel://s1:26379/m/0",
        ),
        (
            "redis-sentinel://:s3cret@s1,s2/2?sentinelMasterId=m",
            [("s1", 26379), ("s2", 26379)],
            "m",
            "redis+sentinel://:***@s1:26379,s2:26379/m/2",
        ),
        ("redis-sentinel://s1/#m", [("s1", 26379)], "m", "redis+sentinel://s1:26379/m/0"),
        ("rediss-sentinel://s1#m", [("s1", 26379)], "m", "rediss+sentinel://s1:26379/m/0"),
        (
            "redis+cluster://u:s3cret@n1,n2:7000",
            [("n1", 6379), ("n2", 7000)],
            None,
            "redis+cluster://u:***@n1:6379,n2:7000",
        ),
        ("rediss+cluster://n1/0", [("n1", 6379)], None, "rediss+cluster://n1:6379"),
        ("redis+cluster://", [("localhost", 6379)], None, "redis+cluster://localhost:6379"),
        ("redis://:s3cret@h/1", [], None, "redis://:***@h:6379/1"),
        ("unix:///run/redis.sock", [], None, "unix:///run/redis.sock?db=0"),
    ],
)
def test_url(url: str, seeds: list[tuple[str, int]], service: str | None, text: str) -> None:
    """What is asked where the server is, and what the server is called there."""
    target = Target.parse(url)
    assert (wheres(target), target.service, str(target)) == (seeds, service, text)
    assert repr(target) == f"<Target {text}>"
    assert target.where == (seeds[0] if seeds else target.node.where)
    assert (target.node.tls is not None) == url.startswith("rediss")


def test_credentials() -> None:
    """Those before the hosts are for the servers, those in the query for the sentinels."""
    url = (
        "rediss+sentinel://u:p@s1/m/1?sentinel_username=su&sentinel_password=s%26p&ssl_ca_certs=/ca"
    )
    target = Target.parse(url)
    server, (sentinel,) = target.at("h", 1), target.seeds
    assert (server.username, server.password, server.db) == ("u", "p", 1)
    assert (sentinel.username, sentinel.password, sentinel.db) == ("su", "s&p", 0)
    assert sentinel.tls is not None
    assert sentinel.tls.ssl_ca_certs == "/ca"
    assert "s&p" not in f"{target!r} {sentinel!r} {sentinel}"


def test_objects() -> None:
    """A provider is for the servers, a context of TLS for the sentinels, too."""
    provider, context = UsernamePasswordCredentialProvider("a", "b"), ssl.create_default_context()
    options = {"credential_provider": provider, "ssl_context": context}
    target = Target.parse("rediss+sentinel://s1/m?socket_connect_timeout=3", **options)  # type: ignore[arg-type]
    (sentinel,) = target.seeds
    assert target.connect_timeout == target.at("h", 1).connect_timeout == 3
    assert sentinel.connect_timeout is None
    assert (target.node.credential_provider, sentinel.credential_provider) == (provider, None)
    assert target.node.tls is sentinel.tls
    assert sentinel.tls is not None
    assert sentinel.tls.given is context
    assert hash(target) == hash(
        Target.parse("rediss+sentinel://s1/m?socket_connect_timeout=3", **options)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (
            "sentinel://u:s3cret@s1:26379;sentinel://s2:26379",
            "redis+sentinel://host1,host2/service",
        ),
        ("redis-cluster://n1", "redis+cluster://host1,host2"),
        ("redis+sentinel://u:s3cret@s1", "redis+sentinel://host1,host2/service"),
        ("redis+sentinel://s1/", "service"),
        ("redis+sentinel://s1/%00", "service"),
        ("redis-sentinel://s1/0", "sentinelMasterId=service"),
        ("redis+sentinel://s1,,s2/m", "between commas"),
        ("redis+cluster://n1,", "between commas"),
        ("redis+sentinel://u:s3cret@s1:port/m", "port"),
        ("redis+sentinel://u:s3cret@s1,s2:0/m", "port"),
        ("redis+sentinel://u:s3cret@s1,s2:65536/m", "port"),
        ("redis+cluster://u:s3/cret@n1", "host or port"),
        ("redis+cluster://u:s3#cret@n1", "%23"),
        ("redis+cluster://[::1,n2", "host or port"),
        ("redis+sentinel://s1/m/one", "number of the database"),
        ("redis+sentinel://s1/m/1/2", "number of the database"),
        ("redis+sentinel://s1/m?db=-1", "database number"),
        ("redis+sentinel://s1/m#f", "#"),
        ("redis+cluster://n1/1", "no numbered databases"),
        ("redis+cluster://n1?db=1", "no numbered databases"),
        ("redis+cluster://n1/service", "number of the database"),
        ("redis+cluster://n1?sentinel_password=s3cret", "sentinel_password"),
        ("redis://h?sentinel_username=x", "sentinel_username"),
        ("redis+sentinel://s1/m?max_connections=10", "max_connections"),
        ("redis+sentinel://s1/m?ssl_ca_certs=/ca", "ssl_ca_certs needs rediss"),
        ("redis+socket:///s", "redis\\+cluster://"),
    ],
)
def test_wrong_url(url: str, text: str) -> None:
    """A wrong URL is a ValueError that names the part, and shows nothing of the password."""
    with pytest.raises(ValueError, match=r"\burl\b") as caught:
        Target.parse(url)
    assert text.replace("\\", "") in str(caught.value)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="url"):
        Target.parse(b"redis+cluster://h")  # type: ignore[arg-type]


_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?", fullmatch=True)
_HOSTS = st.one_of(_NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
_SEEDS = st.lists(st.tuples(_HOSTS, st.none() | st.integers(1, 65535)), min_size=1, max_size=5)
# No characters that also stand in other parts of the text.
_SECRETS = st.text("@#?%&é+ \n\u4e2d;=", min_size=2, max_size=20)
_SERVICES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)


@given(
    seeds=_SEEDS,
    service=_SERVICES,
    secrets=st.tuples(_SECRETS, _SECRETS),
    db=st.none() | st.integers(0, 99),
    tls=st.booleans(),
)
def test_any(
    seeds: list[tuple[str, int | None]],
    service: str,
    secrets: tuple[str, str],
    db: int | None,
    tls: bool,
) -> None:
    """What is written into a URL by its grammar is read from it."""
    hosts = ",".join(
        (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
        for host, port in seeds
    )
    password, other = secrets
    url = (
        f"redis{'s' if tls else ''}+sentinel://u:{quote(password, safe='')}@{hosts}/"
        f"{quote(service, safe='')}{'' if db is None else f'/{db}'}"
        f"?sentinel_password={quote_plus(other)}"
    )
    target = Target.parse(url)
    assert wheres(target) == [(host, port or 26379) for host, port in seeds]
    assert (target.service, target.node.db, target.node.tls is not None) == (service, db or 0, tls)
    assert target.node.password == password
    assert all(seed.password == other for seed in target.seeds)
    for secret in secrets:
        assert secret not in repr(target).replace(quote(service, safe=""), "")
    cluster = url.replace("+sentinel", "+cluster").partition(f"@{hosts}/")[0] + f"@{hosts}"
    assert wheres(Target.parse(cluster)) == [(host, port or 6379) for host, port in seeds]


@given(st.ip_addresses(v=6))
def test_any_ipv6(address: IPv6Address) -> None:
    """An IPv6 host stays one in the text."""
    assert f"//[{address}]:6379" in str(Target.parse(f"redis+cluster://[{address}]"))
