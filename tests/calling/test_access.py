"""Who may use a key, and whether anybody would run what is called."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from anyio_kkrpc import (
    CallHandle,
    DeliveryError,
    KeyNotAllowedError,
    KeyUse,
    MemoryTransport,
    RemoteError,
    RPCChannel,
    with_call_options,
)
from anyio_kkrpc._calling._access import check_guard
from anyio_kkrpc.abc import Envelope, Explanation
from anyio_kkrpc.middleware import Invocation
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

ALL = ("start", "attach", "cancel", "forget")


class Api:
    """What is called.

    :ivar runs: what began
    :ivar began: set once `wait` has
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.began = anyio.Event()
        self.gate = anyio.Event()

    async def wait(self, name: str) -> str:
        self.runs.append(name)
        self.began.set()
        await self.gate.wait()
        return name

    async def echo(self, name: str) -> str:
        self.runs.append(name)
        return name

    async def fail(self) -> None:
        raise ValueError("no")


class Rules:
    """A guard: keys begin with the name of a user, who may do what is listed.

    :ivar asked: what it was asked
    """

    def __init__(self, *allowed: str) -> None:
        self.allowed = set(allowed)
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, use: KeyUse) -> bool:
        await anyio.lowlevel.checkpoint()
        self.asked.append((use.action, use.method))
        return use.action in self.allowed and use.key.startswith(f"{use.metadata.get('user')}:")


Action = Callable[[CallHandle[Any]], Awaitable[Any]]


async def first_progress(call: CallHandle[Any]) -> None:
    async with aclosing(call.progress()) as told:
        await anext(told, None)


ACTIONS: list[tuple[str, Action]] = [
    ("attach", lambda call: call.state()),
    ("attach", lambda call: call.result(timeout=BOUND)),
    ("attach", first_progress),
    ("cancel", lambda call: call.cancel()),
    ("forget", lambda call: call.forget()),
]


async def test_what_a_handle_may_do() -> None:
    """Each of them is asked for; what isn't allowed does nothing."""
    a, b = MemoryTransport.pair(codec="json")
    rules, served, metadata = Rules("start"), Api(), {"user": "ann"}
    channel = RPCChannel(a, key_guard=rules)
    async with a, b, channel, RPCChannel(b, expose=served):
        api = with_call_options(channel.get_api(), metadata=metadata)
        started = await channel.start(api.wait("x"), key="ann:1")
        attached = channel.attach("ann:1", metadata=metadata)
        for call in (started, attached):
            for action, use in ACTIONS:
                rules.asked.clear()
                with pytest.raises(KeyNotAllowedError, match=f"^{action}: not allowed .* 'ann:1'"):
                    await use(call)
                assert rules.asked == [(action, "")]
        served.gate.set()
        rules.allowed = set(ALL)
        for call in (started, attached):
            assert await call.result() == "x"
        # Whoever says that he is another one, or nobody, has keys of his own.
        for others in (channel.attach("ann:1"), channel.attach("ann:1", metadata={"user": "bob"})):
            for _, use in ACTIONS:
                with pytest.raises(PermissionError):
                    await use(others)
        assert not await attached.cancel()
        assert await attached.forget()


async def test_calls_that_are_not_allowed() -> None:
    """Nothing is sent of them; the guard sees what the middleware has put into the metadata."""
    a, b = MemoryTransport.pair(codec="json")
    rules, served = Rules("start"), Api()

    async def identify(call: Invocation, call_next: Any) -> Any:
        call.metadata["user"] = "ann"
        return await call_next(call)

    channel = RPCChannel(a, key_guard=rules, middleware=[identify])
    async with a, b, channel, RPCChannel(b, expose=served):
        api = channel.get_api()
        for key in ("bob:1", "1"):
            with pytest.raises(KeyNotAllowedError, match="^start:"):
                await channel.start(api.echo("x"), key=key)
        for allowed, missing in (("", "start"), ("start", "attach"), ("start attach", "cancel")):
            rules.allowed = {*allowed.split()}
            mine = with_call_options(api, key="ann:1", cancel_when_left=True)
            with pytest.raises(KeyNotAllowedError, match=f"^{missing}:"):
                await mine.echo("x")
        assert served.runs == []
        rules.allowed, rules.asked = {"start"}, []
        await with_call_options(api, key="ann:1", reply=False).echo("only sent")
        call = await channel.start(api.echo("y"), key="ann:2")
        rules.allowed.add("attach")
        assert await call.result() == "y"
        assert await with_call_options(api, key="ann:3").echo("z") == "z"
        assert rules.asked == [
            *[("start", "echo")] * 2,
            ("attach", ""),
            *[("start", "echo"), ("attach", "")],
        ]
        assert await api.echo("no key") == "no key"
        assert len(rules.asked) == 5


async def test_only_true_allows() -> None:
    """A guard that forgets to return allows nothing, and what it raises arrives."""
    for answer in (None, 1, "yes", False):

        async def guard(use: KeyUse, answer: Any = answer) -> bool:
            return answer  # type: ignore[no-any-return]

        a, _ = MemoryTransport.pair()
        async with a, RPCChannel(a, key_guard=guard) as channel:
            with pytest.raises(KeyNotAllowedError):
                await channel.attach("k").state()

    async def broken(use: KeyUse) -> bool:
        raise LookupError("no such user")

    a, _ = MemoryTransport.pair()
    async with a, RPCChannel(a, key_guard=broken) as channel:
        with pytest.raises(LookupError, match="no such user"):
            await channel.attach("k").cancel()


async def test_wrong_options() -> None:
    a, _ = MemoryTransport.pair()
    with pytest.raises(TypeError, match="^key_guard: needs an async function"):
        RPCChannel(a, key_guard=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^metadata: needs a dict"):
        RPCChannel(a).attach("k", metadata=["user"])  # type: ignore[arg-type]
    assert check_guard(None) is None


class Known(MemoryTransport):
    """Tells what is to be told of who serves, and counts how often it is asked."""

    answers: Sequence[Explanation | Exception | None] = ()
    asked = 0

    async def explain(self, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return [answer]


NOBODY = Explanation("nobody is there", unserved=True)


async def test_fail_fast() -> None:
    """A call that nobody serves fails at once and runs no later; what is kept, one gets."""
    a, b = Known.pair(codec="json")
    served = Api()
    a.answers = [NOBODY]
    channel = RPCChannel(a, timeout=BOUND, fail_fast=True)
    async with a, b, channel, RPCChannel(b, expose=served):
        api = channel.get_api()
        for kept in ("echo", "fail", "unkept"):
            options: dict[str, Any] = {"key": kept, "fail_fast": False}
            if kept == "unkept":
                options["keep_errors"] = 0
            once = with_call_options(api, **options)
            if kept == "echo":
                assert await once.echo("x") == "x"
                assert await with_call_options(once, fail_fast=True).echo("x") == "x"
            else:
                again = DeliveryError if kept == "unkept" else RemoteError
                for fail_fast, error in ((False, RemoteError), (True, again)):
                    with pytest.raises(error):
                        await with_call_options(once, fail_fast=fail_fast).fail()
        running = await channel.start(with_call_options(api, fail_fast=False).wait("x"), key="r")
        await served.began.wait()
        for unserved in (
            lambda: with_call_options(api, key="new").echo("new"),
            lambda: with_call_options(api, key="new", reply=False).echo("new"),
            lambda: channel.start(api.echo("new"), key="new"),
            lambda: with_call_options(api, key="r").wait("x"),
        ):
            with pytest.raises(DeliveryError, match="^nobody is there$"):
                await unserved()
        assert served.runs == ["x", "x"]
        served.gate.set()
        assert await running.result() == "x"
        later = await channel.start(api.echo("later"), key="later", delay=0.001)
        assert await later.result() == "later"


@pytest.mark.parametrize(
    "first", [None, Explanation("somebody is there"), LookupError("broken"), "unknown"]
)
async def test_somebody_serves(first: Any) -> None:
    """Or it can't be known: then it is sent, as without."""
    a, b = Known.pair(codec="json")
    unknown = Explanation("no connection", unknown=True)
    a.answers = [unknown, unknown, None] if first == "unknown" else [first]
    channel = RPCChannel(a, timeout=BOUND)
    async with a, b, channel, RPCChannel(b, expose=Api()):
        api = with_call_options(channel.get_api(), key="k", fail_fast=True)
        assert await api.echo("x") == "x"
        assert a.asked == len(a.answers)
        assert await with_call_options(channel.get_api(), key="k").echo("x") == "x"
        assert a.asked == len(a.answers)
