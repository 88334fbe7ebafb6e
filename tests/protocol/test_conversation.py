"""The peer without I/O: two of them joined by hand, and one against arbitrary records."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol import _conversation as p
from anyio_kkrpc._protocol._budget import BUDGET
from anyio_kkrpc._protocol._events import (
    Answer,
    CallbackInvoked,
    CallbacksReleased,
    StreamEnded,
    StreamFailed,
    StreamItem,
    StreamLeft,
    StreamPulled,
)
from anyio_kkrpc._protocol._records import (
    Bye,
    CallbackCall,
    CallbackRelease,
    Cancel,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)
from anyio_kkrpc._protocol._state import CallInput, CallState, HandlingState
from anyio_kkrpc._protocol._streams import FIRST_CREDIT, MAX_WINDOW, Consumer


class Source:
    """Looks like a stream to the core, which never touches it."""

    def __aiter__(self) -> Any:
        raise AssertionError("the core must not run user code")


def make_pair() -> tuple[p.Conversation, p.Conversation]:
    """Two peers; remote callbacks are (id, owner) tuples wrapped in a function."""

    def remote(callback_id: str, owner: str | None, *more: object) -> Any:
        return ("callback", callback_id, owner)

    return p.Conversation("a-", remote), p.Conversation("b-", remote)


def open_stream() -> tuple[p.Conversation, p.Conversation, Consumer, Any]:
    """A call answered with a stream: caller, server, consumer, producer."""
    caller, server = make_pair()
    call, request = caller.call("call", ["count"], args=[])
    handling = server.begin(request, "caller")
    reply = server.reply(handling, Source())
    event = caller.receive(reply, "server")
    assert isinstance(event, p.CallFinished)
    consumer = call.stream
    assert isinstance(consumer, Consumer)
    return caller, server, consumer, handling.producer


def test_call_and_reply() -> None:
    """A request gets its result, and both tables are empty afterwards."""
    caller, server = make_pair()
    call, request = caller.call("call", ["add"], args=[1, 2], kwargs={"z": 3}, budget=500)
    assert (request.op, request.p, request.a, request.k, request.d) == (
        "call",
        ["add"],
        [1, 2],
        {"z": 3},
        500,
    )
    handling = server.begin(request, "caller")
    assert server.unpack(request, handling) == ([1, 2], {"z": 3})
    event = caller.receive(server.reply(handling, 6), "server")
    assert isinstance(event, p.CallFinished)
    assert event.call is call
    assert (call.state, call.result) == (CallState.ANSWERED, 6)
    assert not caller.calls
    assert not server.handlings


def test_error_reply() -> None:
    """An error arrives as it was sent."""
    caller, server = make_pair()
    call, request = caller.call("get", ["x"])
    handling = server.begin(request, None)
    caller.receive(server.reply_error(handling, {"n": "E", "m": "no"}), None)
    assert (call.state, call.error) == (CallState.FAILED, {"n": "E", "m": "no"})


def test_first_answer_wins() -> None:
    """A second reply to the same call is ignored and counted."""
    caller, _ = make_pair()
    call, request = caller.call("call", ["f"], args=[])
    caller.receive(Reply(request.id, 1), "one")
    assert caller.receive(Reply(request.id, 2), "two") is None
    assert (call.result, caller.ignored) == (1, 1)


def test_reply_from_another_peer_than_addressed_is_ignored() -> None:
    """A call to one peer isn't answered by another."""
    caller, _ = make_pair()
    call, request = caller.call("call", ["f"], "b", args=[])
    assert caller.receive(Reply(request.id, 1), "c") is None
    assert call.state is CallState.WAITING
    caller.receive(Reply(request.id, 2), "b")
    assert call.result == 2


def test_late_stream_is_sent_back() -> None:
    """A stream that answers a call nobody waits for is told to end."""
    caller, server = make_pair()
    call, request = caller.call("call", ["f"], args=[])
    caller.finish_call(call, CallInput.CANCEL)
    reply = server.reply(server.begin(request, "caller"), Source())
    event = caller.receive(reply, "server")
    assert isinstance(event, p.Answer)
    assert isinstance(event.record, StreamRequest)
    assert (event.record.op, event.recipient) == ("return", "server")
    left = server.receive(event.record, "caller")
    assert isinstance(left, StreamLeft)


def test_the_same_request_is_not_served_twice_at_once() -> None:
    """A request that is being served already is refused; afterwards it may come again."""
    _, server = make_pair()
    request = Request("1", "call", ["f"])
    handling = server.begin(request, "a")
    with pytest.raises(ProtocolError, match="being served"):
        server.begin(request, "a")
    server.begin(request, "b")
    server.drop(handling)
    server.begin(request, "a")


def test_cancel_reaches_the_handling_of_its_sender_only() -> None:
    """A cancel is for the sender's own request."""
    _, server = make_pair()
    handling = server.begin(Request("1", "call", ["f"]), "a")
    assert server.receive(Cancel("1"), "b") is None
    event = server.receive(Cancel("1"), "a")
    assert isinstance(event, p.HandlingCancelled)
    assert handling.state is HandlingState.CANCELLING
    assert isinstance(server.receive(Cancel("1"), "a"), p.HandlingCancelled)
    server.drop(handling)
    assert server.receive(Cancel("1"), "a") is None


def test_values_that_look_like_envelopes_stay_values() -> None:
    """A dict with kkrpc's own keys arrives as the dict it was."""
    caller, server = make_pair()
    odd = [{"__kkrpc_next_arg__": "callback", "id": "x"}, {"__kkrpc_next_stream__": 1}]
    _, request = caller.call("call", ["f"], args=odd)
    assert server.unpack(request, server.begin(request, None))[0] == odd


@pytest.mark.parametrize(
    "bad",
    [{"__kkrpc_next_arg__": "callback"}, {"__kkrpc_next_arg__": "callback", "id": 1},
     {"__kkrpc_next_arg__": "other"}, {"__kkrpc_next_arg__": None}],
)  # fmt: skip
def test_malformed_argument_envelopes(bad: dict[str, Any]) -> None:
    """An envelope of no known kind, or without an id, is a protocol error."""
    _, server = make_pair()
    request = Request("1", "call", ["f"], a=[bad])
    with pytest.raises(ProtocolError):
        server.unpack(request, server.begin(request, None))


def test_callback_keeps_its_id_and_counts_its_uses() -> None:
    """The same function has one id; it is dropped when each of its uses was released."""
    caller, server = make_pair()

    def function() -> None: ...

    _, first = caller.call("call", ["f"], args=[function, 1, function])
    _, second = caller.call("call", ["f"], args=[function])
    (one, plain, two), _ = server.unpack(first, server.begin(first, "caller"))
    (three,), _ = server.unpack(second, server.begin(second, "caller"))
    assert one == two == three
    assert plain == 1
    callback_id = one[1]
    event = caller.receive(server.callback_call(callback_id, [5], {"k": 6}), "server")
    assert isinstance(event, CallbackInvoked)
    assert (event.export.function, event.args, event.kwargs) == (function, [5], {"k": 6})
    caller.receive(server.reply(server.handlings["caller", first.id], None), "server")
    caller.receive(server.reply(server.handlings["caller", second.id], None), "server")
    assert caller.receive(CallbackRelease([callback_id, callback_id]), "server") is None
    released = caller.receive(CallbackRelease([callback_id, "unknown"]), "server")
    assert isinstance(released, CallbacksReleased)
    assert not caller.callbacks
    assert caller.receive(server.callback_call(callback_id, [], None), "server") is None
    _, third = caller.call("call", ["f"], args=[function])
    assert len(caller.callbacks) == 1
    assert isinstance(third.a, list)


def test_callbacks_of_a_call_that_failed_are_taken_back() -> None:
    """A call that ends without an answer leaves no callback and no stream behind."""
    caller, _ = make_pair()
    source = Source()
    call, _ = caller.call("call", ["f"], args=[print, source])
    assert (len(caller.callbacks), len(caller.producers)) == (1, 1)
    closed = caller.finish_call(call, CallInput.TIMEOUT)
    assert closed is not None
    (producer,) = closed.producers
    assert producer.source is source
    assert not producer.open
    assert not caller.callbacks
    assert not caller.producers


def test_bound_methods_and_unhashable_functions_are_callbacks() -> None:
    """A bound method is one callback, however often it is looked up; hash isn't needed."""

    class Odd:
        __hash__ = None  # type: ignore[assignment]

        def method(self) -> None: ...

        def __call__(self) -> None: ...

    caller, _ = make_pair()
    items: list[int] = []
    odd = Odd()
    caller.call("call", ["f"], args=[items.append, items.append, odd, odd])
    assert len(caller.callbacks) == 2


def test_callbacks_take_values_only() -> None:
    """Neither side accepts a callback or stream as an argument of a callback."""
    caller, server = make_pair()
    with pytest.raises(TypeError, match="takes values"):
        server.callback_call("1", [print], None)
    with pytest.raises(TypeError, match="takes values"):
        server.callback_call("1", [], {"k": Source()})
    caller.call("call", ["f"], args=[print])
    (callback_id,) = caller.callbacks
    with pytest.raises(ProtocolError):
        caller.receive(
            CallbackCall(callback_id, [{"__kkrpc_next_arg__": "callback", "id": "9"}]), None
        )


def test_stream_from_start_to_end() -> None:
    """Credits are 32, then 16 after each 16 delivered; items keep order; the end empties tables."""
    caller, server, consumer, producer = open_stream()
    pull = consumer.wait()
    assert pull is not None
    assert pull.n == FIRST_CREDIT
    assert consumer.wait() is None
    assert isinstance(server.receive(pull, "caller"), StreamPulled)
    got, pulls = [], 0
    for n in range(100):
        assert producer.credit > 0
        event = caller.receive(producer.item(n), "server")
        assert isinstance(event, StreamItem)
        got.append(event.value)
        assert consumer.wait() is None
        more = consumer.delivered()
        if more is not None:
            assert more.n == FIRST_CREDIT // 2
            server.receive(more, "caller")
            pulls += 1
    assert got == list(range(100))
    assert pulls == 100 // (FIRST_CREDIT // 2)
    event = caller.receive(server.end_production(producer, None), "server")
    assert isinstance(event, StreamEnded)
    assert not caller.consumers
    # A pull that crosses the end on its way is late, not one of an unknown stream.
    ignored = server.ignored
    assert (
        server.receive(p.StreamRequest(id="9", sid=producer.id, op="pull", n=1), "caller") is None
    )
    assert server.ignored == ignored + 1
    server.forget(producer)
    assert not server.producers


def flow(item: Any, burst: int | None) -> int:
    """Read a stream; return how far its source was allowed to be ahead.

    :param burst: how many items come at most for each time that the reader waits
    """
    caller, server, consumer, producer = open_stream()
    most, received = 0, 0
    for _ in range(40 if burst is None else 600):
        pulls = []
        while received:
            received -= 1
            pulls.append(consumer.delivered())
        pulls.append(consumer.wait())
        for pull in pulls:
            if pull is not None:
                server.receive(pull, "caller")
        most = max(most, producer.credit)
        received = producer.credit if burst is None else min(producer.credit, burst)
        for _ in range(received):
            event = caller.receive(producer.item(item), "server")
            assert isinstance(event, StreamItem)
    return most


@pytest.mark.parametrize(
    ("item", "burst", "most"),
    [
        (1, None, MAX_WINDOW),
        ({"a": ["b", 1.5, None, b""]}, None, MAX_WINDOW),
        (1, 1, FIRST_CREDIT),
        (1, 3, FIRST_CREDIT),
        ("x" * 2000, None, FIRST_CREDIT),
        ({"a": [[b"x" * 2000]]}, None, FIRST_CREDIT),
        ([[1] * 10] * 200, None, FIRST_CREDIT),
        ({str(n): n for n in range(500)}, None, FIRST_CREDIT),
        (object(), None, FIRST_CREDIT),
    ],
)
def test_window_of_a_stream(item: Any, burst: int | None, most: int) -> None:
    """It grows to 256 where small items come in bursts for which the reader waits, and only there."""
    assert flow(item, burst) == most


def test_stream_without_credit_sends_nothing() -> None:
    """A producer that has used its credit can't make an item."""
    _, server, consumer, producer = open_stream()
    with pytest.raises(ProtocolError):
        producer.item(0)
    server.receive(consumer.wait() or pytest.fail("no pull"), "caller")
    for n in range(FIRST_CREDIT):
        producer.item(n)
    with pytest.raises(ProtocolError):
        producer.item(FIRST_CREDIT)


def test_stream_error() -> None:
    """A failing source ends the stream with its error."""
    caller, server, consumer, producer = open_stream()
    consumer.wait()
    event = caller.receive(server.end_production(producer, {"n": "E", "m": "m"}), "server")
    assert isinstance(event, StreamFailed)
    assert event.error == {"n": "E", "m": "m"}


def test_stream_left_early() -> None:
    """Leaving tells the producer; what was under way is ignored; the answer ends it."""
    caller, server, consumer, producer = open_stream()
    server.receive(consumer.wait() or pytest.fail("no pull"), "caller")
    item = producer.item(1)
    record = caller.leave(consumer)
    assert record is not None
    assert caller.leave(consumer) is None
    assert caller.receive(item, "server") is None
    event = server.receive(record, "caller")
    assert isinstance(event, StreamLeft)
    assert event.answer.id == record.id
    server.forget(producer)
    assert caller.receive(event.answer, "server") is None
    assert not server.producers
    assert caller.ignored >= 1


def test_lost_doubled_and_unasked_items() -> None:
    """A doubled item is ignored; a gap, and an item without credit, fail the stream."""
    caller, server, consumer, producer = open_stream()
    server.receive(consumer.wait() or pytest.fail("no pull"), "caller")
    first = producer.item("a")
    assert isinstance(caller.receive(first, "server"), StreamItem)
    assert caller.receive(first, "server") is None
    producer.item("lost")
    producer.item("lost, too")
    event = caller.receive(producer.item("c"), "server")
    assert isinstance(event, StreamFailed)
    assert event.error is not None
    assert event.error["m"] == "items 1 to 2 of the stream were lost"
    assert not caller.consumers
    assert event.left is not None
    assert isinstance(server.receive(event.left, "caller"), StreamLeft)

    caller, server, consumer, producer = open_stream()
    with pytest.raises(ProtocolError):
        caller.receive(StreamReply(id="1", sid=consumer.id, d=False, v=1), "server")
    consumer.wait()
    for n in range(FIRST_CREDIT):
        caller.receive(StreamReply(id="1", sid=consumer.id, d=False, v=n), "server")
    event = caller.receive(StreamReply(id="1", sid=consumer.id, d=False, v=0), "server")
    assert isinstance(event, StreamFailed)
    assert event.error is None


@pytest.mark.parametrize("lost", ["pull", "item", "end", "return", "its answer", "nothing"])
def test_what_may_be_lost_is_asked_for_again(lost: str) -> None:
    """Whatever of a stream is lost, nobody waits for it; and what wasn't lost does no harm."""
    caller, server, consumer, producer = open_stream()
    assert caller.ask_again() == []  # it has not begun
    pull = consumer.wait() or pytest.fail("no pull")
    if lost != "pull":
        server.receive(pull, "caller")
    if lost == "item":
        producer.item("lost")
    elif lost == "end":
        server.end_production(producer, None)
        server.forget(producer)
    elif lost in ("return", "its answer"):
        left = caller.leave(consumer) or pytest.fail("it wasn't open")
        if lost == "its answer":
            server.receive(left, "caller")
            server.forget(producer)
    (asked,) = caller.ask_again()
    assert asked.recipient == "server"
    event = server.receive(asked.record, "caller")
    if lost in ("return", "its answer"):
        if lost == "return":
            assert isinstance(event, StreamLeft)
            server.forget(producer)
        assert isinstance(event, (Answer, StreamLeft))
        answer = event.record if isinstance(event, Answer) else event.answer
        assert caller.receive(answer, "server") is None
        assert consumer.finished
    elif lost == "end":
        assert isinstance(event, Answer)
        failed = caller.receive(event.record, "server")
        assert isinstance(failed, StreamFailed)
        assert failed.error is not None
        assert failed.error["m"] == "what came behind 0 items of the stream was lost"
    else:
        assert isinstance(event, StreamPulled)
        came = caller.receive(producer.item("next"), "server")
        assert isinstance(came, StreamFailed if lost == "item" else StreamItem)
        if lost != "item":
            # However much that allowed: all may be sent, and then more is asked for.
            granted = FIRST_CREDIT if lost == "pull" else 2 * FIRST_CREDIT
            for _ in range(granted - 1):
                assert isinstance(caller.receive(producer.item(1), "server"), StreamItem)
            assert producer.paused
            for _ in range(granted):
                pull = consumer.delivered()
                if pull is not None:
                    server.receive(pull, "caller")
            assert 0 < producer.credit <= 2 * FIRST_CREDIT
            assert 0 < (producer.room or 0) <= 2 * BUDGET
    assert not consumer.finished or not caller.consumers


def test_lost_last_items_are_noticed_at_the_end() -> None:
    """The end tells how many items there were."""
    caller, server, consumer, producer = open_stream()
    server.receive(consumer.wait() or pytest.fail("no pull"), "caller")
    producer.item("lost")
    assert isinstance(caller.receive(server.end_production(producer, None), "server"), StreamFailed)


def test_streams_of_other_peers_are_out_of_reach() -> None:
    """Another peer can neither pull from, nor end, nor feed a stream that isn't its own."""
    caller, server, consumer, producer = open_stream()
    for op in ("pull", "throw", "return"):
        event = server.receive(StreamRequest(id="1", sid=producer.id, op=op), "thief")  # type: ignore[arg-type]
        assert isinstance(event, p.Answer)
        assert event.recipient == "thief"
    assert producer.open
    assert producer.credit == 0
    consumer.wait()
    assert caller.receive(StreamReply(id="1", sid=consumer.id, d=True), "thief") is None
    assert consumer.readable


@pytest.mark.parametrize(
    ("broadcast", "recipient"), [(True, None), (True, "first"), (False, "first")]
)
def test_stream_argument_that_several_peers_got(broadcast: bool, recipient: str | None) -> None:
    """Who pulls first reads it; that others fail is no answer, since it may succeed."""
    caller = p.Conversation("a-", lambda *_: print, broadcast=broadcast)
    call, _ = caller.call("call", ["total"], recipient, args=[Source()])
    (producer,) = call.producers or ()
    pull = StreamRequest(id="1", sid=producer.id, op="pull", n=1)
    assert isinstance(caller.receive(pull, "first"), StreamPulled)
    event = caller.receive(pull, "second")
    assert isinstance(event, p.Answer)
    assert isinstance(event.record, StreamReply)
    assert event.record.e["rpc_error"] == "delivery"
    assert "another peer" in event.record.e["m"]
    error = caller.receive(Reply(call.id, e={"n": "Error", "m": "no stream"}), "second")
    assert error is None
    assert caller.ignored == 1
    assert isinstance(caller.receive(Reply(call.id, 5), "first"), p.CallFinished)
    assert call.result == 5
    # One that nobody has read yet says nothing about who fails.
    call, _ = caller.call("call", ["total"], recipient, args=[Source()])
    assert isinstance(caller.receive(Reply(call.id, e={}), recipient or "second"), p.CallFinished)


@pytest.mark.parametrize(("n", "credit"), [(5, 5), (UNSET, 1), (-3, 1), ("x", 1), (1 << 60, 1 << 31), (True, 1)])  # fmt: skip
def test_odd_credits(n: Any, credit: int) -> None:
    """A missing or odd number is one credit, and a huge one is bounded."""
    _, server, _, producer = open_stream()
    server.receive(StreamRequest(id="1", sid=producer.id, op="pull", n=n), "caller")
    assert producer.credit == credit


@pytest.mark.parametrize(("overheard", "sid"), [(False, "s"), (True, "b-99")])
def test_unknown_streams_are_answered_as_kkrpc_does(overheard: bool, sid: str) -> None:
    """A pull from an unknown stream is an error, leaving one is acknowledged."""
    _, server = make_pair()
    pull = StreamRequest(id="7", sid=sid, op="pull", n=1)
    receive = server.overhear if overheard else server.receive
    event = receive(pull, "c")
    assert isinstance(event, p.Answer)
    assert isinstance(event.record, StreamReply)
    assert event.record.e == {"n": "Error", "m": f"Unknown RPC stream {sid}"}
    left = StreamRequest(id="8", sid=sid, op="return", v=3)
    event = receive(left, "c")
    assert isinstance(event, p.Answer)
    assert isinstance(event.record, StreamReply)
    assert (event.record.id, event.record.d, event.record.v) == ("8", True, 3)


def test_streams_of_others_are_left_alone() -> None:
    """Where many peers read the same stream, what is none of this peer's affair is ignored."""
    _, server = make_pair()
    for record in (
        StreamRequest(id="7", sid="a-1", op="pull", n=1),
        StreamRequest(id="8", sid="a-1", op="return"),
        Reply("a-5", {"__kkrpc_next_stream__": "async-iterable", "id": "x"}),
    ):
        assert server.overhear(record, "c") is None
    assert server.ignored == 3


def test_release_of_all() -> None:
    """kkrpc releases a callback as a whole; one that an open call passes stays."""
    caller, _ = make_pair()
    for _ in range(2):
        call, _ = caller.call("call", ["f"], args=[print])
        caller.receive(Reply(call.id), "b")
    (callback_id,) = caller.callbacks
    open_call, _ = caller.call("call", ["f"], args=[print])
    assert caller.receive(CallbackRelease([callback_id], all=True), "b") is None
    assert list(caller.callbacks[callback_id].passes) == [open_call.id]
    caller.receive(Reply(open_call.id), "b")
    event = caller.receive(CallbackRelease([callback_id], all=True), "b")
    assert isinstance(event, CallbacksReleased)
    assert caller.callbacks == {}


def pass_function(
    caller: p.Conversation, function: Any, *, gather: bool = False, one_way: bool = False
) -> tuple[p.Call, Request, str]:
    call, request = caller.call("call", ["f"], args=[function], one_way=one_way)
    call.gather = gather
    (argument,) = request.a if isinstance(request.a, list) else []
    return call, request, argument["id"]


def test_a_call_that_ran_twice_releases_once() -> None:
    """A release names the call that it is of: the function of another call stays."""
    caller, _ = make_pair()
    _, short, callback_id = pass_function(caller, print)
    _, long, same = pass_function(caller, print)
    assert same == callback_id
    caller.receive(Reply(short.id), "second")
    for worker in ("first", "second"):  # the one that stalled, and the one that took over
        assert caller.receive(CallbackRelease([callback_id], q=[short.id]), worker) is None
    event = caller.receive(CallbackCall(callback_id, [1]), "first")
    assert isinstance(event, CallbackInvoked)
    caller.receive(Reply(long.id), "first")
    event = caller.receive(CallbackRelease([callback_id], q=[long.id]), "first")
    assert isinstance(event, CallbacksReleased)
    assert caller.callbacks == {}


@pytest.mark.parametrize("release_first", [True, False])
def test_release_and_reply_in_any_order(release_first: bool) -> None:
    caller, _ = make_pair()
    _, request, callback_id = pass_function(caller, print)
    records = [CallbackRelease([callback_id], q=[request.id]), Reply(request.id)]
    for record in records if release_first else reversed(records):
        assert caller.callbacks
        caller.receive(record, "worker")
    assert caller.callbacks == {}


def test_peers_of_a_broadcast_release_for_themselves() -> None:
    """Each that has answered, or used the function, holds it until it has released it."""
    caller, _ = make_pair()
    call, request, callback_id = pass_function(caller, print, gather=True)
    for peer in ("one", "two"):
        caller.receive(Reply(request.id), peer)
    assert caller.receive(CallbackRelease([callback_id], q=[request.id]), "one") is None
    assert isinstance(
        caller.receive(CallbackCall(callback_id, [], q=request.id), "three"), CallbackInvoked
    )
    caller.finish_call(call, CallInput.CANCEL)
    for peer in ("two", "two", "stranger"):
        assert caller.receive(CallbackRelease([callback_id], q=[request.id]), peer) is None
    assert caller.callbacks
    assert caller.receive(CallbackRelease([callback_id], q=[request.id]), "three") is not None
    assert caller.callbacks == {}


def test_functions_of_calls_that_nobody_answers() -> None:
    """Of a one-way call they go when they are released; of one that is given up, at once."""
    caller, _ = make_pair()
    _, request, callback_id = pass_function(caller, print, one_way=True)
    assert caller.callbacks
    assert caller.receive(CallbackRelease([callback_id], q=[request.id]), "worker") is not None
    call, request, callback_id = pass_function(caller, print)
    caller.receive(CallbackCall(callback_id, [], q=request.id), "worker")  # used, not answered
    caller.finish_call(call, CallInput.TIMEOUT)
    assert caller.callbacks == {}
    assert caller.receive(CallbackRelease([callback_id], q=[request.id]), "worker") is None


def test_lose_settles_everything_once() -> None:
    """When the link goes, every table is emptied and every entry is in a final state."""
    caller, server, consumer, producer = open_stream()
    call, _ = caller.call("call", ["f"], args=[print])
    handling = server.begin(Request("9", "call", ["f"]), "caller")
    lost = caller.lose()
    assert lost.calls == [call]
    assert call.state is CallState.LOST
    assert lost.consumers == [consumer]
    assert len(lost.callbacks) == 1
    lost = server.lose()
    assert lost.handlings == [handling]
    assert lost.producers == [producer]
    assert not producer.open
    again = server.lose()
    assert not (again.calls or again.handlings or again.producers)


def test_bye_and_misplaced_requests() -> None:
    """A destroy signal is an event; a request has a way in of its own."""
    caller, _ = make_pair()
    assert isinstance(caller.receive(Bye(), "x"), p.PeerLeft)
    with pytest.raises(ProtocolError):
        caller.receive(Request("1", "call", []), "x")


_ids = st.sampled_from(["a-1", "a-2", "a-3", "a-4", "s1", "1"])
_senders = st.sampled_from([None, "x", "y"])
_values = st.one_of(
    st.none(),
    st.integers(),
    st.builds(lambda i: {"__kkrpc_next_stream__": "async-iterable", "id": i}, _ids),
    st.builds(lambda i: {"__kkrpc_next_arg__": "callback", "id": i}, _ids),
)
_records = st.one_of(
    st.builds(Reply, _ids, _values),
    st.builds(Reply, _ids, e=st.dictionaries(st.sampled_from("nm"), st.text())),
    st.builds(CallbackCall, _ids, st.lists(_values, max_size=2)),
    st.builds(CallbackRelease, st.lists(_ids, max_size=3)),
    st.builds(Cancel, _ids),
    st.builds(
        StreamRequest,
        id=_ids,
        sid=_ids,
        op=st.sampled_from(["pull", "return", "throw"]),
        n=st.one_of(st.just(UNSET), st.integers(), st.text()),
    ),
    st.builds(
        StreamReply,
        id=_ids,
        sid=_ids,
        d=st.booleans(),
        i=st.one_of(st.just(UNSET), st.integers(-1, 3)),
    ),
    st.just(Bye()),
)
_own = st.sampled_from(["call", "stream", "callback", "handle", "reply", "stream reply", "leave", "finish"])  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.one_of(_own, st.tuples(_records, _senders)), max_size=30))
def test_arbitrary_records_are_events_or_protocol_errors(steps: list[Any]) -> None:
    """Whatever comes, in whatever state, is an event, ignored, or a protocol error."""
    peer, _ = make_pair()
    handlings: list[p.Handling] = []
    calls: list[p.Call] = []
    consumers: list[Consumer] = []
    for number, step in enumerate(steps):
        if step == "call":
            calls.append(peer.call("call", ["f"], args=[])[0])
        elif step == "stream":
            calls.append(peer.call("call", ["f"], args=[Source()])[0])
        elif step == "callback":
            calls.append(peer.call("call", ["f"], args=[print])[0])
        elif step == "handle":
            handlings.append(peer.begin(Request(str(number), "call", ["f"]), "x"))
        elif step == "reply" and handlings:
            peer.reply(handlings.pop(), 1)
        elif step == "stream reply" and handlings:
            peer.reply(handlings.pop(), Source())
        elif step == "leave" and consumers:
            peer.leave(consumers.pop())
        elif step == "finish" and calls:
            call = calls.pop()
            if call.state is CallState.WAITING:
                peer.finish_call(call, CallInput.TIMEOUT)
        elif isinstance(step, tuple):
            record, sender = step
            before = msgspec.structs.replace(record)
            try:
                event = peer.receive(record, sender)
            except ProtocolError:
                event = None
            assert record == before
            if isinstance(event, p.CallFinished) and event.call.stream is not None:
                consumers.append(event.call.stream)
                event.call.stream.wait()
    lost = peer.lose()
    assert not any((peer.calls, peer.handlings, peer.callbacks, peer.consumers, peer.producers))
    assert all(call.state is not CallState.WAITING for call in lost.calls)
