"""A blocking client of Redis, for commands that ask it something and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from ..redis._connection._address import Address


def make_client(url: str, timeout: float) -> redis.Redis:
    """Return a client that tries once, since whoever asks wants to know at once.

    :param timeout: seconds to connect, and for each answer
    """
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=timeout,
        socket_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def asking(url: str, timeout: float) -> Iterator[redis.Redis]:
    """Give a client for the block.

    :raises TransportConnectionError: if the server can't be asked
    """
    address = Address.parse(url)
    with make_client(url, timeout) as client:
        try:
            yield client
        except RedisError as exc:
            # redis-py's own error hides that of the operating system, which tells what to check.
            cause = exc.__cause__ or exc.__context__
            raise address.cannot_connect(cause if isinstance(cause, OSError) else exc) from exc
