"""Bidirectional RPC on AnyIO, over Redis Streams first and over any transport in principle."""

from __future__ import annotations

import logging as _logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._calling._access import KeyGuard as KeyGuard
from ._calling._access import KeyUse as KeyUse
from ._calling._gathering import PeerReply as PeerReply
from ._calling._gathering import Replies as Replies
from ._calling._handle import CallHandle as CallHandle
from ._calling._proxy import RemoteAPI as RemoteAPI
from ._calling._proxy import RemoteCall as RemoteCall
from ._calling._proxy import with_call_options as with_call_options
from ._channel import RPCChannel as RPCChannel
from ._driver._callbacks import Callback as Callback
from ._driver._callbacks import RemoteCallback as RemoteCallback
from ._driver._context import CallInfo as CallInfo
from ._driver._context import current_call as current_call
from ._driver._inflow import RemoteStream as RemoteStream
from ._driver._remote_object import RemoteMember as RemoteMember
from ._driver._remote_object import RemoteObject as RemoteObject
from ._driver._remote_object import release as release
from ._driver._remote_object import set_member as set_member
from ._exceptions import CallCancelledError as CallCancelledError
from ._exceptions import CallNotFoundError as CallNotFoundError
from ._exceptions import DeliveryError as DeliveryError
from ._exceptions import ItemsLostError as ItemsLostError
from ._exceptions import KeyConflictError as KeyConflictError
from ._exceptions import KeyNotAllowedError as KeyNotAllowedError
from ._exceptions import MethodNotFoundError as MethodNotFoundError
from ._exceptions import OverloadedError as OverloadedError
from ._exceptions import ProtocolError as ProtocolError
from ._exceptions import RemoteError as RemoteError
from ._exceptions import RPCError as RPCError
from ._exceptions import RPCTimeoutError as RPCTimeoutError
from ._exceptions import RPCValidationError as RPCValidationError
from ._exceptions import StreamRestartedError as StreamRestartedError
from ._exceptions import TransportClosedError as TransportClosedError
from ._exceptions import TransportConnectionError as TransportConnectionError
from ._references._marking import by_reference as by_reference
from ._runtime._log import QuotingFilter as _QuotingFilter
from ._serving._outcomes import ChannelStatistics as ChannelStatistics
from ._serving._outcomes import MethodStatistics as MethodStatistics
from ._serving._table import Exposed as Exposed
from ._serving._table import expose as expose
from ._serving._table import in_thread as in_thread
from ._signals import serve_until_signalled as serve_until_signalled
from .abc import CallState as CallState
from .abc import Item as Item
from .abc import ItemBounds as ItemBounds
from .kit._queue import BoundedQueue as BoundedQueue
from .kit._queue import QueueStatistics as QueueStatistics

if TYPE_CHECKING:
    from .redis import RedisStreamsTransport as RedisStreamsTransport
    from .transports.bytestream import ByteStreamTransport as ByteStreamTransport
    from .transports.memory import MemoryTransport as MemoryTransport

__version__: str
# All that the library logs goes through this logger.
_logging.getLogger(__name__).addFilter(_QuotingFilter())

# Loaded on first use: programs use one of them, and that over Redis needs an extra.
_TRANSPORTS = {
    "ByteStreamTransport": "transports.bytestream",
    "MemoryTransport": "transports.memory",
    "RedisStreamsTransport": "redis",
}


def __getattr__(name: str) -> Any:
    """Load a transport, or look up the version."""
    if name == "__version__":
        from importlib.metadata import version

        globals()[name] = found = version("anyio_kkrpc")
        return found
    if name not in _TRANSPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_TRANSPORTS[name]}")
    except ImportError as exc:
        raise ImportError(f"{name} needs {exc.name}: pip install 'anyio_kkrpc[redis]'") from exc
    transport = globals()[name] = getattr(module, name)
    return transport
