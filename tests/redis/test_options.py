"""The options of the Redis transport: defaults, and what is refused before any I/O."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc._channel import DEFAULT_TIMEOUT
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._connection._role import Role
from anyio_kkrpc.redis._options import GivenOptions, check_options


def test_defaults() -> None:
    """The defaults are those of kkrpc's adapter."""
    transport = RedisStreamsTransport()
    other = RedisStreamsTransport()
    assert transport.stream == "kkrpc-stream"
    assert transport.consumer_group == "kkrpc-group"
    assert len(transport.session_id) == 26
    assert transport.session_id != other.session_id
    assert transport.consumer_name == f"consumer-{transport.session_id}"
    statistics = transport.statistics()
    assert statistics.queue.max_items == 1000
    assert statistics.queue.max_bytes == 64 * 1024 * 1024
    assert (statistics.sent, statistics.received, statistics.invalid) == (0, 0, 0)
    assert transport.capabilities.broadcast
    assert transport.capabilities.addressing
    options = transport._options
    assert (options.block_timeout, options.max_len, options.overflow) == (5.0, None, "drop_oldest")
    grouped = RedisStreamsTransport(use_consumer_group=True)
    assert grouped._options.overflow == "block"
    assert not grouped.capabilities.broadcast
    assert transport.capabilities.takeover is None
    # A call of a worker that is killed can be run again within the caller's time; and workers of
    # versions before, which say each ten seconds what they hold, aren't taken for dead.
    takeover = grouped.capabilities.takeover
    assert takeover is not None
    assert 10 * 1.25 < takeover <= DEFAULT_TIMEOUT / 2


def test_accessors() -> None:
    """What was given is what is told."""
    transport = RedisStreamsTransport(
        stream="s", consumer_group="g", consumer_name="c", session_id="id", codec=get_codec("cbor")
    )
    assert (transport.stream, transport.consumer_group) == ("s", "g")
    assert (transport.consumer_name, transport.session_id) == ("c", "id")
    assert transport._options.codec.name == "cbor"


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("stream", "", ValueError),
        ("stream", b"s", TypeError),
        ("stream", "s" * 257, ValueError),
        ("consumer_group", 1, TypeError),
        ("consumer_name", "", ValueError),
        ("session_id", "", ValueError),
        ("block_timeout", 0, ValueError),
        ("block_timeout", -1, ValueError),
        ("block_timeout", float("nan"), ValueError),
        ("block_timeout", "5", TypeError),
        ("block_timeout", 300.1, ValueError),
        ("health_check_interval", 301, ValueError),
        ("claim_idle", float("inf"), ValueError),
        ("max_len", 0, ValueError),
        ("max_len", 1.5, TypeError),
        ("max_len", True, TypeError),
        ("max_queue_size", 0, ValueError),
        ("max_queue_bytes", 0, ValueError),
        ("use_consumer_group", 1, TypeError),
        ("allow_self_messages", "no", TypeError),
        ("overflow", "explode", ValueError),
        ("dialect", "kkrpc-9", ValueError),
        ("remote_peer_id", "server", ValueError),
        ("superjson", "yes", TypeError),
        ("codec", "pickle", ValueError),
        ("max_message_size", 0, ValueError),
        ("honor_destroy_signal", None, TypeError),
        ("connect_timeout", 0, ValueError),
        ("inbox_ttl", 0.5, ValueError),
        ("url", "http://localhost", ValueError),
        ("url", "redis://localhost:port", ValueError),
        ("url", 5, TypeError),
        ("credential_provider", object(), TypeError),
        ("ssl_context", object(), TypeError),
        ("shards", 0, ValueError),
        ("shards", 257, ValueError),
        ("shards", 2.0, TypeError),
        ("shards", True, TypeError),
        ("shards", 2, ValueError),  # in a broadcast
        ("serve_shards", [1], ValueError),
        ("serve_shards", [], ValueError),
        ("serve_shards", 0, TypeError),
        ("serve_shards", "0", TypeError),
        ("serve_shards", [True], TypeError),
        ("route", "random", ValueError),
    ],
)
def test_wrong_options(option: str, value: Any, error: type[Exception]) -> None:
    """A wrong option fails in the constructor, and the error names it."""
    with pytest.raises(error, match=option):
        RedisStreamsTransport(**{option: value})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"use_consumer_group": False}, "shards: only with use_consumer_group"),
        ({"dialect": "kkrpc-2"}, "shards: peers of dialect 'kkrpc-2' know one stream"),
        ({"dialect": "kkrpc-0"}, "shards: peers of dialect 'kkrpc-0' know one stream"),
        ({"serve_shards": [4]}, "serve_shards: some of 0 to 3"),
        ({"serve_shards": [-1]}, "serve_shards: some of 0 to 3"),
        ({"stream": "a}b"}, "stream: with shards"),
        ({"session_id": "me@3"}, "session_id: must not end as 'me@3' does"),
        ({"session_id": "me@255", "shards": 1}, "session_id: must not end as 'me@255' does"),
    ],
)
def test_what_shards_need(given: dict[str, Any], text: str) -> None:
    """It is said before anything is connected."""
    options = {"shards": 4, "use_consumer_group": True} | given
    with pytest.raises(ValueError, match=re.escape(text)):
        RedisStreamsTransport("redis://nowhere", **options)


def test_options_of_a_shard() -> None:
    """Each has its stream, its part of the length, and this peer under a name of its own."""
    given = GivenOptions(
        "redis://nowhere",
        stream="jobs",
        session_id="me",
        shards=4,
        use_consumer_group=True,
        max_len=10,
    )
    options = check_options(given)
    assert options.served == [0, 1, 2, 3]
    shard = options.of_shard(2)
    assert (shard.session_id, shard.consumer_name, shard.max_len) == ("me@2", "consumer-me@2", 3)
    assert shard.stream.startswith("jobs/2.")
    first = options.of_shard(0)
    assert (first.stream, first.session_id, first.consumer_name) == ("jobs", "me", "consumer-me")
    named = check_options(replace(given, consumer_name="c", serve_shards=(3, 1)))
    assert named.of_shard(3).consumer_name == "c"
    assert named.served == [1, 3]


@pytest.mark.parametrize("option", ["block_timeout", "connect_timeout", "health_check_interval"])
def test_milliseconds(option: str) -> None:
    """What can't be meant in seconds is refused, in words that say so; the longest is taken."""
    with pytest.raises(ValueError, match=f"{option}: .* it is in seconds, not milliseconds"):
        RedisStreamsTransport(**{option: 5000})  # type: ignore[arg-type]
    RedisStreamsTransport(**{option: 300})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "alone", "copied"),
    [
        ({}, (7.5, 12.5), 10.5),
        ({"health_check_interval": 2.0}, (6.0, 8.0), 8.0),
        ({"health_check_interval": 0.3}, (5.15, 7.15), 7.15),
        ({"block_timeout": 1.0}, (3.5, 8.5), 6.5),
        ({"block_timeout": 300.0}, (300.0, 305.0), 303.0),
        ({"health_check_interval": 300.0}, (155.0, 455.0), 305.5),
    ],
)
def test_how_long_a_read_lasts(
    given: dict[str, Any], alone: tuple[float, float], copied: float
) -> None:
    """A connection that dies in a read is given up after as long as when a read lasted 5 seconds,
    and what was allowed beyond that was found over half an interval later: 12.5 seconds.
    """
    options = check_options(GivenOptions("redis://nowhere", **given))
    assert (options.inbox_block, options.read_silence(Role("master"))) == pytest.approx(alone)
    assert options.read_silence(None) == pytest.approx(alone[1])
    for role in (Role("master", 1), Role("slave", 0, ("there", 6379))):
        assert options.read_silence(role) == pytest.approx(copied)


async def call_all(transport: RedisStreamsTransport) -> None:
    for call in (
        transport.get_stream_info,
        transport.get_all_entries,
        transport.delete_stream,
        transport.dead_letters,
        transport.purge_dead_letters,
        transport.signal_destroy,
        partial(transport.trim_stream, 1),
        partial(transport.retry_dead_letter, "1-1"),
    ):
        with pytest.raises(RuntimeError, match="async with"):
            await call()


def test_before_it_is_entered() -> None:
    """Each method says so, and not that it has been destroyed."""
    anyio.run(call_all, RedisStreamsTransport())


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"dialect": "kkrpc-0", "signing_key": b"0" * 16}, "signing_key"),
        ({"dialect": "kkrpc-2", "signing_key": b"0" * 16}, "signing_key"),
        ({"dialect": "kkrpc-0", "remote_peer_id": "server"}, "remote_peer_id"),
        ({"dialect": "kkrpc-2", "remote_peer_id": ""}, "remote_peer_id"),
    ],
)
def test_options_that_dialects_lack(options: dict[str, Any], option: str) -> None:
    """What a TypeScript peer could not do is refused at once."""
    with pytest.raises(ValueError, match=option):
        RedisStreamsTransport(**options)


@pytest.mark.parametrize("dialect", ["native", "kkrpc-2", "kkrpc-0"])
def test_capabilities_of_dialects(dialect: Any) -> None:
    """They tell what a dialect can carry."""
    capabilities = RedisStreamsTransport(dialect=dialect).capabilities
    native = dialect == "native"
    assert capabilities.keyword_arguments is native
    assert capabilities.cancellation is native
    assert capabilities.deadlines is native
    assert capabilities.addressing
