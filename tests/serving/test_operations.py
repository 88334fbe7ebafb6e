"""One request at a time, without a channel: what runs, what is answered, and what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint

from anyio_kkrpc import OverloadedError, RPCError, current_call, expose
from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._protocol._records import Cancel, Reply, Request
from anyio_kkrpc._serving._operations import Server
from anyio_kkrpc._serving._refusals import MAX_SEGMENTS, name_of
from anyio_kkrpc._serving._settling import label
from anyio_kkrpc.abc import Capabilities, Envelope
from anyio_kkrpc.middleware import CallNext, Invocation
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Api:
    name = "api"

    def add(self, a: int, b: int) -> int:
        return a + b

    async def whoami(self) -> list[Any]:
        await checkpoint()
        call = current_call()
        return [call.sender, call.attempt, call.metadata]

    def fail(self) -> None:
        raise ValueError("wrong")

    def lie(self) -> int:
        return cast(int, "text")

    async def stream(self) -> AsyncIterator[int]:
        yield 1


class Bench:
    """A server, and what came of its requests."""

    def __init__(self, *middleware: Any, broadcast: bool = False) -> None:
        self.settled: list[Envelope | None] = []
        self.received: list[Envelope] = []
        self.refusals: list[Exception] = []
        transport: Any = SimpleNamespace(
            capabilities=Capabilities(broadcast=broadcast),
            watch=lambda *_: None,
            send=self._never,
            receive=self._never,
            settle=self.settle,
            serve_more=self.refusals.append,
        )
        core = Core(transport, lambda *ids: print, timeout=None, send_tracebacks=False)
        self.core = core
        self.server = Server(
            expose(Api(), writable=["name"]).copy(),
            2,
            middleware,
            core=core,
            received=self.received.append,
        )
        self.member: Any = SimpleNamespace(deadline=None, serves=None, waits=lambda: None)

    async def _never(self, *_: Any) -> Any:
        raise NotImplementedError

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        await checkpoint()
        self.settled.append(reply)
        if self.refusals:
            raise self.refusals.pop(0)

    async def answer(self, envelope: Envelope) -> Envelope | None:
        reply, rest = self.server.answer(envelope, self.member)
        return reply if rest is None else await rest

    async def ask(self, *path: str, op: Any = "call", **more: Any) -> Any:
        """Return what a request is answered."""
        envelope = {
            key: more.pop(key) for key in ("sent_at", "recipient", "attempt") if key in more
        }
        request = Request("1", op, [*path], **more)
        with anyio.fail_after(BOUND):
            reply = await self.answer(Envelope(request, "x", **envelope))
        assert not self.core.conversation.handlings or reply is not None
        if reply is None:
            return None
        assert reply.recipient == "x"
        assert isinstance(reply.record, Reply)
        return reply.record

    def counts(self, *path: str) -> dict[str, int]:
        entry = self.server.exposed.entry("call", [*path])
        assert entry is not None
        names = ("served", "failed", "refused", "cancelled", "expired")
        return {name: getattr(entry, name) for name in names if getattr(entry, name)}


async def test_answered() -> None:
    bench = Bench()
    assert (await bench.ask("add", a=[1, 2])).v == 3
    assert bench.counts("add") == {"served": 1}
    reply = await bench.ask("whoami", meta={"k": 1}, attempt=3)
    assert reply.v == ["x", 3, {"k": 1}]
    assert not bench.core.conversation.handlings


@pytest.mark.parametrize(
    ("path", "more", "code", "counts"),
    [
        ("fail", {}, None, {"failed": 1}),
        ("lie", {}, "validation", {"failed": 1}),
        ("add", {"a": [1]}, "validation", {"refused": 1}),
        ("add", {"a": [1, "x"]}, "validation", {"refused": 1}),
    ],
)
async def test_errors(path: str, more: Any, code: str | None, counts: dict[str, int]) -> None:
    """What its handler raised, or what was wrong before or after it."""
    bench = Bench()
    reply = await bench.ask(path, **more)
    assert reply.e.get("rpc_error") == code
    assert bench.counts(path) == counts


async def test_properties() -> None:
    bench = Bench()
    assert (await bench.ask("name", op="get")).v == "api"
    assert (await bench.ask("name", op="set", v="new")).v is True
    assert (await bench.ask("name", op="get")).v == "new"


@pytest.mark.parametrize(
    ("op", "text"),
    [("call", "is not a function"), ("get", "is not a property"), ("new", "is not a constructor")],
)
@pytest.mark.parametrize("broadcast", [False, True])
async def test_unknown_names(op: str, text: str, broadcast: bool) -> None:
    """In a broadcast another peer may know it, unless it is for this one alone."""
    bench = Bench(broadcast=broadcast)
    path = ["no"] * (MAX_SEGMENTS + 1)
    if broadcast:
        assert await bench.ask(*path, op=op) is None
        assert bench.server.unknown == 0
    reply = await bench.ask(*path, op=op, recipient="me")
    assert reply.e["rpc_error"] == "method_not_found"
    assert reply.e["m"].endswith(f"... {text}")
    assert reply.e["at"] == 0
    assert bench.server.unknown == 1


async def test_references_are_refused() -> None:
    """Of kkrpc's own remote references; that is no name that somebody got wrong."""
    bench = Bench()
    assert "remote-refs" in (await bench.ask("x", op="ref")).e["m"]
    assert bench.server.unknown == 0


@pytest.mark.parametrize("late", [0.0, 5.0, None])
async def test_out_of_time(late: float | None) -> None:
    """What is in the future was sent now: clocks are known with an error."""
    bench = Bench()
    sent_at = None if late is None else anyio.current_time() + 1000 * (late == 0) - late
    reply = await bench.ask("add", a=[1, 2], d=2000, sent_at=sent_at)
    assert (reply is None) is bool(late)
    assert bench.counts("add") == ({"expired": 1} if late else {"served": 1})
    await bench.ask("unknown", d=2000, sent_at=sent_at)
    assert bench.server.unknown == 1


async def test_out_of_time_is_seen_by_middleware() -> None:
    seen: list[str] = []

    async def watch(call: Invocation, call_next: CallNext) -> Any:
        seen.append(f"{call.method} {call.refused}")
        return await call_next(call)

    bench = Bench(watch)
    late = anyio.current_time() - 5
    assert await bench.ask("add", a=[1, 2], d=1000, sent_at=late) is None
    assert seen == ["add add was out of time before it was started"]
    assert not bench.core.conversation.handlings


async def test_no_reply_wanted() -> None:
    bench = Bench()
    assert await bench.ask("add", a=[1, 2], o=True) is None
    assert bench.counts("add") == {"served": 1}


async def test_cancelled_before_it_came() -> None:
    bench = Bench()
    bench.core.conversation.receive(Cancel("1"), "x")
    assert await bench.ask("add", a=[1, 2]) is None
    assert bench.counts("add") == {"cancelled": 1}
    assert (await bench.ask("add", a=[1, 2])).v == 3


async def test_asked_twice() -> None:
    """The same request of the same peer isn't served while it is served already."""
    bench = Bench()
    bench.core.conversation.begin(Request("1", "call", ["add"]), "x")
    request = Envelope(Request("1", "call", ["add"], a=[1, 2]), "x")
    assert await bench.answer(request) is None
    assert bench.counts("add") == {}
    assert bench.core.refused == 1


async def test_no_request() -> None:
    """It goes to who takes everything else."""
    bench = Bench()
    envelope = Envelope(Cancel("9"), "x")
    assert await bench.answer(envelope) is None
    assert bench.received == [envelope]


async def test_replies_that_can_not_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    """An error takes the place of a result; if that can't be sent either, it is settled without."""
    bench = Bench()
    request = Envelope(Request("1", "call", ["add"], a=[1, 2]), "x")
    reply = await bench.answer(request)
    await bench.server.settling.settle_with_error(request, reply, TypeError("no JSON"))
    (sent,) = bench.settled
    assert sent is not None
    assert sent.record.e["m"] == "no JSON"  # type: ignore[union-attr]
    assert bench.counts("add") == {"served": 1, "failed": 1}
    bench.refusals = [OverloadedError(f"too large {number}") for number in range(9)]
    bench.settled.clear()
    with pytest.raises(OverloadedError):
        await bench.server.settling.settle_with_error(request, reply, TypeError("no JSON"))
    assert bench.settled[-1] is None
    assert all(one is not None for one in bench.settled[:-1])
    assert "could not be sent to its caller" in caplog.text


async def test_acknowledgement_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    request = Envelope(Request("1", "call", ["add"]), "x")
    await bench.server.settling.settle_with_error(request, None, RPCError("no"))
    assert bench.settled == []
    assert "could not be acknowledged" in caplog.text


async def test_could_not_be_run_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for one_way in (False, True):
        request = Envelope(Request("1", "call", ["add"], o=one_way or False), "x")
        reply = bench.server.settling.failed(request, ValueError("odd"))
        assert (reply is None) is one_way
    assert bench.counts("add") == {"failed": 2}
    assert bench.server.settling.failed(Envelope(Cancel("1")), ValueError()) is None
    assert "add() could not be run to its end" in caplog.text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (["a", "b"], "a.b"),
        (["x"] * MAX_SEGMENTS, ".".join("x" * MAX_SEGMENTS)),
        (["x"] * (MAX_SEGMENTS + 1), ".".join("x" * MAX_SEGMENTS) + " ..."),
        (["y" * 201], "y" * 200 + " ..."),
    ],
)
def test_names_are_shown_in_part(path: list[str], shown: str) -> None:
    assert name_of(Request("1", "call", path)) == shown


def test_labels() -> None:
    """What the log calls a request, whatever came."""
    assert label(Envelope(Request("1", "call", ["a", "b"]))) == "a.b()"
    assert label(Envelope(Cancel("1"))) == "a Cancel"
