"""A client and a server in one process, for tests of what uses either."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple, TypeVar, overload

from .._channel import RPCChannel
from .._serving._table import Exposed, entered
from .._serving._table import expose as build_table
from .._values._conversion import annotations_of, signature_of
from ..middleware import CallNext, Invocation, Middleware
from ..transports.memory import MemoryTransport

P = TypeVar("P")


@overload
def connected(
    api: object,
    protocol: None = None,
    *,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AbstractAsyncContextManager[Any]: ...


@overload
def connected(
    api: object,
    protocol: Callable[..., P],
    *,
    partial: bool = False,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AbstractAsyncContextManager[P]: ...


@asynccontextmanager
async def connected(
    api: object,
    protocol: Any = None,
    *,
    partial: bool = False,
    codec: str | None = "json",
    timeout: float | None = 30.0,
    middleware: Sequence[Middleware] = (),
) -> AsyncGenerator[Any, None]:
    """Serve ``api`` over a pair in memory, and give the proxy that a client would have.

    Values are encoded and decoded and arguments converted as over a wire, so a test sees the same
    errors. A dict of functions makes a fake: ``connected({"add": lambda a, b: 5}, MathApi)``.

    :param api: what `anyio_kkrpc.expose` takes, or the table it made; a lifespan is entered
    :param protocol: a `typing.Protocol` class for `RPCChannel.get_api`. What is exposed must have
        all that it describes, methods with their arguments, properties and nested objects, so that
        a fake doesn't stay behind.
    :param partial: let ``api`` lack what the test doesn't use: who uses it all the same gets
        ``NotImplementedError``, which names it and is no error of a call, so that nothing under
        test takes it for one. What is there must fit.
    :param codec: ``"json"`` or ``"cbor"``; with ``None`` values are passed as they are
    :param timeout: seconds for each call, see `RPCChannel`
    :param middleware: of the serving side
    :raises TypeError: if something of ``protocol`` isn't there, or doesn't fit
    """
    if protocol is not None and not isinstance(protocol, type):
        raise TypeError(f"protocol: needs a Protocol class, not {protocol!r:.80}")
    if partial and protocol is None:
        raise TypeError("partial: needs a protocol, which says what there is")
    ours, theirs = MemoryTransport.pair(codec=codec)
    async with entered(api if isinstance(api, Exposed) else build_table(api)) as table:
        lacking = [] if protocol is None else _check(protocol, table, partial=partial)
        async with (
            ours,
            theirs,
            RPCChannel(theirs, expose=table, timeout=timeout, middleware=middleware),
            RPCChannel(ours, timeout=timeout, middleware=lacking) as channel,
        ):
            yield channel.get_api(protocol)


class _Problem(NamedTuple):
    """What of a Protocol isn't there, or doesn't fit.

    :ivar name: its dotted name, as calls have it
    :ivar lacks: how it is written, if it isn't there
    """

    name: str
    lacks: str | None

    def __str__(self) -> str:
        return (
            f"{self.name}() takes other arguments"
            if self.lacks is None
            else f"it lacks {self.lacks}"
        )


def _check(protocol: type, table: Exposed, *, partial: bool) -> list[Middleware]:
    """Return what refuses calls of what isn't there.

    :raises TypeError: if something doesn't fit, or isn't there and has to be
    """
    problems = list(_problems(protocol, table, ()))
    wrong = [problem for problem in problems if problem.lacks is None or not partial]
    if wrong:
        raise TypeError(f"api: doesn't fit {protocol.__name__}: {'; '.join(map(str, wrong))}")
    lacks = {problem.name: problem.lacks for problem in problems}
    if not lacks:
        return []

    async def refuse(call: Invocation, call_next: CallNext) -> Any:
        if call.method in lacks:
            raise NotImplementedError(
                f"the fake for {protocol.__name__} lacks {lacks[call.method]}"
            )
        return await call_next(call)

    return [refuse]


def _problems(protocol: type, table: Exposed, path: tuple[str, ...]) -> Iterator[_Problem]:
    """Tell what a Protocol class and its bases describe and a table hasn't."""
    for name, annotation in annotations_of(protocol).items():
        if not name.startswith("_"):
            yield from _problems_of(annotation, table, (*path, name))
    for name in dir(protocol):
        member = getattr(protocol, name)
        here = (*path, name)
        if name.startswith("_") or isinstance(member, type):
            continue
        if isinstance(member, property):
            annotation = annotations_of(member.fget).get("return")
            yield from _problems_of(annotation, table, here)
        elif callable(member):
            found, dotted = table.methods.get(here), ".".join(here)
            if found is None:
                yield _Problem(dotted, f"{dotted}()")
            elif not _takes(found.function, inspect.signature(member)):
                yield _Problem(dotted, None)


def _problems_of(annotation: Any, table: Exposed, path: tuple[str, ...]) -> Iterator[_Problem]:
    if getattr(annotation, "_is_protocol", False):
        yield from _problems(annotation, table, path)
    elif path not in table.properties:
        yield _Problem(".".join(path), ".".join(path))


def _takes(function: Callable[..., Any], described: inspect.Signature) -> bool:
    """Whether a function can be called with all the arguments that a method is described with."""
    signature = signature_of(function)
    parameters = list(described.parameters.values())[1:]  # without self
    args = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    kwargs = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    if signature is None:
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
