"""What type checkers see of a transport's options. mypy and pyright check this file."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import ssl
from collections.abc import Collection
from typing import Literal, Protocol

from redis.credentials import CredentialProvider
from typing_extensions import assert_type

from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc.abc import Codec


class Connects(Protocol):
    """Each option by its name, with all that it takes."""

    def __call__(
        self,
        url: str = ...,
        *,
        stream: str = ...,
        consumer_group: str = ...,
        consumer_name: str | None = ...,
        block_timeout: float = ...,
        max_len: int | None = ...,
        session_id: str | None = ...,
        max_queue_size: int = ...,
        max_queue_bytes: int = ...,
        use_consumer_group: bool = ...,
        allow_self_messages: bool = ...,
        overflow: Literal["drop_oldest", "drop_newest", "block"] | None = ...,
        dialect: Literal["native", "kkrpc-2", "kkrpc-0"] = ...,
        remote_peer_id: str | None = ...,
        superjson: bool = ...,
        codec: str | Codec = ...,
        max_message_size: int = ...,
        honor_destroy_signal: bool = ...,
        connect_timeout: float = ...,
        inbox_ttl: float = ...,
        claim_idle: float = ...,
        max_deliveries: int = ...,
        max_backlog: int | None = ...,
        replicas_to_confirm: int = ...,
        reconnect_timeout: float | None = ...,
        health_check_interval: float = ...,
        watch_interval: float = ...,
        read_from: Literal["master", "replica"] = ...,
        shards: int = ...,
        serve_shards: Collection[int] | None = ...,
        route: Literal["sticky", "spread"] = ...,
        signing_key: bytes | None = ...,
        credential_provider: CredentialProvider | None = ...,
        ssl_context: ssl.SSLContext | None = ...,
    ) -> RedisStreamsTransport: ...


def check_each_option() -> None:
    """All of them are there."""
    connects: Connects = RedisStreamsTransport
    assert_type(connects(), RedisStreamsTransport)
    assert_type(RedisStreamsTransport("redis://localhost", max_len=10), RedisStreamsTransport)


def check_mistakes(name: str, number: int | None) -> None:
    """Mistakes are seen: an ignore that isn't needed is an error too, in both checkers."""
    RedisStreamsTransport(strem="s")  # type: ignore[call-arg]
    RedisStreamsTransport("redis://localhost", "s")  # type: ignore[call-arg]
    RedisStreamsTransport(url=1)  # type: ignore[arg-type]
    RedisStreamsTransport(max_len="5")  # type: ignore[arg-type]
    RedisStreamsTransport(max_queue_size=number)  # type: ignore[arg-type]
    RedisStreamsTransport(overflow=name)  # type: ignore[arg-type]
    RedisStreamsTransport(dialect="kkrpc-9")  # type: ignore[arg-type]
    RedisStreamsTransport(use_consumer_group=None)  # type: ignore[arg-type]
    RedisStreamsTransport(signing_key="secret")  # type: ignore[arg-type]
    RedisStreamsTransport(ssl_context=True)  # type: ignore[arg-type]
