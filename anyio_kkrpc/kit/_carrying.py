"""The options of what carries messages, once for `Messages` and for each transport over them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from ._options import AnyCodec, AnyDialect, Count, Flag, one_of
from ._queue import Overflow

__all__ = ("CarryingOptions",)


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: needs an int, not {value!r:.80}")
    if not 0 < value < 1 << 32:
        raise ValueError(f"{name}: from 1 to 2**32 - 1, not {value}")
    return value


def _any_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: needs seconds, not {value!r:.80}")
    if not value > 0:
        raise ValueError(f"{name}: must be positive, not {value}")
    return value


def _refusing(name: str, value: Any) -> Any:
    if value == "block":
        raise ValueError(f"{name}: 'block' would hold up replies behind the requests")
    return _overflow(name, value)


_overflow = one_of(Overflow)


@dataclass(frozen=True, kw_only=True, repr=False)
class CarryingOptions:
    """Those that a transport hands on to `Messages`."""

    codec: AnyCodec = "json"
    dialect: AnyDialect = "native"
    superjson: Flag = True
    max_message_size: Annotated[int, _size] = 16 * 1024 * 1024
    max_queue_size: Count = 1000
    max_queue_bytes: Count = 64 * 1024 * 1024
    overflow: Annotated[Overflow, _refusing] = "drop_newest"
    write_timeout: Annotated[float, _any_seconds] = 10.0

    def carrying(self) -> dict[str, Any]:
        """Return them by name, without those that a transport has besides."""
        return {one.name: getattr(self, one.name) for one in fields(CarryingOptions)}
