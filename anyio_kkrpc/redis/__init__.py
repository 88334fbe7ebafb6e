"""RPC over Redis Streams. Needs the extra ``redis``."""

from __future__ import annotations

from ._admin import StreamEntry as StreamEntry
from ._admin import StreamInfo as StreamInfo
from ._group._dead_letters import DeadLetter as DeadLetter
from ._transport import RedisStatistics as RedisStatistics
from ._transport import RedisStreamsTransport as RedisStreamsTransport
