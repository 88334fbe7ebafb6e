"""Many ids are asked about by parts, and what is refused for now is asked again. Time is virtual."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from anyio_kkrpc.redis._connection._errors import RedisError, ResponseError
from anyio_kkrpc.redis._reading._by_id import select_ids

IDS = [b"%d-0" % number for number in range(600)]
# Each with what else its script needs to know of it.
ASKED = [(entry_id, f"request {entry_id!r}") for entry_id in IDS]


class Link:
    """Selects every second id.

    :ivar answers: by number of the question: an error in place of its answer
    """

    def __init__(self, answers: dict[int, Exception]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []

    async def request(self, *command: Any) -> list[bytes]:
        self.asked.append(command)
        error = self.answers.get(len(self.asked))
        if error is not None:
            raise error
        return list(command[5::4])


def select(link: Any, asked: list[tuple[bytes, str]]) -> set[bytes]:
    async def main() -> set[bytes]:
        return await select_ids(link, b"script", b"s", b"what", asked)

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (1, 1), (250, 1), (251, 2), (600, 3)])
def test_parts(count: int, parts: int) -> None:
    link = Link({})
    assert select(link, ASKED[:count]) == set(IDS[:count:2])
    assert len(link.asked) == parts
    assert {command[:5] for command in link.asked} <= {(b"EVAL", b"script", b"1", b"s", b"what")}
    words = [word for command in link.asked for word in command[5:]]
    assert words == [word for one in ASKED[:count] for word in one]


def test_refused_for_now() -> None:
    """Only what was refused is asked again."""
    link = Link({2: ResponseError("OOM no"), 3: ResponseError("OOM no")})
    assert select(link, ASKED) == set(IDS[::2])
    assert [command[5] for command in link.asked] == [IDS[0], *[IDS[250]] * 3, IDS[500]]


@pytest.mark.parametrize(
    ("error", "asked"), [(ResponseError("NOPERM no"), 1), (ResponseError("OOM no"), 20)]
)
def test_refused_for_good(error: RedisError, asked: int) -> None:
    link = Link(dict.fromkeys(range(1, 100), error))
    with pytest.raises(type(error)):
        select(link, ASKED)
    assert len(link.asked) == asked
