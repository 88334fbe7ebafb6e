"""What ``top`` asks Redis for: which streams there are, and how they are at one moment.

It asks by redis-py's blocking client, since nothing else goes on in the process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import redis
from msgspec import Struct
from redis.exceptions import ResponseError

from ..redis._stream._keys import DELAYED, HANDED_BACK, Keys, stream_of

# Seconds from the end of a search for streams to the next one: at least so many, and as many times
# as long as the search took, so that a server with many keys spends little time on it.
SEARCH_INTERVAL = 5.0
SEARCH_FACTOR = 20
_PAGE = 1000
_SIDE_KEY = re.compile(r"(.*?\{.+?\}.*?):(?:control|dead|(?:inbox|claimer):.+)", re.DOTALL)


class Worker(Struct):
    """A consumer at one moment.

    :ivar holds: requests it has taken and not finished
    :ivar idle: seconds since it last did something
    """

    name: str
    holds: int
    idle: float


class KeyedCall(Struct):
    """A call with a key that a worker has.

    :ivar since: seconds since the worker took it, or said last that it has it
    :ivar attempt: how often it was delivered
    """

    key: str
    worker: str
    since: float
    attempt: int


class GroupLook(Struct):
    """A consumer group at one moment.

    :ivar waiting: requests that nobody has; ``None`` where the server can't tell how many
    :ivar running: requests that workers have
    :ivar oldest: seconds since the oldest unfinished request was written, ``None`` if there is none
    :ivar taken: requests taken since the stream began, ``None`` where the server can't tell
    :ivar keyed: calls with keys that workers have, some of them
    """

    name: str
    waiting: int | None
    running: int
    oldest: float | None
    taken: int | None
    workers: list[Worker]
    keyed: list[KeyedCall] = []

    @property
    def some_wait(self) -> bool:
        """Whether a request waits."""
        # Where nothing waits or runs, nothing is unfinished.
        return self.waiting != 0 and (self.waiting is not None or self.oldest is not None)


class StreamLook(Struct):
    """A stream at one moment.

    :ivar written: requests written since the stream began, ``None`` where the server can't tell
    :ivar dead: dead letters, ``None`` where the server doesn't tell this user
    :ivar delayed: calls with keys that are to begin later
    :ivar error: why it can't be read
    :ivar total: whether this is what several shards have together
    """

    name: str
    length: int = 0
    written: int | None = 0
    dead: int | None = 0
    groups: list[GroupLook] = []
    delayed: int = 0
    error: ResponseError | None = None
    total: bool = False


class Search:
    """Finds the streams of requests by SCAN, a part of it at each look.

    Those are the streams beside which there is an inbox, a control stream or a stream of dead
    letters, and those whose last entry is a request of this library or of kkrpc: when all peers
    have gone, and requests wait for workers, nothing else is left.

    :ivar names: what has been found, sorted
    :ivar complete: whether all keys have been seen once
    """

    def __init__(self, client: redis.Redis) -> None:
        self.names: list[str] = []
        self.complete = False
        self._client = client
        self._cursor = 0
        self._streams: set[str] = set()
        self._bases: set[str] = set()
        # Whether a stream's last entry is a request. One look is enough, unless it is empty.
        self._verdicts: dict[str, bool] = {}
        self._next = float("-inf")
        self._spent = 0.0

    def go_on(self, seconds: float | None) -> None:
        """Search for so long, or until all keys have been seen; not if that was a moment ago."""
        start = time.monotonic()
        if start < self._next:
            return
        while True:
            self._cursor, keys = self._client.scan(self._cursor, count=_PAGE, _type="stream")
            self._sort([_text(key) for key in keys])
            now = time.monotonic()
            if not self._cursor or (seconds is not None and now - start >= seconds):
                break
        self._spent += now - start
        found = self._named()
        if not self._cursor:
            self.names, self.complete = sorted(found), True
            self._next = now + max(SEARCH_INTERVAL, self._spent * SEARCH_FACTOR)
            self._spent = 0.0
            self._verdicts = {k: v for k, v in self._verdicts.items() if k in self._streams}
            self._streams, self._bases = set(), set()
        else:
            # What was there before may come later in this search.
            self.names = sorted(found.union(self.names))

    def _sort(self, keys: list[str]) -> None:
        new = []
        for key in keys:
            side = _SIDE_KEY.fullmatch(key)
            if side is not None:
                # An inbox tells of peers, not of a stream that exists; dead letters are to be seen.
                self._bases.add(side[1])
                if key.endswith(":dead"):
                    self._streams.add(stream_of(side[1]))
                continue
            self._streams.add(key)
            if key not in self._verdicts:
                new.append(key)
        if not new:
            return
        with self._client.pipeline(transaction=False) as pipe:
            for key in new:
                pipe.xrevrange(key, count=1)
            for key, reply in zip(new, pipe.execute(raise_on_error=False), strict=True):
                if reply:
                    self._verdicts[key] = not isinstance(reply, Exception) and _is_ours(reply[0][1])

    def _named(self) -> set[str]:
        return {
            name
            for name in self._streams
            if self._verdicts.get(name)
            or Keys.of(name).control.decode().removesuffix(":control") in self._bases
        }


def _is_ours(fields: dict[bytes, bytes] | None) -> bool:
    """Whether an entry is a request, by its fields."""
    first, *others = fields or (b"",)
    if first == b"from":
        return bool(others) and others[0] in (b"json", b"cbor")
    value = (fields or {}).get(b"data", b"")
    return first == b"data" and value.startswith(b"{") and value.endswith(b"}\n")


def look(client: redis.Redis, names: Sequence[str]) -> list[StreamLook]:
    """Return streams as they are now, in two questions to the server."""
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        for name in names:
            pipe.xlen(Keys.of(name).dead)
            pipe.xinfo_stream(name)
            pipe.xinfo_groups(name)
        clock, *replies = pipe.execute(raise_on_error=False)
        looks = [
            _stream(name, *replies[number * 3 : number * 3 + 3])
            for number, name in enumerate(names)
        ]
        asked = [
            (found, group)
            for found, groups in zip(looks, replies[2::3], strict=True)
            if not isinstance(groups, Exception)
            for group in groups
        ]
        for found, group in asked:
            pipe.xinfo_consumers(found.name, group["name"])
            pipe.xpending(found.name, group["name"])
            if _first_matters(group):
                after = _text(group["last-delivered-id"])
                pipe.xrange(found.name, f"({after}", "+", count=1)
        answers = iter(pipe.execute(raise_on_error=False) if asked else ())
    now = time.time() if isinstance(clock, Exception) else clock[0] + clock[1] / 1e6
    for found, group in asked:
        consumers, held = next(answers), next(answers)
        first = next(answers) if _first_matters(group) else None
        # A group that was removed in between has errors here.
        if isinstance(consumers, list) and isinstance(held, dict):
            found.groups.append(_group(group, consumers, held, first, now))
    return looks


def _first_matters(group: dict[str, Any]) -> bool:
    """Whether to ask for the first request that nobody has taken: its text may be long."""
    lag = group.get("lag")
    return lag is None or (lag > 0 and not group["pending"])


def _stream(name: str, dead: Any, info: Any, groups: Any) -> StreamLook:
    found = StreamLook(name, dead=None if isinstance(dead, Exception) else int(dead), groups=[])
    errors = [reply for reply in (info, groups) if isinstance(reply, ResponseError)]
    if not errors:
        found.length, found.written = int(info["length"]), info.get("entries-added")
    elif "no such key" not in str(errors[0]).lower():
        found.error = errors[0]
    return found


def _group(
    group: dict[str, Any], consumers: list[dict[str, Any]], held: dict[str, Any], first: Any,
    now: float,
) -> GroupLook:  # fmt: skip
    workers, handed_back = [], 0
    for consumer in consumers:
        name, holds = _text(consumer["name"]), int(consumer["pending"])
        if name in (HANDED_BACK.decode(), DELAYED.decode()):
            handed_back += holds
        else:
            workers.append(Worker(name, holds, int(consumer["idle"]) / 1000))
    lag = group.get("lag")
    ids = [held["min"]]
    if isinstance(first, list):
        ids += [item[0] for item in first]
        # Redis doesn't know the lag after entries were deleted, but where there is none it is 0.
        lag = lag if first else 0
    ages = [max(now - int(_text(i).partition("-")[0]) / 1000, 0.0) for i in ids if i]
    return GroupLook(
        _text(group["name"]),
        None if lag is None else int(lag) + handed_back,
        int(held["pending"]) - handed_back,
        max(ages, default=None),
        group.get("entries-read"),
        sorted(workers, key=lambda worker: worker.name),
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
