"""What an author of a codec or a transport implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from anyio.abc import UnreliableObjectStream
from msgspec import Struct

from ._protocol._dependencies import Role as Role
from .records import Record, Reply, Request

__all__ = (
    "CallState",
    "Capabilities",
    "Codec",
    "Envelope",
    "Explanation",
    "Item",
    "ItemBounds",
    "ItemsEnd",
    "KeyedCalls",
    "KeyedItems",
    "KeyedRequest",
    "Listener",
    "Role",
    "Transport",
)

_T = TypeVar("_T")


class Capabilities(Struct, frozen=True, kw_only=True):
    """What a transport and its wire can carry. The defaults are those of a link of two peers.

    :ivar broadcast: a request without recipient reaches every peer, and the first answer wins; a
        peer without the method stays silent
    :ivar addressing: peers have ids, and a request can be sent to one of them
    :ivar keyword_arguments: requests can carry keyword arguments
    :ivar cancellation: a cancelled call can be cancelled at the peer
    :ivar deadlines: a call's time budget travels with it
    :ivar takeover: seconds after which a request that a peer had taken is given to another one,
        should that peer be gone; ``None`` if it never is
    """

    broadcast: bool = False
    addressing: bool = False
    keyword_arguments: bool = True
    cancellation: bool = True
    deadlines: bool = True
    takeover: float | None = None


class Envelope(Struct):
    """A record with where it comes from and goes to.

    :ivar record: the record
    :ivar sender: id of the peer that sent it, ``None`` where the link has one peer only
    :ivar recipient: id of the peer it is for, ``None`` for whoever serves the stream, or finds it
        to be its own
    :ivar attempt: how often this record has been delivered, this time included
    :ivar sent_at: when it was sent, or came here if that isn't known, on AnyIO's clock in seconds
    :ivar deadline: when the caller of this request of ours gives up, or the one whom this reply of
        ours is for, on AnyIO's clock
    :ivar key: of a received request, its key, if it has one
    :ivar error: set on a record of *ours* that comes back because it could not be delivered, or
        whose sending was cancelled, if there is more to be said of that
    :ivar token: the transport's own reference: for `Transport.settle`, and, on a request of ours
        that was sent, for the cancel that may follow
    :ivar route: on a request of ours that is for whoever serves, and on its cancel: the
        ``shard_key`` that it was given, and once it was sent, the transport's own reference
    """

    record: Record
    sender: str | None = None
    recipient: str | None = None
    attempt: int = 1
    sent_at: float | None = None
    error: Exception | None = None
    token: Any = None
    deadline: float | None = None
    key: str | None = None
    route: Any = None


class Item(Struct, Generic[_T], frozen=True):
    """One item of a stream that a call with a key has as its result.

    :ivar position: where it stands, for who wants to go on behind it
    :ivar number: the first item has 1
    :ivar value: what the handler yielded
    """

    position: str
    number: int
    value: _T


class ItemsEnd(Struct, frozen=True):
    """What comes behind the last item: where it stands, and a reply with its error, if any."""

    position: str
    reply: Reply


class ItemBounds(Struct, frozen=True):
    """How much is kept of a stream that a call with a key has as its result.

    :ivar keep_items: for those who are slower than the fastest reader; ``None`` for any number
    :ivar keep_bytes: the same in bytes
    :ivar when_unread: what is done once so much is kept and nobody reads: ``"pause"`` the handler,
        ``"cancel"`` the call, or ``"go on"`` without what is oldest
    :ivar unread_timeout: seconds to pause before it is cancelled
    """

    keep_items: int | None = 10_000
    keep_bytes: int = 8 * 1024 * 1024
    when_unread: Literal["pause", "cancel", "go on"] = "pause"
    unread_timeout: float = 60.0


DEFAULT_BOUNDS = ItemBounds()


class KeyedRequest(Struct):
    """A request that runs once while its result is kept, under a key.

    :ivar key: names it among all requests of the stream, or of the link
    :ivar digest: 22 characters, the same for the same method with the same arguments
    :ivar request: what is to run
    :ivar keep: seconds for which the result is kept, from when it is there
    :ivar keep_errors: seconds for which the exception of the handler is kept
    :ivar run_within: seconds that the handler may take
    :ivar delay: seconds before it may begin
    :ivar at: when it may begin, in seconds since the epoch, in place of ``delay``
    :ivar bounds: of its items, if its result is a stream
    """

    key: str
    digest: str
    request: Request
    keep: float
    keep_errors: float
    run_within: float | None = None
    delay: float = 0.0
    at: float | None = None
    bounds: ItemBounds = DEFAULT_BOUNDS


class CallState(Struct, frozen=True):
    """What is known of a call that has a key.

    :ivar kind: ``"delayed"`` until it may begin, ``"waiting"`` for a worker, ``"running"``; then
        ``"done"`` with a result, ``"failed"`` with an exception of its handler, ``"dead"`` if it
        was given up, ``"cancelled"``; ``"refused"`` if it did not run, as its arguments don't fit
    :ivar worker: the consumer that has it, while it runs
    :ivar since: seconds since that worker took it, or was last heard of
    :ivar attempt: how often it was delivered, while it runs
    :ivar expires: seconds until nothing is known of it any more; ``None`` before its end
    """

    kind: Literal["delayed", "waiting", "running", "done", "failed", "dead", "cancelled", "refused"]
    worker: str | None = None
    since: float | None = None
    attempt: int = 0
    expires: float | None = None


class Explanation(Struct, frozen=True):
    """Why a request of this side has no answer yet.

    :ivar text: for people
    :ivar unserved: whether nobody is there who could take it
    :ivar unknown: whether that couldn't be found out now, but may be later
    """

    text: str
    unserved: bool = False
    unknown: bool = False


class Listener(ABC):
    """Takes what a transport's reader receives besides requests. No method may block or raise."""

    @abstractmethod
    def received(self, envelope: Envelope) -> None:
        """Take a reply, callback, stream record, cancel, bye, or what came back with ``error``."""

    @abstractmethod
    def ended(self, reason: Exception) -> None:
        """Learn, once, that nothing will be received any more.

        :param reason: `~anyio.EndOfStream` if the peer ended it, `TransportClosedError` if this
            side did or a destroy signal came, `TransportConnectionError` if it broke
        """

    def peer_gone(self, peer: str, role: Role, error: Exception) -> None:  # noqa: B027
        """Learn that a peer is gone that a stream of this side needs: see `Transport.watch`.

        :param role: as what it was needed
        :param error: for those who need it
        """

    def expects(self) -> bool:
        """Return whether anything may be on the way here that somebody waits for."""
        return False

    def waiting(self) -> Sequence[Envelope]:
        """Return the requests of this side that wait for a reply, as they were sent. A transport
        that has lost replies asks for it, and lets those that they were for come back, to
        `received`, with ``error`` set.
        """
        return ()

    def lost(self, reason: Exception) -> None:  # noqa: B027  # not every listener has streams
        """Learn that records that were on the way here may have been lost, though more will come.
        What can't go on without them is to be ended: streams, at either end.

        :param reason: what its users are told
        """

    def doubted(self) -> None:  # noqa: B027  # the same
        """Learn that records may have been lost, on the way here or from here, which is likely to
        be few or none. Streams go on; what might wait for a lost one is to be asked for again.
        """


class KeyedItems(ABC):
    """How a transport keeps the items of calls that have a key and a stream as their result."""

    @property
    def unread(self) -> int:
        """Items that went to make room here, as ``"go on"`` has it, and nobody had read them."""
        return 0

    @abstractmethod
    async def resume(self, envelope: Envelope) -> Item[Any] | None:
        """Return the last item of earlier attempts at a received request, and go on behind it.

        :raises DeliveryError: if the request is another worker's by now
        """

    @abstractmethod
    async def keep_item(self, envelope: Envelope, value: Any) -> None:
        """Keep the next item of a received request, once there is room, or this is cancelled.

        :raises TypeError, OverloadedError: if it can't be encoded, or is too large
        :raises DeliveryError: if the request is another worker's by now, or the items were removed
        """

    @abstractmethod
    async def keep_rest(self, envelope: Envelope) -> None:
        """Wait until all items of a received request are kept; raises as `keep_item`."""

    @abstractmethod
    def read(self, key: str, after: str | None) -> AsyncGenerator[Item[Any] | ItemsEnd, None]:
        """Yield the items of a request, those that come while this is read too, then their end.

        :param after: position of the item behind which to begin; ``None`` for the first one
        :raises CallNotFoundError, CallCancelledError: if there is none, or it was cancelled
        :raises StreamRestartedError: if the items behind the position are of another run
        :raises ItemsLostError: if some of them aren't kept any more
        """


class KeyedCalls(ABC):
    """How a transport keeps calls that have a key: see ``Transport.keyed``.

    The request of such a call is received as any other, with ``Envelope.key``, and settled as any
    other. What it is settled with is kept. The end of one that is cancelled, or runs for longer
    than it may, the transport tells the listener as a `~anyio_kkrpc.records.Cancel`.

    :ivar items: keeps those of results that are streams
    """

    items: KeyedItems

    @abstractmethod
    async def start(self, call: KeyedRequest) -> None:
        """Have a request run, unless it has run or is about to; return once that is sure.

        :raises KeyConflictError: if the key belongs to another request
        :raises OverloadedError: if the transport takes no more; nothing was sent
        """

    @abstractmethod
    async def call(
        self, call: KeyedRequest, *, cancel_when_left: bool = False, deadline: float | None = None
    ) -> Reply | None:
        """The same, and return what it was settled with.

        :param cancel_when_left: whether it is cancelled should this be, and nobody else waits
        :param deadline: when to wait no longer, on AnyIO's clock
        :return: ``None`` if there is nothing by then
        :raises CallCancelledError: if the call was cancelled
        :raises DeliveryError: if it was given up
        """

    @abstractmethod
    async def wait(self, key: str) -> Reply:
        """Wait for what a request was settled with that somebody has started.

        :raises CallNotFoundError: if there is none with that key
        """

    @abstractmethod
    async def state(self, key: str) -> CallState:
        """Return what is known of a request.

        :raises CallNotFoundError: if there is none with that key
        """

    @abstractmethod
    async def cancel(self, key: str) -> bool:
        """Cancel a request, wherever it is; return false if it has ended, or isn't there."""

    @abstractmethod
    async def forget(self, key: str) -> bool:
        """Keep nothing more of a request that has ended; return false if there is none.

        :raises ValueError: if it hasn't ended
        """

    @abstractmethod
    async def report(self, envelope: Envelope, value: Any) -> None:
        """Keep how far a received request has come, in place of what was told before."""

    @abstractmethod
    async def progress(self, key: str) -> tuple[str, Any] | None:
        """Return how far a request has come as it told last, if it did, and the position of that.

        :raises CallNotFoundError: if there is none with that key
        """

    async def metadata(self, key: str) -> Mapping[str, Any]:
        """Return what a request carried beside its arguments, nothing if that isn't there."""
        return {}


class Codec(ABC):
    """Turns records into bytes and bytes into validated records. It has no state."""

    name: str

    @abstractmethod
    def encode(self, record: Record) -> bytes:
        """Encode a record.

        :raises TypeError: if a value in it can't be encoded; the text names its type
        """

    @abstractmethod
    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        """Decode and validate exactly one record.

        :raises ProtocolError: if the bytes are not one valid record, whatever is wrong with them
        """


class Transport(UnreliableObjectStream[Envelope]):
    """Carries envelopes between peers.

    Used as an async context manager, which owns every task of it. Receiving ends in
    `~anyio.EndOfStream` when the peer has ended it, `TransportClosedError` after this side has
    closed it, and `TransportConnectionError` when it broke.

    A channel that uses the transport registers a listener: see `listen`.

    :ivar keyed: what keeps calls that have a key; ``None`` if this transport doesn't
    """

    keyed: KeyedCalls | None = None

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this transport can carry."""

    @abstractmethod
    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand every received record that is not a request to ``listener`` at once.

        The listener is called without awaiting, from the transport's reader, so replies, callbacks,
        stream items and cancels never wait behind requests. Requests come from `receive`. What has
        been received already and is not a request goes to the listener at once; if the transport
        has ended already, the listener is told at once.

        :param listener: the listener, or ``None`` to take it away
        :param serve: how many requests may be received and not settled at a time; with 0, requests
            are not wanted, and a transport need not fetch them
        """

    def serve_more(self, change: int) -> None:
        """Change the number given to `listen` as ``serve``, for instance while a handler waits.

        A transport that doesn't hold requests back need not do anything.
        """

    def watch(self, peer: str | None, role: Role, wanted: bool) -> None:
        """Learn whether streams and the like need a peer; called for the first one and the last.

        A transport that can tell does so when the peer is gone: see `Listener.peer_gone`. Called
        from the event loop; must not block.

        :param peer: its id; ``None`` where the link has one peer only, or for a reader that isn't
            known yet
        :param role: ``"source"`` if a stream of it is read here, ``"reader"`` if it reads one of
            here, or has a function that is called here
        """

    async def explain(self, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
        """Find out why requests of this side have no answer yet.

        Asked for all those together whose calls are about to time out, or are to fail at once where
        nobody serves them: ten times a second at most. It has a tenth of a second. If it takes
        longer, it is cancelled, and whatever it raises, nothing is known.

        :param requests: as they were sent
        :return: what is known of each, ``None`` for nothing
        """
        return [None] * len(requests)

    @abstractmethod
    async def receive(self) -> Envelope:
        """Return the next request (without a listener, the next record). A cancel loses nothing."""

    @abstractmethod
    async def send(self, item: Envelope) -> None:
        """Send an envelope.

        Returns when it has been handed to the operating system or is about to be by a write under
        way, in order. If the transport learns later that a record was not delivered, it comes back
        to the listener with ``error`` set.

        :raises TypeError: if a value can't be encoded; nothing was sent
        :raises OverloadedError: if the encoded record exceeds ``max_message_size``, or the
            transport refuses more; nothing was sent
        :raises TransportClosedError, TransportConnectionError: after ``aclose``, or if it broke
        """

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Finish a received request: send its reply, if there is one, and acknowledge it.

        Each is to be settled, if only with ``None``: until then it takes room. Where the transport
        keeps requests until they are acknowledged, both happen in one write.
        """
        if reply is not None:
            await self.send(reply)
