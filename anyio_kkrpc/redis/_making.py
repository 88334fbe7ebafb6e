"""Parts as the options want them."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from time import time
from typing import Any

from anyio import current_time

from ..abc import Capabilities, Envelope
from ..records import Record
from ._connection._cluster import ClusterFinder
from ._connection._dials import Dials
from ._connection._link import Link
from ._connection._patience import Outages, Patience
from ._connection._replicas import Replicas
from ._connection._resolver import Finder, Fixed, shared_topology
from ._connection._sentinel import Sentinel
from ._connection._target import Target
from ._group._claims import Groups
from ._group._keeping import KEEP, Keeper, waking_clock
from ._group._reasons import Reasons
from ._group._trim import Trim
from ._group._turns import Turns
from ._keyed._calls import RedisCalls
from ._keyed._claim import Claims
from ._keyed._entries import Entries
from ._keyed._items_in import RedisItems
from ._keyed._items_out import ItemsOut
from ._keyed._keeping import CallKeeping
from ._keyed._kept import Sealer
from ._keyed._later import Later
from ._keyed._tails import Read, Tails
from ._keyed._work import Work
from ._options import Options
from ._reading._broadcast import Broadcast
from ._reading._common import Common
from ._reading._loop import ReadLoop
from ._reading._reception import Reception
from ._stream._clock import ServerClock
from ._stream._holders import introduction
from ._stream._keys import Keys
from ._writing._commands import Commands
from .dialects import Dialects
from .dialects._signing import Signer
from .dialects.native import NativeDialect


def make_finder(target: Target, stream: bytes, timeout: float) -> Finder:
    """Return what finds the server that has a stream.

    :param timeout: seconds that a node of a Cluster has to answer, at most
    """
    if target.kind == "cluster":
        return ClusterFinder(target, stream, timeout)
    return Sentinel(target) if target.kind == "sentinel" else Fixed(target.node)


def make_dials(options: Options, outages: Outages) -> Dials:
    """Return what connects."""
    target, timeout = options.target, options.connect_timeout
    stream = options.stream.encode()
    # Two streams of a Cluster may be on two nodes.
    key = (target, stream) if target.kind == "cluster" else target
    return Dials(
        lambda: shared_topology(key, partial(make_finder, target, stream, timeout)),
        options.session_id[:32],
        outages,
        connect_timeout=timeout if target.connect_timeout is None else target.connect_timeout,
        silence=options.health_check_interval,
        limit=options.reconnect_timeout,
        patient=target.node.credential_provider is not None,
    )


def make_broadcast(
    options: Options,
    stream: bytes,
    common: Common,
    trim: Trim | None,
    dials: Dials,
    link: Link,
    failed: Callable[[Exception], object],
) -> Broadcast:
    """Return what reads requests for everybody, from replicas if that is wanted."""
    count = None if trim is None else trim.count
    if options.read_from == "master":
        return Broadcast(stream, common, count)
    replicas = Replicas(dials, link, common.outages)
    loop = ReadLoop(replicas.dialer, options.max_message_size, failed)
    return Broadcast(stream, common, count, loop, replicas)


def make_dialects(options: Options, deliver: Callable[[Envelope], object]) -> Dialects:
    """Return how this peer speaks.

    :param deliver: takes what a TypeScript peer's message means besides, see `ClassicDialect.pair`
    """
    return Dialects(
        options.dialect,
        options.session_id,
        options.codec,
        superjson=options.superjson,
        remote_peer_id=options.remote_peer_id,
        skips_own=not (options.use_consumer_group or options.allow_self_messages),
        max_queue_size=options.max_queue_size,
        max_queue_bytes=options.max_queue_bytes,
        deliver=lambda record, sender: deliver(Envelope(record, sender)),
        now=current_time,
        time_of_day=time,
    )


def make_reception(
    options: Options,
    *,
    decode: Callable[[list[bytes]], Record],
    dropped: Callable[[Any], object],
    finished: Callable[[Any], object],
    answer: Callable[[Envelope], object] | None = None,
) -> Reception:
    """Return where requests wait; see there."""
    size, size_bytes, overflow = options.max_queue_size, options.max_queue_bytes, options.overflow
    told: dict[str, Any] = {"dropped": dropped, "finished": finished, "answer": answer}
    return Reception(size, size_bytes, overflow, decode=decode, **told)


def make_capabilities(options: Options) -> Capabilities:
    """Return what can be carried."""
    native = options.dialect == "native"
    return Capabilities(
        broadcast=not options.use_consumer_group,
        addressing=True,
        keyword_arguments=native,
        cancellation=native,
        deadlines=native,
        takeover=options.claim_idle if options.use_consumer_group else None,
    )


def make_signer(options: Options, clock: ServerClock) -> Signer | None:
    """Return what signs entries, if they are to be signed."""
    key = options.signing_key
    return None if key is None else Signer(key, clock.now, partial(_token, 8))


def make_commands(
    options: Options, keys: Keys, dialects: Dialects, signer: Signer | None, trim: Trim | None
) -> Commands:
    """Return what makes commands of envelopes."""
    added = None if trim is None else trim.count
    group = options.consumer_group.encode() if options.use_consumer_group else None
    consumer, epoch = options.consumer_name.encode(), _token(4)
    sizes = options.max_message_size, options.max_backlog
    return Commands(keys, dialects, group, consumer, *sizes, signer, epoch, added)


def make_trim(options: Options, keys: Keys, outages: Outages) -> Trim | None:
    """Return what keeps the stream short, if it is to be."""
    if options.max_len is None:
        return None
    return Trim(keys.stream, options.max_len, options.use_consumer_group, outages)


def make_groups(options: Options, keys: Keys, link: Link, outages: Outages) -> tuple[Groups, Turns]:
    """Return the scripts of a worker, and what tells whether it waits at the stream."""
    names = options.consumer_group.encode(), options.consumer_name.encode()
    longest = min(options.block_timeout, options.claim_idle * KEEP)
    turns = Turns(
        link.request, keys, names[0], options.session_id, longest, outages, waking_clock()
    )
    groups = Groups(
        link,
        keys,
        *names,
        claim_idle=options.claim_idle,
        max_deliveries=options.max_deliveries,
        introduction=introduction(keys, *names, options.session_id, options.inbox_ttl),
    )
    return groups, turns


def make_keyed(
    options: Options,
    keys: Keys,
    link: Link,
    native: NativeDialect,
    signer: Signer | None,
    keeper: Keeper,
    outages: Outages,
    trim: Trim | None,
    deliver: Callable[[Envelope], object],
    consumed: Callable[[], object],
    read_on: Callable[[str, Read, Patience], Awaitable[None]],
) -> CallKeeping:
    """Return what keeps calls with keys.

    :param deliver: takes a cancel
    :param consumed: told that a word was read
    :param read_on: see `Tails`
    """
    names = options.consumer_group.encode(), options.consumer_name.encode()
    sealer = Sealer(native, signer)
    entries = Entries(native, signer, sealer)
    out = make_items_out(options, keys, link, entries, outages, deliver, lambda: work.stir())
    later = Later(link, keys, sealer, signer, outages, current_time)
    size, added = options.max_message_size, None if trim is None else trim.count
    parts = (native, sealer, keeper, outages, later, out)
    interval = options.claim_idle * KEEP
    told: dict[str, Any] = {"deliver": deliver, "added": added}
    work = Work(link, keys, names, *parts, interval=interval, max_message_size=size, **told)
    limits: Any = {"max_message_size": size, "max_backlog": options.max_backlog}
    claims = Claims(keys, names[0], options.session_id, native, sealer, signer, **limits)
    calls = RedisCalls(
        link,
        keys,
        names[0],
        options.session_id,
        claims,
        sealer,
        work.teller,
        report=work.report,
        stir=work.stir,
        refusal=options.target.refusal,
        added=added,
    )
    times = options.block_timeout, options.read_silence
    tails = Tails(link, outages, read_on, keys.wake(options.session_id), *times)
    asked: Any = {"kept": calls.get, "value_of": calls.value, "refusal": options.target.refusal}
    calls.items = RedisItems(link, keys, entries, tails, out, **asked)
    return CallKeeping(calls, work, tails, consumed)


def make_items_out(
    options: Options,
    keys: Keys,
    link: Link,
    entries: Entries,
    outages: Outages,
    deliver: Callable[[Envelope], object],
    stir: Callable[[], object],
) -> ItemsOut:
    """Return what writes the items of calls with keys.

    :param deliver: takes a cancel
    :param stir: see `ItemsOut`
    """
    return ItemsOut(
        link,
        keys,
        (options.consumer_group.encode(), options.consumer_name.encode()),
        options.session_id,
        entries,
        max_message_size=options.max_message_size,
        deliver=deliver,
        outages=outages,
        stir=stir,
    )


def make_reasons(options: Options, link: Link) -> Reasons:
    """Return what tells why requests have no answer."""
    group = options.consumer_group.encode() if options.use_consumer_group else None
    return Reasons(link, Keys.of(options.stream), group, options.target)


def _token(size: int) -> bytes:
    """Return so many random bytes as text."""
    return os.urandom(size).hex().encode()
