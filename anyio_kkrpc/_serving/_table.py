"""What other peers may reach: a table, built once when an object is exposed.

A request's path is looked up in the table as a whole. No request makes the program walk attributes,
so a name that isn't in the table, such as ``__class__``, does not exist for a peer.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import inspect
import sys
import types
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import copy
from functools import partial
from typing import Any, ClassVar, Final, Literal, TypeVar, final

import msgspec
from msgspec import UNSET, UnsetType

from .._values._arguments import ArgumentConverter
from .._values._conversion import (
    StreamKind,
    annotations_of,
    convert_value,
    hints_of,
    is_module,
    kind_of,
    result_of,
    unwrap,
)
from ._lifespan import Lifespan, find_lifespan, gives_api
from ._outcomes import Counted

__all__ = ("Exposed", "expose", "in_thread")

E = TypeVar("E", bound=Counted)
F = TypeVar("F", bound=Callable[..., Any])

_IN_THREAD = "__anyio_kkrpc_in_thread__"
_MAX_DEPTH = 16
_DATA = (
    type(None), bool, int, float, complex, str, bytes, bytearray, memoryview,
    list, tuple, set, frozenset, range,
    datetime.date, datetime.time, datetime.timedelta,
    decimal.Decimal, uuid.UUID, enum.Enum, msgspec.Struct,
)  # fmt: skip

Path = tuple[str, ...]


def in_thread(function: F) -> F:
    """Declare that a synchronous handler blocks: it runs in an AnyIO worker thread.

    Handlers that are plain functions and aren't declared so run on the event loop, at once.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"in_thread: {function!r} is asynchronous and never blocks the event loop")
    setattr(function, _IN_THREAD, True)
    return function


class Method(Counted):
    """A function or class that peers may call or construct."""

    __slots__ = ("arguments", "function", "in_thread", "item", "result", "void")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__(name)
        self.function: Callable[..., Any] = function
        self.in_thread: bool = bool(getattr(function, _IN_THREAD, False))
        hints = hints_of(function)
        self.arguments: ArgumentConverter = ArgumentConverter(name, function, hints)
        # What results are checked against, and the items of a result that is a stream.
        self.result: Any = Any
        self.item: Any = Any
        # Whether its result is undefined in JavaScript, and not null.
        self.void: bool = False
        if not isinstance(function, type):
            self.result, self.item = result_of(hints)
            self.void = self.result is type(None)


class Property(Counted):
    """An attribute or item that peers may read, and write if that was allowed."""

    __slots__ = ("_accepts", "_is_item", "_key", "_owner", "item", "result", "writable")

    void = False

    def __init__(self, name: str, owner: Any, key: str, static: object, annotation: Any) -> None:
        super().__init__(name)
        self.writable: bool = False
        self.result: Any = Any
        self.item: Any = Any
        if isinstance(static, property):
            self.result, self.item = result_of(hints_of(static.fget))
            self._accepts = _accepted_by(static)
        else:
            annotation = unwrap(annotation, (ClassVar, Final))
            self.result = self._accepts = kind = kind_of(annotation)
            if isinstance(kind, StreamKind):
                self.item = kind.item
        self._owner = owner
        self._key = key
        self._is_item = isinstance(owner, Mapping)

    def get(self) -> Any:
        """Read it."""
        return self._owner[self._key] if self._is_item else getattr(self._owner, self._key)

    def convert(self, value: Any) -> Any:
        """Return the value as annotated.

        :raises RPCValidationError: if it doesn't fit
        """
        return convert_value(value, self._accepts, self.name, "input")

    def set(self, value: Any) -> None:
        """Write it."""
        if self._is_item:
            self._owner[self._key] = value
        else:
            setattr(self._owner, self._key, value)


def _accepted_by(static: property) -> Any:
    """Return what can be checked of what a setter takes."""
    hints = annotations_of(static.fset)
    hints.pop("return", None)
    return kind_of(next(iter(hints.values()), Any))


@final
class Exposed:
    """The table of what a peer may reach. Made by `expose`.

    :ivar lifespan: makes the context manager in which it is served, if there is one
    :ivar of: makes the table of what entering that gave
    """

    __slots__ = ("_prefixes", "classes", "lifespan", "methods", "objects", "of", "properties")

    def __init__(self) -> None:
        self._prefixes: frozenset[Path] | None = None
        self.lifespan: Callable[[], AbstractAsyncContextManager[Any]] | None = None
        self.of: Callable[[object], Exposed] = lambda found: self
        self.methods: dict[Path, Method] = {}
        self.classes: dict[Path, Method] = {}
        self.properties: dict[Path, Property] = {}
        # What is between: of no use but to be passed back by who holds what is above.
        self.objects: dict[Path, Any] = {}

    def copy(self) -> Exposed:
        """Return the table for one channel, without a lifespan, with counts of its own."""
        copied: dict[int, Any] = {}

        def of(table: dict[Path, E]) -> dict[Path, E]:
            return {path: copied.get(id(one)) or one_of(one) for path, one in table.items()}

        def one_of(one: E) -> E:
            new = copied[id(one)] = copy(one)  # aliases stay the same
            new.begin_to_count()
            return new

        made = Exposed()
        made.methods, made.classes = of(self.methods), of(self.classes)
        made.properties = of(self.properties)
        return made

    def counted(self) -> Iterator[Counted]:
        """Iterate over what is reached, each once, whatever its aliases."""
        tables: tuple[dict[Path, Any], ...] = (self.methods, self.classes, self.properties)
        return iter({id(one): one for table in tables for one in table.values()}.values())

    def entry(self, op: str, path: list[str]) -> Method | Property | None:
        """Return what an operation is about, if there is that."""
        if op == "call":
            return self.methods.get(tuple(path))
        if op == "new":
            return self.classes.get(tuple(path))
        return self.properties.get(tuple(path))

    def depth_of(self, path: list[str]) -> int:
        """Return how many leading segments of a path lead somewhere, less than all of them."""
        if self._prefixes is None:
            paths = (*self.methods, *self.classes, *self.properties)
            self._prefixes = frozenset(p[:n] for p in paths for n in range(1, len(p) + 1))
        depth = 0
        while depth < min(len(path) - 1, _MAX_DEPTH) and tuple(path[: depth + 1]) in self._prefixes:
            depth += 1
        return depth

    def __iter__(self) -> Iterator[str]:
        """Iterate over the dotted names of all that can be reached, sorted."""
        paths = {**self.methods, **self.classes, **self.properties}
        return iter(sorted({".".join(path) for path in paths}))

    def __repr__(self) -> str:
        return f"<Exposed {', '.join(self)}>"


@asynccontextmanager
async def entered(exposed: Exposed) -> AsyncGenerator[Exposed, None]:
    """Enter what a table says; give the table of what is there then, for one channel."""
    if exposed.lifespan is None:
        yield exposed.copy()
        return
    async with exposed.lifespan() as found:
        yield exposed.of(found)


def expose(
    api: object,
    *,
    writable: Iterable[str] = (),
    naming: Literal["python", "camel"] = "python",
    validate_results: bool = True,
    lifespan: Lifespan | UnsetType | None = UNSET,
) -> Exposed:
    """Build the table of what peers may reach of ``api``.

    Reachable are public functions and methods, public data attributes and properties, the same of
    nested objects and dicts, and classes that are attributes or items (for ``construct``). Names
    that start with an underscore never are. Of a module, what its ``__all__`` lists, else the
    public functions and classes defined in it and its public data. What is added to the object
    later isn't reachable.

    An object that is an asynchronous context manager is entered by each channel that serves it,
    before the first request is taken, and left after the last handler has ended. So is what a
    function with `asynccontextmanager` returns, and then what it yields is exposed. An error of
    entering leaves the channel's ``async with``; requests of a group stay there.

    :param api: an object, module or dict of names, or an `asynccontextmanager` function without
        arguments that yields such
    :param writable: dotted names of the properties that peers may set; others are read-only
    :param naming: with ``"camel"``, each name can also be reached as TypeScript would have it:
        ``with_progress`` as ``withProgress``. A name of ``api`` itself comes first.
    :param validate_results: whether what handlers return, items of their streams, properties and
        what they call functions with are checked against their annotations before they are sent. It
        costs time that grows with the size of a value that isn't plain text, a number or bytes.
    :param lifespan: an `asynccontextmanager` function that takes ``api``, entered and left in place
        of ``api`` itself; what it yields is ignored. With ``None`` nothing is entered.
    :raises TypeError: if ``api`` is a class, a function or a plain value
    :raises ValueError: if ``writable`` names something that isn't an exposed property
    """
    if isinstance(writable, str):
        raise TypeError("writable: needs a list of names, not a str")
    if naming not in ("python", "camel"):
        raise ValueError(f"naming: 'python' or 'camel', not {naming!r:.80}")
    deferred = gives_api(api)
    build = partial(
        _build, writable=tuple(writable), camel=naming == "camel", checked=validate_results
    )
    exposed = Exposed() if deferred else build(api)
    exposed.lifespan = find_lifespan(api, lifespan)
    exposed.of = partial(_of, exposed, () if deferred else (api, None), build)
    return exposed


def _of(exposed: Exposed, same: tuple[object, ...], build: Any, found: object) -> Exposed:
    """Return the table of what entering gave; what is added to an object itself isn't in it."""
    if any(found is one for one in same):
        return exposed.copy()
    made: Exposed = build(found)
    return made


def _build(api: object, *, writable: tuple[str, ...], camel: bool, checked: bool) -> Exposed:
    if isinstance(api, (type, *_DATA)) or inspect.isroutine(api):
        hint = f"; make one: {api.__name__}()" if isinstance(api, type) else ""
        raise TypeError(f"expose: needs an object, a module or a dict, not {api!r:.80}{hint}")
    exposed = Exposed()
    _add_members(exposed, api, (), [])
    for name in writable:
        entry = exposed.properties.get(tuple(name.split(".")))
        if entry is None:
            raise ValueError(f"writable: {name!r} is not an exposed property")
        entry.writable = True
    if camel:
        for table in (exposed.methods, exposed.classes, exposed.properties, exposed.objects):
            _add_camel_names(exposed, table)
    if not checked:
        sources: list[Method | Property] = [*exposed.methods.values(), *exposed.properties.values()]
        for source in sources:
            source.result = source.item = Any
            if isinstance(source, Method):
                source.arguments.trust_callbacks()
    return exposed


def _add_camel_names(exposed: Exposed, table: dict[Path, Any]) -> None:
    taken = {**exposed.methods, **exposed.classes, **exposed.properties}
    for path, entry in list(table.items()):
        camel = tuple(_camel(name) for name in path)
        if camel not in taken and camel not in table:
            table[camel] = entry


def _camel(name: str) -> str:
    """Return ``withProgress`` for ``with_progress``, and a name without underscores as it is."""
    head, *rest = [part for part in name.split("_") if part]
    return head + "".join(part[0].upper() + part[1:] for part in rest)


def _add_members(exposed: Exposed, owner: object, path: Path, above: list[object]) -> None:
    if len(path) >= _MAX_DEPTH or any(owner is other for other in above):
        return
    above = [*above, owner]
    hints: dict[str, Any] = {}
    if not isinstance(owner, Mapping):
        hints = annotations_of(owner if is_module(owner) else type(owner))
    for name, value in _members(owner):
        if not isinstance(name, str) or not name or name.startswith("_"):
            continue
        here = (*path, name)
        dotted = ".".join(here)
        if isinstance(value, type):
            exposed.classes[here] = Method(dotted, value)
        elif isinstance(value, property) or _is_data(value):
            annotation = hints.get(name, Any)
            exposed.properties[here] = Property(dotted, owner, name, value, annotation)
            if _has_members(value):
                _add_members(exposed, value, here, above)
        elif callable(value):
            exposed.methods[here] = Method(dotted, value)
        elif not _is_foreign(value):
            exposed.objects[here] = value
            _add_members(exposed, value, here, above)


def _members(owner: object) -> Iterator[tuple[Any, Any]]:
    """Yield names and values; for properties the property itself, which isn't evaluated."""
    if isinstance(owner, Mapping):
        yield from owner.items()
    elif isinstance(owner, types.ModuleType):
        yield from _module_members(owner)
    else:
        names: dict[str, None] = {}
        for cls in type(owner).__mro__:
            if cls.__module__ not in ("builtins", "typing", "abc"):
                names.update(dict.fromkeys(vars(cls)))
        names.update(dict.fromkeys(getattr(owner, "__dict__", ())))
        for name in names:
            if name.startswith("_"):
                continue
            static = inspect.getattr_static(owner, name)
            if isinstance(static, functools.cached_property):
                static = property(static.func)
            if isinstance(static, property):
                yield name, static
                continue
            try:
                yield name, getattr(owner, name)
            except AttributeError:  # a slot without a value
                continue


def _module_members(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    listed = getattr(module, "__all__", None)
    for name, value in vars(module).items():
        if listed is not None:
            if name in listed:
                yield name, value
        elif inspect.isroutine(value) or isinstance(value, type):
            if value.__module__ == module.__name__:
                yield name, value
        elif isinstance(value, Mapping) or _is_data(value):
            yield name, value


def _is_data(value: object) -> bool:
    return isinstance(value, (*_DATA, Mapping)) or (
        hasattr(type(value), "__dataclass_fields__") and not callable(value)
    )


def _has_members(value: object) -> bool:
    """Whether a data value is also a namespace: its own members can be reached one by one."""
    return isinstance(value, (Mapping, msgspec.Struct)) or hasattr(value, "__dataclass_fields__")


def _is_foreign(value: object) -> bool:
    """Whether it belongs to the standard library (a logger, a lock, ...) and stays out."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in sys.stdlib_module_names
    return type(value).__module__.partition(".")[0] in sys.stdlib_module_names
