"""References as tables: what was given is there as long as somebody holds it, and not longer."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from anyio_kkrpc import OverloadedError
from anyio_kkrpc._references._given import (
    ANYBODY,
    Given,
    GivenTable,
    Passing,
    ReleasedReferenceError,
    UnknownReferenceError,
)
from anyio_kkrpc._references._held import Handle, HeldTable

PEERS = ["ada", "bob", None]


class Thing:
    """An object that can be told from others only by what it is."""


class References(RuleBasedStateMachine):
    """One owner and several holders; each way is in order, and takes its time."""

    uses = Bundle("uses")

    @initialize()
    def begin(self) -> None:
        self.given = GivenTable(most=4)
        self.held: dict[Any, HeldTable] = {peer: HeldTable() for peer in PEERS}
        self.out: dict[Any, deque[Given]] = {peer: deque() for peer in PEERS}
        self.back: dict[Any, deque[tuple[str, int]]] = {peer: deque() for peer in PEERS}
        self.things = [Thing() for _ in range(6)]
        self.ids: set[str] = set()
        self.handles: dict[Any, dict[int, Handle]] = {peer: {} for peer in PEERS}

    @rule(number=st.integers(0, 5), peer=st.sampled_from(PEERS), sent=st.booleans())
    def give(self, number: int, peer: Any, sent: bool) -> None:
        """An object is sent, or isn't sent after all."""
        before = len(self.given)
        try:
            given = self.given.give(self.things[number], peer)
        except OverloadedError:
            assert self.given.held_by(peer) == 4
            return
        assert given.referent.value is self.things[number]
        if not sent:
            self.given.take_back(given.id, peer)
            assert len(self.given) <= max(before, 1) if given.times else len(self.given) == before
            return
        self.ids.add(given.id)
        self.out[peer].append(given)

    @rule(target=uses, peer=st.sampled_from(PEERS))
    def arrive(self, peer: Any) -> tuple[Any, Handle, Any] | None:
        """What was sent comes; each proxy that is made of it is a use."""
        if not self.out[peer]:
            return None
        given = self.out[peer].popleft()
        return peer, self.received(peer, given), given.referent.value

    def received(self, peer: Any, given: Given) -> Handle:
        handle = self.held[peer].received(given.id, "owner")
        self.handles[peer][id(handle)] = handle
        return handle

    def held_now(self, peer: Any) -> list[Handle]:
        return [one for one in self.handles[peer].values() if self.held[peer].is_held(one)]

    @rule(use=consumes(uses))
    def drop(self, use: Any) -> None:
        """A proxy is collected."""
        if use is not None:
            peer, handle, _ = use
            for pairs in self.held[peer].dropped([handle]).values():
                self.back[peer].extend(pairs)

    @rule(use=uses)
    def release(self, use: Any) -> None:
        """A proxy is released while others of the same id may be there."""
        if use is not None:
            peer, handle, _ = use
            pair = self.held[peer].release(handle)
            if pair is not None:
                self.back[peer].append(pair)
            assert self.held[peer].release(handle) is None

    @rule(use=uses, stranger=st.sampled_from(PEERS))
    def pass_back(self, use: Any, stranger: Any) -> None:
        """Who holds it gets the object itself; who knows its id only doesn't."""
        if use is None:
            return
        peer, handle, value = use
        if self.held[peer].is_held(handle):
            assert self.given.find(handle.id, peer).value is value
        if stranger != peer:
            with pytest.raises(UnknownReferenceError):
                self.given.find(handle.id, stranger)
            assert not self.given.release(handle.id, stranger)

    @rule(peer=st.sampled_from(PEERS))
    def hear(self, peer: Any) -> None:
        """A release comes to the owner; a giving that it crosses isn't ended by it."""
        if self.back[peer]:
            reference_id, times = self.back[peer].popleft()
            on_the_way = [one for one in self.out[peer] if one.id == reference_id]
            ended = self.given.release(reference_id, peer, times)
            assert not (ended and on_the_way)
            if ended:
                with pytest.raises(ReleasedReferenceError):
                    self.given.find(reference_id, peer)

    @rule(peer=st.sampled_from(PEERS))
    def gone(self, peer: Any) -> None:
        """A holder is gone: with it goes what it had and what was on its way."""
        self.given.lose_peer(peer)
        self.held[peer].lose_owner("owner")
        self.out[peer].clear()
        self.back[peer].clear()
        assert self.given.held_by(peer) == 0

    @invariant()
    def who_holds_it_has_it(self) -> None:
        for peer, held in getattr(self, "held", {}).items():
            assert len(held) == len(self.held_now(peer))
            for handle in self.held_now(peer):
                self.given.find(handle.id, peer)
            for given in self.out[peer]:
                assert self.given.find(given.id, peer) is given.referent

    def teardown(self) -> None:
        """Once all is dropped and heard, nothing is left on either side."""
        for peer in getattr(self, "held", {}):
            while self.out[peer]:
                given = self.out[peer].popleft()
                self.received(peer, given)
            for handle in self.held_now(peer):
                pair = self.held[peer].release(handle)
                assert pair is not None
                self.back[peer].append(pair)
            while self.back[peer]:
                self.given.release(*self.back[peer][0][:1], peer, self.back[peer].popleft()[1])
            assert len(self.held[peer]) == 0
        assert len(getattr(self, "given", ())) == 0


class Calls(RuleBasedStateMachine):
    """One who calls and passes objects, and several who may run it; each way is in order."""

    calls = Bundle("calls")

    @initialize()
    def begin(self) -> None:
        self.table = GivenTable(most=6)
        self.held: dict[Any, HeldTable] = {peer: HeldTable() for peer in PEERS}
        # What peers have sent, each to be called.
        self.sent: dict[Any, deque[Any]] = {peer: deque() for peer in PEERS}
        self.handles: list[tuple[Any, Handle, Any]] = []
        self.open: list[Passing] = []

    @rule(target=calls, to=st.sampled_from([*PEERS, ANYBODY]), twice=st.booleans())
    def call(self, to: Any, twice: bool) -> Passing | None:
        """A call passes an object, perhaps twice."""
        passing, thing = Passing(to), Thing()
        try:
            for _ in range(1 + twice):
                self.table.pass_on(passing, thing)
        except OverloadedError:
            assert sum(len(one.objects) for one in self.open) == 6
            return None
        self.open.append(passing)
        return passing

    @rule(call=calls, peer=st.sampled_from(PEERS), answers=st.booleans())
    def run_it(self, call: Passing | None, peer: Any, answers: bool) -> None:
        """A peer gets it, also one that had it before; not all of them answer."""
        if call is None or call.to not in (ANYBODY, peer):
            return
        for passed in call.objects.values():
            for _ in range(passed.times):
                handle = self.held[peer].received(passed.id, "owner")
                self.handles.append((peer, handle, passed.referent.value))
        if answers:
            self.sent[peer].append(lambda: self.table.answered(call, peer))

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        """A peer uses what it has; it is the object, or is gone with the call."""
        if self.handles:
            peer, handle, value = data.draw(st.sampled_from(self.handles))
            self.sent[peer].append(lambda: self.used(peer, handle.id, value))

    def used(self, peer: Any, reference_id: str, value: Any) -> None:
        try:
            assert self.table.use(reference_id, peer).value is value
        except UnknownReferenceError:
            assert not any(
                value is one.referent.value for each in self.open for one in each.objects.values()
            )

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A peer needs something no more."""
        if self.handles:
            drawn = data.draw(st.integers(0, len(self.handles) - 1))
            self.dropped(*self.handles.pop(drawn))

    def dropped(self, peer: Any, handle: Handle, value: Any) -> None:
        for pairs in self.held[peer].dropped([handle]).values():
            for reference_id, times in pairs:
                self.sent[peer].append(lambda: self.table.release(reference_id, peer, times))

    @rule(peer=st.sampled_from(PEERS))
    def hear(self, peer: Any) -> None:
        if self.sent[peer]:
            self.sent[peer].popleft()()

    @rule(data=st.data())
    def over(self, data: st.DataObject) -> None:
        """The call is over; what was passed is of those who have used it or answered."""
        if self.open:
            call = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            wanted = {p for one in call.objects.values() for p, has in one.users.items() if has}
            full = {peer for peer in PEERS if self.table.held_by(peer) >= 6}
            assert self.table.end(call) == wanted - full

    @rule(peer=st.sampled_from(PEERS))
    def gone(self, peer: Any) -> None:
        self.table.lose_peer(peer)
        self.held[peer].lose_owner("owner")
        self.sent[peer].clear()
        self.handles = [one for one in self.handles if one[0] != peer]

    @invariant()
    def nobody_has_too_much(self) -> None:
        for peer in PEERS if hasattr(self, "table") else ():
            assert self.table.held_by(peer) <= 6

    def teardown(self) -> None:
        """Once all calls are over, and all is dropped and heard, nothing is left."""
        if not hasattr(self, "table"):
            return
        while self.open:
            self.table.end(self.open.pop())
        while self.handles:
            self.dropped(*self.handles.pop())
        for peer in PEERS:
            while self.sent[peer]:
                self.sent[peer].popleft()()
            assert len(self.held[peer]) == self.table.held_by(peer) == 0
        assert len(self.table) == 0


for machine in (References, Calls):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReferences = References.TestCase
TestCalls = Calls.TestCase


def test_ten_thousand() -> None:
    """They leave nothing behind, whatever the order in which they go."""
    given, held = GivenTable(), HeldTable()
    things = [Thing() for _ in range(10_000)]
    handles = [held.received(given.give(one, "a").id, None) for one in things]
    with pytest.raises(OverloadedError):
        given.give(Thing(), "a")
    given.take_back(given.give(Thing(), "b").id, "b")
    for pairs in held.dropped(reversed(handles)).values():
        for reference_id, times in pairs:
            assert given.release(reference_id, "a", times)
    assert len(given) == len(held) == 0


def test_ids() -> None:
    """They are long, and tell nothing of each other; the same object has one of each peer."""
    table, thing = GivenTable(), Thing()
    ids = {table.give(thing, peer).id for peer in ("a", "b", "a")}
    assert len(ids) == 2
    assert all(len(one) >= 24 for one in ids)
    assert table.lose() == [thing, thing]
    assert len(table) == 0


def test_release_as_kkrpc_means_it() -> None:
    """One ends it, however often it was given; the next giving has a new id."""
    table, thing = GivenTable(), Thing()
    first = table.give(thing, "a").id
    assert table.give(thing, "a").id == first
    assert table.release(first, "a")
    assert not table.release(first, "a")
    with pytest.raises(ReleasedReferenceError):
        table.find(first, "a")
    assert table.give(thing, "a").id != first
    for _ in range(1025):
        table.release(table.give(Thing(), "a").id, "a")
    with pytest.raises(UnknownReferenceError) as failed:
        table.find(first, "a")
    assert type(failed.value) is UnknownReferenceError
