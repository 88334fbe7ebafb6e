"""The options of the Redis Streams transport, checked before any I/O."""

from __future__ import annotations

import secrets
import ssl
import string
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from msgspec import Struct

from ..abc import Codec
from ..codecs import get_codec
from ._connection._address import Address

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

Overflow: TypeAlias = Literal["drop_oldest", "drop_newest", "block"]
Dialect: TypeAlias = Literal["native", "kkrpc-2", "kkrpc-0"]

_ALPHABET = string.ascii_lowercase + string.digits
_SESSION_ID_LENGTH = 26
# Seconds that a blocking read may last longer than it should, at least.
_MARGIN = 2.0


class Options(Struct, frozen=True, kw_only=True):
    """Checked options; see `RedisStreamsTransport`."""

    address: Address
    stream: str
    consumer_group: str
    consumer_name: str
    block_timeout: float
    max_len: int | None
    session_id: str
    max_queue_size: int
    max_queue_bytes: int
    use_consumer_group: bool
    allow_self_messages: bool
    overflow: Overflow
    dialect: Dialect
    remote_peer_id: str | None
    superjson: bool
    codec: Codec
    max_message_size: int
    honor_destroy_signal: bool
    connect_timeout: float
    inbox_ttl: float
    claim_idle: float
    max_deliveries: int
    max_backlog: int | None
    reconnect_timeout: float | None
    health_check_interval: float
    signing_key: bytes | None

    @property
    def read_silence(self) -> float:
        """Seconds after which a blocking read without an answer is given up."""
        return self.block_timeout + max(self.health_check_interval, _MARGIN)

    @property
    def shortest_silence(self) -> float:
        """Seconds after which a connection is given up at the soonest."""
        return min(self.health_check_interval, self.read_silence)

    def __repr__(self) -> str:
        return f"<Options of {self.stream} at {self.address}>"  # some of them are secrets


def check_options(
    url: str,
    *,
    stream: str,
    consumer_group: str,
    consumer_name: str | None,
    block_timeout: float,
    max_len: int | None,
    session_id: str | None,
    max_queue_size: int,
    max_queue_bytes: int,
    use_consumer_group: bool,
    allow_self_messages: bool,
    overflow: Overflow | None,
    dialect: Dialect,
    remote_peer_id: str | None,
    superjson: bool,
    codec: str | Codec,
    max_message_size: int,
    honor_destroy_signal: bool,
    connect_timeout: float,
    inbox_ttl: float,
    claim_idle: float,
    max_deliveries: int,
    max_backlog: int | None,
    reconnect_timeout: float | None,
    health_check_interval: float,
    signing_key: bytes | None,
    credential_provider: CredentialProvider | None,
    ssl_context: ssl.SSLContext | None,
) -> Options:
    """Return the options, with what was left out filled in.

    :raises ValueError: if a value is out of range
    :raises TypeError: if a value has the wrong type; either names the option
    """
    session_id = new_session_id() if session_id is None else _text("session_id", session_id)
    if consumer_name is None:
        consumer_name = f"consumer-{session_id}"
    if overflow is None:
        overflow = "block" if use_consumer_group else "drop_oldest"
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow: one of {', '.join(get_args(Overflow))}, not {overflow!r}")
    _check_dialect(dialect, remote_peer_id, signing_key)
    return Options(
        address=Address.parse(
            url, credential_provider=credential_provider, ssl_context=ssl_context
        ),
        stream=_text("stream", stream),
        consumer_group=_text("consumer_group", consumer_group),
        consumer_name=_text("consumer_name", consumer_name),
        block_timeout=_seconds("block_timeout", block_timeout),
        max_len=None if max_len is None else _count("max_len", max_len),
        session_id=session_id,
        max_queue_size=_count("max_queue_size", max_queue_size),
        max_queue_bytes=_count("max_queue_bytes", max_queue_bytes),
        use_consumer_group=_flag("use_consumer_group", use_consumer_group),
        allow_self_messages=_flag("allow_self_messages", allow_self_messages),
        overflow=overflow,
        dialect=dialect,
        remote_peer_id=None if remote_peer_id is None else _text("remote_peer_id", remote_peer_id),
        superjson=_flag("superjson", superjson),
        codec=get_codec(codec),
        max_message_size=_count("max_message_size", max_message_size),
        honor_destroy_signal=_flag("honor_destroy_signal", honor_destroy_signal),
        connect_timeout=_seconds("connect_timeout", connect_timeout),
        inbox_ttl=_seconds("inbox_ttl", inbox_ttl, least=1.0),
        claim_idle=_seconds("claim_idle", claim_idle, least=0.05),
        max_deliveries=_count("max_deliveries", max_deliveries),
        max_backlog=None if max_backlog is None else _count("max_backlog", max_backlog),
        reconnect_timeout=None
        if reconnect_timeout is None
        else _seconds("reconnect_timeout", reconnect_timeout),
        health_check_interval=_seconds("health_check_interval", health_check_interval, least=0.05),
        signing_key=None if signing_key is None else _key("signing_key", signing_key),
    )


def _check_dialect(dialect: Any, remote_peer_id: Any, signing_key: Any) -> None:
    if dialect not in get_args(Dialect):
        raise ValueError(f"dialect: one of {', '.join(get_args(Dialect))}, not {dialect!r:.80}")
    if remote_peer_id is not None and dialect != "kkrpc-2":
        raise ValueError("remote_peer_id: only dialect 'kkrpc-2' has it; use get_api(to=...)")
    if signing_key is not None and dialect != "native":
        raise ValueError(f"signing_key: peers of dialect {dialect!r} can't sign")


def new_session_id() -> str:
    """Return 26 random characters."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_SESSION_ID_LENGTH))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: needs a str, not {value!r:.80}")
    if not value or len(value.encode()) > 256:
        raise ValueError(f"{name}: needs 1 to 256 bytes of text")
    return value


def _key(name: str, value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{name}: needs bytes")
    if len(value) < 16:
        raise ValueError(f"{name}: needs at least 16 bytes")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: needs an int, not {value!r:.80}")
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, not {value}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: needs a bool, not {value!r:.80}")
    return value


def _seconds(name: str, value: Any, least: float = 0.001) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: needs seconds, not {value!r:.80}")
    if not least <= value < 1e7:
        raise ValueError(f"{name}: needs between {least} and 10,000,000 seconds, not {value}")
    return float(value)
