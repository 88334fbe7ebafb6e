"""Whether requests come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .._connection._patience import Patience

__all__ = ("Flow",)


class Flow:
    """Knows whether requests are read now: their connection is up, and Redis lets them be read.

    That there is no room for more of them changes nothing: then they are not to be read.
    """

    __slots__ = ("_patience",)

    def __init__(self) -> None:
        self._patience: Patience | None = None

    @property
    def going(self) -> bool:
        """Whether they are read."""
        return self._patience is not None and self._patience.refusal is None

    @contextmanager
    def through(self, patience: Patience) -> Iterator[None]:
        """Note that they are read within the block.

        :param patience: of who reads: what was refused a moment ago isn't known to go on yet
        """
        self._patience = patience
        try:
            yield
        finally:
            self._patience = None
