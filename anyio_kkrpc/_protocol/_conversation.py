"""One side of a conversation without any I/O: records in, events out; wishes in, records out.

A `Conversation` holds the tables of calls made, requests served, callbacks given away and the two
ends of streams. A driver feeds it what it received and sends what it returns. It calls no code of
users.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Literal, TypeAlias

from msgspec import UNSET, UnsetType

from ._ahead import WINDOW, Ahead
from ._callback_table import Callbacks
from ._calls import Call, Handling
from ._dependencies import Depend, Dependencies, Role
from ._errors import ProtocolError
from ._events import (
    Answer,
    CallFinished,
    Event,
    HandlingCancelled,
    Lost,
    PeerGone,
    PeerLeft,
    PeerReplied,
    StreamsClosed,
)
from ._exports import CallbackExport
from ._records import (
    Bye,
    CallbackCall,
    CallbackProgress,
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from ._referred import Referred
from ._state import (
    CALL,
    HANDLING,
    CallInput,
    CallState,
    HandlingInput,
    advance,
)
from ._stream_table import Streams
from ._streams import Consumer, Producer
from ._values import (
    PLAIN,
    Packed,
    callback_envelope,
    is_callback,
    is_stream,
    pack_argument,
    pack_result,
    stream_envelope,
    unpack_argument,
    unpack_result,
)

# Cancels remembered for requests that may still come.
MAX_CANCELLED = 10_000

# Found more quickly than in their classes.
_RESULT, _FINISH = CallInput.RESULT, HandlingInput.FINISH

Operation: TypeAlias = Literal["call", "get", "set", "new"]


class Conversation:
    """The protocol's state at one side.

    :ivar functions: those that were passed in either direction
    :ivar prefix: as given
    :ivar receivers: what takes each kind of record, as `receive` does

    :param prefix: text that makes this side's ids unique among all peers
    :param remote_callback: makes the callable for a callback argument, from its id, its owner, the
        id of the request that it came with, and what its owner lets be ahead, if it counts that
    :param broadcast: whether several peers run a request that isn't for one of them
    :param depend: told which other peers the streams of this side need, see `Dependencies`
    :param referred: asks what values with references stand for
    """

    def __init__(
        self,
        prefix: str,
        remote_callback: Callable[[str, str | None, str, Ahead | None], Callable[..., Any]],
        *,
        broadcast: bool = False,
        depend: Depend = lambda peer, role, wanted: None,
        referred: Referred | None = None,
    ) -> None:
        numbers = count(1)
        self.prefix: str = prefix
        self._referred = referred = Referred() if referred is None else referred
        self.new_id: Callable[[], str] = lambda: f"{prefix}{next(numbers):x}"
        self._remote_callback = remote_callback
        self._broadcast = broadcast
        self.calls: dict[str, Call] = {}
        self.handlings: dict[tuple[str | None, str], Handling] = {}
        dependencies = Dependencies(depend)
        self.functions: Callbacks = Callbacks(self.new_id, dependencies, self.calls)
        callbacks = self.functions
        self.callbacks: dict[str, CallbackExport] = callbacks.exports.table
        self.callback_call: Callable[..., CallbackCall] = callbacks.call
        self.send_callback: Callable[[Ahead, CallbackCall, int], int] = callbacks.send
        self.end_callback: Callable[[Ahead], None] = callbacks.end
        self.called_of: Callable[[str | None], list[Ahead]] = callbacks.called_of
        self._streams = streams = Streams(self.new_id, dependencies, referred.release)
        self.consumers: dict[tuple[str | None, str], Consumer] = streams.consumers
        self.producers: dict[str, Producer] = streams.producers
        self.produce: Callable[[Any, str | None], Producer] = streams.produce
        self.leave: Callable[..., StreamRequest | None] = streams.leave
        self.forget: Callable[[Producer], None] = streams.forget
        self.lose_peer: Callable[[str, Role], PeerGone] = streams.lose_peer
        self.ask_again: Callable[[], list[Answer]] = streams.ask_again
        self.doubt_callbacks: Callable[[], list[Ahead]] = callbacks.doubt
        self.cancelled: OrderedDict[tuple[str | None, str], None] = OrderedDict()
        self._ignored = 0
        self.receivers: dict[type, Callable[[Any, str | None], Event | None]] = {
            Reply: self._receive_reply,
            Cancel: self._receive_cancel,
            CallbackCall: callbacks.receive_call,
            CallbackProgress: callbacks.receive_progress,
            CallbackRelease: callbacks.receive_release,
            StreamRequest: streams.receive_request,
            StreamReply: streams.receive_reply,
            Bye: self._receive_bye,
            Request: self._receive_request,
        }

    @property
    def ignored(self) -> int:
        """How many records came too late to matter."""
        return self._ignored + self.functions.ignored + self._streams.ignored

    # Calls, at the caller's side

    def call(
        self,
        op: Operation,
        path: list[str],
        recipient: str | None = None,
        args: Iterable[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        value: Any = UNSET,
        budget: int | UnsetType = UNSET,
        meta: dict[str, Any] | None = None,
        one_way: bool = False,
        gather: bool = False,
    ) -> tuple[Call, Request]:
        """Make a request: its entry in the table (none if ``one_way``) and its record.

        :param budget: milliseconds until the caller gives up
        :param gather: whether it takes the replies of several peers
        """
        call_id = self.new_id()
        call = Call(call_id, recipient)
        packed: list[Any] | UnsetType = UNSET
        if args is not None:
            packed = list(args)
            for index, arg in enumerate(packed):
                if arg.__class__ not in PLAIN:
                    packed[index] = self._pack(arg, call)
        # All at once: to set an attribute of a Struct costs as much as a call of a function.
        request = Request(call_id, op, path, packed, value, UNSET, budget)
        if kwargs:
            request.k = {name: self._pack(arg, call) for name, arg in kwargs.items()}
        if value is not UNSET:
            request.v = pack_result(value, lambda v: self._export(v, call))
        if call.callbacks:
            request.cw = WINDOW
            request.cr = True
        if meta:
            request.meta = meta
        if gather:
            call.gather = True
        if one_way:
            request.o = True
            self.functions.exports.close(call_id, call.callbacks or ())
            return call, request
        self.calls[call_id] = call
        if call.producers and recipient is None and not (gather or self._broadcast):
            for producer in call.producers:
                producer.shared = []
        return call, request

    def finish_call(self, call: Call, step: CallInput) -> StreamsClosed | None:
        """End a call by ``TIMEOUT``, ``CANCEL`` or ``LOSE``, unless it has ended already.

        :return: what ends with it of the streams that it had passed to the other side
        """
        if call.state is not CallState.WAITING:
            return None
        call.state = advance(CALL, call.state, step)
        self.calls.pop(call.id, None)
        self.functions.exports.close(call.id, call.callbacks or (), given_up=True)
        return self._streams.take_back(call.producers) if call.producers else None

    # Requests, at the serving side

    def was_cancelled(self, request: Request, sender: str | None) -> bool:
        """Whether the cancel of a request came before the request was served."""
        return self.cancelled.pop((sender, request.id), self) is None

    def begin(self, request: Request, sender: str | None, driver: Any = None) -> Handling:
        """Enter a request that is about to be served.

        :param driver: the driver's object for it
        :raises ProtocolError: if the same request of the same peer is being served already
        """
        key = (sender, request.id)
        if key in self.handlings:
            raise ProtocolError(f"request {request.id[:80]!r} is being served already")
        handling = self.handlings[key] = Handling(request.id, sender, driver)
        return handling

    def unpack(self, request: Request, handling: Handling) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments, with callables and `Consumer`s in place of their envelopes."""
        args = [] if request.a is UNSET else request.a
        kwargs = {} if request.k is UNSET else request.k
        if not kwargs and dict not in map(type, args):
            return args, kwargs
        return self._unpack(args, kwargs, request, handling)

    def _unpack(
        self, args: list[Any], kwargs: dict[str, Any], request: Request, handling: Handling
    ) -> tuple[list[Any], dict[str, Any]]:
        sender = handling.sender

        def callback(callback_id: str) -> Callable[..., Any]:
            ahead = self.functions.begin(request, sender)
            return self._remote_callback(callback_id, sender, request.id, ahead)

        def stream(stream_id: str) -> Consumer:
            return self._consume(stream_id, handling)

        def one(item: Any) -> Any:
            return self._referred.of(unpack_argument(item, callback, stream), sender)

        return [one(item) for item in args], {name: one(item) for name, item in kwargs.items()}

    def unpack_value(self, request: Request, handling: Handling) -> Any:
        """Return the value of a ``set``, ``UNSET`` for undefined."""
        if request.v is UNSET:
            return UNSET
        value = unpack_result(request.v, lambda stream_id: self._consume(stream_id, handling))
        return self._referred.of(value, handling.sender)

    def _consume(self, stream_id: str, handling: Handling) -> Consumer:
        consumer = self._streams.consume(stream_id, handling.sender, handling.id)
        if handling.consumers is None:
            handling.consumers = []
        handling.consumers.append(consumer)
        return consumer

    def reply(self, handling: Handling, value: Any) -> Reply:
        """Finish a request with a result. A stream result is entered in the table."""
        handling.state = advance(HANDLING, handling.state, _FINISH)
        self.handlings.pop((handling.sender, handling.id), None)
        if value.__class__ not in PLAIN and value is not UNSET:
            value = self._pack_result(value, handling)
        return Reply(handling.id, value)

    def reply_error(self, handling: Handling, error: dict[str, Any]) -> Reply:
        """Finish a request with an error."""
        self._finish(handling, HandlingInput.FINISH)
        return Reply(handling.id, e=error)

    def drop(self, handling: Handling) -> None:
        """Finish a request without a reply."""
        self._finish(handling, HandlingInput.FINISH)

    def _finish(self, handling: Handling, step: HandlingInput) -> None:
        handling.state = advance(HANDLING, handling.state, step)
        self.handlings.pop((handling.sender, handling.id), None)

    # Callbacks and streams. Functions of their own, since one that makes others costs more.

    def _pack(self, value: Any, call: Call) -> Any:
        return pack_argument(value, lambda v: self._export(v, call))

    def _pack_result(self, value: Any, handling: Handling) -> Any:
        return pack_result(value, lambda v: self._export_result(v, handling))

    def _unpack_result(self, value: Any, sender: str | None, request_id: str) -> Any:
        return unpack_result(
            value, lambda stream_id: self._streams.consume(stream_id, sender, request_id)
        )

    def _export(self, value: Any, call: Call) -> dict[str, Any] | None:
        if is_stream(value):
            producer = self._streams.produce(value, call.recipient)
            if call.producers is None:
                call.producers = []
            call.producers.append(producer)
            return stream_envelope(producer.id)
        if not is_callback(value):
            return None
        export = self.functions.exports.add(value, call.id)
        if call.callbacks is None:
            call.callbacks = []
        if export not in call.callbacks:
            call.callbacks.append(export)
        return callback_envelope(export.id)

    def _export_result(self, value: Any, handling: Handling) -> dict[str, Any] | None:
        if not is_stream(value):
            return None
        handling.producer = self._streams.produce(value, handling.sender)
        return stream_envelope(handling.producer.id)

    # Streams

    def end_production(self, producer: Producer, error: dict[str, Any] | None) -> StreamReply:
        """End a stream at the source's side; return the record that says so.

        It stays in the table until `forget`, to be called once the record is on its way: a pull
        that comes before is late, and must not be answered as one of an unknown stream.
        """
        return producer.end() if error is None else producer.fail(error)

    # What comes in

    def receive(self, record: Record, sender: str | None) -> Event | None:
        """Take a record that is not a request.

        :return: what happened, or ``None`` if the record is out of date and was ignored
        :raises ProtocolError: if it isn't legal; nothing has changed then
        """
        return self.receivers[record.__class__](record, sender)

    def overhear(self, record: Record, sender: str | None) -> Event | None:
        """Take a record that may be meant for another peer, as `receive` does: what isn't known
        here must not be answered.
        """
        if not self._is_ours(record):
            self._ignored += 1
            return None
        return self.receive(record, sender)

    def _is_ours(self, record: Record) -> bool:
        if isinstance(record, Reply):
            return record.id.startswith(self.prefix)
        if isinstance(record, CallbackCall):
            return record.p is UNSET or record.id.startswith(self.prefix)
        return not isinstance(record, StreamRequest) or record.sid.startswith(self.prefix)

    def _receive_reply(self, record: Reply, sender: str | None) -> Event | None:
        call = self.calls.get(record.id)
        if call is None or (call.recipient is not None and call.recipient != sender):
            return self._late_reply(record, sender)
        value: Any = record.v
        if record.e is UNSET:
            if value is UNSET:
                value, call.undefined = None, True
            elif value.__class__ is dict:
                value = self._unpack_result(value, sender, call.id)
                if value.__class__ is Packed:
                    value = self._referred.of_reply(record, value, sender)
        if record.e is UNSET:
            if call.callbacks is not None:
                call.dropped = self.functions.exports.note_answer(call.id, call.callbacks, sender)
                if call.passed is not None:
                    call.passed.answered(sender)
            if call.gather:
                return PeerReplied(call, sender, value, None)
            if value.__class__ is Consumer:
                call.stream = value
            else:
                call.result = value
            call.state = advance(CALL, call.state, _RESULT)
        else:
            record.e = self._referred.of_error(record.e, sender)
            if call.callbacks is not None:
                call.dropped = self.functions.exports.note_answer(call.id, call.callbacks, sender)
            if call.gather:
                return PeerReplied(call, sender, None, record.e)
            if self._broadcast and call.is_read_elsewhere(sender):
                self._ignored += 1
                return None
            call.error = record.e
            call.state = advance(CALL, call.state, CallInput.ERROR)
        del self.calls[record.id]
        if call.callbacks is not None:
            self.functions.exports.close(call.id, call.callbacks)
        if call.producers is None or (self._broadcast and call.recipient is None):
            return CallFinished(call)
        failed = call.state is CallState.FAILED
        return CallFinished(call, self._streams.finish(call.producers, sender, failed=failed))

    def _late_reply(self, record: Reply, sender: str | None) -> Event | None:
        self._ignored += 1
        late: list[str] = []
        self._referred.release(unpack_result(record.v, late.append), sender)
        if record.e is not UNSET:
            self._referred.of_error(record.e, sender)
        if not late:
            return None
        # Nobody will read that stream: its source must not wait for ever.
        return Answer(StreamRequest(id=self.new_id(), sid=late[0], op="return"), sender)

    def _receive_cancel(self, record: Cancel, sender: str | None) -> Event | None:
        key = (sender, record.id)
        handling = self.handlings.get(key)
        if handling is None:
            # The request may still wait somewhere, or come here from a worker that is gone.
            self._ignored += 1
            self.cancelled[key] = None
            if len(self.cancelled) > MAX_CANCELLED:
                self.cancelled.popitem(last=False)
            return None
        handling.state = advance(HANDLING, handling.state, HandlingInput.CANCEL)
        return HandlingCancelled(handling)

    def _receive_bye(self, record: Bye, sender: str | None) -> Event:
        return PeerLeft()

    def _receive_request(self, record: Request, sender: str | None) -> Event | None:
        raise ProtocolError("a request must be entered with begin()")

    # The end

    def lose(self) -> Lost:
        """Move everything that is open to its final state, because the link is gone."""
        lost = Lost(
            list(self.calls.values()),
            list(self.handlings.values()),
            self.functions.exports.lose(),
            self.functions.lose(),
            *self._streams.lose(),
        )
        for call in lost.calls:
            call.state = advance(CALL, call.state, CallInput.LOSE)
        for handling in lost.handlings:
            handling.state = advance(HANDLING, handling.state, HandlingInput.LOSE)
        self.calls.clear()
        self.handlings.clear()
        return lost
