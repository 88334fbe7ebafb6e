"""Parts of a transport put together without one, and a connection that answers as it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import anyio

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc._protocol._records import Record, Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit._queue import Overflow
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._link import Dialer
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._reading._arrivals import Arrivals
from anyio_kkrpc.redis._reading._common import Common
from anyio_kkrpc.redis._reading._destroying import DestroySignals
from anyio_kkrpc.redis._reading._loop import ReadLoop
from anyio_kkrpc.redis._reading._reader import Decoder
from anyio_kkrpc.redis._reading._reception import Reception
from anyio_kkrpc.redis._reading._shared import Shared
from anyio_kkrpc.redis._stream._clock import ServerClock
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis.dialects import Dialects

ME = "me"
KEYS = Keys.of("s")
# Any stream is longer than what tests write.
DEFAULTS: dict[str, Any] = {
    "EVAL": b"999999-0",
    "TIME": [b"1000", b"0"],
    "INFO": b"run_id:1\r\n",
    "XINFO": ResponseError("ERR no such key"),
}


def make_dialects(session_id: str, deliver: Any = None) -> Dialects:
    return Dialects(
        "native",
        session_id,
        get_codec("json"),
        superjson=True,
        remote_peer_id=None,
        skips_own=False,
        max_queue_size=10,
        max_queue_bytes=10_000,
        deliver=deliver,
        now=lambda: 0.0,
        time_of_day=lambda: 0.0,
    )


def written(record: Record, sender: str = "other") -> list[bytes]:
    """Return the fields of an entry that another peer has written."""
    fields = make_dialects(sender).own.encode(record, None)
    assert fields is not None
    return [*fields]


def request(name: str) -> list[bytes]:
    return written(Request(name, "call", ["f"]))


class Server:
    """In place of a connection: the replies to reads that come in order, and then none.

    :ivar replies: to XREAD and XREADGROUP; an exception is raised
    :ivar others: to other commands, by their names
    :ivar asked: all commands
    :ivar connects: how often it can be connected to
    """

    def __init__(self, *replies: Any, **others: Any) -> None:
        self.replies = [*replies]
        self.others = DEFAULTS | others
        self.connects = 1
        self.asked: list[Any] = []
        self.received, self.silence = 0, 0.0
        self.closed, self.role = False, None

    @property
    def connection(self) -> Connection:
        return cast(Connection, self)

    async def execute(self, *command: Any) -> Any:
        await anyio.lowlevel.checkpoint()
        self.asked.append(command)
        name = command[0].decode()
        if not name.startswith("XREAD"):
            reply = self.others[name]
        elif not self.replies:
            await anyio.sleep_forever()
        else:
            reply = self.replies.pop(0)
            self.received += len(repr(reply))  # about
        if isinstance(reply, Exception):
            raise reply
        return reply

    request = execute

    async def execute_many(self, commands: list[Any]) -> list[Any]:
        return [await self._attempt(*command) for command in commands]

    async def _attempt(self, *command: Any) -> Any:
        try:
            return await self.execute(*command)
        except ResponseError as exc:
            return exc

    async def again(self) -> Connection:
        """Connect, as a dialer does."""
        await anyio.lowlevel.checkpoint()
        if not self.connects:
            raise TransportConnectionError("there is no server any more")
        self.connects -= 1
        return self.connection

    def note_lost(self, connection: Connection, exc: Exception) -> None:
        """Note why a connection is of no use any more, as a dialer does."""

    async def aclose(self) -> None:
        self.closed = True


class Parts:
    """What the readers of the stream ``s`` share, and what they told.

    :ivar expected: how often several entries came together
    :ivar handled: how often what reading called for was to be sent
    :ivar failures: errors after which nothing can be read
    """

    def __init__(
        self, server: Server, group: str | None = None, *, overflow: Overflow = "drop_newest"
    ) -> None:
        self.expected = self.followed_up = 0
        self.failures: list[Exception] = []
        self.ended: list[Exception] = []
        self.words: list[bytes] = []
        self.listened: list[bytes] = []
        self.dropped: list[bytes] = []
        self.skipped: Callable[[bytes, str, list[bytes]], object] = lambda *skipped: None
        self.dialects = make_dialects(ME)
        self.reception = Reception(
            3,
            10_000,
            overflow,
            decode=self.dialects.decode_whole,
            dropped=self.dropped.append,
            finished=self.dropped.append,
        )
        inbound, clock, outages = (
            self.reception.inbound,
            ServerClock(anyio.current_time),
            make_outages(),
        )
        self.signals = DestroySignals(True, inbound, self.ended.append)
        shared = Shared(
            self.dialects,
            ME,
            group,
            wants_own=False,
            inbound=inbound,
            signals=self.signals,
            answer=self.reception.answers.append,
            now=clock.now,
            listen=self.listened.append,
        )
        answer = self.reception.answers.append
        rest = (None, answer, None, lambda *skipped: self.skipped(*skipped), KEYS.inbox(ME))
        self.common = Common(
            decoder=Decoder(self.dialects, 10_000, self.words.append, *rest),
            loop=ReadLoop(lambda what: cast(Dialer, server), 10_000, self.failures.append),
            arrivals=Arrivals(self.reception, clock, shared, ME, grouped=group is not None),
            shared=shared,
            outages=outages,
            block_timeout=5.0,
            silence=lambda role: 7.0,
            expect_more=self.expect_more,
            follow_up=self.follow_up,
        )

    def expect_more(self) -> None:
        self.expected += 1

    async def follow_up(self) -> None:
        self.followed_up += 1

    def queued(self) -> list[str]:
        """Take the ids of the requests in the queue."""
        queue = self.reception.queue
        return [id_of(queue.get_nowait()) for _ in range(len(queue))]


def make_outages() -> Outages:
    return Outages(Target.parse("redis://nowhere"))


def id_of(envelope: Envelope) -> str:
    assert isinstance(envelope.record, (Request, Reply))
    return envelope.record.id
