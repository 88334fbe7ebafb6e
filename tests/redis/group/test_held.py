"""What a worker holds and what follows from it, without Redis, a clock or an event loop."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from anyio_kkrpc.redis._group._held import Held, HeldEntry, Standing

IDLE = 10.0
IDS = st.sampled_from([b"1-0", b"2-0", b"3-0"])


def take(held: Held, entry_id: bytes, sure_until: float, attempt: int = 1) -> HeldEntry:
    """Take an entry as `Worker` does, and return what stands for it."""
    if entry_id in held.entries:
        held.regain(entry_id, sure_until)
    else:
        held.entries[entry_id] = HeldEntry(entry_id, attempt, sure_until)
    return held.entries[entry_id]


def test_standing() -> None:
    held = Held(IDLE)
    entry = take(held, b"1-0", 5.0)
    assert held.standing(entry, 4.9) is Standing.SURE
    assert held.standing(entry, 5.0) is Standing.UNSURE
    entry.start()
    assert held.standing(entry, 4.9) is Standing.NO
    other = take(held, b"2-0", 5.0)
    held.end()
    assert held.standing(other, 4.9) is Standing.NO


@pytest.mark.parametrize("begun", [False, True])
def test_released(begun: bool) -> None:
    """What was not started here doesn't count as delivered; what runs goes back at the end only."""
    held = Held(IDLE)
    waits, runs = take(held, b"1-0", 5.0, 2), take(held, b"2-0", 5.0, 3)
    runs.start()
    held.release(begun=begun)
    assert held.dropped == ({b"1-0": 1, b"2-0": 3} if begun else {b"1-0": 1})
    assert list(held.entries) == ([] if begun else [b"2-0"])
    assert held.standing(waits, 0.0) is Standing.NO
    assert waits.sure_until < 0


def test_handed_over_meanwhile() -> None:
    """What is dropped once more while Redis takes it back is handed back once more."""
    held = Held(IDLE)
    held.give_back({b"1-0": 1, b"2-0": 1})
    entries = list(held.dropped.items())
    held.give_back({b"2-0": 2})
    held.handed_over(entries, 1)
    assert held.dropped == {b"2-0": 2}
    assert held.handed_back == 1


def test_group_made_anew() -> None:
    """Nobody else has what is held; it isn't in Redis' list, and so isn't to be kept."""
    held = Held(IDLE)
    waits, runs = take(held, b"1-0", 5.0), take(held, b"2-0", 5.0)
    runs.start()
    held.own_all()
    assert held.standing(waits, 1e9) is Standing.SURE
    assert list(held.to_keep()) == [b"2-0"]


def test_what_redis_answers() -> None:
    """What is lost isn't begun, and runs on if it runs; what came again meanwhile is another one."""
    held = Held(IDLE)
    kept, lost, runs, settled, came_again, gained = (
        take(held, b"%d-0" % number, 5.0) for number in range(6)
    )
    runs.start()
    asked = held.to_keep()
    del held.entries[settled.id]
    held.drop(came_again)
    again = take(held, came_again.id, 7.0)
    held.regain(gained.id, 30.0)
    everything_else = [lost.id, runs.id, settled.id, came_again.id]
    assert held.keep(asked, everything_else, 20.0) == [lost, runs]
    assert (kept.sure_until, gained.sure_until, again.sure_until) == (20.0, 30.0, 7.0)
    assert held.entries == {one.id: one for one in (kept, runs, gained, again)}
    assert runs.lost
    assert held.lost == 2
    assert held.standing(came_again, 6.0) is Standing.NO
    assert runs.id not in held.to_keep()
    held.regain(runs.id, 40.0)
    assert runs.id in held.to_keep()
    assert runs.started


PAUSES = st.sampled_from([0.0, 0.0, 3.0, 9.5, 20.0])


class HoldingEntries(RuleBasedStateMachine):
    """Workers that hold entries, as this one sees it: it begins none that isn't surely its own.

    :ivar owned: ids that Redis knows to be this worker's, with when that ends unless it is kept
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = Held(IDLE)
        self.now = 100.0
        self.owned: dict[bytes, float] = {}
        self.queue: list[HeldEntry] = []
        self.running: list[HeldEntry] = []
        self.asked: tuple[float, dict[bytes, HeldEntry]] | None = None
        self.answers: set[bytes] | None = None

    def wait(self, seconds: float) -> None:
        """Let time pass: others get what wasn't kept."""
        self.now += seconds
        self.owned = {key: until for key, until in self.owned.items() if until > self.now}

    @initialize()
    def begin(self) -> None:
        for entry_id in (b"1-0", b"2-0"):
            self.read(0.0, entry_id)

    @rule(pause=PAUSES, entry_id=IDS)
    def read(self, pause: float, entry_id: bytes) -> None:
        """It is delivered here, maybe once more: others had it in between."""
        self.wait(pause)
        if entry_id in self.owned or entry_id in self.held.dropped:
            return
        self.owned[entry_id] = self.now + IDLE
        known = self.held.entries.get(entry_id)
        entry = take(self.held, entry_id, self.now + self.held.sure_for)
        if known is None:
            self.queue.append(entry)

    @precondition(lambda self: self.queue)
    @rule(pause=PAUSES)
    def receive(self, pause: float) -> None:
        self.wait(pause)
        entry = self.queue.pop(0)
        standing = self.held.standing(entry, self.now)
        # As the transport asks, without a look at what is held.
        assert (self.now < entry.sure_until) is (standing is Standing.SURE)
        if standing is Standing.SURE:
            assert entry.id in self.owned
            entry.start()
            self.running.append(entry)
        elif standing is Standing.UNSURE:
            self.held.drop(entry)

    @precondition(lambda self: self.running)
    @rule()
    def settle(self) -> None:
        entry = self.running.pop(0)
        assert self.held.entries.pop(entry.id) is entry
        self.owned.pop(entry.id, None)

    @precondition(lambda self: self.asked is None)
    @rule(pause=PAUSES, at_once=st.booleans())
    def ask(self, pause: float, at_once: bool) -> None:
        self.wait(pause)
        self.asked = self.now, self.held.to_keep()
        if at_once:
            self.serve(0.0)

    @precondition(lambda self: self.asked is not None and self.answers is None)
    @rule(pause=PAUSES)
    def serve(self, pause: float) -> None:
        """Redis gets the question, and answers."""
        self.wait(pause)
        assert self.asked is not None
        known = self.asked[1]
        self.answers = {key for key in known if key not in self.owned}
        for key in known.keys() - self.answers:
            self.owned[key] = self.now + IDLE

    @precondition(lambda self: self.answers is not None)
    @rule(pause=PAUSES)
    def answer(self, pause: float) -> None:
        self.wait(pause)
        assert self.asked is not None
        assert self.answers is not None
        (asked_at, known), lost, self.asked, self.answers = self.asked, self.answers, None, None
        gone = self.held.keep(known, lost, asked_at + self.held.sure_for)
        assert all(known[entry.id] is entry for entry in gone)
        assert {entry.id for entry in gone} <= lost

    @rule()
    def hand_back(self) -> None:
        entries = list(self.held.dropped.items())
        self.held.handed_over(entries, len(entries))
        for key, _ in entries:
            self.owned.pop(key, None)

    @invariant()
    def each_is_in_one_place(self) -> None:
        held = self.held
        assert not held.entries.keys() & held.dropped.keys()
        waits = Counter(entry.id for entry in self.queue if held.entries.get(entry.id) is entry)
        runs = Counter(entry.id for entry in self.running)
        assert waits + runs == Counter(held.entries.keys())


TestHoldingEntries = HoldingEntries.TestCase
TestHoldingEntries.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
