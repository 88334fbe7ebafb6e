"""A codec of a user's that doesn't keep what `Codec` says of errors."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc import MemoryTransport, ProtocolError, RPCChannel
from anyio_kkrpc.abc import Codec
from anyio_kkrpc.codecs import JSONCodec, get_codec
from anyio_kkrpc.codecs._guarded import GuardedCodec
from anyio_kkrpc.records import Record, Request
from tests.bounds import BOUND

REQUEST = Request(id="1", op="call", p=["echo"], a=[1])


class Odd(Codec):
    """JSON, except that it does what it is told when it meets a word."""

    name = "odd"

    def __init__(self, encodes: Any = None, decodes: Any = None) -> None:
        self._json, self._encodes, self._decodes = JSONCodec(), encodes, decodes

    def encode(self, record: Record) -> bytes:
        return _instead(self._encodes, self._json.encode(record))

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        return _instead(self._decodes, self._json.decode(data), bytes(data))


def _instead(what: Any, result: Any, data: bytes | None = None) -> Any:
    if what is None or b"odd" not in (result if data is None else data):
        return result
    if isinstance(what, Exception):
        raise what
    return what


ODD = Request(id="2", op="call", p=["echo"], a=["odd"])


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("x"), RecursionError(), OSError()])
def test_other_errors(error: Exception) -> None:
    codec = get_codec(Odd(encodes=error))
    with pytest.raises(TypeError, match="Odd can't encode it") as caught:
        codec.encode(ODD)
    assert caught.value.__cause__ is error
    data, codec = JSONCodec().encode(ODD), get_codec(Odd(decodes=error))
    with pytest.raises(ProtocolError, match="Odd can't decode it") as found:
        codec.decode(data)
    assert found.value.__cause__ is error


@pytest.mark.parametrize("error", [TypeError("a Decimal"), ProtocolError("not one record")])
def test_errors_that_it_may_have(error: Exception) -> None:
    """They stay what they are, with their texts."""
    if isinstance(error, TypeError):
        with pytest.raises(TypeError, match="^a Decimal$"):
            get_codec(Odd(encodes=error)).encode(ODD)
    else:
        with pytest.raises(ProtocolError, match="^not one record$"):
            get_codec(Odd(decodes=error)).decode(JSONCodec().encode(ODD))


def test_other_results() -> None:
    data = JSONCodec().encode(ODD)
    with pytest.raises(TypeError, match="Odd encodes it as str, not bytes"):
        get_codec(Odd(encodes="text")).encode(ODD)
    with pytest.raises(ProtocolError, match="Odd decodes it as dict, no record"):
        get_codec(Odd(decodes={})).decode(data)


def test_all_else_is_as_before() -> None:
    codec = get_codec(Odd(ValueError(), ValueError()))
    assert codec.name == "odd"
    assert codec.encode(REQUEST) == JSONCodec().encode(REQUEST)
    assert codec.decode(codec.encode(REQUEST)) == REQUEST
    assert type(codec) is GuardedCodec
    assert get_codec(codec) is codec
    plain = JSONCodec()
    assert get_codec(plain) is plain


@pytest.mark.anyio
async def test_a_call_that_cannot_be_decoded() -> None:
    """Its caller is told, and what comes behind it is served."""

    async def echo(value: str) -> str:
        return value

    here, there = MemoryTransport.pair(codec=Odd(decodes=ValueError("no")))
    async with (
        here,
        there,
        RPCChannel(there, expose={"echo": echo}),
        RPCChannel(here, timeout=BOUND) as caller,
    ):
        with pytest.raises(ProtocolError, match="Odd can't decode it"):
            await caller.get_api().echo("odd")
        assert await caller.get_api().echo("even") == "even"
