"""Values with references that came, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._records import Reply
from ._values import REFERENCES, Packed


class Referred:
    """Asks what they stand for.

    :param take: makes of a value with references what it stands for, from who has sent it; raises
        what is wrong with it
    :param told: makes of that what a reply has in its place
    """

    __slots__ = ("_take", "_told")

    def __init__(
        self,
        take: Callable[[Packed, str | None], Any] = lambda value, sender: value,
        told: Callable[[Any], dict[str, Any]] = lambda exc: {"n": "Error", "m": str(exc)},
    ) -> None:
        self._take = take
        self._told = told

    def of(self, value: Any, sender: str | None) -> Any:
        """Return a value with objects in place of its references, if it has any."""
        return self._take(value, sender) if value.__class__ is Packed else value

    def of_reply(self, record: Reply, value: Any, sender: str | None) -> Any:
        """Return a result likewise; if something is wrong with it, that is the answer."""
        try:
            return self.of(value, sender)
        except Exception as exc:  # its caller waits
            record.e = self._told(exc)
            return None

    def of_error(self, error: dict[str, Any], sender: str | None) -> dict[str, Any]:
        """Return an error likewise: its fields may have references. What is wrong stays as it came:
        its caller is to see the error.
        """
        for key, field in error.items():
            if isinstance(field, dict) and field.keys() == {REFERENCES}:
                try:
                    error = {**error, key: self._take(Packed(field), sender)}
                except Exception:
                    continue
        return error

    def release(self, value: Any, sender: str | None) -> None:
        """Take what nobody waits for any more: what it has of references is released."""
        self.of_reply(Reply(""), value, sender)
