"""The options of what carries messages are in one place, and a transport over it has them all."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from anyio_kkrpc import ByteStreamTransport
from anyio_kkrpc.kit import Messages
from anyio_kkrpc.kit._carrying import CarryingOptions
from anyio_kkrpc.kit._options import check
from anyio_kkrpc.transports.bytestream import ByteStreamOptions

NAMES = [one.name for one in fields(CarryingOptions)]


@pytest.mark.parametrize("kind", [Messages, ByteStreamTransport])
def test_each_is_in_the_signature_and_told(kind: type) -> None:
    """With one default for all, and a line for ``help()``."""
    parameters = inspect.signature(kind).parameters
    found = {name: parameters[name].default for name in NAMES}
    assert found == {one.name: one.default for one in fields(CarryingOptions)}
    assert all(f":param {name}:" in (kind.__doc__ or "") for name in NAMES)


def test_handed_on() -> None:
    """All but what is the transport's own, as they were given."""
    options = ByteStreamOptions(stream=None, max_queue_size=7, codec="cbor")  # type: ignore[arg-type]
    assert options.carrying() == {
        one.name: {"max_queue_size": 7, "codec": "cbor"}.get(one.name, one.default)
        for one in fields(CarryingOptions)
    }


def test_checked_twice_is_checked_once() -> None:
    """`Messages` checks what a transport has checked already: rules leave what they have made."""
    once = check(CarryingOptions(codec="cbor", write_timeout=3))
    assert check(once) == once
