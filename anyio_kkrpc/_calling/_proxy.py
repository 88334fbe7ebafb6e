"""The remote API as an object: attribute access makes paths, and never does I/O."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar, final

from msgspec import UNSET
from msgspec.structs import replace

from .._driver._inflow import RemoteStream
from .._driver._remote_object import RemoteObject
from ..abc import ItemBounds
from ._calls import Calls
from ._keyed import KeyOptions, kept_stream, key_options
from ._options import CallOptions, check_flag, check_metadata, check_shard_key, check_timeout
from ._question import Question
from ._typed import NO_TYPES, TypesOf

__all__ = ("RemoteAPI", "RemoteCall", "with_call_options")

P = TypeVar("P")


@final
class RemoteCall(Coroutine[Any, Any, Any]):
    """A call that is made when it is awaited, iterated over, or entered as a context manager.

    ``await call`` gives the result. ``async for item in call`` and ``async with call as items`` are
    for results that are streams. It is a coroutine too, so that ``group.start_soon(api.method, 1)``
    works.
    """

    __slots__ = ("_args", "_coroutine", "_kwargs", "_proxy", "_stream", "_used")

    def __init__(self, proxy: RemoteAPI, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._proxy = proxy
        self._args = args
        self._kwargs = kwargs
        self._stream: RemoteStream[Any] | RemoteObject | None = None
        self._used = False
        self._coroutine: Coroutine[Any, Any, Any] | None = None

    def send(self, value: Any) -> Any:
        """Step it as a coroutine."""
        if self._coroutine is None:
            self._coroutine = self._make()
        return self._coroutine.send(value)

    def throw(self, *exc: Any) -> Any:
        """Raise an exception in it as a coroutine."""
        if self._coroutine is None:
            self._coroutine = self._make()
        return self._coroutine.throw(*exc)

    def close(self) -> None:
        """Give it up; a call that was not made yet isn't made."""
        self._used = True
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        proxy = self._proxy
        if self._used or proxy._rpc_types is not NO_TYPES or proxy._rpc_calls.middleware:
            return self._make().__await__()
        self._used = True  # the short way of most
        path, options = list(proxy._rpc_path), proxy._rpc_options
        request = proxy._rpc_calls.request
        return request("call", path, options, self._args, self._kwargs).__await__()

    async def _make(self) -> Any:
        if self._used:
            self._check_unused()
        self._used = True
        proxy = self._proxy
        path, types, calls = proxy._rpc_path, proxy._rpc_types, proxy._rpc_calls
        # Not by ask(): each step counts here.
        if calls.middleware:
            return await calls.intercept(
                "call",
                list(path),
                proxy._rpc_options,
                args=self._args,
                kwargs=self._kwargs,
                convert=lambda result: types.convert_result(result, path),
            )
        result = await calls.request(
            "call", list(path), proxy._rpc_options, self._args, self._kwargs
        )
        return result if types is NO_TYPES else types.convert_result(result, path)

    def _check_unused(self) -> None:
        if self._used:
            raise RuntimeError("a call can be made once; call the method again")

    async def _open(self) -> Any:
        if self._proxy._rpc_options.keyed is not None:
            self._used = True
            raise kept_stream(self._proxy._rpc_path)
        result = await self._make()
        if not isinstance(result, (RemoteStream, RemoteObject)):
            raise TypeError(
                f"{'.'.join(self._proxy._rpc_path)}() did not return a stream but "
                f"{type(result).__name__}"
            )
        return result

    def __aiter__(self) -> AsyncIterator[Any]:
        self._check_unused()
        return _LazyStream(self)

    async def __aenter__(self) -> Any:
        self._stream = await self._open()
        return self._stream

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            await self._stream.__aexit__(exc_type, exc, tb)

    def __del__(self) -> None:
        if not self._used:
            name = ".".join(self._proxy._rpc_path)
            warnings.warn(
                f"remote call {name}() was never awaited", RuntimeWarning, stacklevel=2, source=self
            )


def question_of(call: object, calls: Calls) -> Question:
    """Return what a call asks that was not made yet; it can't be made any more.

    :param calls: of the channel that it has to be of
    :raises TypeError: if it is none of this channel's
    :raises RuntimeError: if it was made already
    """
    if not isinstance(call, RemoteCall) or call._proxy._rpc_calls is not calls:
        raise TypeError(f"question: needs a call of this channel, not {call!r:.80}")
    call._check_unused()
    call._used = True
    proxy = call._proxy
    path, options, types = proxy._rpc_path, proxy._rpc_options, proxy._rpc_types
    return Question(path, call._args, call._kwargs, options, types)


class _LazyStream:
    """``async for item in api.method()``: the call is made when the first item is wanted."""

    __slots__ = ("_call", "_stream")

    def __init__(self, call: RemoteCall) -> None:
        self._call = call
        self._stream: RemoteStream[Any] | None = None

    def __aiter__(self) -> _LazyStream:
        return self

    async def __anext__(self) -> Any:
        stream = self._stream
        if stream is None:
            stream = self._stream = await self._call._open()
        return await stream.__anext__()

    async def aclose(self) -> None:
        """End the stream."""
        if self._stream is not None:
            await self._stream.aclose()


@final
class RemoteAPI:
    """What the other side exposes.

    ``api.name`` and ``api["any name"]`` go deeper, ``api.name(...)`` makes a call, and
    ``await api.name`` reads a property.
    """

    __slots__ = ("__dict__", "_rpc_calls", "_rpc_options", "_rpc_path", "_rpc_types")

    _rpc_calls: Calls
    _rpc_path: tuple[str, ...]
    _rpc_options: CallOptions
    _rpc_types: TypesOf

    def __init__(
        self,
        calls: Calls,
        path: tuple[str, ...],
        options: CallOptions,
        types: TypesOf = NO_TYPES,
    ) -> None:
        set_slot = object.__setattr__
        set_slot(self, "_rpc_calls", calls)
        set_slot(self, "_rpc_path", path)
        set_slot(self, "_rpc_options", options)
        set_slot(self, "_rpc_types", types)

    def __getattr__(self, name: str) -> RemoteAPI:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} starts with an underscore and can't be remote")
        child = self[name]
        self.__dict__[name] = child  # the next access finds it without coming here
        return child

    def __getitem__(self, name: str) -> RemoteAPI:
        if not isinstance(name, str):
            raise TypeError(f"a remote name is a str, not {type(name).__name__}")
        return RemoteAPI(
            self._rpc_calls,
            (*self._rpc_path, name),
            self._rpc_options,
            NO_TYPES if self._rpc_types is NO_TYPES else self._rpc_types.child(name),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("use: await channel.set_property(name, value)")

    def __call__(self, /, *args: Any, **kwargs: Any) -> RemoteCall:
        callbacks = self._rpc_types.callbacks
        if callbacks is not None:
            args, kwargs = callbacks.bound(args, kwargs, ".".join(self._rpc_path))
        return RemoteCall(self, args, kwargs)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._get().__await__()

    async def _get(self) -> Any:
        path, types, calls = self._rpc_path, self._rpc_types, self._rpc_calls
        if calls.middleware:
            return await calls.intercept(
                "get",
                list(path),
                self._rpc_options,
                convert=lambda value: types.convert_value(value, path),
            )
        value = await calls.request("get", list(path), self._rpc_options)
        return types.convert_value(value, path)

    def __repr__(self) -> str:
        return f"<RemoteAPI {'.'.join(self._rpc_path)}>"

    def _with(self, options: CallOptions) -> RemoteAPI:
        return RemoteAPI(self._rpc_calls, self._rpc_path, options, self._rpc_types)


def with_call_options(
    api: P,
    *,
    timeout: float | Any | None = UNSET,
    reply: bool = True,
    metadata: dict[str, Any] | None = None,
    idempotent: bool | None = None,
    fail_fast: bool | None = None,
    key: str | None = None,
    keep: float | None = None,
    keep_errors: float | None = None,
    run_within: float | None = None,
    cancel_when_left: bool = False,
    shard_key: str | None = None,
    bounds: ItemBounds | None = None,
) -> P:
    """Return a proxy like ``api`` whose calls are made with these options.

    :param timeout: seconds until `RPCTimeoutError`; ``None`` waits for ever
    :param reply: if false, a call returns ``None`` as soon as the request was accepted for
        delivery; its result and errors are not reported
    :param metadata: travels with each request, see `current_call`
    :param idempotent: whether it does no harm to make a call again, see
        `anyio_kkrpc.middleware.retry`; as ``api`` says if not given
    :param fail_fast: whether a call fails with `DeliveryError` at once if it is for a consumer
        group that no worker serves, in place of waiting for one; as ``api`` says if not given, else
        as the channel does
    :param key: makes a call run once while its result is kept: a second one with the same key, of
        any peer, waits for the first, or gets what that came to; 1 to 512 bytes. Leaving such a
        call, by its timeout too, leaves it running. The other options are for calls with a key.
    :param keep: seconds for which the result is kept, from when it is there; 3600 if not given
    :param keep_errors: the same for what the handler raises; as ``keep`` if not given, 0 to run the
        call again at once. What did not run isn't kept.
    :param run_within: seconds that the handler may take; any number if not given
    :param cancel_when_left: whether a call that is left is cancelled, if nobody else waits for it
    :param shard_key: where a stream has shards, calls of this peer that have the same one reach the
        same shard, in the order in which they were sent; else it means nothing. A call with a
        ``key`` goes to the shard of that.
    :param bounds: how much is kept of a result that is a stream; see `CallHandle.items`
    :raises TypeError: if ``api`` is not a proxy from `RPCChannel.get_api`
    :raises ValueError: if a number is out of range, or ``key`` is given and the transport keeps no
        calls: Redis does with a consumer group, and memory
    """
    if not isinstance(api, RemoteAPI):
        raise TypeError(f"with_call_options: needs a proxy from get_api(), not {api!r:.80}")
    rest: dict[str, Any] = {"cancel_when_left": cancel_when_left, "bounds": bounds}
    keyed = key_options(key, keep, keep_errors, run_within, **rest)
    more = (idempotent, fail_fast, keyed, shard_key)
    return _changed(api, timeout, reply, metadata, *more)  # type: ignore[return-value]


def telling_undefined(api: Any) -> Any:
    """Return a proxy like ``api`` whose results are UNSET where JavaScript's are undefined."""
    return api._with(replace(api._rpc_options, undefined=True))


def _changed(
    api: RemoteAPI,
    timeout: Any,
    reply: bool,
    metadata: dict[str, Any] | None,
    idempotent: bool | None,
    fail_fast: bool | None,
    keyed: KeyOptions | None,
    shard_key: str | None,
) -> RemoteAPI:
    """Return a proxy with other options; see `with_call_options`."""
    check_timeout(timeout)
    check_metadata(metadata)
    if fail_fast is not None:
        check_flag("fail_fast", fail_fast)
    old = api._rpc_options
    if keyed is not None:
        api._rpc_calls.check_keyed(old.to)
    if shard_key is not None:
        check_shard_key(shard_key, old.to, keyed or old.keyed)
    elif keyed is None:
        shard_key = old.shard_key
    options = replace(
        old,
        timeout=old.timeout if timeout is UNSET else timeout,
        reply=reply,
        metadata=old.metadata if metadata is None else metadata,
        idempotent=old.idempotent if idempotent is None else idempotent,
        fail_fast=old.fail_fast if fail_fast is None else fail_fast,
        keyed=old.keyed if keyed is None else keyed,
        shard_key=shard_key,
    )
    return api._with(options)
