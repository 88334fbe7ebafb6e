"""Objects of other peers, as they are used here."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable
from types import TracebackType
from typing import Any, Protocol, final

from .._protocol._values import is_callback
from .._references._held import Handle
from .._references._marking import USE

Path = tuple[str, ...]


class Holder(Protocol):
    """What holds such objects: the `Holding` of a channel.

    :ivar relayed: whether what it holds may be passed to other channels
    """

    relayed: bool

    async def ask(
        self,
        root: Root,
        what: str,
        path: Path,
        args: Iterable[Any],
        kwargs: dict[str, Any],
        *,
        undefined: bool = False,
    ) -> Any:
        """Have the owner of an object do something to it.

        :param undefined: whether JavaScript's undefined comes as ``UNSET``
        """

    def check(self, root: Root) -> None:
        """Raise `DeliveryError` if an object was released, or its owner is gone."""

    def release(self, handle: Handle) -> None:
        """Tell its owner at once that it isn't needed any more."""

    def drop(self, handle: Handle) -> None:
        """Note that one use of it was collected. From any thread."""


class Root:
    """Keeps an object held, as long as a proxy of it or of something below it is there.

    :ivar is_function: whether it is a function, and not an object
    """

    __slots__ = ("__weakref__", "handle", "holder", "is_function")

    def __init__(self, holder: Holder, handle: Handle, *, is_function: bool) -> None:
        USE.begun = True
        self.holder: Holder = holder
        self.handle: Handle = handle
        self.is_function: bool = is_function

    def __del__(self) -> None:
        self.holder.drop(self.handle)


class RemoteReference:
    """What stands for an object of another peer, or for something below it."""

    __slots__ = ("__weakref__", "_rpc_path", "_rpc_root")

    _rpc_root: Root
    _rpc_path: Path
    __anyio_kkrpc_by_reference__ = True

    def __init__(self, root: Root, path: Path = ()) -> None:
        object.__setattr__(self, "_rpc_root", root)
        object.__setattr__(self, "_rpc_path", path)

    def __getattr__(self, name: str) -> RemoteMember:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} starts with an underscore and can't be remote")
        return self[name]

    def __getitem__(self, name: str) -> RemoteMember:
        if not isinstance(name, str):
            raise TypeError(f"a remote name is a str, not {type(name).__name__}")
        return RemoteMember(self._rpc_root, (*self._rpc_path, name))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("use: await set_member(reference.name, value)")

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        It has as much time as a call, and no more than the handler that makes it; if this is
        cancelled, so is what runs there.

        :raises RemoteError: what it raised
        :raises MethodNotFoundError: if there is nothing of that name to call
        :raises RPCValidationError: if the arguments don't fit
        :raises DeliveryError: if it was released, its owner is gone, or it isn't known whether it
            ran
        """
        root, path = self._rpc_root, self._rpc_path
        return await root.holder.ask(root, "call" if path else "apply", path, args, kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteReference):
            return NotImplemented
        return (self._rpc_root.handle, self._rpc_path) == (other._rpc_root.handle, other._rpc_path)

    def __hash__(self) -> int:
        return hash((id(self._rpc_root.handle), self._rpc_path))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'.'.join(self._rpc_path)}>"


@final
class RemoteObject(RemoteReference):
    """An object or a function of another peer, got by reference; see `by_reference`.

    ``await session.ask("who?")`` calls a method, ``await session.name`` reads a property, and
    ``session["any name"]`` is for names that Python's syntax hasn't. ``async with session``
    releases it at the end, as `release` does, and the garbage collector if nobody did. Two of the
    same object are equal.
    """

    __slots__ = ()

    async def __aenter__(self) -> RemoteObject:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        release(self)


@final
class RemoteMember(RemoteReference):
    """Something below a `RemoteObject`: ``await`` reads it, and it can be called."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, Any]:
        root = self._rpc_root
        return root.holder.ask(root, "get", self._rpc_path, (), {}).__await__()


def root_of(reference: RemoteReference) -> tuple[Root, Path]:
    """Return what a proxy stands for, and what it means below that."""
    return reference._rpc_root, reference._rpc_path


def release(reference: RemoteReference) -> None:
    """Release an object of another peer, with all that is below it: its owner may forget it.

    It does no I/O, and is harmless if that was done.
    """
    root = reference._rpc_root
    root.holder.release(root.handle)


async def set_member(reference: RemoteReference, value: Any) -> None:
    """Set a property of an object of another peer, which that made writable.

    :param reference: such as ``session.title``
    :raises MethodNotFoundError: if there is none such, or it isn't writable
    :raises RPCValidationError: if the value doesn't fit
    :raises DeliveryError: if it was released, or its owner is gone
    """
    root = reference._rpc_root
    await root.holder.ask(root, "set", reference._rpc_path, (value,), {})


def key_of(value: Any) -> Hashable:
    """Return what tells an object from others: what comes again is another proxy of the same."""
    return value if isinstance(value, RemoteReference) else id(value)


def is_function(value: Any) -> bool:
    """Whether an object is passed as a function."""
    if isinstance(value, RemoteReference):
        root, path = root_of(value)
        return root.is_function and not path
    return is_callback(value)
