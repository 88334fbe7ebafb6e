"""What has a call made, unless it is there."""

from __future__ import annotations

from msgspec import Struct

from .._connection._command import Argument, pack
from ._script import Script

__all__ = ("Claim",)


class Claim(Struct):
    """What has a call made.

    :ivar again: ``1`` if that may have been done already
    """

    script: Script
    names: tuple[bytes, ...]
    head: tuple[bytes, ...]
    rest: tuple[bytes, ...]
    again: bytes = b"0"

    def command(self, *, known: bool = True) -> tuple[Argument, ...]:
        """Return the command.

        :param known: whether the server knows the script
        """
        make = self.script.known if known else self.script.unknown
        return make(self.names, (*self.head, self.again, *self.rest))

    def packed(self) -> bytes:
        """Return the command, packed."""
        return pack(self.command())
