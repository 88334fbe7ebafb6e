"""``anyio-kkrpc call``: JSON in, JSON out."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import anyio
import msgspec
from msgspec import Struct

from .._calling._proxy import RemoteAPI, with_call_options
from .._channel import RPCChannel
from .._driver._inflow import RemoteStream
from ..redis import RedisStreamsTransport


class Request(Struct, frozen=True, kw_only=True):
    """What is called, and how."""

    method: str
    args: list[Any]
    kwargs: dict[str, Any]
    timeout: float
    to: str | None
    reply: bool
    get: bool
    key: str | None = None
    keep: float | None = None


def parse_argument(text: str) -> Any:
    """Return the value of JSON, and other text as it is.

    :raises ValueError: if it begins as an object, an array or a string of JSON does, and is none
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as exc:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise ValueError(f"{text!r:.80} looks like JSON and isn't: {exc}") from exc
        return text


def run(request: Request, url: str, **options: Any) -> None:
    """Make the call and print what comes, as long as somebody reads it.

    :param options: see `make`
    """
    try:
        anyio.run(partial(make, request, url, **options))
    except BrokenPipeError:  # who reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def make(
    request: Request,
    url: str,
    *,
    stream: str,
    codec: str,
    dialect: Any,
    group: str,
    shards: int = 1,
    signing_key: bytes | None,
) -> None:
    """Make the call and print what comes."""
    # It connects before the deadline of the call begins, so that has a bound of its own.
    connect = min(max(request.timeout, 0.001), 10.0)
    async with (
        RedisStreamsTransport(
            url,
            stream=stream,
            codec=codec,
            dialect=dialect,
            signing_key=signing_key,
            connect_timeout=connect,
            use_consumer_group=request.key is not None or shards > 1,
            shards=shards,
            consumer_group=group,
        ) as transport,
        RPCChannel(transport, timeout=request.timeout) as channel,
    ):
        api: RemoteAPI = channel.get_api(to=request.to)
        keyed: dict[str, Any] = {"key": request.key, "keep": request.keep}
        if not request.reply or request.key is not None:
            api = with_call_options(api, reply=request.reply, **keyed)
        for name in request.method.split("."):
            api = api[name]
        result = await (api if request.get else api(*request.args, **request.kwargs))
        if isinstance(result, RemoteStream):
            async with result:
                async for item in result:
                    write(item)
        elif request.reply:
            write(result)


def write(value: Any) -> None:
    """Print a value as a line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(value, enc_hook=str) + b"\n")
    sys.stdout.buffer.flush()
