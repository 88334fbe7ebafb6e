"""Functions that were passed to other peers, alone: how long they stay, and whose they are."""

from __future__ import annotations

from itertools import count

import pytest

from anyio_kkrpc._protocol._exports import Exports
from anyio_kkrpc._protocol._records import CallbackCall, CallbackRelease
from anyio_kkrpc._protocol._state import CallbackState


def one() -> None:
    raise NotImplementedError


def two() -> None:
    raise NotImplementedError


def make() -> Exports:
    ids = count(1)
    return Exports(lambda: f"f{next(ids)}")


def release(exports: Exports, callback_id: str, call: str, sender: str, *open_calls: str) -> bool:
    """Return whether a function was dropped by the release."""
    return bool(exports.release(CallbackRelease([callback_id], q=[call]), sender, open_calls))


def test_one_id_for_one_function() -> None:
    """Bound methods are made anew each time, and are one function; what has no hash is itself."""

    class Api(list[int]):
        def method(self) -> None:
            raise NotImplementedError

    exports, api, other = make(), Api(), Api()
    assert exports.add(one, "a") is exports.add(one, "b")
    assert exports.add(two, "a") is not exports.add(one, "a")
    kept = api.method  # its identity is what tells it apart
    assert exports.add(kept, "a") is exports.add(kept, "b")
    assert exports.add(kept, "a") is not exports.add(other.method, "a")
    assert set(exports.table) == {"f1", "f2", "f3", "f4"}


def test_goes_when_all_that_have_it_released_it() -> None:
    """Each run of a call releases as often as the function was passed; the last one drops it."""
    exports = make()
    export = exports.add(one, "c")
    exports.add(one, "c")
    for worker in ("x", "y"):
        exports.note_answer("c", [export], worker)
        assert not release(exports, "f1", "c", worker)
    exports.close("c", [export])
    assert not release(exports, "f1", "c", "x")
    assert export.state is CallbackState.LIVE
    assert release(exports, "f1", "c", "y")
    assert exports.table == {}
    assert export.state is CallbackState.RELEASED
    assert not release(exports, "f1", "c", "y")
    assert exports.ignored == 1
    # Passed once more it is another one.
    assert exports.add(one, "d").id == "f2"


def test_stays_for_calls_that_pass_it_still() -> None:
    exports = make()
    export = exports.add(one, "c")
    exports.add(one, "d")
    exports.note_answer("c", [export], "x")
    exports.close("c", [export])
    assert not release(exports, "f1", "c", "x")
    assert list(export.passes) == ["d"]
    # A release that says nothing of a call is of one that the peer has still.
    assert not exports.release(CallbackRelease(["f1"]), "x", ())
    assert exports.table == {"f1": export}  # others may run the call still
    exports.close("d", [export])
    assert exports.table == {}


@pytest.mark.parametrize("answered", [False, True])
def test_given_up(answered: bool) -> None:
    """A call that nobody waits for any more ends its functions, unless its worker has them still."""
    exports = make()
    export = exports.add(one, "c")
    if answered:
        exports.note_answer("c", [export], "x")
    exports.close("c", [export], given_up=True)
    assert bool(exports.table) is answered


def test_who_uses_it_has_it() -> None:
    """In a broadcast all that use a function have to release it."""
    exports = make()
    export = exports.add(one, "c")
    for peer in ("x", "y"):
        assert exports.use(CallbackCall("f1", [], q="c"), peer) is export
    exports.close("c", [export])
    assert not release(exports, "f1", "c", "x")
    assert release(exports, "f1", "c", "y")
    assert exports.use(CallbackCall("f1", []), "x") is None


def test_all_at_once() -> None:
    """kkrpc 2 releases once for all; what waits for its reply may have passed it once more."""
    exports = make()
    export = exports.add(one, "c")
    exports.add(one, "d")
    record = CallbackRelease(["f1", "f1", "f9"], all=True)
    assert exports.release(record, "x", {"d"}) == []
    assert list(export.passes) == ["d"]
    assert exports.release(record, "x", ()) == [export]
    assert exports.ignored == 4


def test_dropped_invocations_are_counted_for_each_call() -> None:
    """A caller learns of those of its own call, by the peer that has answered it."""
    exports = make()
    export = exports.add(one, "c")
    export.drop("x")
    exports.add(one, "d")
    for peer in ("x", "x", "y"):
        export.drop(peer)
    assert exports.note_answer("c", [export], "x") == 3
    assert exports.note_answer("d", [export], "x") == 2
    assert exports.note_answer("d", [export], "z") == 0


def test_lost() -> None:
    exports = make()
    export = exports.add(one, "c")
    assert exports.lose() == [export]
    assert (exports.table, export.state) == ({}, CallbackState.RELEASED)
    assert exports.lose() == []
