"""What is there while a channel serves: a pool, a model, and what else has to be entered."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

from msgspec import UNSET, UnsetType

# Entered with the object that is exposed.
Lifespan: TypeAlias = Callable[[Any], AbstractAsyncContextManager[Any]]


def find_lifespan(
    api: object, given: Lifespan | UnsetType | None
) -> Callable[[], AbstractAsyncContextManager[Any]] | None:
    """Return what makes the context manager in which ``api`` is served, ``None`` if there is none.

    :raises TypeError: if ``given`` can't be one
    """
    if gives_api(api) and given is not UNSET:
        raise TypeError("lifespan: what is exposed is one itself")
    if given is UNSET:
        if inspect.isfunction(api):
            return api
        return (lambda: api) if _can_be_entered(api) else None  # type: ignore[return-value]
    if given is None:
        return None
    if inspect.isasyncgenfunction(given):
        raise TypeError(f"lifespan: needs @asynccontextmanager above {given.__qualname__}()")
    if not callable(given):
        raise TypeError(f"lifespan: needs a function, not {given!r:.80}")
    return partial(_without_result, given, api)


def gives_api(api: object) -> bool:
    """Whether it isn't exposed itself, but what is got by entering it.

    That is so for functions with `asynccontextmanager`, and for what such a function returns.

    :raises TypeError: if it is nearly one
    """
    if not inspect.isfunction(api):
        return type(api).__module__ == contextlib.__name__ and _can_be_entered(api)
    if inspect.isasyncgenfunction(api):
        raise TypeError(f"expose: needs @asynccontextmanager above {api.__qualname__}()")
    if not inspect.isasyncgenfunction(inspect.unwrap(api)):
        return False
    try:
        inspect.signature(api).bind()
    except TypeError as exc:
        raise TypeError(f"expose: {api.__qualname__}() is to take no arguments: {exc}") from None
    return True


def _can_be_entered(api: object) -> bool:
    return hasattr(type(api), "__aenter__") and hasattr(type(api), "__aexit__")


@asynccontextmanager
async def _without_result(lifespan: Lifespan, api: object) -> AsyncGenerator[None, None]:
    async with lifespan(api):
        yield
