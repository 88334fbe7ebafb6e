"""What is to be done with what was taken over: run, acknowledged, or answered."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc._protocol._records import Bye, Reply, Request
from anyio_kkrpc.redis._group._claims import Claims, Taken
from anyio_kkrpc.redis._group._findings import Died, sort_out
from anyio_kkrpc.redis._group._held import HeldEntry
from anyio_kkrpc.redis.dialects import Entry
from anyio_kkrpc.redis.dialects._keyed import Keyed

ENTRIES = {
    b"1-0": Entry(Request("held", "call", ["f"]), "a", 1),
    b"2-0": Entry(Request("new", "call", ["f"]), "a", 1),
    b"3-0": None,
    b"4-0": Entry(Request("nobody waits", "call", ["f"], o=True), "a", 1),
    b"5-0": Entry(Bye(), "a", 1),
}
HELD = {b"1-0": HeldEntry(b"1-0", 1, 50.0, "a", False, Request("held", "call", ["f"]))}


def found(*ids: bytes) -> list[Taken]:
    return [Taken(entry_id, 3, []) for entry_id in ids]


def decode(item: Taken) -> Any:
    return ENTRIES[item.id]


def test_taken_over() -> None:
    """What is held already isn't taken twice; what can't be read is done with."""
    claims = Claims(found(*ENTRIES), [], [])
    done = sort_out(claims, HELD, decode)
    assert done.regained == [b"1-0"]
    assert [item.id for item, _ in done.taken] == [b"2-0", b"4-0", b"5-0"]
    assert [entry for _, entry in done.taken] == [ENTRIES[item.id] for item, _ in done.taken]
    assert done.unreadable == [b"3-0"]
    assert done.answers == []


@pytest.mark.parametrize(("sender", "name"), [("b", "held"), ("a", "new")])
def test_another_request_under_the_id(sender: str, name: str) -> None:
    """Another server has given it to another one: what is held isn't that."""
    entry = Entry(Request(name, "call", ["f"]), sender, 1)
    done = sort_out(Claims(found(b"1-0"), [], []), HELD, lambda item: entry)
    assert done.regained == []
    assert [(item.id, one) for item, one in done.taken] == [(b"1-0", entry)]


def test_held_and_no_longer_readable() -> None:
    done = sort_out(Claims(found(b"1-0"), [], []), HELD, lambda item: None)
    assert (done.regained, done.unreadable) == ([b"1-0"], [])


@pytest.mark.parametrize("dead", [True, False])
def test_given_up(dead: bool) -> None:
    """Who waits for a request is told what became of it; nobody waits for anything else."""
    given_up = found(*ENTRIES)
    done = sort_out(Claims([], given_up, []) if dead else Claims([], [], given_up), HELD, decode)
    assert (done.regained, done.taken, done.unreadable) == ([], [], [])
    assert [(answer.recipient, answer.record.id) for answer in done.answers] == [  # type: ignore[union-attr]
        ("a", "held"),
        ("a", "new"),
    ]
    reply = done.answers[0].record
    assert isinstance(reply, Reply)
    assert reply.e["rpc_error"] == "delivery"
    assert "delivered 3 times" in reply.e["m"]
    assert ("it is a dead letter now" in reply.e["m"]) is dead


def test_nothing() -> None:
    done = sort_out(Claims([], [], []), {}, decode)
    assert (done.regained, done.taken, done.unreadable, done.answers) == ([], [], [], [])


@pytest.mark.parametrize("dead", [True, False])
def test_given_up_with_a_key(dead: bool) -> None:
    """Who waits for it is told otherwise; what couldn't become a dead letter has its turn again."""
    keyed = Keyed(b"k", b"d" * 22, 1, 1, 0)
    entry = Entry(Request("new", "call", ["f"]), "a", 1, keyed=keyed)
    given_up = found(b"2-0")
    claims = Claims([], given_up, []) if dead else Claims([], [], given_up)
    done = sort_out(claims, {}, lambda item: entry)
    assert done.answers == []
    why = "the request was delivered 3 times without being finished; it is a dead letter now"
    assert done.died == ([Died(b"2-0", keyed, why)] if dead else [])
