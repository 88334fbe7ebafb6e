"""A client and a server in one process, for tests of what uses either."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, overload

from .._channel import RPCChannel
from .._exposure import Exposed
from .._exposure import expose as build_table
from ..middleware import Middleware
from ..transports.memory import MemoryTransport

P = TypeVar("P")


@overload
def connected(
    api: object,
    protocol: None = None,
    *,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AbstractAsyncContextManager[Any]: ...


@overload
def connected(
    api: object,
    protocol: Callable[..., P],
    *,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AbstractAsyncContextManager[P]: ...


@asynccontextmanager
async def connected(
    api: object,
    protocol: Any = None,
    *,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AsyncGenerator[Any, None]:
    """Serve ``api`` over a pair in memory, and give the proxy that a client would have.

    Values are encoded and decoded and arguments converted as over a wire, so a test sees the same
    errors. A dict of functions makes a fake: ``connected({"add": lambda a, b: 5}, MathApi)``.

    :param api: what `anyio_kkrpc.expose` takes, or the table it made
    :param protocol: a `typing.Protocol` class for `RPCChannel.get_api`. What is exposed must have
        each of its public methods, so that a fake doesn't stay behind.
    :param codec: ``"json"`` or ``"cbor"``; with ``None`` values are passed as they are
    :param timeout: seconds for each call, see `RPCChannel`
    :param middleware: of the serving side
    :raises TypeError: if a method of ``protocol`` isn't there
    """
    table = api if isinstance(api, Exposed) else build_table(api)
    if protocol is not None:
        if not isinstance(protocol, type):
            raise TypeError(f"protocol: needs a Protocol class, not {protocol!r:.80}")
        missing = [name for name in _methods(protocol) if (name,) not in table.methods]
        if missing:
            raise TypeError(f"api: lacks {', '.join(missing)} of {protocol.__name__}")
    ours, theirs = MemoryTransport.pair(codec=codec)
    async with (
        ours,
        theirs,
        RPCChannel(theirs, expose=table, timeout=timeout, middleware=middleware),
        RPCChannel(ours, timeout=timeout) as channel,
    ):
        yield channel.get_api(protocol)


def _methods(protocol: type) -> list[str]:
    """Return the public functions that a Protocol class and its bases describe."""
    return [
        name
        for name in dir(protocol)
        if not name.startswith("_")
        and callable(getattr(protocol, name))
        and not isinstance(getattr(protocol, name), type)
    ]
