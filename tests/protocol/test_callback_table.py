"""Functions that are called here and elsewhere, alone: what comes, and what is told of it."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from msgspec import UNSET

from anyio_kkrpc import ProtocolError
from anyio_kkrpc._protocol._ahead import Ahead
from anyio_kkrpc._protocol._callback_table import Callbacks
from anyio_kkrpc._protocol._dependencies import Dependencies
from anyio_kkrpc._protocol._events import (
    Answer,
    CallbackInvoked,
    CallbackRan,
    CallbacksReleased,
)
from anyio_kkrpc._protocol._records import CallbackCall, CallbackProgress, CallbackRelease, Request

OWNER = "owner"


class Table:
    """One side's table, and which peers it needs."""

    def __init__(self) -> None:
        ids = count(1)
        self.needs: list[tuple[str | None, str, bool]] = []
        dependencies = Dependencies(lambda *need: self.needs.append(need))
        self.callbacks = Callbacks(lambda: f"i{next(ids)}", dependencies, ())

    def ahead(self, window: int = 4) -> Ahead:
        found = self.callbacks.begin(Request("r", "call", ["f"], cw=window), OWNER)
        assert found is not None
        return found

    def fill(self, ahead: Ahead, number: int) -> list[CallbackCall]:
        """Call the function so often; return those calls that ask to be told when they ran."""
        records = [self.callbacks.call("cb", [n], None) for n in range(number)]
        for record in records:
            self.callbacks.send(ahead, record, 10)
        return [record for record in records if record.i is not UNSET]


def test_owners_that_do_not_count() -> None:
    """An older peer doesn't tell what has run, and so nothing is counted."""
    assert Table().callbacks.begin(Request("r", "call", ["f"]), OWNER) is None


def test_record() -> None:
    table = Table()
    record = table.callbacks.call("cb", [1, "a"], {"k": None}, "r")
    assert (record.id, record.a, record.k, record.q) == ("cb", [1, "a"], {"k": None}, "r")
    for bad in (print, [].append):
        with pytest.raises(TypeError, match="callback takes values"):
            table.callbacks.call("cb", [bad], None)
        with pytest.raises(TypeError, match="callback takes values"):
            table.callbacks.call("cb", [], {"k": bad})


def test_asks_and_is_told() -> None:
    """As long as an answer is due its owner is needed."""
    table = Table()
    ahead = table.ahead()
    asking = table.fill(ahead, 4)
    assert asking
    assert table.needs == [(OWNER, "reader", True)]
    assert table.callbacks.called_of(OWNER) == [ahead]
    assert table.callbacks.called_of("x") == []
    number = asking[-1].i
    assert isinstance(number, int)
    progress = CallbackProgress(ahead.id, number)
    assert table.callbacks.receive_progress(progress, "x") is None
    assert table.callbacks.ignored == 1
    event = table.callbacks.receive_progress(progress, OWNER)
    assert event == CallbackRan(ahead, False)
    table.callbacks.end(ahead)
    table.callbacks.end(ahead)
    assert table.needs == [(OWNER, "reader", True), (OWNER, "reader", False)]
    assert table.callbacks.receive_progress(progress, OWNER) is None


def test_lost() -> None:
    table = Table()
    ahead = table.ahead()
    table.fill(ahead, 4)
    assert table.callbacks.lose() == [ahead]
    assert table.callbacks.lose() == []
    assert [need[2] for need in table.needs] == [True, False]


@pytest.mark.parametrize("asked", [False, True])
def test_called_when_it_is_gone(asked: bool) -> None:
    """Who asks is told; a late call is no error."""
    table = Table()
    record = CallbackCall("cb", [1])
    if asked:
        record.f, record.i = "ahead", 3
    event = table.callbacks.receive_call(record, "x")
    gone = Answer(CallbackProgress("ahead", 3, gone=True), "x")
    assert event == (gone if asked else None)
    assert table.callbacks.ignored == 1


def test_called() -> None:
    table = Table()
    export = table.callbacks.exports.add(print, "c")
    event = table.callbacks.receive_call(CallbackCall(export.id, [1], k={"k": 2}), "x")
    assert event == CallbackInvoked(export, [1], {"k": 2}, "x", None)
    record = CallbackCall(export.id, [], f="ahead", i=7)
    event = table.callbacks.receive_call(record, "x")
    assert isinstance(event, CallbackInvoked)
    assert event.progress == CallbackProgress("ahead", 7)


@pytest.mark.parametrize("mark", ["callback", "stream"])
def test_called_with_more_than_values(mark: str) -> None:
    table = Table()
    export = table.callbacks.exports.add(print, "c")
    kind: dict[str, Any] = {"__kkrpc_next_arg__": "callback", "id": "f"}
    if mark == "stream":
        stream = {"__kkrpc_next_stream__": "async-iterable", "id": "s"}
        kind = {"__kkrpc_next_arg__": "value", "v": stream}
    with pytest.raises(ProtocolError, match="callback was called with"):
        table.callbacks.receive_call(CallbackCall(export.id, [kind]), "x")


def test_released() -> None:
    table = Table()
    export = table.callbacks.exports.add(print, "c")
    record = CallbackRelease([export.id], all=True)
    assert table.callbacks.receive_release(record, "x") == CallbacksReleased([export])
    assert table.callbacks.receive_release(record, "x") is None
