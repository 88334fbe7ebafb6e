"""How streams end, for those who watch them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

logger = logging.getLogger("anyio_kkrpc")

# By itself, by its source's error, because its reader has left, or because an end of it is gone.
Outcome: TypeAlias = Literal["ok", "failed", "left", "lost"]
# Called with how many items there were, and with the error if there was one.
StreamOver: TypeAlias = Callable[[Outcome, int, BaseException | None], object]


def tell(watchers: Iterable[Callable[[Any], object]], end: object) -> None:
    """Tell all of them; what they raise is logged, and ends nothing."""
    for watcher in watchers:
        try:
            watcher(end)
        except KeyboardInterrupt:
            raise
        except BaseException:  # nothing is awaited: it is the watcher's own
            logger.exception("what was told of the end of a stream failed")
