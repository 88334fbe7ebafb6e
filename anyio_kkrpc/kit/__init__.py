"""What a transport is made of."""

from ._queue import BoundedQueue, QueueStatistics

__all__ = ("BoundedQueue", "QueueStatistics")
