"""What travels between peers, for authors of transports, codecs and whatever looks at traffic.

A record is a Struct of msgspec whose members are named as on the wire; a member that is absent is
``msgspec.UNSET``. `Record` is any of them. Tell them apart by ``isinstance``.
"""

from __future__ import annotations

from ._protocol._records import Bye as Bye
from ._protocol._records import CallbackCall as CallbackCall
from ._protocol._records import CallbackProgress as CallbackProgress
from ._protocol._records import CallbackRelease as CallbackRelease
from ._protocol._records import Cancel as Cancel
from ._protocol._records import Record as Record
from ._protocol._records import Reply as Reply
from ._protocol._records import Request as Request
from ._protocol._records import StreamReply as StreamReply
from ._protocol._records import StreamRequest as StreamRequest

__all__ = (
    "Bye",
    "CallbackCall",
    "CallbackProgress",
    "CallbackRelease",
    "Cancel",
    "Record",
    "Reply",
    "Request",
    "StreamReply",
    "StreamRequest",
)
