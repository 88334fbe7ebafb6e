"""Transports that need no extra."""

from __future__ import annotations

from .bytestream import ByteStreamStatistics as ByteStreamStatistics
from .bytestream import ByteStreamTransport as ByteStreamTransport
from .links import connect_tcp as connect_tcp
from .links import connect_unix as connect_unix
from .links import open_process as open_process
from .links import serve as serve
from .links import stdio as stdio
from .memory import MemoryTransport as MemoryTransport
