"""``anyio-kkrpc check``: whether workers take calls, as an exit code for probes."""

from __future__ import annotations

import http.client
import re
import sys

import redis
from redis.exceptions import ResponseError

from ..redis._stream._keys import DELAYED, HANDED_BACK, Keys
from ..redis._stream._places import name_of_shard
from ._asking import asking
from ._http import parse_address
from ._report import NotReadyError

# What comes before the session id in the name of a consumer that was given none.
_PREFIX = b"consumer-"
# Keys that one step of a search looks at.
_PAGE = 1000


def by_http(address: str, path: str, timeout: float) -> None:
    """Ask a service that was started with ``--http``.

    :raises NotReadyError: if it says no, or doesn't answer
    """
    host, port = parse_address(address)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(65536).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as exc:
        raise NotReadyError(f"http://{address}{path} doesn't answer: {exc}") from exc
    finally:
        connection.close()
    if answer.status != 200:
        raise NotReadyError(f"{answer.status}: {text}")
    sys.stdout.write(f"{text}\n")


def by_redis(
    url: str, stream: str, group: str, *, workers: int, timeout: float, shards: int = 1
) -> None:
    """Look whether workers of a group are there.

    :param workers: how many have to be, in each shard
    :param timeout: seconds that each shard has to answer
    :param shards: how many the stream has
    :raises NotReadyError: if there are fewer
    :raises TransportConnectionError: if the server can't be asked
    """
    found: list[str] = []
    lacking = False
    for name in (name_of_shard(stream, shard) for shard in range(shards)):
        with asking(url, timeout, name) as client:
            count = _living(client, name, group.encode(), workers)
        found.append(f"{count} worker{'' if count == 1 else 's'} of {group} on {name}")
        lacking = lacking or count < workers
    there = ", ".join(found)
    if lacking:
        raise NotReadyError(f"{there}; {workers} wanted")
    sys.stdout.write(f"{there}\n")


def _living(client: redis.Redis, stream: str, group: bytes, wanted: int) -> int:
    """Return how many workers of a group have an inbox: those that vanish lose it.

    Idle times of consumers don't tell: before Redis 7.2, a read that ends without an entry isn't
    counted, nor does the first one of them make the consumer. So where too few are found there, the
    keys are searched in which workers that were given a name say whose it is.
    """
    keys = Keys.of(stream)
    try:
        consumers = client.xinfo_consumers(stream, group)
    except ResponseError as exc:
        if "no such key" in str(exc).lower() or "NOGROUP" in str(exc):
            return 0
        raise
    names = {one["name"] for one in consumers} - {HANDED_BACK, DELAYED}
    found = _with_inbox(client, keys, group, names)
    if found < wanted:
        beginning = keys.worker(group, b"")
        pattern = re.sub(rb"([\\*?\[\]])", rb"\\\1", beginning) + b"*"
        told = client.scan_iter(pattern, count=_PAGE, _type="stream")
        found += _with_inbox(client, keys, group, {k[len(beginning) :] for k in told} - names)
    return found


def _with_inbox(client: redis.Redis, keys: Keys, group: bytes, names: set[bytes]) -> int:
    if not names:
        return 0
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.xrevrange(keys.worker(group, name), count=1)
        for name, told in zip(names, pipe.execute(raise_on_error=False), strict=True):
            is_told = isinstance(told, list) and told
            session = told[0][1].get(b"session", b"") if is_told else name.removeprefix(_PREFIX)
            pipe.exists(keys.inbox("") + session)
        return sum(pipe.execute())
