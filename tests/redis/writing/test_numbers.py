"""Numbers of what was refused, or comes late, as readers of either version need them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc._protocol._records import Cancel, Reply
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._writing._commands import Commands
from anyio_kkrpc.redis._writing._ledger import Ledger, Post
from anyio_kkrpc.redis._writing._numbers import Numbers

from .pure import commands, dialects

OLD, NEW = "old", "new"


def parts() -> tuple[Commands, Ledger, Numbers]:
    """Return them as a writer has them that has heard of both versions."""
    speaks = dialects()
    hello = get_codec("json").encode(Cancel("hello"))
    speaks.decode([b"from", OLD.encode(), b"json", hello])
    speaks.decode([b"from", NEW.encode(), b"json", hello, b"v", b"1"])
    maker, ledger = commands(speaks=speaks), Ledger()
    return maker, ledger, Numbers(maker, ledger)


def waiting(maker: Commands, ledger: Ledger, recipient: str) -> Post:
    post = maker.make(Envelope(Reply("r", 1), None, recipient))
    assert post is not None
    ledger.hold(post)
    return post


def number(post: Post) -> tuple[bytes, int]:
    assert post.number is not None
    epoch, _, count = post.number.partition(b".")
    return epoch, int(count)


def test_a_number_that_is_left_out() -> None:
    """Nobody waits for it: what comes next counts anew."""
    maker, ledger, numbers = parts()
    first, second = (waiting(maker, ledger, NEW) for _ in range(2))
    numbers.leave_out(first)
    third = waiting(maker, ledger, NEW)
    assert number(first)[0] == number(second)[0] != number(third)[0]
    assert number(third)[1] == 1


def test_what_has_no_number() -> None:
    maker, _, numbers = parts()
    control = maker.make(Envelope(Cancel("1"), None, None))
    assert control is not None
    for post in (control, Post(b"", ids=[b"1-0"])):
        numbers.come_late(post)
        numbers.leave_out(post)
        assert numbers.late == set()


@settings(max_examples=40)
@given(
    recipients=st.lists(st.sampled_from([OLD, NEW]), min_size=1, max_size=6),
    refused=st.sets(st.integers(0, 5)),
    unknown=st.sets(st.integers(0, 5)),
)
def test_what_comes_late(recipients: list[str], refused: set[int], unknown: set[int]) -> None:
    """Peers of the version before get it under numbers above all that they have had, in its order.

    What may have arrived keeps its number, by which it is recognized, and so does all that is for
    peers that take what is late.
    """
    maker, ledger, numbers = parts()
    posts = [waiting(maker, ledger, recipient) for recipient in recipients]
    before = [number(post) for post in posts]
    for index, post in enumerate(posts):
        if index in refused:
            numbers.come_late(post)
        elif index in unknown:
            post.unknown = True
    late = {index for index in refused if index < len(posts) and recipients[index] == OLD}
    assert numbers.late == {posts[index] for index in late}
    numbers.raise_late()
    assert numbers.late == set()
    after = [number(post) for post in posts]
    anew = []
    for index, recipient in enumerate(recipients):
        if recipient == OLD and late and (index in late or not posts[index].unknown):
            anew.append(after[index])
        else:
            assert after[index] == before[index]
    assert [count for _, count in anew] == [*range(1, len(anew) + 1)]
    assert len({epoch for epoch, _ in anew} - {epoch for epoch, _ in before}) == bool(anew)
    assert len({epoch for epoch, _ in anew}) <= 1
