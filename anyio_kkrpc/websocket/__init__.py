"""RPC over WebSockets: an ASGI application, and a client, which needs the extra ``websocket``."""

from __future__ import annotations

from typing import Any

from ._client import connect_websocket as connect_websocket
from ._endpoint import Connection as Connection
from ._endpoint import Endpoint as Endpoint
from ._endpoint import EndpointStatistics as EndpointStatistics
from ._endpoint import current_connection as current_connection
from ._handshake import Handshake as Handshake
from ._handshake import Refused as Refused
from ._transport import WebSocketStatistics as WebSocketStatistics
from ._transport import WebSocketTransport as WebSocketTransport

__all__ = (
    "Connection",
    "Endpoint",
    "EndpointStatistics",
    "Handshake",
    "Refused",
    "WebSocketStatistics",
    "WebSocketTransport",
    "connect_websocket",
    "current_connection",
    "endpoint",
)


def endpoint(api: object, **options: Any) -> Endpoint:
    """Return an ASGI application that serves ``api`` over WebSockets.

    :param options: those of `Endpoint`
    """
    return Endpoint(api, **options)
