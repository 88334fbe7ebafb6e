"""How long entering takes at most, and what is said then. Seconds pass in no time, on trio's clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from trio.testing import MockClock

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._entering import Entering
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._portion import Portion
from anyio_kkrpc.redis._connection._target import Target

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class Link:
    """Does what the test says with each command."""

    def __init__(self, answer: Callable[[], Awaitable[Any]]) -> None:
        self.lost_by: Exception | None = None
        self.answer = answer

    async def request(self, *command: Any) -> Any:
        return await self.answer()

    async def ask(self, what: str, portion: Portion, command: Callable[[int], Any]) -> Any:
        return await self.answer()


def entering(link: Any, url: str = "redis://:s3cret@h") -> Entering:
    target = Target.parse(url)
    return Entering(target, 5.0, link, Outages(target))


async def test_slow_answers() -> None:
    """A server that answers each command in time may take longer for all of them."""

    async def answer() -> str:
        await anyio.sleep(4)
        return "OK"

    one = entering(Link(answer))
    with one.scope:
        for _ in range(5):
            assert await one.execute(b"INFO") == "OK"
        await anyio.sleep(60)  # nobody waits for the server then
    assert not one.scope.cancelled_caught


@pytest.mark.parametrize("url", ["redis://:s3cret@h", "redis://h?socket_connect_timeout=2"])
async def test_no_answer(url: str) -> None:
    """The command that isn't answered is named with its key, and the time is the URL's, if any."""
    one = entering(Link(anyio.sleep_forever), url)
    seconds = 2 if "?" in url else 5
    with one.scope:
        await one.execute(b"XADD", b"{s}:inbox:me", b"*", b"hint", b"hello")
    assert trio.current_time() == pytest.approx(seconds, abs=0.01)
    text = str(one.error())
    assert (
        f"no answer to XADD, key '{{s}}:inbox:me' within {seconds} seconds. Check whether" in text
    )
    assert "CLIENT PAUSE" in text
    assert "s3cret" not in text
    assert isinstance(one.error().__cause__, TimeoutError)


async def test_refused_for_now() -> None:
    """A refusal that may pass is tried again until the time is over, and then told."""

    async def answer() -> None:
        await anyio.sleep(0.1)
        raise ResponseError("MISCONF Redis is configured to save RDB snapshots")

    one = entering(Link(answer))
    with one.scope:
        await one.ask("the last id", Portion(1), lambda _: (b"XINFO", b"STREAM", b"s"))
    assert trio.current_time() == pytest.approx(5, abs=0.01)
    assert "no answer to XINFO STREAM, key 's' within 5 seconds but 'MISCONF" in str(one.error())
    assert isinstance(one.error().__cause__, ResponseError)


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (
            ResponseError("READONLY You can't write against a read only replica."),
            "but \"READONLY You can't",
        ),
        (anyio.EndOfStream(), "(the connection was lost: closed by the server)"),
    ],
)
async def test_connections_lost(cause: Exception, text: str) -> None:
    """Why the connections are lost on which it is tried is told as well."""
    link = Link(anyio.sleep_forever)
    one = entering(link)
    with one.scope:
        await one.execute(b"INFO")
    link.lost_by = TransportConnectionError("lost")
    link.lost_by.__cause__ = cause
    assert f"no answer to INFO within 5 seconds {text}" in str(one.error())
    assert one.error().__cause__ is cause


@pytest.mark.parametrize("refusal", ["WRONGTYPE Operation against a key", "NOPERM No permissions"])
async def test_refused_for_good(refusal: str) -> None:
    """Other errors are raised at once, also after commands that were taken."""
    answers: list[Any] = ["OK", ResponseError(refusal)]

    async def answer() -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    one = entering(Link(answer))
    with one.scope, pytest.raises(ResponseError, match=refusal):
        assert await one.execute(b"INFO") == "OK"
        await one.execute(b"XADD", b"s")
    assert trio.current_time() == 0


async def test_several_at_once() -> None:
    """Each has its time, and the one that isn't answered is named."""
    times = {b"INFO": 4.0, b"XADD": 1.0, b"XINFO": 60.0}

    class Several(Link):
        async def request(self, *command: Any) -> Any:
            await anyio.sleep(times[command[0]])
            return command[0]

    one = entering(Several(anyio.sleep_forever))

    async def ask() -> None:
        assert await one.execute(b"XADD", b"a") == b"XADD"
        await one.execute(b"XINFO", b"STREAM", b"s")

    with one.scope:
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            assert await one.execute(b"INFO") == b"INFO"
    assert trio.current_time() == pytest.approx(6, abs=0.01)
    assert "no answer to XINFO STREAM, key 's' within 5 seconds" in str(one.error())
