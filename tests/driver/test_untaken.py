"""What is told of references that can't be taken."""

from __future__ import annotations

from anyio_kkrpc import DeliveryError, RemoteError
from anyio_kkrpc._driver._asking import RefusedError
from anyio_kkrpc._driver._untaken import unknown, why_wrong
from anyio_kkrpc._references._given import ReleasedReferenceError, UnknownReferenceError


def test_why() -> None:
    """The library's errors are themselves, without what they were raised in; others are remote."""
    error = DeliveryError("gone")
    try:
        raise error
    except DeliveryError as exc:
        assert why_wrong(exc) is error
    assert error.__traceback__ is None
    assert why_wrong(RefusedError(error)) is error
    other = why_wrong(KeyError("boom"))
    assert isinstance(other, RemoteError)
    assert (other.name, other.message) == ("KeyError", "boom")


def test_those_that_are_not_there() -> None:
    """In kkrpc's words; of a long id its beginning."""
    assert str(unknown("", UnknownReferenceError(""))) == "Missing remote reference id"
    told = str(unknown("x" * 200, UnknownReferenceError("")))
    assert told == f"Unknown remote reference {'x' * 80}"
    assert "has been released" in str(unknown("x", ReleasedReferenceError("x")))
