"""The records that travel between peers: kkrpc 2's compact messages and this library's additions.

Each is a tagged struct: ``t`` in a message names the class. Members are named as on the wire, so
that one declaration is schema, validation and codec at once. A member that is absent is ``UNSET``,
never null: a null where a member is optional makes the record invalid, as in kkrpc. So does a
number or an id beyond its bound: what is kept of a record, or calculated with, is bounded here.

====  ==================  =====================================================================
t     class               meaning
====  ==================  =====================================================================
q     `Request`           call a function, get or set a property, construct
r     `Reply`             result (``v``) or error (``e``) of the request with the same ``id``
cb    `CallbackCall`      call a function that was passed as an argument; has a reply if asked for
cbr   `CallbackRelease`   the functions with these ids will not be called again
cbp   `CallbackProgress`  how many invocations of a function have run (ours)
sq    `StreamRequest`     consumer to producer: pull ``n`` items, or end early
sr    `StreamReply`       producer to consumer: an item, the end or an error
x     `Cancel`            the caller no longer wants the request ``id`` (ours)
bye   `Bye`               end your channel: the destroy signal (ours)
====  ==================  =====================================================================
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

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

# Characters of an id.
MAX_ID = 256
# What every codec and every language holds exactly; as milliseconds, 285,000 years.
MAX_NUMBER = (1 << 53) - 1

Id: TypeAlias = Annotated[str, Meta(max_length=MAX_ID)]
Index: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
_Whole: TypeAlias = Annotated[int, Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
_Real: TypeAlias = Annotated[float, Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Number: TypeAlias = _Whole | _Real


class Request(Struct, tag_field="t", tag="q", omit_defaults=True):
    """A request: ``op`` applied to the path ``p``.

    :ivar id: unique for the sender; its reply bears it
    :ivar op: ``call``, ``get``, ``set``, ``new`` (construct); ``ref`` (kkrpc's remote references)
        is answered with an error
    :ivar p: path, a segment for each name; segments are never split at dots
    :ivar a: positional arguments of ``call`` and ``new``, each bare or in kkrpc's argument envelope
    :ivar v: the value of ``set``
    :ivar k: keyword arguments (ours)
    :ivar d: time budget from sending to reply, in milliseconds (ours)
    :ivar o: true if the sender wants no reply (ours)
    :ivar meta: metadata such as ``traceparent``
    :ivar cw: invocations of each function passed that may be ahead of it (ours)
    :ivar cr: true if results of these functions can be asked for (ours)
    """

    id: Id
    op: Literal["call", "get", "set", "new", "ref"]
    p: list[str]
    a: list[Any] | UnsetType = UNSET
    v: Any = UNSET
    k: dict[str, Any] | UnsetType = UNSET
    d: Number | UnsetType = UNSET
    o: bool | UnsetType = UNSET
    meta: dict[str, Any] | UnsetType = UNSET
    cw: Index | UnsetType = UNSET
    cr: bool | UnsetType = UNSET


class Reply(Struct, tag_field="t", tag="r", omit_defaults=True):
    """The reply to a request: a result ``v`` (absent for undefined) or an error ``e``.

    An error has ``n`` (name), ``m`` (message), ``s`` (traceback, if sent) and the exception's own
    fields beside them.
    """

    id: Id
    v: Any = UNSET
    e: dict[str, Any] | UnsetType = UNSET


class CallbackCall(Struct, tag_field="t", tag="cb", omit_defaults=True):
    """Call the callback ``id`` with positional arguments ``a`` and keyword arguments ``k``.

    :ivar q: the request that it came with, in a broadcast, where several peers may hold it (ours)
    :ivar f: chosen by the sender for this function of one request, if `CallbackProgress` is to tell
        when this invocation has run (ours)
    :ivar i: the number of this invocation among those of ``f``, from 1; told if ``f`` is (ours)
    :ivar r: the result is wanted, as the reply to a request with this id (ours)
    :ivar d: time budget from sending to reply, in milliseconds, if the result is wanted (ours)
    :ivar p: ``id`` is that of a reference, and this what is done to it: ``call``, ``get``, ``set``
        or ``apply``, and the path (ours)
    """

    id: Id
    a: list[Any]
    k: dict[str, Any] | UnsetType = UNSET
    q: Id | UnsetType = UNSET
    f: Id | UnsetType = UNSET
    i: Index | UnsetType = UNSET
    r: Id | UnsetType = UNSET
    d: Number | UnsetType = UNSET
    p: list[str] | UnsetType = UNSET


class CallbackRelease(Struct, tag_field="t", tag="cbr", omit_defaults=True):
    """The sender dropped the callbacks ``ids``.

    :ivar all: true if that is all of them, however often each was passed, as kkrpc means it;
        otherwise an id counts once for each time that it was passed (ours)
    :ivar q: for each of ``ids`` the request that it came with, since what runs twice is released
        twice (ours)
    :ivar times: the ids are those of references, each received so often (ours)
    """

    ids: list[Id]
    all: bool | UnsetType = UNSET
    q: list[Id] | UnsetType = UNSET
    times: list[Index] | UnsetType = UNSET


class CallbackProgress(Struct, tag_field="t", tag="cbp", omit_defaults=True):
    """Of the invocations that the recipient sent as ``id``, all up to number ``n`` have run.

    :ivar id: the invocations' ``f``
    :ivar gone: true if the function isn't there any more: what came of late was ignored
    """

    id: Id
    n: Index
    gone: bool | UnsetType = UNSET


class StreamRequest(Struct, tag_field="t", tag="sq", omit_defaults=True):
    """From a stream's consumer: ``pull`` allows ``n`` more items; ``return`` ends it, and ``throw``
    raises an error in its source. Both are answered by a reply with the same ``id``.

    :ivar v: of ``return``, what its answer has as ``v`` unless the source has something else
    :ivar e: of ``throw``, the error, in place of kkrpc's ``v`` (ours)
    :ivar b: what the items may weigh that are sent beyond what was allowed before; without it that
        isn't bounded (ours)
    """

    id: Id
    sid: Id
    op: Literal["pull", "return", "throw"]
    n: Any = UNSET
    v: Any = UNSET
    b: Index | UnsetType = UNSET
    e: dict[str, Any] | UnsetType = UNSET


class StreamReply(Struct, tag_field="t", tag="sr", omit_defaults=True):
    """From a stream's producer: an item (``d`` false), the end (``d`` true) or an error ``e``.

    :ivar i: index of the item, from 0, so that a lost or doubled one is seen (ours)
    :ivar w: what the item weighs, where its consumer bounds that; those without it weigh nothing,
        but the first one always has it (ours)
    """

    id: Id
    sid: Id
    d: bool | UnsetType = UNSET
    v: Any = UNSET
    e: dict[str, Any] | UnsetType = UNSET
    i: Index | UnsetType = UNSET
    w: Index | UnsetType = UNSET


class Cancel(Struct, tag_field="t", tag="x"):
    """The sender of request ``id`` has stopped waiting for it."""

    id: Id


class Bye(Struct, tag_field="t", tag="bye"):
    """The destroy signal: peers that honor it end their channels."""


Record: TypeAlias = (
    Request
    | Reply
    | CallbackCall
    | CallbackRelease
    | CallbackProgress
    | StreamRequest
    | StreamReply
    | Cancel
    | Bye
)
