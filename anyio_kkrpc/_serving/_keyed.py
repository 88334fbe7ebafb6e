"""What is different for the handler of a call that has a key."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from contextvars import Context
from functools import partial
from typing import Any

from anyio import get_cancelled_exc_class
from msgspec.structs import replace

from .._driver._context import CallInfo, run_in_context
from .._driver._core import Core
from .._driver._endings import Outcome, tell
from .._protocol._calls import Handling
from .._protocol._values import is_stream, stream_envelope
from .._references._marking import USE, has_references
from .._values._conversion import check_own
from ..abc import Envelope, KeyedCalls
from ..middleware import StreamEnd
from ._intercepting import watchers_in
from ._table import Method, Property

__all__ = ("keep_stream", "with_key")


def with_key(info: CallInfo, envelope: Envelope, keeps: KeyedCalls | None) -> CallInfo:
    """Return what a handler can learn of its call, with the key, and a way to tell of progress."""
    if keeps is None:
        return replace(info, key=envelope.key)
    report, resume = partial(keeps.report, envelope), partial(keeps.items.resume, envelope)
    return replace(info, key=envelope.key, _report=report, _resume=resume)


async def keep_stream(
    core: Core,
    value: Any,
    envelope: Envelope,
    source: Method | Property,
    handling: Handling,
    context: Context,
) -> Any:
    """Have the items of a result that is a stream kept; return what stands for it in the reply.

    Anything else is returned as it is. The handler serves its call until the stream has ended.

    :raises TypeError: for references: they would end with this process, and the key would not
    """
    _refuse_references(value)
    keeps, watchers = core.transport.keyed, watchers_in(context)
    if keeps is None or not is_stream(value):
        return value
    handling.driver.waits()
    stream = _Stream(value, partial(keeps.items.keep_item, envelope), source)
    failure: Exception | None = None
    end = StreamEnd("lost", 0)
    try:
        try:
            await run_in_context(context, stream.run())
        except Exception as exc:
            failure = exc
        await keeps.items.keep_rest(envelope)  # what came before an error is read before it
        outcome: Outcome = "ok" if failure is None else "failed"
        end = StreamEnd(outcome, stream.count, failure)
    finally:
        tell(watchers, end)
    if failure is not None:
        raise failure
    return stream_envelope("items")


def _refuse_references(value: Any) -> None:
    if USE.begun and has_references(value):
        raise TypeError("a call with a key can't return references")


class _Stream:
    """Runs a source, all in one task, so that it may hold cancel scopes around what it yields.

    :ivar count: how many items it has yielded
    """

    def __init__(self, source: Any, keep: Callable[[Any], Any], of: Method | Property) -> None:
        self._iterator: Any = type(source).__aiter__(source)
        self._keep = keep
        self._kind, self._name = of.item, of.name
        self.count = 0

    async def run(self) -> None:
        """Have all its items kept, and close it."""
        if hasattr(self._iterator, "aclose"):
            async with aclosing(self._iterator):
                await self._run()
        else:
            await self._run()

    async def _run(self) -> None:
        step = type(self._iterator).__anext__
        try:
            item = await step(self._iterator)
            while True:
                if self._kind is not Any:
                    item = check_own(item, self._kind, self._name)
                _refuse_references(item)
                self.count += 1
                cancel: BaseException | None = None
                try:
                    await self._keep(item)
                except get_cancelled_exc_class() as exc:  # it is kept all the same
                    cancel = exc
                item = await (step(self._iterator) if cancel is None else self._raise(cancel))
        except StopAsyncIteration:
            return

    async def _raise(self, exc: BaseException) -> Any:
        """Raise a cancel at the source's yield, as a scope there may be meant; return the next item
        if the source goes on.
        """
        throw = getattr(self._iterator, "athrow", None)
        if throw is None:
            raise exc
        return await throw(exc)  # if it is cancelled still, keeping that raises
