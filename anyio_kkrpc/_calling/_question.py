"""What a call asks, for who sends it in another way."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ._options import CallOptions
from ._typed import TypesOf


class Question(Struct, frozen=True):
    """A call that was prepared with a proxy, and not made.

    :ivar path: names that lead to what is called
    :ivar args: positional arguments
    :ivar kwargs: keyword arguments
    :ivar options: how it is to be sent
    :ivar types: what is known of its result
    """

    path: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: CallOptions
    types: TypesOf

    @property
    def method(self) -> str:
        """The names, joined by dots."""
        return ".".join(self.path)
