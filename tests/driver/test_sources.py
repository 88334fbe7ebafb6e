"""What becomes of the streams that others read when a channel is left, without a channel."""

from __future__ import annotations

from typing import Any, cast

import anyio
import pytest
from anyio import create_task_group, fail_after

from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._driver._sources import ENDED, Sources
from anyio_kkrpc._protocol._records import StreamReply
from anyio_kkrpc._protocol._streams import Producer
from anyio_kkrpc.abc import Capabilities, Envelope
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Source:
    """Looks like a stream."""

    def __aiter__(self) -> Any:
        raise AssertionError("nobody reads it here")


class Sending:
    """A transport that keeps what is sent."""

    def __init__(self, addressing: bool) -> None:
        self.capabilities = Capabilities(addressing=addressing)
        self.sent: list[Envelope] = []

    def watch(self, *_: Any) -> None:
        pass

    async def send(self, item: Envelope) -> None:
        self.sent.append(item)


class Pump:
    """In place of what reads a source: it is over when it is told so."""

    def __init__(self, core: Core, producer: Producer) -> None:
        self._core, self._producer = core, producer
        producer.driver = self
        self._ended = anyio.Event()
        self.stopped: Exception | None = None

    def stop(self, answer: object, error: Exception) -> None:
        self.stopped = error

    def finish(self) -> None:
        del self._core.conversation.producers[self._producer.id]
        self._ended.set()

    async def over(self) -> None:
        await self._ended.wait()


def make(*consumers: str | None, addressing: bool = True) -> tuple[Core, list[Pump], Sending]:
    """Return what has a call for each of these peers, with a stream as its argument."""
    transport = Sending(addressing)
    core = Core(cast(Any, transport), lambda *_: print, timeout=None, send_tracebacks=False)
    pumps = []
    for consumer in consumers:
        call, _ = core.conversation.call("call", ["f"], None, args=[Source()])
        (producer,) = call.producers or ()
        if consumer is not None:
            producer.consumer = consumer
        pumps.append(Pump(core, producer))
    return core, pumps, transport


@pytest.mark.parametrize("addressing", [False, True])
async def test_cut(addressing: bool) -> None:
    """Readers are told, as far as it is known who they are; where there is one peer, it is told."""
    core, pumps, transport = make("x", None, addressing=addressing)
    core.enter()
    Sources(core).cut()
    await core.outbox.finish(BOUND)
    said = [(one.recipient, one.record.e["m"]) for one in transport.sent]  # type: ignore[union-attr]
    assert said == [("x", ENDED)] + ([] if addressing else [(None, ENDED)])
    assert all(isinstance(one.record, StreamReply) for one in transport.sent)
    assert [str(pump.stopped) for pump in pumps] == [ENDED, ENDED]
    Sources(core).cut()
    assert len(transport.sent) == len(said)


async def test_drained() -> None:
    """It waits until all are over, those that begin meanwhile included."""
    core, pumps, _ = make("x", "y")
    drained = anyio.Event()

    async def drain() -> None:
        await Sources(core).drain(BOUND)
        drained.set()

    with fail_after(BOUND):
        async with create_task_group() as tasks:
            tasks.start_soon(drain)
            for pump in pumps:
                await anyio.wait_all_tasks_blocked()
                assert not drained.is_set()
                pump.finish()
    assert drained.is_set()


async def test_drained_no_longer_than_that() -> None:
    core, pumps, _ = make("x")
    with fail_after(BOUND):
        await Sources(core).drain(0.01)
    assert core.conversation.producers
    assert pumps[0].stopped is None
