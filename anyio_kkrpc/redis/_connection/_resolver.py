"""Where the server is now: asked before each connection is made."""

from __future__ import annotations

from typing import Protocol

from ._address import Address


class Resolver(Protocol):
    """Tells which server has a stream now. All keys of a stream are in one Cluster slot, so there
    is one at a time.
    """

    async def resolve(self) -> Address:
        """Return the address to connect to.

        :raises TransportConnectionError: if it can't be found out; it is tried again
        """
        ...


class Fixed:
    """The server of a URL, which stays where it is."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def resolve(self) -> Address:
        """Return the address."""
        return self._address
