"""In which shard a peer is at home, without a server: only what it is told decides."""

from __future__ import annotations

import pytest

from anyio_kkrpc.redis._options import GivenOptions, check_options
from anyio_kkrpc.redis._sharding._home import Home
from anyio_kkrpc.redis._stream._places import home_of

OPTIONS = check_options(
    GivenOptions("redis://nowhere", session_id="me", shards=4, use_consumer_group=True)
)
FIRST, SECOND, THIRD, _ = (home_of("me", 4, turn) for turn in range(4))


class Place:
    """A home, the shards that are there, and those that it has had opened."""

    def __init__(self) -> None:
        self.there = {FIRST}
        self.opened: list[int] = []
        self.home = Home(OPTIONS, lambda shard: shard in self.there, self.opened.append)

    def pass_time(self, start: float, end: float) -> int:
        """Look each tenth of a second; return where it is then."""
        for tick in range(round(start * 10), round(end * 10) + 1):
            self.home.look(tick / 10)
        return self.home.shard


def test_stays() -> None:
    """One that is there is stayed in, and so is one that is away for a moment."""
    place = Place()
    assert place.pass_time(0, 10) == FIRST
    place.there.clear()
    assert place.pass_time(10.1, 10.9) == FIRST
    place.there.add(FIRST)
    assert place.pass_time(11, 11.5) == FIRST
    place.there.clear()
    assert place.pass_time(11.6, 12.5) == FIRST
    assert place.opened == []


def test_moves_and_comes_back() -> None:
    """Another one is opened, and moved to once it is there; the first is gone back to when it has
    been there for a while.
    """
    place = Place()
    place.there.clear()
    assert place.pass_time(0, 1.8) == FIRST
    assert place.opened == [SECOND]
    place.there = {SECOND}
    assert place.pass_time(1.9, 1.9) == SECOND
    place.there = {FIRST, SECOND}
    assert place.pass_time(3, 7.9) == SECOND
    place.there = {SECOND}
    assert place.pass_time(8, 8.1) == SECOND
    place.there = {FIRST, SECOND}
    assert place.pass_time(8.2, 13.1) == SECOND
    assert place.pass_time(13.2, 13.2) == FIRST


def test_all_are_away() -> None:
    """One after the other is opened, each once, with time for each to connect."""
    place = Place()
    place.there.clear()
    assert place.pass_time(0, 0.9) == FIRST
    assert place.opened == []
    assert place.pass_time(1, 1.9) == FIRST
    assert place.opened == [SECOND]
    assert place.pass_time(2, 60) == FIRST
    assert place.opened == [home_of("me", 4, turn) for turn in (1, 2, 3)]
    place.there = {THIRD}
    assert place.pass_time(60.1, 60.1) == THIRD


@pytest.mark.parametrize("moved", [False, True])
def test_one_that_is_open_is_taken_first(moved: bool) -> None:
    place = Place()
    place.there = {THIRD}
    assert place.pass_time(0, 0.9) == FIRST
    if moved:
        assert place.pass_time(1, 1.1) == THIRD
        assert place.opened == []
