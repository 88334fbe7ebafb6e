"""The ledger alone, against a model: any pattern of answers, refusals and lost connections."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anyio_kkrpc.redis._writing._ledger import Ledger, Phase, Post


class Model(RuleBasedStateMachine):
    """A server that executes, refuses or never sees what is written to it, and a user of the ledger.

    ``packed`` is a post's number. Its state is one of: it waits here, is on its way, has executed (as
    far as the server knows) and is done with (as far as the ledger knows).
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.posts: list[Post] = []
        self.on_its_way: deque[Post] = deque()
        self.answers: deque[tuple[Post, bool]] = deque()
        self.executed: list[Post] = []
        self.finished: set[int] = set()
        self.dropped: set[int] = set()
        # Beside the order: acknowledgements, say.
        self.beside: list[Post] = []

    def number(self, post: Post) -> int:
        return int(post.packed)

    def write(self, post: Post) -> None:
        """Nothing is written while something before it waits: only what is on its way is behind."""
        if post.ids is None:
            waiting = {self.number(other) for other in self.ledger.waiting()}
            assert not [number for number in waiting if number < self.number(post)]
        self.on_its_way.append(post)

    def finish(self, post: Post, taken: bool) -> None:
        assert self.ledger.written.popleft() is post
        if taken:
            if post.ids is None:
                self.finished.add(self.number(post))
            self.ledger.done(post)
        else:
            self.ledger.refuse(post)

    @rule()
    def add(self) -> None:
        post = Post(b"%d" % len(self.posts))
        self.posts.append(post)
        if self.ledger.flowing:
            self.ledger.written.append(post)
            self.write(post)
        else:
            self.ledger.hold(post)

    @precondition(lambda self: self.ledger.phase not in (Phase.CLOSED, Phase.STOPPED))
    @rule()
    def add_beside(self) -> None:
        post = Post(b"", ids=[b"1-0"])
        self.beside.append(post)
        self.ledger.write(post)
        self.write(post)

    @precondition(lambda self: self.ledger.phase is Phase.CLOSED)
    @rule()
    def connect(self) -> None:
        self.ledger.open()
        self.ledger.flow()

    @rule(limit=st.integers(0, 5))
    def feed(self, limit: int) -> None:
        """The connection has room for some of what waits."""
        for _ in range(limit):
            post = self.ledger.next()
            if post is None:
                self.ledger.flow()
                return
            self.ledger.write(post)
            self.write(post)

    @rule()
    def crowd(self) -> None:
        self.ledger.crowd()

    @precondition(lambda self: self.on_its_way)
    @rule(verdicts=st.lists(st.booleans(), min_size=1, max_size=6))
    def execute(self, verdicts: list[bool]) -> None:
        """The server takes or refuses what comes, one after the other."""
        for taken in verdicts[: len(self.on_its_way)]:
            post = self.on_its_way.popleft()
            self.answers.append((post, taken))
            if taken and post.ids is None:
                self.executed.append(post)

    @precondition(lambda self: self.answers)
    @rule(count=st.integers(1, 6))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.answers))):
            self.finish(*self.answers.popleft())

    @precondition(lambda self: self.ledger.drained)
    @rule()
    def probe(self) -> None:
        self.ledger.probe()

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """What waits and can't have arrived is taken back."""
        if not self.posts:
            return
        post = data.draw(st.sampled_from(self.posts))
        may_be_there = self.executed.count(post) > 0
        if self.ledger.drop(post):
            assert not may_be_there
            self.dropped.add(self.number(post))

    @precondition(lambda self: self.ledger.phase is not Phase.CLOSED)
    @rule(arrive=st.integers(0, 6))
    def cut(self, arrive: int) -> None:
        """The connection is lost: some of what was on its way still arrives, and nobody is told."""
        while arrive and self.on_its_way:
            post = self.on_its_way.popleft()
            if post.ids is None:
                self.executed.append(post)
            arrive -= 1
        self.on_its_way.clear()
        self.answers.clear()
        once = self.ledger.lost()
        assert all(post in self.beside for post in once)

    @precondition(lambda self: self.ledger.phase is Phase.CLOSED)
    @rule()
    def look_up(self) -> None:
        """What is there is known to be there; the rest isn't."""
        unknown = [post for post in self.ledger.waiting() if post.unknown]
        self.ledger.remove(post for post in unknown if post in self.executed)
        for post in unknown:
            post.unknown = False
            if post in self.executed:
                self.finished.add(self.number(post))

    @invariant()
    def each_is_in_one_place(self) -> None:
        waiting = [self.number(post) for post in self.ledger.waiting()]
        written = [self.number(post) for post in self.ledger.written if post.ids is None]
        assert waiting == sorted(waiting)
        places = Counter([*waiting, *written, *self.finished, *self.dropped])
        assert places == Counter(range(len(self.posts)))
        assert self.ledger.weight == sum(len(b"%d" % number) for number in waiting)

    @invariant()
    def what_is_done_with_was_executed(self) -> None:
        assert self.finished <= {self.number(post) for post in self.executed}

    def teardown(self) -> None:
        """The server takes everything from now on: all is executed, and nothing is left."""
        ledger = self.ledger
        if ledger.phase is Phase.CLOSED:
            self.connect()
        for _ in range(10):
            while self.on_its_way or self.answers:
                self.execute([True] * len(self.on_its_way))
                self.read(len(self.answers))
            if ledger.drained:
                ledger.probe()
            self.feed(1_000_000)
        assert ledger.flowing
        assert not ledger.written
        assert ledger.waiting() == []
        assert self.finished | self.dropped == set(range(len(self.posts)))


def test_any_pattern() -> None:
    run_state_machine_as_test(Model, settings=settings(max_examples=300, stateful_step_count=40))


def refused(ledger: Ledger, *posts: Post) -> None:
    for post in posts:
        assert ledger.written.popleft() is post
        ledger.refuse(post)


def test_goes_back_to_the_first_refused() -> None:
    """Two of three are refused: these are written again, in order, one of them as a probe."""
    ledger = Ledger()
    ledger.open()
    ledger.flow()
    first, second, third, new = (Post(b"%d" % n) for n in range(4))
    for post in (first, second, third):
        ledger.write(post)
    refused(ledger, first)
    assert ledger.phase is Phase.STOPPED
    assert not ledger.drained
    ledger.hold(new)
    refused(ledger, second)
    ledger.done(ledger.written.popleft())
    assert ledger.drained
    assert ledger.next() is None
    ledger.probe()
    probe = ledger.next()
    assert probe is first
    ledger.write(probe)
    assert ledger.next() is None
    assert ledger.done(ledger.written.popleft())
    assert [ledger.next(), ledger.next(), ledger.next()] == [second, new, None]
    ledger.flow()
    assert ledger.flowing


def test_what_was_taken_back_is_not_kept() -> None:
    """However long nothing can be written, and however much comes and is taken back meanwhile."""
    ledger = Ledger()
    first, replaced, instead = Post(b"first"), Post(b"replaced"), Post(b"instead")
    ledger.hold(first)
    ledger.hold(replaced)
    for number in range(1000):
        post = Post(b"%d" % number)
        ledger.hold(post)
        if number == 500:
            assert ledger.replace(replaced, instead)
        assert ledger.drop(post)
    assert ledger.count == 2
    assert ledger.weight == len(b"first instead") - 1
    assert len(ledger._waiting) <= 102
    assert ledger.waiting() == [first, instead]
    ledger.open()
    assert [ledger.next(), ledger.next(), ledger.next()] == [first, instead, None]
    assert (ledger.count, ledger.weight) == (0, 0)
