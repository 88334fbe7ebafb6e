"""``anyio-kkrpc dead``: requests that were given up."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec
import redis
from redis.exceptions import ResponseError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._exceptions import ProtocolError
from .._runtime._log import quoted
from ..codecs import get_codec
from ..records import Request
from ..redis import DeadLetter, RedisStreamsTransport
from ..redis._stream._keys import Keys
from ..redis._stream._places import name_of_shard, parse_shard
from ..redis.dialects._keyed import CALL, parse_keyed
from ._asking import asking

_COUNT = 100_000
# Seconds for Redis to answer.
_TIMEOUT = 5.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _request(letter: DeadLetter) -> dict[str, Any]:
    """Return method and arguments of a request that a Python peer made."""
    for codec in ("json", "cbor"):
        data = letter.fields.get(codec)
        if data is None:
            continue
        try:
            record = get_codec(codec).decode(data)
        except (ProtocolError, ImportError, ValueError):
            return {}
        if isinstance(record, Request):
            return msgspec.to_builtins(record, enc_hook=str)  # type: ignore[no-any-return]
    return {}


def _key(letter: DeadLetter) -> str | None:
    """Return the key of a request that has one."""
    try:
        return parse_keyed(letter.fields[CALL.decode()]).name
    except (KeyError, ProtocolError):
        return None


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(" ", "seconds")


def _describe(letter: DeadLetter) -> dict[str, Any]:
    request = _request(letter)
    return {
        "id": letter.id,
        "entry_id": letter.entry_id,
        "group": letter.group,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "first": _when(letter.first),
        "last": _when(letter.last),
        "method": ".".join(request["p"]) if request else None,
        "key": _key(letter),
        "request": request or None,
        "fields": {
            name: value.decode(errors="backslashreplace") for name, value in letter.fields.items()
        },
    }


def _write(value: Any, *, indent: int = -1) -> None:
    text = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.buffer.write(msgspec.json.format(text, indent=indent) + b"\n")
    sys.stdout.buffer.flush()


def _transport(url: str, stream: str, shards: int, **options: Any) -> RedisStreamsTransport:
    """Return what looks at a stream, which is a group's if it has several shards."""
    return RedisStreamsTransport(
        url, stream=stream, shards=shards, use_consumer_group=shards > 1, **options
    )


async def show_all(url: str, stream: str, shards: int, *, as_json: bool) -> None:
    """List them."""
    async with _transport(url, stream, shards) as transport:
        letters = await transport.dead_letters(_COUNT)
    if as_json:
        for letter in letters:
            _write(_describe(letter))
        return
    if not letters:
        sys.stdout.write(f"{stream} has no dead letters\n")
        return
    title = Text(quoted(stream))
    table = Table("id", "method", "key", "attempts", "given up (UTC)", "reason", title=title)
    for letter in letters:
        what = _describe(letter)
        row = (
            letter.id, what["method"] or "?", what["key"] or "", str(letter.attempts),
            _when(letter.last)[:-6], letter.reason,
        )  # fmt: skip
        # As they are: a name that somebody called may hold markup, or commands for a terminal.
        table.add_row(*(Text(quoted(cell)) for cell in row))
    Console().print(table)


async def show_one(url: str, stream: str, shards: int, letter_id: str) -> None:
    """Show one of them."""
    async with _transport(url, stream, shards) as transport:
        for letter in await transport.dead_letters(_COUNT):
            if letter.id == letter_id:
                _write(_describe(letter), indent=2)
                return
    raise LookupError(f"{stream} has no dead letter {letter_id!r}; see: anyio-kkrpc dead list")


async def retry(
    url: str,
    stream: str,
    shards: int,
    letter_ids: Sequence[str] | None,
    signing_key: bytes | None,
) -> None:
    """Put some back, or all."""
    async with _transport(url, stream, shards, signing_key=signing_key) as transport:
        if letter_ids is None:
            letter_ids = [letter.id for letter in await transport.dead_letters(_COUNT)]
        for letter_id in letter_ids:
            new = await transport.retry_dead_letter(letter_id)
            sys.stdout.write(f"{letter_id} is in {stream} again as {new}\n")
    if not letter_ids:
        sys.stdout.write(f"{stream} has no dead letters\n")


async def purge(url: str, stream: str, shards: int) -> None:
    """Remove all."""
    async with _transport(url, stream, shards) as transport:
        sys.stdout.write(f"{await transport.purge_dead_letters()} removed\n")


def purge_some(url: str, stream: str, shards: int, letter_ids: Sequence[str]) -> None:
    """Remove some.

    :raises LookupError: if one isn't there; the others are removed
    """
    wanted: dict[int, list[str]] = {}
    for letter_id in letter_ids:
        shard = parse_shard(letter_id.rpartition(":")[0] or "0", shards)
        if shard is not None:
            wanted.setdefault(shard, []).append(letter_id)
    removed: set[str] = set()
    for number, ids in wanted.items():
        name = name_of_shard(stream, number)
        with asking(url, _TIMEOUT, name) as client:
            removed.update(one for one in ids if _delete(client, Keys.of(name).dead, one))
    sys.stdout.write(f"{len(removed)} removed\n")
    missing = [one for one in letter_ids if one not in removed]
    if missing:
        raise LookupError(f"{stream} has no dead letter {', '.join(map(repr, missing))}")


def _delete(client: redis.Redis, dead: bytes, letter_id: str) -> bool:
    """Remove one; return whether it was there."""
    try:
        return bool(client.xdel(dead, letter_id.rpartition(":")[2]))
    except ResponseError as exc:
        if "Invalid stream ID" not in str(exc):
            raise
        return False


def purge_older(url: str, stream: str, shards: int, seconds: float) -> None:
    """Remove those that were given up longer ago, by Redis' clock."""
    removed = 0
    for shard in range(shards):
        name = name_of_shard(stream, shard)
        with asking(url, _TIMEOUT, name) as client:
            now, _ = client.time()
            # A letter's id is when it was given up.
            first = max(round((now - seconds) * 1000), 0)
            removed += client.xtrim(Keys.of(name).dead, minid=f"{first}-0", approximate=False)
    sys.stdout.write(f"{removed} removed\n")


def parse_age(text: str) -> float:
    """Return the seconds of an age such as ``90s``, ``30m``, ``12h`` or ``7d``.

    :raises ValueError: if it is none
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text, re.ASCII)
    if match is None:
        raise ValueError(f"needs a number with s, m, h or d, such as 7d, not {text!r:.80}")
    return float(match[1]) * _UNITS[match[2]]
