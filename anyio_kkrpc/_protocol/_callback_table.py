"""The functions of this side that others may call, and those of others that are called here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from msgspec import UNSET

from ._ahead import Ahead
from ._calls import Call
from ._dependencies import Dependencies
from ._errors import ProtocolError
from ._events import (
    Answer,
    CallbackInvoked,
    CallbackRan,
    CallbacksReleased,
    Event,
    ReferencesReleased,
    ReferenceUsed,
)
from ._exports import Exports
from ._records import CallbackCall, CallbackProgress, CallbackRelease, Reply, Request
from ._values import Packed, is_callback, is_stream, pack_argument, unpack_argument


class Callbacks:
    """The tables of both kinds.

    :param new_id: makes ids
    :param dependencies: counts the peers that have functions which are called here
    :param calls: the calls of this side that have no answer yet
    :ivar exports: the functions of this side
    :ivar dependencies: as given
    :ivar ignored: records that came too late to matter
    """

    def __init__(
        self,
        new_id: Callable[[], str],
        dependencies: Dependencies,
        calls: dict[str, Call],
    ) -> None:
        self._new_id = new_id
        self.dependencies: Dependencies = dependencies
        self._calls = calls
        self.exports: Exports = Exports(new_id)
        # Those of which an invocation has asked when it has run.
        self._asking: dict[tuple[str | None, str], Ahead] = {}
        self._asked: dict[str, Call] = {}
        self._ignored = 0

    @property
    def ignored(self) -> int:
        """How many records came too late to matter."""
        return self._ignored + self.exports.ignored

    # Functions of other peers

    def begin(self, request: Request, owner: str | None) -> Ahead | None:
        """Begin to count for a function that came with a request, if its owner wants that."""
        if request.cw is UNSET:
            return None
        ahead = Ahead(self._new_id(), owner, request.cw)
        ahead.results = request.cr is True
        return ahead

    def ask(self, record: CallbackCall, owner: str | None, budget: int | None) -> Call:
        """Enter a call of a function of another peer whose result is wanted.

        :param record: see `call`; it says so then
        :param budget: milliseconds until the caller gives up
        """
        call = Call(self._new_id(), owner)
        record.r = call.id
        if budget is not None:
            record.d = budget
        self._calls[call.id] = self._asked[call.id] = call
        self.dependencies.add(owner, "reader", call)
        return call

    def end_ask(self, call: Call) -> None:
        """Note that nobody waits for that any more."""
        if self._asked.pop(call.id, None) is not None:
            self.dependencies.remove(call.recipient, "reader", call)

    def asked_of(self, owner: str | None) -> list[Call]:
        """Return the calls of one peer's functions whose results are waited for."""
        return [call for call in self._asked.values() if call.recipient == owner]

    def all_asked(self) -> list[Call]:
        """Return the calls of functions whose results are waited for."""
        return list(self._asked.values())

    def call(
        self,
        callback_id: str,
        args: Iterable[Any],
        kwargs: dict[str, Any] | None,
        request_id: str | None = None,
        path: list[str] | None = None,
    ) -> CallbackCall:
        """Return the record that calls a function of another peer.

        :param request_id: of the request that it came with, where several peers may have got that
        :param path: see `CallbackCall.p`
        :raises TypeError: if an argument is a function or a stream
        """
        refuse: Callable[[Any], None] = _no_export
        record = CallbackCall(callback_id, [pack_argument(arg, refuse) for arg in args])
        if kwargs:
            record.k = {name: pack_argument(arg, refuse) for name, arg in kwargs.items()}
        if request_id is not None:
            record.q = request_id
        if path is not None:
            record.p = path
        return record

    def send(self, ahead: Ahead, record: CallbackCall, weight: int) -> int:
        """See `Ahead.send`; what asks is entered in the table."""
        number = ahead.send(record, weight)
        key = (ahead.owner, ahead.id)
        if record.i is not UNSET and key not in self._asking:
            self._asking[key] = ahead
            self.dependencies.add(ahead.owner, "reader", ahead)
        return number

    def end(self, ahead: Ahead) -> None:
        """Forget a function: it isn't called any more."""
        if self._asking.pop((ahead.owner, ahead.id), None) is not None:
            self.dependencies.remove(ahead.owner, "reader", ahead)

    def called_of(self, owner: str | None) -> list[Ahead]:
        """Return the functions of one peer of which answers may come."""
        return [ahead for ahead in self._asking.values() if ahead.owner == owner]

    def doubt(self) -> list[Ahead]:
        """Note that invocations, or word of them, may be lost; return the functions concerned."""
        doubted = list(self._asking.values())
        for ahead in doubted:
            ahead.doubt()
        return doubted

    # What comes in

    def receive_call(self, record: CallbackCall, sender: str | None) -> Event | None:
        """Take the call of a function of this side."""
        if record.p is not UNSET:
            return ReferenceUsed(record, *_unpacked(record), sender)
        export, progress = self.exports.use(record, sender), None
        if record.f is not UNSET and record.i is not UNSET:
            progress = CallbackProgress(record.f, record.i)
        if export is None:
            self._ignored += 1
            if record.r is not UNSET:
                return Answer(Reply(record.r, e=_gone()), sender)
            if progress is None:
                return None
            progress.gone = True
            return Answer(progress, sender)
        args: list[Any] = record.a
        kwargs: dict[str, Any] = {}
        if record.k is not UNSET or dict in map(type, args):
            args, kwargs = _unpacked(record)
            if record.r is UNSET and Packed in map(type, (*args, *kwargs.values())):
                raise ProtocolError("references came with an invocation that has no result")
        invoked = CallbackInvoked(export, args, kwargs, sender, progress)
        if record.r is not UNSET:
            invoked.asked = record.r
            invoked.budget = None if record.d is UNSET else record.d
        return invoked

    def receive_progress(self, record: CallbackProgress, sender: str | None) -> Event | None:
        """Take word of how many calls of another peer's function have run."""
        ahead = self._asking.get((sender, record.id))
        if ahead is None:
            self._ignored += 1
            return None
        ahead.ran(record.n)
        return CallbackRan(ahead, record.gone is True)

    def receive_release(self, record: CallbackRelease, sender: str | None) -> Event | None:
        """Take word of functions of this side that won't be called again."""
        if record.times is not UNSET:
            return ReferencesReleased(record, sender)
        released = self.exports.release(record, sender, self._calls)
        return CallbacksReleased(released) if released else None

    # The end

    def lose(self) -> list[Ahead]:
        """Forget the functions of others, because the link is gone; return those of the table."""
        lost = list(self._asking.values())
        for ahead in lost:
            self.end(ahead)
        for call in self.all_asked():
            self.end_ask(call)
        return lost


def _gone() -> dict[str, Any]:
    why = "the function isn't there any more, and did not run"
    return {"n": "DeliveryError", "m": why, "rpc_error": "delivery"}


def _unpacked(record: CallbackCall) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments; with references they are `Packed` still."""
    args = [unpack_argument(item, _refuse, _refuse) for item in record.a]
    kwargs: dict[str, Any] = {}
    if record.k is not UNSET:
        kwargs = {k: unpack_argument(v, _refuse, _refuse) for k, v in record.k.items()}
    return args, kwargs


def _no_export(value: Any) -> None:
    if is_stream(value) or is_callback(value):
        raise TypeError("a callback takes values, not further callbacks or streams")


def _refuse(identifier: str) -> Any:
    raise ProtocolError("a callback was called with a callback or a stream")
