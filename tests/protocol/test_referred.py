"""Values with references that came, alone."""

from __future__ import annotations

from typing import Any

import pytest

from anyio_kkrpc._exceptions import OverloadedError
from anyio_kkrpc._protocol._records import Reply
from anyio_kkrpc._protocol._referred import Referred
from anyio_kkrpc._protocol._values import Packed
from anyio_kkrpc._wire_errors import library_error


def test_what_they_stand_for() -> None:
    """Other values are themselves; what is released was taken before."""
    taken: list[tuple[Packed, str | None]] = []

    def take(value: Packed, sender: str | None) -> Any:
        taken.append((value, sender))
        return "object"

    referred, packed = Referred(take), Packed({"a": 1})
    assert referred.of({"a": 1}, "x") == {"a": 1}
    referred.release({"a": 1}, "x")
    assert taken == []
    assert referred.of(packed, "x") == "object"
    assert referred.of_reply(Reply("1"), packed, None) == "object"
    referred.release(packed, "y")
    assert taken == [(packed, "x"), (packed, None), (packed, "y")]


def test_what_is_wrong() -> None:
    """A result is an error then; nobody is told of what nobody waits for."""

    def take(value: Packed, sender: str | None) -> Any:
        raise OverloadedError("too many")

    referred, packed, reply = Referred(take, library_error), Packed({}), Reply("1", {})
    with pytest.raises(OverloadedError):
        referred.of(packed, "x")
    assert referred.of_reply(reply, packed, "x") is None
    assert reply.e == library_error(OverloadedError("too many"))
    referred.release(packed, "x")
