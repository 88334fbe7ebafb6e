"""Large items of a stream wait at their source: what a reader may hold is bounded by weight."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from tests.bounds import BOUND
from tests.pairs import pair

pytestmark = pytest.mark.anyio

# Four of them weigh more than 1 MiB, three don't, and their JSON is of another size.
SIZE = 300_000


@dataclasses.dataclass
class Chunk:
    number: int
    data: str


class Api:
    def __init__(self, item: Any) -> None:
        self.made = 0
        self._item = item

    async def items(self, count: int) -> AsyncIterator[Any]:
        for _ in range(count):
            self.made += 1
            yield self._item

    async def total(self, items: AsyncIterator[Any]) -> int:
        """Take one, wait for the first call of `ping`, and take the others."""
        self.begun = anyio.Event()
        self.go_on = anyio.Event()
        await items.__anext__()
        self.begun.set()
        await self.go_on.wait()
        return 1 + len([item async for item in items])

    def ping(self) -> None: ...


ITEMS: dict[str, Any] = {
    "text": "x" * SIZE,
    "bytes": bytes(SIZE),
    "map": {"a": ["x" * SIZE]},
    "dataclass": Chunk(1, "x" * SIZE),
}


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        (kind, codec)
        for kind in ITEMS
        for codec in ("json", "cbor", None)
        if (kind, codec) != ("dataclass", "cbor")  # which has none
    ],
)
async def test_reader_that_stops(kind: str, codec: str | None) -> None:
    """Its source goes no further than weighs the budget, and on when it reads on."""
    item = ITEMS[kind]
    api = Api(item)
    async with pair(api, codec=codec) as link:
        with anyio.fail_after(BOUND):
            async with link.api.items(50) as items:
                await items.__anext__()
                for _ in range(100):
                    await link.api.ping()
                assert api.made == 4
                assert len([item async for item in items]) == 49
        assert api.made == 50


async def test_argument() -> None:
    """So does that of a stream argument."""
    api, source = Api(None), Api("x" * SIZE)
    async with pair(api) as link, anyio.create_task_group() as group:
        totals: list[int] = []

        async def call() -> None:
            totals.append(await link.api.total(source.items(20)))

        with anyio.fail_after(BOUND):
            group.start_soon(call)
            while not source.made:
                await anyio.sleep(0.001)
            await api.begun.wait()
            for _ in range(100):
                await link.api.ping()
            assert source.made == 4
            api.go_on.set()
            while not totals:
                await anyio.sleep(0.001)
    assert totals == [20]
