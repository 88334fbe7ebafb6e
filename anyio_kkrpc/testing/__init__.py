"""For tests of programs that use this library, and of transports written for it."""

from __future__ import annotations

from ._connected import connected as connected
from ._contract import check_transport as check_transport
from ._server import RedisServer as RedisServer
from ._server import ServerError as ServerError
from ._server import find_server as find_server
