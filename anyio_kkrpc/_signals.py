"""A worker's body that ends cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

from anyio import create_task_group, open_signal_receiver

from ._channel import RPCChannel
from ._runtime._lone import lone_error

__all__ = ("serve_until_signalled",)


async def serve_until_signalled(
    channel: RPCChannel, *signals: signal.Signals
) -> signal.Signals | None:
    """Wait until the channel ends, or the process is told to.

    Leave the channel's block then: with a ``grace_period`` its handlers finish, and what was not
    begun goes back to the consumer group. Needs the main thread.

    :param signals: those to wait for; SIGTERM and SIGINT if none are given
    :return: the signal, or ``None`` if the channel ended
    :raises TransportConnectionError: if the transport broke
    """
    with open_signal_receiver(*(signals or (signal.SIGTERM, signal.SIGINT))) as caught:
        return await serve_until_caught(channel, caught)


async def serve_until_caught(
    channel: RPCChannel, caught: AsyncIterator[signal.Signals]
) -> signal.Signals | None:
    """The same, where signals are taken already.

    :param caught: gives them
    """
    received: signal.Signals | None = None
    with lone_error():
        async with create_task_group() as tasks:

            async def watch() -> None:
                nonlocal received
                async for number in caught:
                    received = number
                    tasks.cancel_scope.cancel()
                    return

            tasks.start_soon(watch, name="anyio_kkrpc signals")
            await channel.serve_forever()
            tasks.cancel_scope.cancel()
    return received
