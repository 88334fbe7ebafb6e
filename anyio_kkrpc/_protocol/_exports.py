"""Functions that were passed to the other side: who may call them, and when they can be dropped.

A function is passed by calls. Each peer that runs such a call gets it, and says so when it won't
use it any more. A call may run twice, or on many peers, so a release is of one call by one peer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

from msgspec import UNSET

from ._records import CallbackCall, CallbackRelease
from ._state import CALLBACK, CallbackInput, CallbackState, advance


class _Pass:
    """A function as an argument of one call, which several peers may run.

    :ivar times: how often it is among the arguments
    :ivar open: whether further peers may still answer the call
    :ivar answered: whether one has
    :ivar holders: who has answered the call, or used the function
    :ivar released: how often each peer has released it
    :ivar before: `CallbackExport.dropped` as it was when the call was made
    """

    __slots__ = ("answered", "before", "holders", "open", "released", "times")

    def __init__(self, before: dict[str | None, int]) -> None:
        self.times = 0
        self.open = True
        self.answered = False
        self.holders: set[str | None] = set()
        self.released: dict[str | None, int] = {}
        self.before = before.copy() if before else {}

    def is_with(self, peer: str | None) -> bool:
        """Whether that peer may hold it still."""
        return self.released.get(peer, 0) < self.times

    @property
    def over(self) -> bool:
        """Whether nobody needs it any more: all that are known to have it have released it."""
        holders = self.holders or self.released
        return not self.open and bool(holders) and not any(map(self.is_with, holders))


class CallbackExport:
    """A function that was passed to the other side.

    :ivar passes: the calls that passed it and may use it still, by their ids
    :ivar dropped: how many invocations by each peer were thrown away
    """

    __slots__ = ("driver", "dropped", "function", "id", "passes", "state")

    def __init__(self, callback_id: str, function: Callable[..., Any]) -> None:
        self.id: str = callback_id
        self.function: Callable[..., Any] = function
        self.state: CallbackState = CallbackState.LIVE
        self.passes: dict[str, _Pass] = {}
        self.dropped: dict[str | None, int] = {}
        self.driver: Any = None

    def drop(self, peer: str | None) -> None:
        """Note that an invocation by a peer was thrown away."""
        self.dropped[peer] = self.dropped.get(peer, 0) + 1

    def call_for(self, peer: str | None) -> str | None:
        """Return the call by which a peer that doesn't say it has got the function."""
        found = (call_id for call_id, passed in self.passes.items() if passed.is_with(peer))
        return next(found, None)


class Exports:
    """The functions that the other side may call.

    :param new_id: makes ids
    :ivar table: the functions by their ids
    :ivar ignored: releases of what had been dropped already
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._by_function: dict[Any, CallbackExport] = {}
        self.table: dict[str, CallbackExport] = {}
        self.ignored: int = 0

    def add(self, function: Callable[..., Any], call_id: str) -> CallbackExport:
        """Note that a call passes a function; the same function keeps its id."""
        key = _identity(function)
        export = self._by_function.get(key)
        if export is None:
            export = CallbackExport(self._new_id(), function)
            self.table[export.id] = self._by_function[key] = export
        export.state = advance(CALLBACK, export.state, CallbackInput.EXPORT)
        passed = export.passes.get(call_id)
        if passed is None:
            passed = export.passes[call_id] = _Pass(export.dropped)
        passed.times += 1
        return export

    def use(self, record: CallbackCall, sender: str | None) -> CallbackExport | None:
        """Return the function that a peer calls, ``None`` if there is none such any more."""
        export = self.table.get(record.id)
        if export is not None:
            export.state = advance(CALLBACK, export.state, CallbackInput.CALL)
            if record.q is not UNSET and record.q in export.passes:
                export.passes[record.q].holders.add(sender)
        return export

    def note_answer(
        self, call_id: str, exports: Iterable[CallbackExport], sender: str | None
    ) -> int:
        """Note who has run a call: its functions stay until that peer has released them.

        :return: how many invocations by that peer were thrown away since the call was made
        """
        dropped = 0
        for export in exports:
            passed = export.passes.get(call_id)
            if passed is not None:
                passed.answered = True
                passed.holders.add(sender)
                if export.dropped:
                    dropped += export.dropped.get(sender, 0) - passed.before.get(sender, 0)
        return dropped

    def close(
        self, call_id: str, exports: Iterable[CallbackExport], *, given_up: bool = False
    ) -> None:
        """Note that no further answer is wanted: the call's functions go once they are released.

        :param given_up: whether its handler is told that nobody waits for it: if nobody has
            answered, they go at once
        """
        for export in exports:
            passed = export.passes.get(call_id)
            if passed is not None:
                passed.open = False
                if passed.over or (given_up and not passed.answered):
                    self._end_pass(export, call_id)

    def release(
        self, record: CallbackRelease, sender: str | None, open_calls: Container[str]
    ) -> list[CallbackExport]:
        """Take a release; return the functions that were dropped.

        :param open_calls: ids of calls that have no answer yet
        """
        calls = () if record.q is UNSET else record.q
        dropped, done = [], set()
        for index, callback_id in enumerate(record.ids):
            export = self.table.get(callback_id)
            if export is None or callback_id in done:
                self.ignored += 1
                continue
            if record.all is True:
                done.add(callback_id)
                # What waits for its reply may have passed it once more meanwhile.
                over = [call_id for call_id in export.passes if call_id not in open_calls]
            else:
                call_id = calls[index] if index < len(calls) else export.call_for(sender)
                if call_id is None:
                    done.add(callback_id)
                over = self._note_release(export, call_id, sender)
            if [call_id for call_id in over if self._end_pass(export, call_id)]:
                dropped.append(export)
        return dropped

    def lose(self) -> list[CallbackExport]:
        """Drop all, because the link is gone; return them."""
        lost = list(self.table.values())
        for export in lost:
            export.state = advance(CALLBACK, export.state, CallbackInput.LOSE)
        self.table.clear()
        self._by_function.clear()
        return lost

    def _note_release(
        self, export: CallbackExport, call_id: str | None, sender: str | None
    ) -> list[str]:
        passed = None if call_id is None else export.passes.get(call_id)
        if call_id is None or passed is None:
            self.ignored += 1  # of a run that came to its end after another one, say
            return []
        passed.released[sender] = passed.released.get(sender, 0) + 1
        return [call_id] if passed.over else []

    def _end_pass(self, export: CallbackExport, call_id: str) -> bool:
        """End one pass; return whether it was the last one, and the function was dropped."""
        if export.state is CallbackState.RELEASED:
            return False
        del export.passes[call_id]
        last = not export.passes
        step = CallbackInput.RELEASE_LAST if last else CallbackInput.RELEASE
        export.state = advance(CALLBACK, export.state, step)
        if last:
            del self.table[export.id]
            del self._by_function[_identity(export.function)]
        return last


def _identity(function: Callable[..., Any]) -> Any:
    """Return what tells functions apart: bound methods are equal, though made anew each time."""
    try:
        hash(function)
    except TypeError:
        return id(function)
    return function
