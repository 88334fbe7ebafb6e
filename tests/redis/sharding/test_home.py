"""In which shard a peer is at home, without a server: only what it is told decides."""

from __future__ import annotations

import pytest

from anyio_kkrpc.redis._options import GivenOptions, Options, check_options
from anyio_kkrpc.redis._sharding._home import Home
from anyio_kkrpc.redis._stream._places import home_of


def options(url: str = "redis+cluster://nowhere", shards: int = 4) -> Options:
    return check_options(GivenOptions(url, session_id="me", shards=shards, use_consumer_group=True))


OPTIONS = options()
FIRST, SECOND, THIRD, _ = (home_of("me", 4, turn) for turn in range(4))


class Place:
    """A home, the shards that are there, and those that it has had opened."""

    def __init__(self, options: Options = OPTIONS) -> None:
        self.there = {options.home}
        self.opened: list[int] = []
        self.home = Home(options, lambda shard: shard in self.there, self.opened.append)

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
    """One after the other is opened, each once, with time for each to connect, and ever more."""
    place = Place()
    place.there.clear()
    assert place.pass_time(0, 0.9) == FIRST
    assert place.opened == []
    assert place.pass_time(1, 1.9) == FIRST
    assert place.opened == [SECOND]
    assert place.pass_time(2, 2.9) == FIRST
    assert place.opened == [SECOND]
    assert place.pass_time(3, 6.9) == FIRST
    assert place.opened == [SECOND, THIRD]
    assert place.pass_time(7, 60) == FIRST
    assert place.opened == [home_of("me", 4, turn) for turn in (1, 2, 3)]
    place.there = {THIRD}
    assert place.pass_time(60.1, 60.1) == THIRD


def test_not_all_are_opened_while_all_are_away() -> None:
    """Each stays open once it is. However long that takes, and however often it comes, they are
    few; and none where all shards are on the one server that is away.
    """
    place, lone = Place(options(shards=256)), Place(options("redis://nowhere", 256))
    for start in (0, 1000, 2000):
        for one in (place, lone):
            one.there.clear()
            one.pass_time(start, start + 130)
            one.there = {one.home.shard}
            one.pass_time(start + 131, start + 131)
    assert len(set(place.opened)) == 7
    assert lone.opened == []


@pytest.mark.parametrize("moved", [False, True])
def test_one_that_is_open_is_taken_first(moved: bool) -> None:
    place = Place()
    place.there = {THIRD}
    assert place.pass_time(0, 0.9) == FIRST
    if moved:
        assert place.pass_time(1, 1.1) == THIRD
        assert place.opened == []
