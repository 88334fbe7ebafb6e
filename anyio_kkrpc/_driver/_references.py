"""Objects by reference: those that others hold of this side, and those of others held here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

from msgspec import UNSET

from .._exceptions import (
    DeliveryError,
    OverloadedError,
    ProtocolError,
    RPCError,
)
from .._protocol._dependencies import Role
from .._protocol._events import ReferenceUsed
from .._protocol._records import CallbackRelease
from .._protocol._values import REFERENCES, Packed
from .._references._given import (
    ANYBODY,
    GivenTable,
    Passing,
    Referent,
    UnknownReferenceError,
)
from .._references._marking import USE, Reference, marked, packed, references_in, unpacked
from .._wire_errors import Fields, as_it_is, handler_error
from ._asking import Answering, RefusedError
from ._core import Core
from ._holding import Holding
from ._remote_object import (
    RemoteReference,
    is_function,
    key_of,
    root_of,
)
from ._untaken import unknown, why_wrong

# What runs at a time of all that is done to references here.
MAX_RUNNING = 1000

# Returns what does an operation to an object: called with the object, the operation's name and the
# path. Raises `RefusedError` if there is nothing of the kind.
Operation: TypeAlias = Callable[[Referent, str, "tuple[str, ...]"], Callable[..., Any]]


class References:
    """Those of one channel.

    :ivar given: what others hold of this side
    :ivar holding: what this side holds of others
    """

    def __init__(self, core: Core, operation: Operation) -> None:
        self._core = core
        self._operation = operation
        # What begins so was made here.
        self._prefix = core.conversation.prefix
        self.given: GivenTable = GivenTable(self._prefix, key_of=key_of)
        self.holding: Holding = Holding(core)
        self._holders: set[str | None] = set()
        self._running: set[Answering] = set()
        self._anybody = ANYBODY if core.transport.capabilities.addressing else None
        self._dependencies = core.conversation.functions.dependencies

    def relay(self) -> None:
        """Let references pass to and from other channels."""
        self.holding.relay()

    def open(self) -> None:
        """Find out what event loop there is."""
        self.holding.open()

    # On the way out

    def passing(
        self,
        to: str | None,
        args: Iterable[Any] | None,
        kwargs: dict[str, Any] | None,
        value: Any = UNSET,
        *,
        lasts: bool = True,
        to_all: bool = False,
    ) -> PassedArguments | None:
        """Return what a call passes by reference, ``None`` if it passes nothing so.

        :param to: whom it is for
        :param lasts: whether there will be an answer
        :param to_all: whether it is for all peers, unless it is for one
        :raises TypeError: if it has references that can't be passed so
        :raises OverloadedError: if there are too many
        """
        passing = Passing(self._anybody if to is None else to)

        def export(item: Any) -> Reference:
            if self._is_back(item):
                if passing.to == ANYBODY and not to_all:
                    passing.to = root_of(item)[0].handle.owner
                return self._back(item, passing.to)
            value = marked(item)
            if not lasts:
                raise TypeError(
                    "a call that wants no reply can't pass references: nobody would say how long "
                    "they are needed"
                )
            one = self.given.pass_on(passing, value)
            return Reference(one.id, is_function(value), ())

        try:
            made = PassedArguments(
                self,
                passing,
                None if args is None else [self._packed(one, export) for one in args],
                {name: self._packed(one, export) for name, one in (kwargs or {}).items()},
                self._packed(value, export),
            )
        except BaseException:
            self.given.end(passing)
            raise
        return made if made.begin() else None

    def give(self, value: Any, peer: str | None) -> Any:
        """Return a result or an item as it travels, with what stands for references in it.

        :raises TypeError: if it has references that can't be passed so
        :raises OverloadedError: if that peer holds too many
        """
        given: list[str] = []

        def export(item: Any) -> Reference:
            if self._is_back(item):
                return self._back(item, peer)
            value = marked(item)
            one = self.given.give(value, peer)
            given.append(one.id)
            return Reference(one.id, is_function(value), ())

        try:
            made = self._packed(value, export)
        except BaseException:
            for one in given:
                self.given.take_back(one, peer)
            raise
        if given:
            self._watch(peer)
        return made

    def _packed(self, value: Any, export: Callable[[Any], Reference]) -> Any:
        made = packed(value, export)
        return value if made is value else Packed({REFERENCES: made})

    def _is_back(self, item: Any) -> bool:
        """Whether something is passed back to who has it; what a relay passes on isn't.

        :raises TypeError: if it is of a channel that isn't joined to this one
        """
        if not isinstance(item, RemoteReference):
            return False
        root, _ = root_of(item)
        if root.holder is self.holding:
            return True
        if not (self.holding.relayed or root.holder.relayed):
            raise TypeError("a reference of another channel can't be passed")
        root.holder.check(root)
        return False

    def _back(self, item: RemoteReference, peer: str | None) -> Reference:
        root, path = root_of(item)
        if root.handle.owner != peer:
            raise TypeError("a reference can be passed to the peer that has the object only")
        self.holding.check(root)
        return Reference(root.handle.id, root.is_function, path)

    def error(self, exc: BaseException, peer: str | None) -> dict[str, Any]:
        """Return what travels for an exception that was raised for a peer: its fields may have
        references.
        """
        give = partial(self.give, peer=peer) if USE.begun else as_it_is
        return handler_error(exc, traceback=self._core.send_tracebacks, give=give)

    def not_sent(self, value: Any, peer: str | None) -> None:
        """Take back what a result, an item or an error gave that was not sent."""
        values = value.values() if value.__class__ is Fields else (value,)
        for one in values:
            for reference_id in references_in(one):
                self.given.take_back(reference_id, peer)
        self._unwatch(peer)

    def begin(self, passing: Passing) -> None:
        """Note that a call is about to be sent: who runs it looks whether this side is there."""
        self._dependencies.add(_known(passing.to), "reader", passing)

    def end(self, passing: Passing) -> None:
        """Note that a call is over."""
        self._dependencies.remove(_known(passing.to), "reader", passing)
        for peer in self.given.end(passing):
            self._watch(peer)

    # What comes in

    def take(self, value: Packed, sender: str | None) -> Any:
        """Return a value that came, with objects in place of what stands for them.

        If one of them is wrong, the others were given all the same, and are released.

        :raises RPCError: if it means what isn't there, or what can't be read
        """
        wrong: list[RPCError] = []

        def one(reference: Reference) -> Any:
            try:
                return self._take(reference, sender)
            except Exception as exc:
                wrong.append(why_wrong(exc))

        try:
            made = unpacked(value[REFERENCES], one)
        except ValueError as exc:
            raise ProtocolError(str(exc)) from None
        if wrong:
            del made, wrong[1:]
            raise wrong.pop() from None  # kept by no frame of its own
        return made

    def _take(self, reference: Reference, sender: str | None) -> Any:
        try:
            referent = self.given.find(reference.id, sender)
        except UnknownReferenceError as exc:
            if reference.id.startswith(self._prefix):
                raise unknown(reference.id, exc) from None
        else:
            if not reference.path:
                return referent.value
            return self._operation(referent, "member", reference.path)()
        return self.holding.take(reference, sender)

    def use(self, event: ReferenceUsed) -> None:
        """Do what another peer wants of an object that it holds."""
        core, record, sender = self._core, event.record, event.sender
        if record.p is UNSET or record.r is UNSET:
            core.refuse(ProtocolError("the use of a reference says what is wanted, and for whom"))
            return
        budget = None if record.d is UNSET else record.d
        try:
            answering = Answering(core, record.r, sender, budget)
        except ProtocolError as exc:
            core.refuse(exc)
            return
        if len(self._running) >= MAX_RUNNING:
            answering.refuse(OverloadedError(f"{MAX_RUNNING} uses of references run already"))
            return
        what, *path = record.p or [""]
        what = "" if what == "member" else what  # that is for what is passed back
        use = partial(self._do, record.id, sender, what, tuple(path))
        self._running.add(answering)

        async def run() -> None:
            try:
                await answering.run(use, event.args, event.kwargs)
            finally:
                self._running.discard(answering)

        core.start_standing(run, "reference")

    def _do(
        self,
        reference_id: str,
        sender: str | None,
        what: str,
        path: tuple[str, ...],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if what == "release":  # what kkrpc says is answered
            self.given.release(reference_id, sender)
            self._unwatch(sender)
            return True
        try:
            referent = self.given.use(reference_id, sender)
        except UnknownReferenceError as exc:
            raise RefusedError(unknown(reference_id, exc)) from None
        return self._operation(referent, what, path)(*args, **kwargs)

    def released(self, record: CallbackRelease, sender: str | None) -> None:
        """Note that another peer needs objects no more."""
        times = record.times if isinstance(record.times, list) else []
        for reference_id, count in zip(record.ids, times, strict=False):
            self.given.release(reference_id, sender, count)
        self._unwatch(sender)

    # Peers that are gone, and the end

    def _watch(self, peer: str | None) -> None:
        if peer not in self._holders:
            self._holders.add(peer)
            self._dependencies.add(peer, "reader", self)

    def _unwatch(self, peer: str | None) -> None:
        if peer in self._holders and not self.given.held_by(peer):
            self._holders.discard(peer)
            self._dependencies.remove(peer, "reader", self)

    def peer_gone(self, peer: str | None, role: Role) -> None:
        """Forget what is open with a peer that is gone."""
        if role == "source":
            self.holding.lose_owner(peer)
        else:
            self.given.lose_peer(peer)
            self._unwatch(peer)

    def close(self) -> None:
        """Tell others what ends with this side: what they use of it, and what it holds of them."""
        ended = DeliveryError("the peer that has the object ended meanwhile")
        for answering in [*self._running]:
            answering.refuse(ended)
        self.holding.close()

    def lose(self) -> None:
        """Forget all, because the link is gone."""
        self.given.lose()
        self.holding.lose()


class PassedArguments:
    """The arguments of a call that passes something by reference, as they travel.

    :ivar args: by position; ``None`` of a ``set``
    :ivar kwargs: by name
    :ivar value: of a ``set``
    """

    __slots__ = ("_passing", "_references", "args", "kwargs", "value")

    def __init__(
        self,
        references: References,
        passing: Passing,
        args: list[Any] | None,
        kwargs: dict[str, Any],
        value: Any,
    ) -> None:
        self._references = references
        self._passing = passing
        self.args: list[Any] | None = args
        self.kwargs: dict[str, Any] = kwargs
        self.value: Any = value

    @property
    def to(self) -> str | None:
        """Whom the call is for: if an object is passed back, who has it."""
        return _known(self._passing.to)

    def begin(self) -> bool:
        """Begin, and return true, if anything is passed; otherwise `end` isn't to be called."""
        values = (*(self.args or ()), *self.kwargs.values(), self.value)
        if not any(value.__class__ is Packed for value in values):
            return False
        self._references.begin(self._passing)
        return True

    def answered(self, peer: str | None) -> None:
        """Note that a peer has answered: it has what it was passed, until it releases that."""
        self._references.given.answered(self._passing, peer)

    def end(self) -> None:
        """Note that the call is over."""
        self._references.end(self._passing)


def _known(to: str | None) -> str | None:
    return None if to == ANYBODY else to
