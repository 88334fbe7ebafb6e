"""What all that reads has in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec import Struct

from .._connection._patience import Outages
from .._connection._role import Silence
from ._arrivals import Arrivals
from ._loop import ReadLoop
from ._reader import Decoder
from ._shared import Shared

__all__ = ("Common",)


class Common(Struct, frozen=True):
    """The parts that the readers of one stream share.

    :ivar decoder: decodes entries
    :ivar loop: keeps them reading
    :ivar arrivals: is given what was read
    :ivar shared: knows what TypeScript peers mean
    :ivar outages: told of what is refused
    :ivar block_timeout: seconds that one blocking read lasts
    :ivar silence: returns the seconds after which a read without an answer is given up
    :ivar expect_more: told that several entries came together
    :ivar follow_up: sends what reading called for
    """

    decoder: Decoder
    loop: ReadLoop
    arrivals: Arrivals
    shared: Shared
    outages: Outages
    block_timeout: float
    silence: Silence
    expect_more: Callable[[], object]
    follow_up: Callable[[], Awaitable[None]]
