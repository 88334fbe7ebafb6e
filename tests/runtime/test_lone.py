"""One error out of a task group."""

from __future__ import annotations

import sys

import pytest

from anyio_kkrpc._runtime._lone import lone_error

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


def test_one_arrives_as_itself() -> None:
    """With the cause and the context that it had, and without the group."""
    error, cause, context = ValueError("it"), KeyError("cause"), KeyError("context")
    error.__cause__, error.__context__ = cause, context
    with pytest.raises(ValueError, match="it") as caught, lone_error():
        raise ExceptionGroup("tasks", [error])
    assert caught.value is error
    assert (error.__cause__, error.__context__) == (cause, context)


def test_several_stay_together() -> None:
    group = ExceptionGroup("tasks", [ValueError("a"), ValueError("b")])
    with pytest.raises(ExceptionGroup) as caught, lone_error():
        raise group
    assert caught.value is group


def test_a_group_of_the_user_stays_one() -> None:
    """One level is taken off."""
    inner = ExceptionGroup("of the user", [ValueError("a")])
    with pytest.raises(ExceptionGroup) as caught, lone_error():
        raise ExceptionGroup("tasks", [inner])
    assert caught.value is inner


def test_what_is_no_group() -> None:
    with pytest.raises(KeyError), lone_error():
        raise KeyError("it")
    with lone_error():
        pass
    with pytest.raises(KeyboardInterrupt), lone_error():
        raise BaseExceptionGroup("tasks", [KeyboardInterrupt()])
