"""What became of requests is counted by name, and seen in the log and by the middleware."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import create_task_group, current_time, fail_after

from anyio_kkrpc import (
    MemoryTransport,
    MethodNotFoundError,
    MethodStatistics,
    RemoteError,
    RPCChannel,
    RPCValidationError,
    expose,
    in_thread,
    with_call_options,
)
from anyio_kkrpc._protocol._records import Request
from anyio_kkrpc._runtime._sparing import LOGGED_WITHIN, MOST_LOGGED
from anyio_kkrpc._serving._outcomes import FailureLog
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.middleware import CallNext, Invocation, access_log, limit_concurrency
from tests.bounds import BOUND
from tests.pairs import Pair, pair

pytestmark = pytest.mark.anyio


class Api:
    size = 1

    def __init__(self) -> None:
        self._began = anyio.Event()
        self._end = anyio.Event()

    class Broken:
        def __init__(self) -> None:
            raise ValueError("no")

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self) -> None:
        raise ValueError("no")

    @in_thread
    def fail_in_thread(self) -> None:
        raise ValueError("no")

    async def fail_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("no")

    @property
    def failing(self) -> int:
        raise ValueError("no")

    def wrong(self) -> int:
        return "text"  # type: ignore[return-value]

    def unsendable(self) -> Any:
        return object()

    async def hold(self) -> None:
        self._began.set()
        await self._end.wait()

    async def wait(self) -> None:
        self._began.set()
        await anyio.sleep_forever()


class Seen:
    """A middleware that notes what becomes of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool, str]] = []

    async def __call__(self, call: Invocation, call_next: CallNext) -> Any:
        outcome = "cancelled"
        try:
            result = await call_next(call)
            outcome = "ok"
            return result
        except Exception as exc:
            outcome = type(exc).__name__
            assert call.refused in (None, exc)
            raise
        finally:
            self.calls.append((call.operation, call.method, call.known, outcome))


async def ask_late(link: Pair, api: Api, *paths: list[str]) -> None:
    """Send requests that are out of time when the only other one ends."""
    async with create_task_group() as group:
        group.start_soon(link.api.hold)
        await api._began.wait()
        for number, path in enumerate(paths):
            request = Request(f"late-{number}", "call", path, a=[1, 2], d=1)
            await link.transports[0].send(Envelope(request, None, None))
        await anyio.wait_all_tasks_blocked()
        came = current_time()
        while current_time() < came + 0.002:
            await anyio.sleep(0.002)
        api._end.set()


async def until(condition: Callable[[], bool]) -> None:
    with fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.parametrize("watched", [False, True])
async def test_counted_by_name(watched: bool) -> None:
    """Each request once, as what came of it; whatever names peers make up add none."""
    api, seen = Api(), Seen()
    table = expose(api, naming="camel")
    options = {"middleware": [seen] if watched else [], "max_concurrency": 1}
    async with pair(table, server=options) as link:
        remote = link.api
        assert await remote.add(1, 2) == 3
        assert await remote.size == 1
        for failing in (remote.fail, remote.failLater, remote.fail_later, remote.fail_in_thread):
            with pytest.raises(RemoteError, match="^ValueError: no$"):
                await failing()
        with pytest.raises(RemoteError, match="^ValueError: no$"):
            await remote.failing
        with pytest.raises(RemoteError, match="^ValueError: no$"):
            await link.client.construct("Broken")
        with pytest.raises(RPCValidationError):
            await remote.wrong()
        with pytest.raises(RPCValidationError):
            await remote.add("x", 2)
        with pytest.raises(MethodNotFoundError, match="not writable"):
            await link.client.set_property("size", 2)
        for number in range(20):
            with pytest.raises(MethodNotFoundError):
                await remote[f"made-up-{number}"]()
        with pytest.raises(MethodNotFoundError):
            await remote.made.up
        await ask_late(link, api, ["add"], ["made", "up"])
        api._began = anyio.Event()
        async with create_task_group() as group:
            group.start_soon(remote.wait)
            await api._began.wait()
            group.cancel_scope.cancel()
        await until(lambda: "wait" in link.server.statistics().methods)
        statistics = link.server.statistics()
        served = RPCChannel(MemoryTransport.pair()[0], expose=table).statistics()
    assert statistics.methods == {
        "add": MethodStatistics(served=1, refused=1, expired=1),
        "size": MethodStatistics(served=1, refused=1),
        "fail": MethodStatistics(failed=1),
        "fail_later": MethodStatistics(failed=2),
        "fail_in_thread": MethodStatistics(failed=1),
        "failing": MethodStatistics(failed=1),
        "Broken": MethodStatistics(failed=1),
        "wrong": MethodStatistics(failed=1),
        "hold": MethodStatistics(served=1),
        "wait": MethodStatistics(cancelled=1),
    }
    assert statistics.unknown == 22
    assert (statistics.served, statistics.failed) == (3, 7)
    assert (statistics.cancelled, statistics.expired) == (1, 1)
    assert served.methods == {}, "a table that several channels serve counts for each"
    if watched:
        refused = [one for one in seen.calls if one[-1] not in ("ok", "ValueError", "cancelled")]
        assert refused == [
            ("call", "wrong", True, "UnfitResultError"),
            ("call", "add", True, "RPCValidationError"),
            ("set", "size", True, "MethodNotFoundError"),
            *(("call", f"made-up-{n}", False, "MethodNotFoundError") for n in range(20)),
            ("get", "made.up", False, "MethodNotFoundError"),
            ("call", "add", True, "RPCTimeoutError"),
            ("call", "made.up", False, "RPCTimeoutError"),
        ]


async def test_one_name_of_several() -> None:
    """What has the same dotted name at different paths is counted together, and loses nothing."""

    def fail() -> None:
        raise ValueError("no")

    async with pair({"a.b": fail, "a": {"b": lambda: 1}, "c.d": 1, "c": {"d": 2}}) as link:
        with pytest.raises(RemoteError):
            await link.api["a.b"]()
        for _ in range(2):
            assert await link.api.a.b() == 1
        assert await link.api["c.d"] == 1
        assert await link.api.c.d == 2
        statistics = link.server.statistics()
    assert statistics.methods["a.b"] == MethodStatistics(served=2, failed=1)
    assert statistics.methods["c.d"] == MethodStatistics(served=2)
    assert (statistics.served, statistics.failed) == (4, 1)
    assert [name for name in expose({"a.b": fail, "a": {"b": fail}}) if "." in name] == ["a.b"]


async def test_what_can_not_be_sent() -> None:
    """It is the failure of who gave it."""
    async with pair(Api()) as link:
        with pytest.raises(RemoteError, match="TypeError"):
            await link.api.unsendable()
        methods = link.server.statistics().methods
        assert methods == {"unsendable": MethodStatistics(served=1, failed=1)}


@pytest.mark.parametrize("reply", [True, False])
async def test_failures_are_logged(reply: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With what was called, by whom, and where it was raised; also where nobody waits for it."""
    async with pair(Api()) as link:
        failing = with_call_options(link.api, reply=reply).fail
        if reply:
            with pytest.raises(RemoteError):
                await failing()
        else:
            await failing()
        await until(lambda: bool(link.server.statistics().failed))
    (record,) = (one for one in caplog.records if one.levelno >= logging.WARNING)
    assert record.name == "anyio_kkrpc"
    assert record.getMessage().startswith("fail failed: request ")
    assert record.getMessage().endswith(" of its peer")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert ", in fail\n" in caplog.text


def test_as_many_as_are_of_use(caplog: pytest.LogCaptureFixture) -> None:
    """Of each name; the log says what isn't in it."""
    now = 0.0
    log = FailureLog(lambda: now)

    def fail(times: int, name: str = "pay") -> list[str]:
        caplog.clear()
        for number in range(times):
            log.note(name, str(number), "client-1", ValueError("no"))
        return [record.getMessage() for record in caplog.records]

    lines = fail(MOST_LOGGED + 5)
    assert lines[0] == "pay failed: request 0 of client-1"
    assert len(lines) == MOST_LOGGED
    assert lines[-1].endswith("; further ones are counted only, for up to 10 s")
    assert len(fail(1, "other")) == 1
    now = LOGGED_WITHIN - 0.1
    assert fail(2) == []
    now = LOGGED_WITHIN
    assert fail(1) == ["pay failed: request 0 of client-1; 7 more before were not logged"]
    assert fail(1) == ["pay failed: request 0 of client-1"]


async def test_refused_calls_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api, middleware = Api(), [access_log(), limit_concurrency(1)]
    options = {"middleware": middleware, "max_concurrency": 1}
    async with pair(api, server=options) as link:
        with pytest.raises(RPCValidationError):
            await link.api.add("secret", 1)
        with pytest.raises(MethodNotFoundError) as caught:
            await link.api.add.more()
        assert str(caught.value) == "add.more is not a function"
        await ask_late(link, api, ["add"])
        await until(lambda: link.server.statistics().expired == 1)
        await until(lambda: "RPCTimeoutError" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("access")]
    assert [line.rpartition(" ")[0].rpartition(" ")[0] for line in lines] == [
        "server call add peer=None attempt=1 RPCValidationError",
        "server call add.more peer=None attempt=1 MethodNotFoundError",
        "server call hold peer=None attempt=1 ok",
        "server call add peer=None attempt=1 RPCTimeoutError",
    ]
    assert "secret" not in caplog.text


async def test_middleware_decides_on_refused_calls() -> None:
    """It comes first: it may hide what there is, and answer itself."""

    async def guard(call: Invocation, call_next: CallNext) -> Any:
        if call.method == "hidden":
            raise PermissionError("not for you")
        if not call.known:
            return f"{call.method} of {len(call.args)}"
        return await call_next(call)

    async with pair(Api(), server={"middleware": [guard]}) as link:
        with pytest.raises(RemoteError, match="^PermissionError: not for you$"):
            await link.api.hidden(1)
        assert await link.api.made_up(1, 2) == "made_up of 0"
        assert link.server.statistics().methods == {}
        assert link.server.statistics().unknown == 2
