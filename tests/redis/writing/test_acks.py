"""Acknowledgements alone: nothing that has no reply stays acknowledged, whatever Redis refuses, and
whatever another server lacks.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anyio_kkrpc.redis._writing._acks import Acknowledgements
from anyio_kkrpc.redis._writing._ledger import Post

Entries: TypeAlias = dict[bytes, Post | None]


class Model(RuleBasedStateMachine):
    """A worker that has what it is told to write written, and a server that may refuse it.

    Commands and answers come in the order of writing, as Redis has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.acks = Acknowledgements()
        self.attempts: dict[bytes, int] = {}
        # What the server has: entries that are pending, and those whose reply is there.
        self.pending: set[bytes] = set()
        self.replied: set[bytes] = set()
        # What was executed, with what it has changed, so that it can be lost again.
        self.done: list[tuple[set[bytes], set[bytes], set[bytes]]] = []
        # Replies that wait to be written again, and entries that were given up.
        self.waiting: list[bytes] = []
        self.given_up: list[bytes] = []
        self.on_its_way: deque[tuple[str, Entries]] = deque()
        self.answers: deque[tuple[str, Entries, bool]] = deque()

    def write_reply(self, entry: bytes) -> None:
        self.acks.write(entry, self.reply(entry))
        self.on_its_way.append(("reply", {entry: None}))

    def reply(self, entry: bytes) -> Post:
        return Post(b"reply", answers=entry, attempt=self.attempts[entry])

    @rule(attempt=st.integers(1, 3))
    def finish(self, attempt: int) -> None:
        """A handler is done."""
        entry = b"%d-0" % (len(self.attempts) + 1)
        self.attempts[entry] = attempt
        self.pending.add(entry)
        self.write_reply(entry)

    @rule()
    def acknowledge(self) -> None:
        """The acknowledgements leave with the next write."""
        if entries := self.acks.take():
            self.on_its_way.append(("acknowledge", entries))

    @precondition(lambda self: self.waiting)
    @rule()
    def repeat(self) -> None:
        """The oldest reply that was refused is written again."""
        self.write_reply(self.waiting.pop(0))

    @rule()
    def bring_back(self) -> None:
        if entries := self.acks.to_bring_back():
            assert all(self.attempts[entry] == attempt for entry, attempt in entries)
            self.on_its_way.append(("bring back", dict.fromkeys(entry for entry, _ in entries)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """What is refused isn't tried again; another worker is to have it."""
        entry = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(entry)
        self.acks.abandon(entry)

    @precondition(lambda self: self.on_its_way)
    @rule(verdicts=st.lists(st.booleans(), min_size=1, max_size=4))
    def execute(self, verdicts: list[bool]) -> None:
        for taken in verdicts[: len(self.on_its_way)]:
            what, entries = self.on_its_way.popleft()
            # Nothing but memory that is used up is refused to one and not to the other.
            self.answers.append((what, entries, taken))
            if taken:
                self.run(what, entries)

    def run(self, what: str, entries: Entries) -> None:
        named = {*entries}
        added = named - self.pending if what == "bring back" else set()
        removed = named & self.pending if what == "acknowledge" else set()
        self.done.append((named - self.replied if what == "reply" else set(), added, removed))
        if what == "reply":
            self.replied.update(entries)
        elif what == "acknowledge":
            self.pending.difference_update(entries)
        else:
            self.pending.update(entries)

    @precondition(lambda self: self.answers)
    @rule(count=st.integers(1, 4))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.answers))):
            what, entries, taken = self.answers.popleft()
            acks = self.acks
            if what == "reply":
                (entry,) = entries
                if taken:
                    acks.answer(entry, self.reply(entry))
                else:
                    acks.be_careful(True)
                    acks.hold(entry, self.attempts[entry])
                    self.waiting.append(entry)
            elif what == "acknowledge":
                if taken:
                    acks.acknowledged(entries)
                else:
                    acks.be_careful(True)
                    acks.not_acknowledged(entries)
            elif taken:
                given_up = acks.brought_back(entries)
                assert all(self.attempts[entry] == attempt for entry, attempt in given_up)
                self.given_up += [entry for entry, _ in given_up]

    @precondition(lambda self: self.on_its_way or self.answers)
    @rule(arrive=st.integers(0, 4), lost=st.one_of(st.none(), st.integers(0, 4)))
    def cut(self, arrive: int, lost: int | None) -> None:
        """The connection is lost: some still arrives, and nobody is told.

        :param lost: how much of what was executed the next server lacks, ``None`` if it is the same
        """
        unknown = [(what, entries) for what, entries, _ in self.answers] + [*self.on_its_way]
        while arrive and self.on_its_way:
            self.run(*self.on_its_way.popleft())
            arrive -= 1
        self.on_its_way.clear()
        self.answers.clear()
        replies = [entry for what, entries in unknown if what == "reply" for entry in entries]
        others = [entries for what, entries in unknown if what == "acknowledge"]
        self.acks.lose(others, [(entry, self.attempts[entry]) for entry in replies])
        self.waiting += replies
        if lost is not None:
            self.fail_over(lost)

    def fail_over(self, lost: int) -> None:
        for _ in range(min(lost, len(self.done))):
            replied, added, removed = self.done.pop()
            self.replied -= replied
            self.pending -= added
            self.pending |= removed
        again = [reply.answers for reply in self.acks.doubt()]
        self.waiting[:0] = [entry for entry in again if entry is not None]
        # What is pending there, and not known here any more, runs once more.
        known = {*self.acks.unanswered, *self.acks.settled, *self.given_up}
        for entry in sorted(self.pending - known):
            self.write_reply(entry)

    @rule()
    def calm_down(self) -> None:
        """It is long past that something was refused."""
        if not self.acks.unanswered:
            self.acks.be_careful(False)

    @invariant()
    def what_waits_is_unanswered(self) -> None:
        assert set(self.waiting) <= set(self.acks.unanswered)

    @invariant()
    def what_is_given_up_stays_for_others(self) -> None:
        assert not set(self.given_up) & set(self.acks.unanswered)

    def teardown(self) -> None:
        """Redis takes all from now on: each entry has its reply and is done, or was given up."""
        for _ in range(6):
            while self.waiting:
                self.repeat()
            self.bring_back()
            self.acknowledge()
            self.execute([True] * len(self.on_its_way))
            self.read(len(self.answers))
        assert self.acks.to_bring_back() == []
        assert not self.acks.unanswered
        assert self.pending == set(self.given_up)
        assert self.replied | set(self.given_up) == set(self.attempts)


def test_any_pattern() -> None:
    run_state_machine_as_test(Model, settings=settings(max_examples=100, stateful_step_count=30))


def test_with_the_reply_while_nothing_is_amiss() -> None:
    acks = Acknowledgements()
    replies = {b"%d-0" % number: Post(b"", attempt=1) for number in (1, 2)}
    for entry, reply in replies.items():
        acks.write(entry, reply)
    assert acks.take() == replies
    assert acks.take() == {}
    assert not acks.acknowledged(replies)


def test_only_behind_its_reply_when_careful() -> None:
    acks = Acknowledgements()
    acks.be_careful(True)
    reply = Post(b"", attempt=2)
    acks.write(b"1-0", reply)
    assert acks.take() == {}
    assert acks.unanswered == {b"1-0": 2}
    acks.answer(b"1-0", reply)
    assert acks.take() == {b"1-0": reply}
    assert not acks.unanswered


def test_replies_are_kept_until_acknowledged() -> None:
    """Not without bound, though: what isn't kept isn't acknowledged where the reply may be lost."""
    acks = Acknowledgements()
    entries: Entries = {b"%d-0" % number: Post(b"x" * (1 << 20)) for number in range(20)}
    acks.settled.update(entries)
    acks.settled[b"one-way"] = None
    acks.not_acknowledged(acks.take())
    assert acks.take().keys() == {*entries, b"one-way"}
    acks.settled.update({**entries, b"one-way": None})
    acks.lose([acks.take()], [])
    kept = acks.doubt()
    assert kept == [*entries.values()][:15]
    assert acks.unanswered.keys() == {*[*entries][:15]}
    assert acks.take() == {b"one-way": None}
