"""When a shard is left that is far behind, and when it is gone back to: without a server."""

from __future__ import annotations

import pytest

from anyio_kkrpc.redis._options import GivenOptions, check_options
from anyio_kkrpc.redis._sharding._behind import Behind, Progress, Shows
from anyio_kkrpc.redis._sharding._home import Home
from anyio_kkrpc.redis._stream._places import home_of

pytestmark = pytest.mark.anyio

FIRST, SECOND, THIRD, LAST = (home_of("me", 4, turn) for turn in range(4))


class Place(Shows):
    """A home, and what its shards tell.

    :ivar open: requests of this peer that wait in each, with the number of their entry and since when
    :ivar told: what the group of each tells
    :ivar asked: which shards were asked, in order
    """

    def __init__(self, *there: int) -> None:
        options = check_options(
            GivenOptions("redis://nowhere", session_id="me", shards=4, use_consumer_group=True)
        )
        self.there = {*there}
        self.opened: list[int] = []
        self.home = Home(options, lambda shard: shard in self.there, self.opened.append)
        self.behind = Behind(self.home, self.opened.append, self)
        self.open: dict[int, tuple[int, float]] = {}
        self.told: dict[int, Progress] = {}
        self.asked: list[int] = []
        self.came = 0
        self.now = 0.0

    def oldest(self, shard: int, after: bytes) -> float | None:
        entry, since = self.open.get(shard, (0, 0.0))
        return None if entry <= int(after.split(b"-")[0]) else self.now - since

    def received(self, shard: int) -> int:
        return self.came

    async def ask(self, shard: int) -> Progress | None:
        self.asked.append(shard)
        return self.told.get(shard)

    async def pass_time(self, seconds: int, come: int = 0) -> int:
        """Look each second; return where it is then."""
        for _ in range(seconds):
            self.now += 1.0
            self.came += come
            self.home.look(self.now)
            await self.behind.look(self.now)
        return self.home.shard


def progress(waited: float, last: int = 5, workers: int = 1) -> Progress:
    return Progress(b"%d-0" % last, waited, workers)


async def test_nothing_is_asked_while_calls_are_answered() -> None:
    """Nor while none is open, nor of one again that a worker has, however long it runs."""
    place = Place(FIRST, SECOND)
    await place.pass_time(100)
    place.open[FIRST] = (9, place.now)
    place.told[FIRST] = progress(0.0, last=9)
    await place.pass_time(2, come=1)
    assert place.asked == []
    assert await place.pass_time(100) == FIRST
    assert place.asked == [FIRST]


async def test_one_that_is_far_behind_is_left() -> None:
    """For one where less has waited, and whose workers live and read; none is opened then."""
    place = Place(FIRST, SECOND, THIRD, LAST)
    place.open[FIRST] = (9, 0.0)
    place.told = {
        FIRST: progress(1.0),
        SECOND: progress(0.0, workers=0),
        THIRD: progress(3.0),
        LAST: progress(2.0),
    }
    assert await place.pass_time(2) == FIRST
    place.told[FIRST] = progress(5.0)
    assert await place.pass_time(3) == FIRST
    place.told[LAST] = progress(2.0, last=6)
    assert await place.pass_time(1) == LAST
    assert place.home.moved == 1
    assert place.opened == []


async def test_calls_whose_time_is_over_are_always_young() -> None:
    """A group that reads nothing for seconds though something waits is far behind as well."""
    place = Place(FIRST, SECOND)
    place.told = {FIRST: progress(0.3), SECOND: progress(0.0)}
    place.open[FIRST] = (9, 0.0)
    for second in range(7):
        place.open[FIRST] = (9 + second, place.now + 0.7)
        if await place.pass_time(1) == SECOND:
            break
    assert 2 <= place.now <= 6
    assert place.home.shard == SECOND


async def test_one_that_reads_is_not_left() -> None:
    place = Place(FIRST, SECOND)
    place.told[SECOND] = progress(0.0)
    for second in range(60):
        place.open[FIRST] = (10 + second, place.now + 0.7)
        place.told[FIRST] = progress(0.3, last=5 + second)
        assert await place.pass_time(1) == FIRST


async def test_all_are_behind() -> None:
    """Then it stays; the others are opened one after the other, ever more rarely."""
    place = Place(FIRST)
    place.open[FIRST] = (9, 0.0)
    place.told = dict.fromkeys(range(4), progress(9.0))
    await place.pass_time(2)
    assert place.opened == [SECOND]
    place.there = {FIRST, SECOND}
    assert await place.pass_time(60) == FIRST
    assert place.opened == [SECOND, THIRD, LAST]


async def test_it_is_gone_back_to_once_it_has_caught_up() -> None:
    """Each time later, if it is left again soon: nobody goes to and fro."""
    place = Place(FIRST, SECOND)
    place.told = {FIRST: progress(9.0), SECOND: progress(0.0)}
    stays: list[float] = []
    for _ in range(4):
        place.open[FIRST] = (9, place.now)
        while place.home.shard == FIRST:
            await place.pass_time(1)
        place.open.clear()
        left = place.now
        assert await place.pass_time(30) == SECOND
        place.told[FIRST] = progress(0.0)
        while place.home.shard == SECOND:
            await place.pass_time(1)
        stays.append(place.now - left)
        place.told[FIRST] = progress(9.0)
    assert stays[0] <= 52
    assert stays[3] > 80
    assert place.home.moved == 8


async def test_one_that_has_no_workers_is_not_gone_back_to() -> None:
    """Though nothing waits there. Nor is it because it is connected."""
    place = Place(FIRST, SECOND)
    place.told = {FIRST: progress(9.0), SECOND: progress(0.0)}
    place.open[FIRST] = (9, 0.0)
    assert await place.pass_time(5) == SECOND
    place.told[FIRST] = progress(0.0, workers=0)
    assert await place.pass_time(100) == SECOND


async def test_one_that_goes_away_meanwhile() -> None:
    """It goes on to a third one, rather than back; back if there is no other."""
    place = Place(FIRST, SECOND)
    place.told = {FIRST: progress(9.0), SECOND: progress(0.0), THIRD: progress(0.0)}
    place.open[FIRST] = (9, 0.0)
    assert await place.pass_time(5) == SECOND
    place.there = {FIRST, THIRD}
    assert await place.pass_time(3) == THIRD
    place.there = {FIRST}
    assert await place.pass_time(3) == FIRST
