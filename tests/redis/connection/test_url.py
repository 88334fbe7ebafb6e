"""What a URL says, without a server: it is read as redis-py does, and what that ignores is refused."""

from __future__ import annotations

import pytest

from anyio_kkrpc.redis._connection._url import read_url


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("redis://", {"host": "localhost"}),
        ("redis://h:1/2", {"host": "h", "port": 1, "db": 2}),
        ("rediss://u:p%40@h", {"username": "u", "password": "p@"}),
        ("unix:///run/r.sock?db=3", {"host": None, "path": "/run/r.sock", "db": 3}),
        ("redis://h?socket_connect_timeout=1.5", {"connect_timeout": 1.5}),
        ("redis://h?client_name=me", {"client_name": "me"}),
    ],
)
def test_read(url: str, found: dict[str, object]) -> None:
    read = read_url(url)
    assert {key: read[key] for key in found} == found
    assert "socket_connect_timeout" not in read


SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"http://u:{SECRET}@h", "needs to begin with"),
        (f"redis://u:{SECRET}@h:x", "host or port is not valid"),
        (f"redis://u:{SECRET}@h:0", "port must be"),
        (f"redis://u:{SECRET}#@h", "has a '#'|host or port"),
        (f"redis://u:{SECRET}@h/one", "number of the database"),
        (f"redis://u:{SECRET}@h?db=-1", "must not be negative"),
        (f"redis://u:{SECRET}@h?nodelay=1", "unknown option 'nodelay'"),
        (f"redis://u@h?{SECRET}%20x=1", "unknown option in the query"),
        (f"redis://u:{SECRET}@h?ssl_cert_reqs=none", "needs rediss://"),
        (f"rediss://u:{SECRET}@h?ssl_cert_reqs=maybe", "is one of"),
        (f"redis://u:{SECRET}@h?socket_connect_timeout=0", "seconds above 0"),
        (f"redis://u:{SECRET}@h?client_name=a%20b", "visible ASCII"),
        ("unix://relative.sock", "absolute"),
    ],
)
def test_refused(url: str, text: str) -> None:
    """No text repeats what may be a part of the password."""
    with pytest.raises(ValueError, match=f"^url: .*({text})") as caught:
        read_url(url)
    assert SECRET not in str(caught.value)
