"""``anyio-kkrpc attach``: a call that has a key, from outside."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from anyio import create_task_group

from .._calling._handle import CallHandle
from .._channel import RPCChannel
from .._exceptions import CallNotFoundError
from .._runtime._lone import lone_error
from ..redis import RedisStreamsTransport
from ._call import write

What: TypeAlias = Literal["result", "state", "cancel", "forget"]


async def run(
    key: str,
    url: str,
    what: What,
    timeout: float,
    *,
    progress: bool,
    **options: Any,
) -> None:
    """Do what is asked for, and print what comes of it.

    :param timeout: seconds to wait for a result
    :param options: of the transport
    :raises CallNotFoundError: if there is nothing to do it with
    """
    async with (
        RedisStreamsTransport(url, use_consumer_group=True, **options) as transport,
        RPCChannel(transport, timeout=timeout) as channel,
    ):
        call = channel.attach(key)
        if what == "state":
            write(await call.state())
        elif what == "result":
            await _result(call, progress=progress)
        elif not await (call.cancel() if what == "cancel" else call.forget()):
            raise CallNotFoundError(f"nothing to {what}: {key!r} has ended, or isn't there")


async def _result(call: CallHandle[Any], *, progress: bool) -> None:
    async def show() -> None:
        async for told in call.progress():
            write(told)

    result: list[Any] = []
    with lone_error():
        async with create_task_group() as tasks:
            if progress:
                tasks.start_soon(show)
            result.append(await call.result())
    write(result[0])
