"""How items of a stream are converted: by whom the stream is from."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from anyio_kkrpc._values._conversion import convert_value, result_of

pytestmark = pytest.mark.anyio


async def test_a_stream_of_this_side_is_left_alone() -> None:
    """Items that didn't come over the wire are nobody's to convert; only a stream it must be."""

    async def numbers() -> AsyncIterator[object]:
        yield "1"
        yield 2

    kind, _ = result_of({"return": AsyncIterator[int]})
    source = numbers()
    assert convert_value(source, kind, "f", "input") is source
    assert [item async for item in source] == ["1", 2]
