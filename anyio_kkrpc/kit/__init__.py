"""What a transport is made of.

`Messages` is all of one but for reading and writing: over anything that carries messages of bytes,
whole and in order. `Inbound`, `Outgoing` and `BoundedQueue` are its parts, for transports of
another kind.
"""

from __future__ import annotations

from ._inbound import Inbound as Inbound
from ._inbound import refusal as refusal
from ._messages import Messages as Messages
from ._messages import MessageStatistics as MessageStatistics
from ._outgoing import Outgoing as Outgoing
from ._queue import BoundedQueue as BoundedQueue
from ._queue import QueueStatistics as QueueStatistics
