"""How often trio runs each task for a lone call. The numbers may only shrink."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio
from anyio import CancelScope

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc._serving import _crew
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.one_server]

CALLS = 50
TRIES = 6
# Of both sides: what is read there is handed on at once. The worker's reader lets the handler run
# first: in the next turn or, by trio's chance, in the one after that. Each has a reader of answers.
MOST = {"inbox": 1, "requests": 2.7, "handler": 1, "read": 2}
# What is done in between takes place now and then.
SELDOM = 0.2


class Steps(trio.abc.Instrument):
    """Counts the steps of the library's tasks by their names."""

    def __init__(self) -> None:
        self.counter: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.counter[task.name.removeprefix("anyio_kkrpc ").removeprefix("redis ")] += 1


async def _echo(value: str) -> str:
    return value


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_steps_of_a_lone_call(
    anyio_backend: str,
    redis_server: RedisServer,
    stream_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scopes: list[CancelScope] = []

    def scope(**options: Any) -> CancelScope:
        scopes.append(CancelScope(**options))
        return scopes[-1]

    monkeypatch.setattr(_crew, "CancelScope", scope)
    # What is done beside calls would count for more, the slower the machine is.
    seldom = ("health_check_interval", "watch_interval", "block_timeout", "claim_idle")
    options: dict[str, Any] = dict.fromkeys(seldom, BOUND)
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, **options
        ) as worker,
        RPCChannel(worker, expose={"echo": _echo}),
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, **options
        ) as client,
        RPCChannel(client, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        for _ in range(TRIES):
            await api.echo("first")
            steps.counter.clear()
            scopes.clear()
            for _ in range(CALLS):
                await api.echo("x")
            found = {name: steps.counter[name] / CALLS for name in MOST}
            if all(found[name] <= most + SELDOM for name, most in MOST.items()):
                break
        trio.lowlevel.remove_instrument(steps)
    assert min(found.values()) > 0.9, "the count is wrong"
    assert all(found[name] <= most + SELDOM for name, most in MOST.items()), found
    assert not scopes  # the handler left none open, so that of its task is used again
