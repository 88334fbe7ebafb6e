"""What is done to objects that others hold by reference: by a table as of what is exposed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import UNSET

from .._driver._asking import RefusedError
from .._driver._context import run_in_thread
from .._driver._remote_object import RemoteReference
from .._exceptions import MethodNotFoundError, RPCValidationError
from .._protocol._values import is_callback
from .._references._given import Referent
from .._references._marking import by_reference
from .._values._conversion import UnfitResultError, check_own
from ._relaying import relayed
from ._table import Exposed, Method, Property, expose

# What may be done; ``member`` is for what is passed back.
_OPERATIONS = frozenset({"call", "get", "set", "member"})
_UNSUPPORTED = "Unsupported remote reference operation "


def operation(referent: Referent, what: str, path: tuple[str, ...]) -> Callable[..., Any]:
    """Return what does something to an object.

    :raises RefusedError: if there is nothing of the kind
    """
    value = referent.value
    if isinstance(value, RemoteReference):
        return relayed(value, what, path)
    if what == "apply":
        if path or not is_callback(value):
            raise _missing(what, path, 0)
        known = referent.known
        if "applied" not in known:
            known["applied"] = Method("a function", value)
        return _caller(known["applied"])
    if inspect.isroutine(value) or isinstance(value, partial):
        why = f"a function has no {'.'.join(path)[:200]!r} to {what[:40]}"
        raise RefusedError(MethodNotFoundError(why), 0)
    if what not in _OPERATIONS:
        raise RefusedError(MethodNotFoundError(f"{_UNSUPPORTED}{what[:40]}"))
    if what == "get" and not path:
        return lambda: by_reference(value)
    table = _table(referent)
    method = table.methods.get(path) if what in ("call", "member") else None
    if method is not None:
        return _caller(method) if what == "call" else lambda: method.function
    entry = table.properties.get(path)
    if entry is not None and what in ("get", "member"):
        return entry.get
    if entry is not None and what == "set" and entry.writable:
        return partial(_write, entry)
    if what == "member" and path in table.objects:
        return lambda: table.objects[path]
    if what == "member" and path in table.classes:
        return lambda: table.classes[path].function
    raise _missing(what, path, table.depth_of(list(path)))


def _table(referent: Referent) -> Exposed:
    value, known = referent.value, referent.known
    if isinstance(value, Exposed):
        return value
    if "table" not in known:
        known["table"] = _exposed(value)
    table: Exposed = known["table"]
    return table


def _exposed(value: Any) -> Exposed:
    try:
        return expose(value, lifespan=None)
    except TypeError:  # there is nothing of it to expose
        return Exposed()


def _missing(what: str, path: tuple[str, ...], at: int) -> RefusedError:
    name = ".".join(path)[:200] or "the object itself"
    return RefusedError(MethodNotFoundError(f"{name} can't be reached by {what[:40]!r}"), at)


def _write(entry: Property, value: Any) -> bool:
    try:
        entry.set(entry.convert(value))
    except RPCValidationError as exc:
        raise RefusedError(exc) from None
    return True


def _caller(method: Method) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await _call(method, list(args), kwargs)

    return call


async def _call(method: Method, args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        if any(value is UNSET for value in args):
            args, kwargs = method.arguments.without_undefined(args, kwargs)
        checked, kwargs = method.arguments.convert(args, kwargs)
    except RPCValidationError as exc:
        raise RefusedError(exc) from None
    if method.in_thread:
        result = await run_in_thread(method.function, *checked, **kwargs)
    else:
        result = method.function(*checked, **kwargs)
        if inspect.isawaitable(result):
            result = await result
    try:
        result = check_own(result, method.result, method.name)
    except UnfitResultError as exc:
        raise RefusedError(exc) from None
    return UNSET if result is None and method.void else result
