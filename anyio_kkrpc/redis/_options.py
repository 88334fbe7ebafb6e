"""The options of the Redis Streams transport, checked before any I/O.

A new one is a line here, with its type, its default and its rule, and a line that says what it is
for in the docstring of `RedisStreamsTransport`, where editors look for it. CONTRIBUTING.md tells
the rest.
"""

from __future__ import annotations

import ssl
import string
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from random import SystemRandom
from typing import Annotated, Any, Literal, TypeAlias

from ..abc import Codec
from ..kit._options import (
    AnyCodec,
    AnyDialect,
    AnyOverflow,
    Count,
    Flag,
    Seconds,
    Text,
    checked,
    count,
    one_of,
    seconds,
)
from ..kit._queue import Overflow
from ._connection._role import Role, longest_silence
from ._connection._target import Target
from ._connection._url import CredentialProvider
from ._stream._places import MOST_SHARDS, address_in, check_name, home_of, name_of_shard, shard_of

ReadFrom: TypeAlias = Literal["master", "replica"]
AnyReadFrom: TypeAlias = Annotated[ReadFrom, one_of(ReadFrom)]
Route: TypeAlias = Literal["sticky", "spread"]
AnyRoute: TypeAlias = Annotated[Route, one_of(Route)]

_ALPHABET = string.ascii_lowercase + string.digits
_SESSION_ID_LENGTH = 26
# As `secrets` has it, which loads hash functions that nothing else here needs.
_random = SystemRandom()
# Seconds that a blocking read may last longer than it should, at least.
_MARGIN = 2.0
# Seconds that a connection may be silent: what stands between here and a server forgets one that is
# silent for longer, without a word to either. Nobody waits so long for a server; whoever gives more
# has milliseconds in mind.
_LONGEST = 300.0
# More replicas than a server has.
_MOST_REPLICAS = 1000


def _key(name: str, value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{name}: needs bytes")
    if len(value) < 16:
        raise ValueError(f"{name}: needs at least 16 bytes")
    return value


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: needs an int, not {value!r:.80}")
    if not 0 <= value <= _MOST_REPLICAS:
        raise ValueError(f"{name}: must be between 0 and {_MOST_REPLICAS}, not {value}")
    return value


def _shards(name: str, value: Any) -> int:
    shards = count(name, value)
    if shards > MOST_SHARDS:
        raise ValueError(f"{name}: must be at most {MOST_SHARDS}, not {value}")
    return shards


def _numbers(name: str, value: Any) -> frozenset[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Collection):
        raise TypeError(f"{name}: needs the numbers of shards, not {value!r:.80}")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{name}: needs the numbers of shards, not {one!r:.80} among them")
    return frozenset(value)


@dataclass(frozen=True, kw_only=True, repr=False)
class ShardOptions:
    """Those of a stream in several shards."""

    shards: Annotated[int, _shards] = 1
    serve_shards: Annotated[Collection[int], _numbers] | None = None
    route: AnyRoute = "sticky"


@dataclass(frozen=True, kw_only=True, repr=False)
class PlainOptions:
    """Those that hold as they are given."""

    stream: Text = "kkrpc-stream"
    consumer_group: Text = "kkrpc-group"
    block_timeout: Annotated[float, seconds(most=_LONGEST)] = 5.0
    max_len: Count | None = None
    max_queue_size: Count = 1000
    max_queue_bytes: Count = 64 * 1024 * 1024
    use_consumer_group: Flag = False
    allow_self_messages: Flag = False
    dialect: AnyDialect = "native"
    remote_peer_id: Text | None = None
    superjson: Flag = True
    max_message_size: Count = 16 * 1024 * 1024
    honor_destroy_signal: Flag = True
    connect_timeout: Annotated[float, seconds(most=_LONGEST)] = 5.0
    inbox_ttl: Annotated[float, seconds(1.0)] = 60.0
    claim_idle: Annotated[float, seconds(0.05)] = 15.0
    max_deliveries: Count = 5
    max_backlog: Count | None = None
    replicas_to_confirm: Annotated[int, _number] = 0
    reconnect_timeout: Seconds | None = None
    health_check_interval: Annotated[float, seconds(0.05, _LONGEST)] = 5.0
    watch_interval: Annotated[float, seconds(0.05, _LONGEST)] = 0.25
    read_from: AnyReadFrom = "master"
    signing_key: Annotated[bytes, _key] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.stream}>"  # some of them are secrets


@dataclass(frozen=True, kw_only=True, repr=False)
class GivenOptions(ShardOptions, PlainOptions):
    """All that a user can give."""

    url: str = field(default="redis://localhost:6379", kw_only=False)
    consumer_name: Text | None = None
    session_id: Text | None = None
    overflow: AnyOverflow | None = None
    codec: AnyCodec = "json"
    credential_provider: CredentialProvider | None = None
    ssl_context: ssl.SSLContext | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Options(ShardOptions, PlainOptions):
    """All that the parts of the transport go by: checked, and what was left out filled in.

    :ivar shard: which of the stream's shards they are for
    """

    target: Target
    consumer_name: str
    session_id: str
    overflow: Overflow
    codec: Codec
    shard: int = 0

    def of_shard(self, shard: int) -> Options:
        """Return what the parts of one shard go by: it is a stream, and this peer is one there."""
        if self.shards == 1:
            return self
        session_id = address_in(self.session_id, shard)
        given = self.consumer_name != f"consumer-{self.session_id}"
        return replace(
            self,
            stream=name_of_shard(self.stream, shard),
            session_id=session_id,
            consumer_name=self.consumer_name if given else f"consumer-{session_id}",
            max_len=None if self.max_len is None else -(-self.max_len // self.shards),
            shard=shard,
        )

    @property
    def home(self) -> int:
        """Which shard this peer is at home in."""
        return home_of(self.session_id, self.shards)

    @property
    def served(self) -> list[int]:
        """The shards whose requests it reads, if it serves."""
        return sorted(range(self.shards) if self.serve_shards is None else self.serve_shards)

    @property
    def inbox_block(self) -> float:
        """Seconds that one blocking read of the inbox lasts. What comes from one that reads no
        requests shows seldom enough that it lives.
        """
        return min(self.block_timeout + self.health_check_interval / 2, _LONGEST)

    def read_silence(self, role: Role | None) -> float:
        """Return the seconds after which a blocking read without an answer is given up.

        :param role: what the server said that it is
        """
        interval = self.health_check_interval
        margin = (interval + longest_silence(role, interval)) / 2
        return self.inbox_block + max(margin, _MARGIN)


def check_options(given: GivenOptions) -> Options:
    """Return the options, with what was left out filled in.

    :raises ValueError: if a value is out of range
    :raises TypeError: if a value has the wrong type; either names the option
    """
    values = checked(given)
    _check_dialect(given)
    if given.read_from == "replica" and given.use_consumer_group:
        raise ValueError(
            "read_from: only a broadcast is read from replicas, not by a consumer group"
        )
    _check_shards(given)
    where = {name: values.pop(name) for name in ("credential_provider", "ssl_context")}
    target = Target.parse(values.pop("url"), **where)
    if given.session_id is None:
        values["session_id"] = new_session_id()
    if given.consumer_name is None:
        values["consumer_name"] = f"consumer-{values['session_id']}"
    if given.overflow is None:
        values["overflow"] = "block" if given.use_consumer_group else "drop_oldest"
    return Options(target=target, **values)


def _check_dialect(given: GivenOptions) -> None:
    if given.remote_peer_id is not None and given.dialect != "kkrpc-2":
        raise ValueError("remote_peer_id: only dialect 'kkrpc-2' has it; use get_api(to=...)")
    if given.signing_key is not None and given.dialect != "native":
        raise ValueError(f"signing_key: peers of dialect {given.dialect!r} can't sign")


def _check_shards(given: GivenOptions) -> None:
    last = given.shards - 1
    if given.serve_shards is not None and not (
        given.serve_shards and all(0 <= shard <= last for shard in given.serve_shards)
    ):
        raise ValueError(
            f"serve_shards: some of 0 to {last} (shards), not {given.serve_shards!r:.80}"
        )
    grouped, session_id = given.use_consumer_group, given.session_id
    if grouped and session_id is not None and shard_of(session_id, MOST_SHARDS):
        raise ValueError(
            f"session_id: must not end as {session_id!r:.80} does: so ends an address in a shard"
        )
    if given.shards == 1:
        return
    if given.dialect != "native":
        raise ValueError(f"shards: peers of dialect {given.dialect!r} know one stream; they have 1")
    if not grouped:
        raise ValueError(
            "shards: only with use_consumer_group; in a broadcast everybody reads everything, "
            "and more streams are more to read"
        )
    check_name(given.stream)


def new_session_id() -> str:
    """Return 26 random characters."""
    return "".join(_random.choice(_ALPHABET) for _ in range(_SESSION_ID_LENGTH))
