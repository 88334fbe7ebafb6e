"""Each event of the protocol goes to the part that it is for, and none ends the reader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from anyio_kkrpc import ProtocolError, TransportClosedError
from anyio_kkrpc._calling._calls import Calls
from anyio_kkrpc._driver._core import Core
from anyio_kkrpc._protocol import _events
from anyio_kkrpc._protocol._calls import Call, Handling
from anyio_kkrpc._protocol._events import (
    Answer,
    CallbackRan,
    CallFinished,
    HandlingCancelled,
    PeerLeft,
    PeerReplied,
    StreamEnded,
    StreamFailed,
    StreamItem,
    StreamLeft,
    StreamPulled,
)
from anyio_kkrpc._protocol._records import Bye, Cancel, Reply, Request
from anyio_kkrpc._protocol._streams import Consumer
from anyio_kkrpc._reactions import _REACT, Reactions
from anyio_kkrpc.abc import Envelope


class Desk:
    """Reactions to events that are given, and what was done to the parts."""

    def __init__(self, event: object = None) -> None:
        self.core = Mock(spec=Core)
        self.core.timeout = None
        self.receive = Mock(side_effect=[event])
        receivers = {Cancel: self.receive, Bye: self.receive}
        known = Mock(calls={}, consumers={}, producers={}, receivers=receivers)
        self.core.conversation = known
        self.overhear = known.overhear
        self.calls, self.ended = Mock(spec=Calls), Mock()
        self.reactions = Reactions(cast(Core, self.core), cast(Calls, self.calls), self.ended)

    def take(self, record: Any = None, **envelope: Any) -> None:
        self.reactions.received(Envelope(Cancel("1") if record is None else record, **envelope))


def with_driver(**more: Any) -> Any:
    return SimpleNamespace(driver=Mock(), **more)


def test_every_event_has_a_reaction() -> None:
    """What the protocol can return, but for what others make of it."""
    known = {one for one in vars(_events).values() if isinstance(one, type)}
    events = {one for one in known if one.__module__ == _events.__name__}
    others = {_events.Lost, _events.PeerGone, _events.StreamsClosed}
    assert events - others == set(_REACT)


def test_answered() -> None:
    """Whoever waits for a call goes on; a stream gets what reads it before."""
    call = Call("1", None)
    call.driver = Mock()
    call.stream = Consumer("s", None, "1", lambda: "2")
    seen: list[bool] = []
    call.driver.set.side_effect = lambda: seen.append(call.stream.driver is not None)  # type: ignore[union-attr]
    Desk(CallFinished(call)).take()
    assert seen == [True]


@pytest.mark.parametrize("wanted", [True, False])
def test_one_of_several_answers(wanted: bool) -> None:
    """A stream that nobody reads is sent back."""
    call = cast(Call, with_driver(dropped=0))
    call.driver.add.return_value = wanted
    consumer = Consumer("s", "x", "1", lambda: "2")
    desk = Desk(PeerReplied(call, "x", consumer, None))
    desk.take()
    call.driver.add.assert_called_once_with("x", consumer, None)
    assert desk.core.abandon.called is not wanted


def test_answer_whose_callbacks_were_dropped() -> None:
    """It is an error, and its stream isn't read."""
    call = cast(Call, with_driver(dropped=2))
    desk = Desk(PeerReplied(call, "x", Consumer("s", "x", "1", lambda: "2"), None))
    desk.take()
    sender, value, error = call.driver.add.call_args.args
    assert (sender, value, error["rpc_error"]) == ("x", None, "overloaded")
    assert desk.core.abandon.called


@pytest.mark.parametrize(
    ("event", "method"),
    [
        (HandlingCancelled(cast(Handling, with_driver())), "cancel"),
        (CallbackRan(with_driver(), False), "go_on"),
        (CallbackRan(with_driver(), True), "fail"),
        (StreamItem(with_driver(), 5), "add"),
        (StreamEnded(with_driver()), "finish"),
        (StreamFailed(with_driver(), None), "finish"),
        (StreamPulled(with_driver()), "wake"),
        (StreamLeft(with_driver(), cast(Any, None)), "stop"),
    ],
)
def test_goes_to_its_driver(event: Any, method: str) -> None:
    Desk(event).take()
    (part,) = (
        getattr(event, name)
        for name in ("handling", "ahead", "consumer", "producer")
        if hasattr(event, name)
    )
    assert [call[0] for call in part.driver.method_calls] == [method]


@pytest.mark.parametrize("event", [StreamEnded, lambda one: StreamFailed(one, None)])
def test_streams_that_nobody_wanted(event: Any, caplog: pytest.LogCaptureFixture) -> None:
    Desk(event(SimpleNamespace(driver=None))).take()
    assert caplog.text == ""


def test_answered_by_itself() -> None:
    desk = Desk(Answer(Reply("1"), "x"))
    desk.take()
    desk.core.owe.assert_called_once_with(Reply("1"), "x")


def test_destroyed() -> None:
    desk = Desk(PeerLeft())
    desk.take(Bye())
    (reason,) = desk.ended.call_args.args
    assert isinstance(reason, TransportClosedError)


def test_nothing_ends_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    """What isn't legal is refused; a reaction that fails is logged."""
    desk = Desk()
    desk.receive.side_effect = ProtocolError("no")
    desk.take()
    assert str(desk.core.refuse.call_args.args[0]) == "no"
    desk = Desk(StreamItem(cast(Any, SimpleNamespace(driver=None)), 5))
    desk.take()
    assert "what came of a Cancel failed" in caplog.text


@pytest.mark.parametrize(
    ("sender", "recipient", "overheard"),
    [(None, None, False), ("x", None, True), ("x", "me", False)],
)
def test_overheard(sender: str | None, recipient: str | None, overheard: bool) -> None:
    """What has a sender and no recipient may be for another peer."""
    desk = Desk()
    desk.overhear.return_value = None
    desk.take(sender=sender, recipient=recipient)
    called, other = desk.receive, desk.overhear
    if overheard:
        called, other = other, called
    called.assert_called_once_with(Cancel("1"), sender)
    other.assert_not_called()


def test_what_waits() -> None:
    """Requests that wait for one reply; a transport asks whether anything does."""
    desk = Desk()
    assert not desk.reactions.expects()
    known = {}
    for name in ("one", "all", "unsent"):
        known[name] = Call(name, None)
        known[name].sent = None if name == "unsent" else Envelope(Request(name, "call", ["f"]))
    known["all"].gather = True
    desk.core.conversation.calls = known
    assert desk.reactions.waiting() == [known["one"].sent]
    assert desk.reactions.expects()
